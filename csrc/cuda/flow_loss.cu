// flow_loss.cu: per-sample losses of r = prediction - target and their gradient; deterministic, without atomics.
//
// target given, or x1 - x0 with x0 given or drawn. Of a sample with d elements, S = sum r^2, scale = weight grad_scale:
//   mse           S / d                          grad = r ((2 / d) scale)
//   pseudo_huber  (sqrt(S + c^2) - c) / d        grad = r (C(1 / (d sqrt(S + c^2))) scale)
//   elementwise   sum(sqrt(r^2 + c^2) - c) / d   grad = (r / sqrt(r^2 + c^2)) (scale / d)
//
// A segment is a run of RFK_LOSS_BLOCK elements of one sample; its sum is fixed: 16 terms a thread in C, threads and then
// segments in double, always in the same order. A NaN stays in its sample.
// Launches: one where a sample is one segment (pseudo_huber then keeps r in registers between sum and gradient); else the
// segments' sums with the gradient go first and loss_finish adds them; pseudo_huber needs S before its gradient, so a third
// launch reads the operands again. Bytes an element in float32 with gradient: 12 (target given or x1 with drawn noise), 16
// with x1 and x0; pseudo_huber over several segments 20.
//
// loss_dense serves contiguous operands whose samples start aligned (d a multiple of the pack) and have 256 elements or
// more; loss_strided anything else, with 1 to 32 lanes a segment for small samples, a whole block for large ones.
#include "cuda/common.cuh"

namespace rfk {
namespace cuda {
namespace {

enum { kPrediction, kTarget, kX0, kGrad, kUsed };
constexpr int kPerThread = RFK_LOSS_BLOCK / kThreads;
constexpr int64_t kDenseFrom = 256;  // elements of a sample

template <class C>
struct Loss {
  Operand prediction, target, x0, grad;  // target is x1 where `rebuilt`
  int32_t rebuilt, drawn;
  int32_t kind, second_pass;
  int32_t group;  // threads a segment in loss_strided
  C c, grad_scale;
  double c_double;
  int32_t weighted;
  Scalar<C> weight;
  int64_t samples, elements, segments;  // elements and segments of one sample
  C* losses;
  int64_t losses_stride;
  double* workspace;
  Noise noise;

