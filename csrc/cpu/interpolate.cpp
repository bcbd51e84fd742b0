// interpolate.cpp: x_t = sigma x0 + alpha x1 and target = dsigma x0 + dalpha x1 in one pass, x0 given or drawn in place.
//
// Bytes an element (float): 12 with drawn noise (read x1, write x_t and target), 16 with x0 given. The coefficients of a
// sample are computed in double from its t and rounded to the compute type. Outputs may be the memory of x1 or x0.
#include <initializer_list>

#include "cpu/cpu_ops.h"
#include "cpu/noise.h"
#include "cpu/tiles.h"
#include "rfk/paths.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

enum { kXt, kTarget, kX1, kX0, kX0Out, kOperands };

template <class C>
struct PointCoefficients {
  C alpha, sigma, dalpha, dsigma;
};

template <class C>
struct Scratch {
  alignas(64) C x1[kTile];
  alignas(64) C x0[kTile];
  alignas(64) C xt[kTile];
  alignas(64) C target[kTile];
  alignas(64) float noise[kTile];
  C alpha[kTile], sigma[kTile], dalpha[kTile], dsigma[kTile];
};

template <class C, class S>
void points(int n, const S* x1, const S* x0, PointCoefficients<C> c, S* xt, S* target) {
  RFK_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const C source = get(x0[i]), data = get(x1[i]);
    put(xt + i, c.sigma * source + c.alpha * data);
    put(target + i, c.dsigma * source + c.dalpha * data);
  }
}

template <class C>
void points_each(int n, const C* x1, const C* x0, const Scratch<C>& s, C* xt, C* target) {
  RFK_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const C source = x0[i], data = x1[i];
    xt[i] = s.sigma[i] * source + s.alpha[i] * data;
    target[i] = s.dsigma[i] * source + s.dalpha[i] * data;
  }
}

template <class C>
class Interpolation {
 public:
  explicit Interpolation(const InterpolateArguments& arguments) : a_(arguments) {
    const rfk_tensor* tensors[kOperands] = {a_.xt, a_.target, a_.x1, a_.x0, a_.x0_out};
    space_ = make_space(tensors, kOperands, a_.x0 == nullptr, operands_);
    source_ = {a_.noise, RFK_NORMAL, 24, space_.per_sample};
    if (a_.path == RFK_PATH_CUSTOM) {
      for (const rfk_scalar& scalar : a_.custom) varies_ = varies_ || varies(scalar);
    } else {
      varies_ = varies(a_.t);
    }
    each_ = varies_ && space_.per_sample < kSmallSample;
    bfloat16_ = a_.x0 != nullptr && a_.x0_out == nullptr && !each_ && sizeof(C) == sizeof(float);
    for (int k : {kXt, kTarget, kX1, kX0}) {
      bfloat16_ = bfloat16_ && operands_[k].dense && operands_[k].dtype == RFK_BFLOAT16;
    }
    for (int k : {kXt, kTarget, kX0Out}) stream_[k] = streams(space_, operands_[k], operands_ + kX1, 2);
  }

  void run() const {
    if (space_.numel == 0) return;
    parallel_ranges(space_.numel, kTile, space_.numel, [&](int64_t begin, int64_t end) {
      Scratch<C> scratch;
      PointCoefficients<C> c = varies_ ? PointCoefficients<C>{} : coefficients(0);
      int64_t known = -1;
      for_tiles(space_, begin, end, varies_ && !each_, [&](int64_t start, int n, int64_t sample) {
        if (varies_ && !each_ && sample != known) {
          c = coefficients(sample);
          known = sample;
        }
        tile(start, n, c, scratch);
      });
      stream_fence();
    });
  }

 private:
  PointCoefficients<C> coefficients(int64_t sample) const {
    if (a_.path == RFK_PATH_CUSTOM) {
      return {scalar_at<C>(a_.custom[0], sample), scalar_at<C>(a_.custom[1], sample),
              scalar_at<C>(a_.custom[2], sample), scalar_at<C>(a_.custom[3], sample)};
    }
    const PathCoefficients p = path_coefficients(a_.path, static_cast<double>(scalar_at<C>(a_.t, sample)));
    return {static_cast<C>(p.alpha), static_cast<C>(p.sigma), static_cast<C>(p.dalpha), static_cast<C>(p.dsigma)};
  }

  void expand(int64_t start, int n, Scratch<C>& s) const {
    int64_t sample = start / space_.per_sample, left = space_.per_sample - start % space_.per_sample;
    for (int i = 0; i < n;) {
      const int run = left < n - i ? static_cast<int>(left) : n - i;
      const PointCoefficients<C> c = coefficients(sample);
      for (int j = i; j < i + run; ++j) {
        s.alpha[j] = c.alpha;
        s.sigma[j] = c.sigma;
        s.dalpha[j] = c.dalpha;
        s.dsigma[j] = c.dsigma;
      }
      i += run;
      ++sample;
      left = space_.per_sample;
    }
  }

  void tile(int64_t start, int n, const PointCoefficients<C>& c, Scratch<C>& s) const {
    if constexpr (sizeof(C) == sizeof(float)) {
      if (bfloat16_ && !stream_[kXt]) {  // no buffers
        const auto place = [&](int k) { return reinterpret_cast<Bfloat16*>(operands_[k].data) + start; };
        return points<float, Bfloat16>(n, place(kX1), place(kX0), c, place(kXt), place(kTarget));
      }
    }
    const C* x1 = load_tile(space_, operands_[kX1], start, n, s.x1);
    const C* x0 = s.x0;
    if (a_.x0 != nullptr) {
      x0 = load_tile(space_, operands_[kX0], start, n, s.x0);
    } else {
      source_.fill(start, n, s.noise);
      for (int i = 0; i < n; ++i) s.x0[i] = static_cast<C>(s.noise[i]);
    }
    if (a_.x0_out != nullptr) store_tile(space_, operands_[kX0Out], start, n, stream_[kX0Out], x0);
    C* xt = output_tile(operands_[kXt], start, stream_[kXt], s.xt);
    C* target = output_tile(operands_[kTarget], start, stream_[kTarget], s.target);
    if (each_) {
      expand(start, n, s);
      points_each(n, x1, x0, s, xt, target);
    } else {
      points<C, C>(n, x1, x0, c, xt, target);
    }
    store_tile(space_, operands_[kXt], start, n, stream_[kXt], xt);
    store_tile(space_, operands_[kTarget], start, n, stream_[kTarget], target);
  }

  const InterpolateArguments& a_;
  Operand operands_[kOperands];
  Space space_;
  NoiseSource source_;
  bool varies_ = false, each_ = false, bfloat16_ = false, stream_[kOperands] = {};
};

}  // namespace

void interpolate(const InterpolateArguments& arguments) {
  if (arguments.x1->dtype == RFK_FLOAT64) {
    Interpolation<double>(arguments).run();
  } else {
    Interpolation<float>(arguments).run();
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
