// flow_loss.cpp: per-sample losses of r = prediction - target and their gradient.
//
// Bytes an element (float): 12 (read prediction and target, write the gradient); the target may be rebuilt from x1 and a
// drawn x0. Sums run over fixed blocks of RFK_LOSS_BLOCK elements of a sample in kLanes partial sums, the blocks of a
// sample are added in order, in double: the result does not depend on threads or the instruction set.
// mse and the element-wise kind take one pass. pseudo_huber needs the sum of a sample before its gradient: a second pass,
// by the same thread right after the first where samples are many (the sample is then in the cache).
#include <cmath>

#include "cpu/cpu_ops.h"
#include "cpu/noise.h"
#include "cpu/tiles.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

enum { kPrediction, kTarget, kX0, kX1, kGrad, kOperands };
constexpr int kLanes = 16;

template <class C>
inline C root(C value) {
  return std::sqrt(value);
}

// Adds the squares of r to 16 partial sums, element i to lane i % 16.
template <class C>
void add_squares(int n, const C* r, C* lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += r[i + l] * r[i + l];
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += r[i + l] * r[i + l];
}

// r becomes the gradient r / sqrt(r^2 + c^2) * scale (where asked for), the losses sqrt(r^2 + c^2) - c are added to lanes.
template <class C>
void huber_elements(int n, const C* r, C c, C* roots, C* lanes) {
  const C square = c * c;
  for (int i = 0; i < n; ++i) roots[i] = root(r[i] * r[i] + square);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += roots[i + l] - c;
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += roots[i + l] - c;
}

template <class C>
double total(const C* lanes) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

template <class C>
struct Scratch {
  alignas(64) C prediction[kTile];
  alignas(64) C target[kTile];
  alignas(64) C x0[kTile];
  alignas(64) C residual[kTile];
  alignas(64) C grad[kTile];
  alignas(64) float noise[kTile];
};

template <class C>
class Loss {
 public:
  explicit Loss(const LossArguments& arguments) : a_(arguments) {
    const rfk_tensor* tensors[kOperands] = {a_.prediction, a_.target, a_.x0, a_.x1, a_.grad};
    const bool drawn = a_.target == nullptr && a_.x0 == nullptr;
    space_ = make_space(tensors, kOperands, drawn, operands_);
    source_ = {a_.noise, RFK_NORMAL, 24, space_.per_sample};
    blocks_ = (space_.per_sample + RFK_LOSS_BLOCK - 1) / RFK_LOSS_BLOCK;
    stream_ = streams(space_, operands_[kGrad], operands_, kGrad);
  }