  __device__ __forceinline__ C scale(int64_t sample) const {
    return (weighted ? weight.at(sample) : static_cast<C>(1)) * grad_scale;
  }
  // What the gradient of the kinds that need no sum is multiplied by.
  __device__ __forceinline__ C direct_factor(int64_t sample) const {
    const C d = static_cast<C>(elements);
    return kind == RFK_LOSS_MSE ? (static_cast<C>(2) / d) * scale(sample) : scale(sample) / d;
  }
  __device__ __forceinline__ double norm(double sum) const { return sqrt(sum + c_double * c_double); }
  __device__ __forceinline__ C norm_factor(int64_t sample, double sum) const {
    return static_cast<C>(1.0 / (static_cast<double>(elements) * norm(sum))) * scale(sample);
  }
  __device__ __forceinline__ void write_loss(int64_t sample, double sum) const {
    const double d = static_cast<double>(elements);  // none: 0 / 0, NaN, as a mean over nothing
    const double loss = kind == RFK_LOSS_PSEUDO_HUBER ? (norm(sum) - c_double) / d : sum / d;
    losses[sample * losses_stride] = static_cast<C>(loss);
  }
};

template <class C>
struct StridedLoss {
  Loss<C> loss;
  Space space;  // of one sample; operands: prediction, target or x1, x0, grad
  int64_t sample_stride[kUsed];
};

// Sum over the block; every thread gets it. `parts` is used once in a kernel.
__device__ __forceinline__ double block_sum(double value, double* parts) {
  const int thread = static_cast<int>(threadIdx.x);
  value = lanes_sum(value, 32);
  if (thread % 32 == 0) parts[thread / 32] = value;
  __syncthreads();
  double total = parts[0];
  for (int i = 1; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// The summand of a residual; root_out receives sqrt(r^2 + c^2) of the element-wise kind.
template <class C>
__device__ __forceinline__ C summand(const Loss<C>& p, C r, C& root_out) {
  if (p.kind != RFK_LOSS_PSEUDO_HUBER_ELEMENTWISE) return r * r;
  root_out = root(r * r + p.c * p.c);
  return root_out - p.c;
}

// P: dtype of prediction and gradient; T: of target, x1 and x0.
template <class C, int P, int T, int N, bool kNoise>
__global__ void __launch_bounds__(kThreads, P == kAny ? 2 : 4) loss_dense(const __grid_constant__ Loss<C> p) {
  constexpr int kUnroll = kPerThread / N;
  __shared__ double parts[kThreads / 32];
  __shared__ C shared_factor;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t unit = static_cast<int64_t>(blockIdx.x);
  const int64_t sample = p.segments == 1 ? unit : unit / p.segments;
  const int64_t segment = unit - sample * p.segments;
  const int64_t first = segment * RFK_LOSS_BLOCK;  // in the sample
  const int64_t left = p.elements - first;
  const int count = left < RFK_LOSS_BLOCK ? static_cast<int>(left) : RFK_LOSS_BLOCK;
  const int64_t base = sample * p.elements + first;

  bool inside[kUnroll];
  Raw<P, N> raw_p[kUnroll];
  Raw<T, N> raw_t[kUnroll], raw_x0[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (u * kThreads + thread) * N;
    inside[u] = at < count;
    clear_pack(raw_p[u]);
    clear_pack(raw_t[u]);
    clear_pack(raw_x0[u]);
    if (!inside[u]) continue;
    load_pack<P, N>(p.prediction.data, p.prediction.dtype, base + at, raw_p[u]);
    load_pack<T, N>(p.target.data, p.target.dtype, base + at, raw_t[u]);
    if (!kNoise && p.rebuilt) load_pack<T, N>(p.x0.data, p.x0.dtype, base + at, raw_x0[u]);
  }

  C r[kUnroll][N];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    C target[N];
    unpack<P, N>(raw_p[u], p.prediction.dtype, r[u]);
    unpack<T, N>(raw_t[u], p.target.dtype, target);
    if constexpr (kNoise) {
      float z[N];
      // d is a multiple of the pack, so a pack begins a counter. Outside the segment the numbers are not used.
      const int64_t at = (u * kThreads + thread) * N;
      const int64_t index = p.noise.per_sample ? first + at : base + at;
      draw_run<N, false>(p.noise, p.noise.per_sample ? sample : 0, index, z);
#pragma unroll
      for (int j = 0; j < N; ++j) target[j] = target[j] - static_cast<C>(z[j]);
    } else if (p.rebuilt) {
      C x0[N];
      unpack<T, N>(raw_x0[u], p.x0.dtype, x0);
#pragma unroll
      for (int j = 0; j < N; ++j) target[j] = target[j] - x0[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) r[u][j] = r[u][j] - target[j];
  }

  const bool has_grad = p.grad.data != nullptr;
  if (!p.second_pass) {
    const bool direct = has_grad && p.kind != RFK_LOSS_PSEUDO_HUBER;
    const C factor = direct ? p.direct_factor(sample) : static_cast<C>(0);
    C sum = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!inside[u]) continue;
      C grad[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        C norm = 1;
        sum += summand(p, r[u][j], norm);
        grad[j] = p.kind == RFK_LOSS_MSE ? r[u][j] * factor : (r[u][j] / norm) * factor;
      }
      if (direct) store_pack<P, N>(p.grad.data, p.grad.dtype, base + (u * kThreads + thread) * N, grad);
    }
    const double total = block_sum(static_cast<double>(sum), parts);
    if (p.segments > 1) {
      if (thread == 0) p.workspace[unit] = total;
      return;
    }
    if (thread == 0) p.write_loss(sample, total);
    if (!has_grad || direct) return;
    if (thread == 0) shared_factor = p.norm_factor(sample, total);
  } else if (thread == 0) {
    shared_factor = p.norm_factor(sample, p.workspace[sample * p.segments]);
  }
  __syncthreads();
  const C factor = shared_factor;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!inside[u]) continue;
    C grad[N];
#pragma unroll
    for (int j = 0; j < N; ++j) grad[j] = r[u][j] * factor;
    store_pack<P, N>(p.grad.data, p.grad.dtype, base + (u * kThreads + thread) * N, grad);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) loss_strided(const __grid_constant__ StridedLoss<C> q) {
  __shared__ double parts[kThreads / 32];
  __shared__ C shared_factor;
  const Loss<C>& p = q.loss;
  const int thread = static_cast<int>(threadIdx.x);
  const bool whole_block = p.group == kThreads;
  const int lane = thread & (p.group - 1);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / p.group) + thread / p.group;
  const bool valid = unit < p.samples * p.segments;
  const int64_t sample = !valid ? 0 : p.segments == 1 ? unit : unit / p.segments;
  const int64_t first = valid ? (unit - sample * p.segments) * RFK_LOSS_BLOCK : 0;
  const int64_t left = p.elements - first;
  const int count = !valid ? 0 : left < RFK_LOSS_BLOCK ? static_cast<int>(left) : RFK_LOSS_BLOCK;
  const bool has_grad = p.grad.data != nullptr;
  NumberCache<false> numbers;

