// projected_update.cu: AdamP and SGDP, many parameters a launch, each as rows x columns; formulas in rfk.h and the CPU kernel.
//
// The parameter table travels as the kernel's argument, kBatch parameters of one dtype at a time: no copy to the device, so
// a step can be captured into a CUDA graph, and nothing waits for it. Launches of a batch:
//   update_moments   moments, and per segment (RFK_UPDATE_BLOCK columns of a row) the sums of g w, g^2, w^2 and u w;
//                    24 bytes an element in float32. A parameter that is never projected is done here, in AdamW's 28 bytes.
//   update_decide    one block a parameter: adds segments to rows and rows to the summary, and decides;
//   update_weights   u once more from the moments, and the weights: 16 bytes. 40 in all; an average adds 8.
// The sharded phases end after the summary, or begin with the decision.
//
// Every sum has a fixed order: 16 elements a thread in C, then threads, segments and rows in double. A segment belongs to 1 to
// 32 lanes where rows are short, else to a block. kPack elements are moved by one access where columns and memory allow it.
#include "core/update_layout.h"
#include "cuda/common.cuh"

namespace rfk {
namespace cuda {
namespace {

constexpr int kBatch = 24;
constexpr int kPerThread = RFK_UPDATE_BLOCK / kThreads;

template <class C>
struct Record {
  char* weight;
  const char* grad;
  C *first, *second;
  float* step;
  char* average;
  double *summary, *header, *sums;  // of the caller, and of the workspace (update_layout.h)
  int64_t rows, columns, total;
  int32_t average_dtype, projected;
  int32_t group;     // threads a segment
  int32_t segments;  // of a row
};

template <class C>
struct Batch {
  Record<C> parameters[kBatch];
  int32_t first_block[kBatch + 1];  // of the kernels over elements
  int32_t count;
  int32_t adam, nesterov;
  int32_t gather, decide;  // what update_decide does; update_weights runs after a decision only
  Scalar<double> learning_rate;
  double beta1, beta2, eps, weight_decay, delta, decay_ratio, average_decay;
};

// Sum over the `group` threads of a segment; every thread of the block calls it, every thread of the group gets it.
__device__ __forceinline__ double group_sum(double value, int group, double* parts) {
  if (group <= 32) return lanes_sum(value, group);
  const int thread = static_cast<int>(threadIdx.x);
  value = lanes_sum(value, 32);
  __syncthreads();  // parts of the sum before have been read
  if (thread % 32 == 0) parts[thread / 32] = value;
  __syncthreads();
  double total = parts[0];
  for (int i = 1; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// The numbers of the element formulas at this step.
template <class C>
struct Factors {
  C b1, c1, b2, c2, correction, eps;
};

// The one under way included.
template <class C>
__device__ __forceinline__ double steps_of(const Record<C>& p) {
  return static_cast<double>(*p.step) + 1.0;
}

template <class C>
__device__ __forceinline__ Factors<C> factors_of(const Batch<C>& q, double steps) {
  Factors<C> k;
  k.b1 = static_cast<C>(q.beta1);
  k.c1 = static_cast<C>(1.0 - (q.adam ? q.beta1 : q.beta2));
  k.b2 = static_cast<C>(q.beta2);
  k.c2 = static_cast<C>(1.0 - q.beta2);
  k.correction = q.adam ? static_cast<C>(1.0 / sqrt(1.0 - pow(q.beta2, steps))) : static_cast<C>(1);
  k.eps = static_cast<C>(q.eps);
  return k;
}

// What the weights are multiplied by, and the step size.
template <class C>
__device__ __forceinline__ void weight_factors(const Batch<C>& q, double steps, bool projected, double& keep, double& step) {
  const double rate = q.learning_rate.at(0);
  double decay = rate * q.weight_decay;
  if (projected) decay = decay * q.decay_ratio;
  if (!q.adam && q.weight_decay > 0.0) decay = decay / (1.0 - q.beta1);
  keep = q.weight_decay > 0.0 ? 1.0 - decay : 1.0;
  step = q.adam ? rate / (1.0 - pow(q.beta1, steps)) : rate;
}

// The update of an element from its moments.
template <class C>
__device__ __forceinline__ C update_of(const Batch<C>& q, const Factors<C>& k, C g, C m, C v) {
  if (!q.adam) return q.nesterov ? g + k.b1 * m : m;
  const C top = q.nesterov ? k.b1 * m + k.c1 * g : m;
  return top / (root(v) * k.correction + k.eps);
}

// Where a thread's elements of a segment lie.
struct Stretch {
  int64_t row, base;  // base: of the segment's first element
  int segment, count, lane;
  bool valid;
};

template <class C>
__device__ __forceinline__ int parameter_of_block(const Batch<C>& q) {
  const int block = static_cast<int>(blockIdx.x);
  int k = 0;
  while (k + 1 < q.count && block >= q.first_block[k + 1]) ++k;
  return k;
}

template <class C>
__device__ __forceinline__ Stretch stretch_of(const Batch<C>& q, const Record<C>& p, int parameter) {
  Stretch at;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x) - q.first_block[parameter];
  const int64_t unit = static_cast<int64_t>(block) * (kThreads / p.group) + thread / p.group;
  at.lane = thread & (p.group - 1);
  at.row = unit / p.segments;
  at.segment = static_cast<int>(unit - at.row * p.segments);
  at.valid = at.row < p.rows;
  const int64_t first = static_cast<int64_t>(at.segment) * RFK_UPDATE_BLOCK, left = p.columns - first;
  at.base = at.row * p.columns + first;
  at.count = !at.valid ? 0 : left < RFK_UPDATE_BLOCK ? static_cast<int>(left) : RFK_UPDATE_BLOCK;
  return at;
}

template <class C>
__device__ constexpr int state_dtype() {
  return sizeof(C) == 8 ? RFK_FLOAT64 : RFK_FLOAT32;
}

// N elements of a tensor of dtype D, by one access or one element after another.
template <int D, int N, class C>
__device__ __forceinline__ void load_some(const void* data, int dtype, int64_t at, C (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = load_element<C>(static_cast<const char*>(data), D == kAny ? dtype : D, at);
  } else {
    Raw<D, N> raw;
    load_pack<D, N>(static_cast<const char*>(data), dtype, at, raw);
    unpack<D, N>(raw, dtype, out);
  }
}

template <int D, int N, class C>
__device__ __forceinline__ void store_some(void* data, int dtype, int64_t at, const C (&value)[N]) {
  if constexpr (N == 1) {
    store_element<C>(static_cast<char*>(data), D == kAny ? dtype : D, at, value[0]);
  } else {
    store_pack<D, N>(static_cast<char*>(data), dtype, at, value);
  }
}

// w = w keep - step (u - factor w) of N elements, and the average after it.
template <class C, int D, int N>
__device__ __forceinline__ void move_weights(const Record<C>& p, C toward, int64_t at, const C (&u)[N], C (&w)[N], C keep,
                                             C step, bool projected, C factor, bool buffer) {
  C left[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    left[j] = projected ? u[j] - factor * w[j] : u[j];
    w[j] = w[j] * keep - step * left[j];
  }
  if (buffer) store_some<state_dtype<C>(), N>(p.first, state_dtype<C>(), at, left);
  store_some<D, N>(p.weight, D, at, w);
  if (p.average == nullptr) return;
  C mean[N];
  load_some<kAny, N>(p.average, p.average_dtype, at, mean);
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] = mean[j] + toward * (rounded(D, w[j]) - mean[j]);
  store_some<kAny, N>(p.average, p.average_dtype, at, mean);
}

template <class C, int D, int N>
__global__ void __launch_bounds__(kThreads) update_moments(const __grid_constant__ Batch<C> q) {
  __shared__ double parts[kThreads / 32];
  __shared__ Factors<C> shared;
  __shared__ double shared_keep, shared_step;
  const int parameter = parameter_of_block(q);
  const Record<C>& p = q.parameters[parameter];
  if (threadIdx.x == 0) {
    const double steps = q.adam ? steps_of(p) : 0.0;
    shared = factors_of(q, steps);
    shared_keep = shared_step = 0.0;
    if (!p.projected) weight_factors(q, steps, false, shared_keep, shared_step);
  }
  __syncthreads();
  const Factors<C> k = shared;
  const Stretch at = stretch_of(q, p, parameter);
  const C toward = static_cast<C>(1.0 - q.average_decay);
  const C keep = static_cast<C>(shared_keep), step = static_cast<C>(shared_step);
  C gw = 0, gg = 0, ww = 0, uw = 0;
#pragma unroll 4
  for (int i = 0; i < kPerThread / N; ++i) {
    const int place = (at.lane + i * p.group) * N;
    if (place >= at.count) break;
    C g[N], m[N], v[N], w[N], u[N];
    load_some<D, N>(p.grad, D, at.base + place, g);
    load_some<state_dtype<C>(), N>(p.first, state_dtype<C>(), at.base + place, m);
    if (q.adam) load_some<state_dtype<C>(), N>(p.second, state_dtype<C>(), at.base + place, v);
    load_some<D, N>(p.weight, D, at.base + place, w);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m[j] = k.b1 * m[j] + k.c1 * g[j];
      v[j] = q.adam ? k.b2 * v[j] + (k.c2 * g[j]) * g[j] : static_cast<C>(0);
      u[j] = update_of(q, k, g[j], m[j], v[j]);
      gw += g[j] * w[j];
      gg += g[j] * g[j];
      ww += w[j] * w[j];
      uw += u[j] * w[j];
    }
    store_some<state_dtype<C>(), N>(p.first, state_dtype<C>(), at.base + place, m);
    if (q.adam) store_some<state_dtype<C>(), N>(p.second, state_dtype<C>(), at.base + place, v);
    if (!p.projected) {
      move_weights<C, D, N>(p, toward, at.base + place, u, w, keep, step, false, static_cast<C>(0), false);
    }
  }
  if (!p.projected) return;  // all threads of the block alike
  const double sums[kUpdateSums] = {static_cast<double>(gw), static_cast<double>(gg), static_cast<double>(ww),
                                    static_cast<double>(uw)};
  double* target = p.sums + (at.row * p.segments + at.segment) * kUpdateSums;
#pragma unroll
  for (int s = 0; s < kUpdateSums; ++s) {
    const double total = group_sum(sums[s], p.group, parts);
    if (at.valid && at.lane == 0) target[s] = total;
  }
}

template <class C>
__device__ __forceinline__ double cosine(const Batch<C>& q, double gw, double gg, double ww) {
  const double g = sqrt(gg), w = sqrt(ww);
  return fabs(gw / ((g < q.eps ? q.eps : g) * (w < q.eps ? q.eps : w)));
}

// sum(u w) / (|w| + eps)^2: u less this times w has nothing along w.
template <class C>
__device__ __forceinline__ double along(const Batch<C>& q, double uw, double ww) {
  const double norm = sqrt(ww) + q.eps;
  return uw / (norm * norm);
}

// Greater of the two, infinity for a NaN.
__device__ __forceinline__ double worse(double a, double b) {
  const double infinity = HUGE_VAL;
  if (!(a <= infinity) || !(b <= infinity)) return infinity;
  return a > b ? a : b;
}

template <class C>
__global__ void __launch_bounds__(kThreads) update_decide(const __grid_constant__ Batch<C> q) {
  __shared__ double parts[kThreads / 32];
  __shared__ double shared_worst[kThreads];
  const Record<C>& p = q.parameters[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  double* summary = p.summary != nullptr ? p.summary : p.header;
  if (q.gather && p.projected) {
    // A row to so many lanes as it has segments, 32 at most.
    int lanes = 1;
    while (lanes < 32 && lanes < p.segments) lanes *= 2;
    const int rows_at_once = kThreads / lanes, lane = thread % lanes;
    double worst = 0.0, sums[kUpdateSums] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t start = 0; start < p.rows; start += rows_at_once) {
      const int64_t row = start + thread / lanes;
      const bool inside = row < p.rows;
      double* of_row = p.sums + (inside ? row : 0) * p.segments * kUpdateSums;
      double own[kUpdateSums] = {0.0, 0.0, 0.0, 0.0};
      for (int segment = lane; inside && segment < p.segments; segment += lanes) {
        for (int s = 0; s < kUpdateSums; ++s) own[s] += of_row[segment * kUpdateSums + s];
      }
      if (lanes > 1) {
        for (int s = 0; s < kUpdateSums; ++s) own[s] = lanes_sum(own[s], lanes);
      }
      if (!inside || lane != 0) continue;
      for (int s = 0; s < kUpdateSums; ++s) {
        if (lanes > 1) of_row[s] = own[s];
        sums[s] += own[s];
      }
      worst = worse(worst, cosine(q, own[kSumGw], own[kSumGg], own[kSumWw]));
    }
    shared_worst[thread] = worst;
    for (int s = 0; s < kUpdateSums; ++s) {
      const double total = group_sum(sums[s], kThreads, parts);
      if (thread == 0) summary[1 + s] = total;
    }
    __syncthreads();
    if (thread == 0) {
      for (int i = 1; i < kThreads; ++i) worst = worse(worst, shared_worst[i]);
      summary[0] = worst;
    }
  }
  if (thread != 0) return;
  if (q.decide && p.projected) {
    int view = kViewNone;
    const double layer = cosine(q, summary[1 + kSumGw], summary[1 + kSumGg], summary[1 + kSumWw]);
    if (layer < q.delta / sqrt(static_cast<double>(p.total))) view = kViewLayer;
    if (summary[0] < q.delta / sqrt(static_cast<double>(p.columns))) view = kViewChannel;
    double keep = 1.0, step = 0.0;
    weight_factors(q, q.adam ? steps_of(p) : 0.0, view != kViewNone, keep, step);
    const double uw = summary[1 + kSumUw], ww = summary[1 + kSumWw];
    p.header[kDecidedView] = static_cast<double>(view);
    p.header[kDecidedStep] = step;
    p.header[kDecidedKeep] = keep;
    p.header[kDecidedLayer] = along(q, uw, ww);
  }
  // Counted when its weights are moved, before or after this launch: both read the steps before it or take them from here.
  if (q.adam && (p.projected ? q.decide : q.gather)) *p.step += 1.0f;
}

template <class C, int D, int N>
__global__ void __launch_bounds__(kThreads) update_weights(const __grid_constant__ Batch<C> q) {
  __shared__ Factors<C> shared;
  const int parameter = parameter_of_block(q);
  const Record<C>& p = q.parameters[parameter];
  if (!p.projected) return;
  if (threadIdx.x == 0) shared = factors_of(q, q.adam ? static_cast<double>(*p.step) : 0.0);
  __syncthreads();
  const Factors<C> k = shared;
  const Stretch at = stretch_of(q, p, parameter);
  const int view = static_cast<int>(p.header[kDecidedView]);
  const C keep = static_cast<C>(p.header[kDecidedKeep]), step = static_cast<C>(p.header[kDecidedStep]);
  const C toward = static_cast<C>(1.0 - q.average_decay);
  C factor = static_cast<C>(p.header[kDecidedLayer]);
  if (view == kViewChannel && at.valid) {
    const double* sums = p.sums + at.row * p.segments * kUpdateSums;
    factor = static_cast<C>(along(q, sums[kSumUw], sums[kSumWw]));
  }
  const bool projected = view != kViewNone, buffer = projected && !q.adam && !q.nesterov;
#pragma unroll 4
  for (int i = 0; i < kPerThread / N; ++i) {
    const int place = (at.lane + i * p.group) * N;
    if (place >= at.count) break;
    C g[N], m[N], v[N], w[N], u[N];
    if (q.nesterov) load_some<D, N>(p.grad, D, at.base + place, g);
    load_some<state_dtype<C>(), N>(p.first, state_dtype<C>(), at.base + place, m);
    if (q.adam) load_some<state_dtype<C>(), N>(p.second, state_dtype<C>(), at.base + place, v);
    load_some<D, N>(p.weight, D, at.base + place, w);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C gradient = q.nesterov ? g[j] : static_cast<C>(0), square = q.adam ? v[j] : static_cast<C>(0);
      u[j] = update_of(q, k, gradient, m[j], square);
    }
    move_weights<C, D, N>(p, toward, at.base + place, u, w, keep, step, projected, factor, buffer);
  }
}

template <class C, int D, int N>
void launch_batch(Launcher& launcher, const Batch<C>& batch, int phase, bool any_projected) {
  const int64_t blocks = batch.first_block[batch.count];
  if (phase != RFK_UPDATE_APPLY) launcher.run(update_moments<C, D, N>, batch, blocks);
  if (batch.adam || any_projected) launcher.run(update_decide<C>, batch, batch.count);
  if (phase != RFK_UPDATE_GATHER && any_projected) launcher.run(update_weights<C, D, N>, batch, blocks);
}

// Parameters of one dtype whose packs have N elements.
template <class C, int D, int N>
void run(Launcher& launcher, const rfk_update_parameter* parameters, int64_t count, const rfk_update_options& o, int phase,
         double* summary, double* workspace) {
  Batch<C> batch = {};
  batch.adam = o.rule == RFK_UPDATE_ADAMP;
  batch.nesterov = o.nesterov != 0;
  batch.gather = phase != RFK_UPDATE_APPLY;
  batch.decide = phase != RFK_UPDATE_GATHER;
  batch.learning_rate = scalar<double>(o.learning_rate);
  batch.beta1 = o.beta1;
  batch.beta2 = o.beta2;
  batch.eps = o.eps;
  batch.weight_decay = o.weight_decay;
  batch.delta = o.delta;
  batch.decay_ratio = o.decay_ratio;
  batch.average_decay = o.average_decay;
  bool any_projected = false;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (batch.count > 0) launch_batch<C, D, N>(launcher, batch, phase, any_projected);
    batch.count = 0;
    blocks = 0;
    any_projected = false;
  };
  for (int64_t k = 0; k < count; workspace += update_doubles(parameters[k]), ++k) {
    const rfk_update_parameter& p = parameters[k];
    const bool packs = p.columns % 4 == 0 && aligned(p.weight, pack_alignment(D, 4)) && aligned(p.grad, pack_alignment(D, 4)) &&
                       aligned(p.first, 16) && aligned(p.second, 16) &&
                       (p.average == nullptr || aligned(p.average, pack_alignment(p.average_dtype, 4)));
    if (p.dtype != D || packs != (N == 4)) continue;
    if (p.projected == 0 && phase == RFK_UPDATE_APPLY) continue;  // done in the other phase
    int group = 1;
    while (group < 32 && group * kPerThread < p.columns) group *= 2;
    if (group * kPerThread < p.columns) group = kThreads;
    const int64_t segments = update_segments(p.columns);
    const int64_t own = blocks_for(p.rows * segments, kThreads / group);
    if (batch.count == kBatch || (batch.count > 0 && blocks + own > 0x7fffffff)) flush();
    Record<C>& r = batch.parameters[batch.count];
    r.weight = static_cast<char*>(p.weight);
    r.grad = static_cast<const char*>(p.grad);
    r.first = static_cast<C*>(p.first);
    r.second = static_cast<C*>(p.second);
    r.step = p.step;
    r.average = static_cast<char*>(p.average);
    r.summary = summary != nullptr ? summary + k * RFK_UPDATE_SUMMARY : nullptr;
    r.header = workspace;
    r.sums = workspace + kUpdateHeader;
    r.rows = p.rows;
    r.columns = p.columns;
    r.total = p.total;
    r.average_dtype = p.average_dtype;
    r.projected = p.projected;
    r.group = group;
    r.segments = static_cast<int32_t>(segments);
    batch.first_block[batch.count] = static_cast<int32_t>(blocks);
    blocks += own;
    batch.first_block[++batch.count] = static_cast<int32_t>(blocks);
    any_projected = any_projected || p.projected != 0;
  }
  flush();
}

template <class C, int D>
void run_both(Launcher& launcher, const rfk_update_parameter* parameters, int64_t count, const rfk_update_options& o,
              int phase, double* summary, double* workspace) {
  run<C, D, 4>(launcher, parameters, count, o, phase, summary, workspace);
  run<C, D, 1>(launcher, parameters, count, o, phase, summary, workspace);
}

}  // namespace

rfk_status projected_update(const rfk_device& device, const rfk_update_parameter* parameters, int64_t count,
                            const rfk_update_options& options, int phase, double* summary, double* workspace) {
  Launcher launcher(device, RFK_OP_PROJECTED_UPDATE);
  run_both<float, RFK_FLOAT32>(launcher, parameters, count, options, phase, summary, workspace);
  run_both<float, RFK_BFLOAT16>(launcher, parameters, count, options, phase, summary, workspace);
  run_both<float, RFK_FLOAT16>(launcher, parameters, count, options, phase, summary, workspace);
  run_both<double, RFK_FLOAT64>(launcher, parameters, count, options, phase, summary, workspace);
  return launcher.status();
}

}  // namespace cuda
}  // namespace rfk