  void run() const {
    const int64_t samples = space_.samples, units = samples * blocks_;
    const bool two_passes = a_.kind == RFK_LOSS_PSEUDO_HUBER && a_.grad != nullptr;
    if (two_passes && samples >= max_threads()) {
      parallel_ranges(samples, 1, space_.numel, [&](int64_t begin, int64_t end) {
        Scratch<C> scratch;
        for (int64_t sample = begin; sample < end; ++sample) {
          for (int64_t block = 0; block < blocks_; ++block) first_pass(sample, block, scratch);
          const double sum = finish(sample);
          for (int64_t block = 0; block < blocks_; ++block) second_pass(sample, block, sum, scratch);
        }
        stream_fence();
      });
      return;
    }
    parallel_ranges(units, 1, space_.numel, [&](int64_t begin, int64_t end) {
      Scratch<C> scratch;
      for (int64_t unit = begin; unit < end; ++unit) first_pass(unit / blocks_, unit % blocks_, scratch);
      stream_fence();
    });
    for (int64_t sample = 0; sample < samples; ++sample) finish(sample);
    if (two_passes) {
      parallel_ranges(units, 1, space_.numel, [&](int64_t begin, int64_t end) {
        Scratch<C> scratch;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t sample = unit / blocks_;
          second_pass(sample, unit % blocks_, sum_of(sample), scratch);
        }
        stream_fence();
      });
    }
  }

 private:
  C elements() const { return static_cast<C>(space_.per_sample); }

  // The factor that weight and reduction put on a sample's gradient.
  C scale(int64_t sample) const {
    const C weight = a_.weight != nullptr ? scalar_at<C>(*a_.weight, sample) : C(1);
    return weight * static_cast<C>(a_.grad_scale);
  }

  template <class Body>
  void tiles(int64_t sample, int64_t block, const Body& body) const {
    const int64_t begin = sample * space_.per_sample + block * RFK_LOSS_BLOCK;
    int64_t end = begin + RFK_LOSS_BLOCK;
    if (end > (sample + 1) * space_.per_sample) end = (sample + 1) * space_.per_sample;
    for_tiles(space_, begin, end, false, [&](int64_t start, int n, int64_t) { body(start, n); });
  }

  const C* residual(int64_t start, int n, Scratch<C>& s) const {
    const C* prediction = load_tile(space_, operands_[kPrediction], start, n, s.prediction);
    if (a_.target != nullptr) {
      const C* target = load_tile(space_, operands_[kTarget], start, n, s.target);
      for (int i = 0; i < n; ++i) s.residual[i] = prediction[i] - target[i];
      return s.residual;
    }
    const C* x1 = load_tile(space_, operands_[kX1], start, n, s.target);
    const C* x0 = s.x0;
    if (a_.x0 != nullptr) {
      x0 = load_tile(space_, operands_[kX0], start, n, s.x0);
    } else {
      source_.fill(start, n, s.noise);
      for (int i = 0; i < n; ++i) s.x0[i] = static_cast<C>(s.noise[i]);
    }
    for (int i = 0; i < n; ++i) s.residual[i] = prediction[i] - (x1[i] - x0[i]);
    return s.residual;
  }

  void scale_into_grad(int64_t start, int n, const C* r, C factor, Scratch<C>& s) const {
    C* grad = output_tile(operands_[kGrad], start, stream_, s.grad);
    RFK_INDEPENDENT
    for (int i = 0; i < n; ++i) grad[i] = r[i] * factor;
    store_tile(space_, operands_[kGrad], start, n, stream_, grad);
  }

  void first_pass(int64_t sample, int64_t block, Scratch<C>& s) const {
    C lanes[kLanes] = {};
    const C mse_factor = (C(2) / elements()) * scale(sample);
    const C huber_factor = scale(sample) / elements(), c = static_cast<C>(a_.c);
    tiles(sample, block, [&](int64_t start, int n) {
      const C* r = residual(start, n, s);
      if (a_.kind == RFK_LOSS_PSEUDO_HUBER_ELEMENTWISE) {
        huber_elements(n, r, c, s.x0, lanes);
        if (a_.grad == nullptr) return;
        C* grad = output_tile(operands_[kGrad], start, stream_, s.grad);
        RFK_INDEPENDENT
        for (int i = 0; i < n; ++i) grad[i] = (r[i] / s.x0[i]) * huber_factor;
        store_tile(space_, operands_[kGrad], start, n, stream_, grad);
      } else {
        add_squares(n, r, lanes);
        if (a_.grad != nullptr && a_.kind == RFK_LOSS_MSE) scale_into_grad(start, n, r, mse_factor, s);
      }
    });
    a_.workspace[sample * blocks_ + block] = total(lanes);
  }

  double sum_of(int64_t sample) const {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks_; ++block) sum += a_.workspace[sample * blocks_ + block];
    return sum;
  }

  // Writes the loss of a sample from its sum, which it returns.
  double finish(int64_t sample) const {
    const double sum = sum_of(sample), d = static_cast<double>(space_.per_sample);
    const double loss = a_.kind == RFK_LOSS_PSEUDO_HUBER ? (std::sqrt(sum + a_.c * a_.c) - a_.c) / d : sum / d;
    static_cast<C*>(a_.losses->data)[sample * a_.losses->strides[0]] = static_cast<C>(loss);
    return sum;
  }

  void second_pass(int64_t sample, int64_t block, double sum, Scratch<C>& s) const {
    const double d = static_cast<double>(space_.per_sample);
    const C factor = static_cast<C>(1.0 / (d * std::sqrt(sum + a_.c * a_.c))) * scale(sample);
    tiles(sample, block, [&](int64_t start, int n) {
      scale_into_grad(start, n, residual(start, n, s), factor, s);
    });
  }

  const LossArguments& a_;
  Operand operands_[kOperands];
  Space space_;
  NoiseSource source_;
  int64_t blocks_ = 0;
  bool stream_ = false;
};

}  // namespace

void flow_loss(const LossArguments& arguments) {
  if (arguments.prediction->dtype == RFK_FLOAT64) {
    Loss<double>(arguments).run();
  } else {
    Loss<float>(arguments).run();
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