  // body(r, offset of grad) for this thread's elements: four consecutive ones where they share a Philox counter.
  const auto for_residuals = [&](const auto& body) {
#pragma unroll 1
    for (int start = 0; start < count; start += 4 * p.group) {
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int at = start + (p.drawn ? 4 * lane + j : lane + j * p.group);
        if (at >= count) break;
        const int64_t element = first + at;
        int64_t place[kUsed];
        offsets(q.space, kUsed, element, place);
#pragma unroll
        for (int k = 0; k < kUsed; ++k) place[k] += sample * q.sample_stride[k];
        C target = load_element<C>(p.target.data, p.target.dtype, place[kTarget]);
        if (p.drawn) {
          target = target - static_cast<C>(p.noise.per_sample
                                               ? numbers.at(p.noise, sample, element)
                                               : numbers.at(p.noise, 0, sample * p.elements + element));
        } else if (p.rebuilt) {
          target = target - load_element<C>(p.x0.data, p.x0.dtype, place[kX0]);
        }
        body(load_element<C>(p.prediction.data, p.prediction.dtype, place[kPrediction]) - target, place[kGrad]);
      }
    }
  };

  C factor = 0;
  if (!p.second_pass) {
    const bool direct = has_grad && p.kind != RFK_LOSS_PSEUDO_HUBER;
    const C direct_factor = direct && valid ? p.direct_factor(sample) : static_cast<C>(0);
    C sum = 0;
    for_residuals([&](C r, int64_t place) {
      C norm = 1;
      sum += summand(p, r, norm);
      if (!direct) return;
      const C grad = p.kind == RFK_LOSS_MSE ? r * direct_factor : (r / norm) * direct_factor;
      store_element(p.grad.data, p.grad.dtype, place, grad);
    });
    const double total = whole_block ? block_sum(static_cast<double>(sum), parts)
                                     : lanes_sum(static_cast<double>(sum), p.group);
    const bool leads = lane == 0 && valid;
    if (p.segments > 1) {
      if (leads) p.workspace[unit] = total;
      return;
    }
    if (leads) p.write_loss(sample, total);
    if (!has_grad || direct) return;
    if (leads) factor = p.norm_factor(sample, total);
  } else if (lane == 0 && valid) {
    factor = p.norm_factor(sample, p.workspace[sample * p.segments]);
  }
  if (whole_block) {
    if (thread == 0) shared_factor = factor;
    __syncthreads();
    factor = shared_factor;
  } else {
    factor = __shfl_sync(0xffffffffu, factor, 0, p.group);
  }
  for_residuals([&](C r, int64_t place) { store_element(p.grad.data, p.grad.dtype, place, r * factor); });
}

// Adds the segments of a sample, one block each: thread t takes segments t, t + 256, ... The sum stays in the sample's
// first workspace entry for the second pass.
template <class C>
__global__ void __launch_bounds__(kThreads) loss_finish(const __grid_constant__ Loss<C> p) {
  __shared__ double parts[kThreads / 32];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t sample = static_cast<int64_t>(blockIdx.x);
  double sum = 0.0;
  for (int64_t k = thread; k < p.segments; k += kThreads) sum += p.workspace[sample * p.segments + k];
  sum = block_sum(sum, parts);  // behind its barrier every entry has been read
  if (thread != 0) return;
  p.write_loss(sample, sum);
  if (p.segments > 0) p.workspace[sample * p.segments] = sum;
}

// One or both passes of a kernel with the sums between them.
template <class C, class Parameters>
void run_passes(Launcher& launcher, void (*kernel)(Parameters), Parameters& parameters, Loss<C>& loss, int64_t blocks) {
  launcher.run(kernel, parameters, blocks);
  if (loss.segments == 1) return;
  launcher.run(loss_finish<C>, loss, loss.samples);
  if (loss.kind != RFK_LOSS_PSEUDO_HUBER || loss.grad.data == nullptr) return;
  loss.second_pass = 1;
  launcher.run(kernel, parameters, blocks);
}

template <class C, int P, int T, int N>
void run_dense(Launcher& launcher, Loss<C>& loss) {
  const int64_t blocks = loss.samples * loss.segments;
  if (loss.drawn) {
    run_passes<C>(launcher, loss_dense<C, P, T, N, true>, loss, loss, blocks);
  } else {
    run_passes<C>(launcher, loss_dense<C, P, T, N, false>, loss, loss, blocks);
  }
}

template <class C>
rfk_status run(const rfk_device& device, const rfk_tensor* const* operands, bool rebuilt, const rfk_noise* noise,
               const rfk_scalar* weight, int kind, double c, double grad_scale, const rfk_tensor& losses,
               double* workspace) {
  const rfk_tensor& prediction = *operands[kPrediction];
  const bool drawn = rebuilt && operands[kX0] == nullptr;
  StridedLoss<C> strided = {};
  Loss<C>& loss = strided.loss;
  loss.prediction = operand(operands[kPrediction]);
  loss.target = operand(operands[kTarget]);
  loss.x0 = operand(operands[kX0]);
  loss.grad = operand(operands[kGrad]);
  loss.rebuilt = rebuilt;
  loss.drawn = drawn;
  loss.kind = kind;
  loss.c = static_cast<C>(c);
  loss.grad_scale = static_cast<C>(grad_scale);
  loss.c_double = c;
  if (weight != nullptr) {
    loss.weighted = 1;
    loss.weight = scalar<C>(*weight);
  }
  strided.space = make_space(operands, kUsed, kPrediction, drawn ? Order::kLogical : Order::kAny, 1);
  for (int k = 0; k < kUsed; ++k) {
    strided.sample_stride[k] = operands[k] == nullptr ? 0 : operands[k]->strides[0];
  }
  loss.samples = prediction.shape[0];
  loss.elements = strided.space.numel;
  loss.segments = blocks_for(loss.elements, RFK_LOSS_BLOCK);
  loss.losses = static_cast<C*>(losses.data);
  loss.losses_stride = losses.ndim > 0 ? losses.strides[0] : 1;
  loss.workspace = workspace;
  if (drawn) loss.noise = noise_source(*noise);

  Launcher launcher(device, RFK_OP_FLOW_LOSS);
  if (loss.samples == 0) return launcher.status();
  if (loss.elements == 0) {
    launcher.run(loss_finish<C>, loss, loss.samples);
    return launcher.status();
  }

  const rfk_tensor* outer[2] = {operands[kPrediction], operands[kGrad]};
  const int outer_dtype = common_dtype(outer, 2), inner_dtype = common_dtype(operands + kTarget, 2);
  const bool halves = (outer_dtype == RFK_BFLOAT16 || outer_dtype == RFK_FLOAT16) && inner_dtype == outer_dtype;
  const auto fits = [&](int pack) {
    bool good = loss.elements >= kDenseFrom && loss.elements % pack == 0 &&
                packable(strided.space, operands, kUsed, pack);
    for (int k = 0; k < kUsed; ++k) {
      good = good && (operands[k] == nullptr || loss.samples == 1 || strided.sample_stride[k] == loss.elements);
    }
    return good;
  };
  const int pack = halves && fits(8) ? 8 : 4;
  if (!fits(pack)) {
    int group = 1;
    while (group < 32 && group * kPerThread < loss.elements) group *= 2;
    if (group * kPerThread < loss.elements) group = kThreads;
    loss.group = group;
    run_passes<C>(launcher, loss_strided<C>, strided, loss,
                  blocks_for(loss.samples * loss.segments, kThreads / group));
    return launcher.status();
  }
  if constexpr (sizeof(C) == 8) {
    run_dense<C, kAny, kAny, 4>(launcher, loss);
  } else if (outer_dtype == RFK_FLOAT32 && inner_dtype == RFK_FLOAT32) {
    run_dense<C, RFK_FLOAT32, RFK_FLOAT32, 4>(launcher, loss);
  } else if (pack == 8 && outer_dtype == RFK_BFLOAT16) {
    run_dense<C, RFK_BFLOAT16, RFK_BFLOAT16, 8>(launcher, loss);
  } else if (pack == 8) {
    run_dense<C, RFK_FLOAT16, RFK_FLOAT16, 8>(launcher, loss);
  } else if (outer_dtype == RFK_BFLOAT16 && inner_dtype == RFK_FLOAT32) {
    run_dense<C, RFK_BFLOAT16, RFK_FLOAT32, 4>(launcher, loss);
  } else {
    run_dense<C, kAny, kAny, 4>(launcher, loss);
  }
  return launcher.status();
}

}  // namespace

rfk_status flow_loss(const rfk_device& device, const rfk_tensor& prediction, const rfk_tensor* target,
                     const rfk_tensor* x0, const rfk_tensor* x1, const rfk_noise* noise, const rfk_scalar* weight,
                     int kind, double c, double grad_scale, const rfk_tensor& losses, const rfk_tensor* grad,
                     double* workspace) {
  const bool rebuilt = target == nullptr;
  const rfk_tensor* operands[kUsed] = {&prediction, rebuilt ? x1 : target, rebuilt ? x0 : nullptr, grad};
  const auto chosen = prediction.dtype == RFK_FLOAT64 ? run<double> : run<float>;
  return chosen(device, operands, rebuilt, noise, weight, kind, c, grad_scale, losses, workspace);
}

}  // namespace cuda
}  // namespace rfk
