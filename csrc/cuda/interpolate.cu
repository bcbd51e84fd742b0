// interpolate.cu: x_t and its target in one pass, the source drawn in the kernel where it is not given.
//
//   xt = sigma x0 + alpha x1,  target = dsigma x0 + dalpha x1,  each product and sum rounded in C
//
// with the coefficients of paths.h (or of `custom`), computed in double once a sample and block, kept in shared memory and
// rounded to C. Elements with x0 drawn: 12 bytes in float32 (read x1, write xt and target), 16 with x0 given.
//
// Layouts as in ode_step.cu: packs for contiguous tensors, element by element otherwise. The order of samples is kept, so
// a block meets the samples from its first element's on and needs at most (tile - 2) / elements_per_sample + 2 of them (16 KiB of table at worst in float, 32 in double).
#include "cuda/common.cuh"
#include "rfk/paths.h"

namespace rfk {
namespace cuda {
namespace {

constexpr int kUnroll = 2;

template <class C>
struct alignas(16) Coefficients {
  C alpha, sigma, dalpha, dsigma;
};

template <class C>
struct Interpolation {
  Operand x1, x0, xt, target, x0_out;
  Scalar<C> t, custom[4];
  int32_t path;
  int32_t entries;  // samples a block can meet
  int64_t numel;
  Rows rows;
  Noise noise;
};

template <class C>
struct StridedInterpolation {
  Interpolation<C> call;
  Space space;  // operands: x1, x0, xt, target, x0_out
};

constexpr int kOperands = 5;

template <class C>
__device__ __forceinline__ Coefficients<C> coefficients_of(const Interpolation<C>& p, int64_t sample) {
  if (p.path == RFK_PATH_CUSTOM) {
    return {p.custom[0].at(sample), p.custom[1].at(sample), p.custom[2].at(sample), p.custom[3].at(sample)};
  }
  const PathCoefficients c = path_coefficients(p.path, static_cast<double>(p.t.at(sample)));
  return {static_cast<C>(c.alpha), static_cast<C>(c.sigma), static_cast<C>(c.dalpha), static_cast<C>(c.dsigma)};
}

// Every thread of the block takes part.
template <class C>
__device__ __forceinline__ void fill_table(const Interpolation<C>& p, int64_t first_sample, Coefficients<C>* table) {
  for (int i = static_cast<int>(threadIdx.x); i < p.entries; i += kThreads) {
    if (first_sample + i < p.rows.samples || !p.rows.per_sample) table[i] = coefficients_of(p, first_sample + i);
  }
  __syncthreads();
}

// One element of a contiguous call; not inlined, to keep it out of the registers and the compile time of every kernel.
template <class C>
__device__ RFK_NOINLINE void interpolate_tail(const Interpolation<C>& p, Spot spot, Coefficients<C> c) {
  const C x1 = load_element<C>(p.x1.data, p.x1.dtype, spot.index);
  const C x0 = p.x0.data == nullptr ? static_cast<C>(draw_one<false>(p.noise, spot))
                                    : load_element<C>(p.x0.data, p.x0.dtype, spot.index);
  store_element(p.xt.data, p.xt.dtype, spot.index, c.sigma * x0 + c.alpha * x1);
  store_element(p.target.data, p.target.dtype, spot.index, c.dsigma * x0 + c.dalpha * x1);
  if (p.x0_out.data != nullptr) store_element(p.x0_out.data, p.x0_out.dtype, spot.index, x0);
}

// D: dtype of every tensor.
template <class C, int D, int N, bool kNoise>
__global__ void __launch_bounds__(kThreads, D == kAny || N == 8 ? 3 : 4) interpolate_dense(const __grid_constant__ Interpolation<C> p) {
  RFK_DYNAMIC_SHARED(Coefficients<C>, table);
  constexpr int kTile = kThreads * kUnroll * N;
  const int thread = static_cast<int>(threadIdx.x);
  const Spot start = tile_start(p.rows, static_cast<int64_t>(blockIdx.x) * kTile);
  const int64_t limit = p.numel - p.numel % N;
  // Before the loads: the double precision sine is a call that everything held in registers would be spilled for.
  fill_table(p, start.sample, table);

  Spot spot[kUnroll];
  Raw<D, N> raw_x1[kUnroll], raw_x0[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    spot[u] = advance<kTile>(p.rows, start, (u * kThreads + thread) * N, limit);
    clear_pack(raw_x1[u]);
    clear_pack(raw_x0[u]);
    if (spot[u].inside) {
      load_pack<D, N>(p.x1.data, p.x1.dtype, spot[u].index, raw_x1[u]);
      if (!kNoise) load_pack<D, N>(p.x0.data, p.x0.dtype, spot[u].index, raw_x0[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!spot[u].inside) continue;
    C x1[N], x0[N], xt[N], target[N];
    unpack<D, N>(raw_x1[u], p.x1.dtype, x1);
    if constexpr (kNoise) {
      float z[N];
      draw_pack<N, false>(p.noise, spot[u], z);
#pragma unroll
      for (int j = 0; j < N; ++j) x0[j] = static_cast<C>(z[j]);
    } else {
      unpack<D, N>(raw_x0[u], p.x0.dtype, x0);
    }
    const Coefficients<C> c = table[spot[u].sample - start.sample];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      xt[j] = c.sigma * x0[j] + c.alpha * x1[j];
      target[j] = c.dsigma * x0[j] + c.dalpha * x1[j];
    }
    store_pack<D, N>(p.xt.data, p.xt.dtype, spot[u].index, xt);
    store_pack<D, N>(p.target.data, p.target.dtype, spot[u].index, target);
    if (p.x0_out.data != nullptr) store_pack<D, N>(p.x0_out.data, p.x0_out.dtype, spot[u].index, x0);
  }

  if (!holds_tail()) return;
  const Spot tail = tail_spot<kTile>(p.rows, start, limit, p.numel);
  if (tail.inside) interpolate_tail(p, tail, table[tail.sample - start.sample]);
}

template <class C>
__global__ void __launch_bounds__(kThreads) interpolate_strided(const __grid_constant__ StridedInterpolation<C> q) {
  RFK_DYNAMIC_SHARED(Coefficients<C>, table);
  const Interpolation<C>& p = q.call;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kStridedTile;
  const Spot start = tile_start(p.rows, base);
  fill_table(p, start.sample, table);
  const bool noise = p.x0.data == nullptr;
  NumberCache<false> numbers;
#pragma unroll 1
  for (int j = 0; j < kStridedPerThread; ++j) {
    const Spot spot = advance<kStridedTile>(p.rows, start, strided_shift(noise, j), p.numel);
    if (!spot.inside) continue;
    int64_t at[kOperands];
    offsets(q.space, kOperands, spot.index, at);
    const Coefficients<C> c = table[spot.sample - start.sample];
    const C x1 = load_element<C>(p.x1.data, p.x1.dtype, at[0]);
    const C x0 = noise ? static_cast<C>(numbers.at(p.noise, spot))
                       : load_element<C>(p.x0.data, p.x0.dtype, at[1]);
    store_element(p.xt.data, p.xt.dtype, at[2], c.sigma * x0 + c.alpha * x1);
    store_element(p.target.data, p.target.dtype, at[3], c.dsigma * x0 + c.dalpha * x1);
    if (p.x0_out.data != nullptr) store_element(p.x0_out.data, p.x0_out.dtype, at[4], x0);
  }
}

// Samples that one tile can meet.
int table_entries(const Rows& rows, int tile) {
  if (!rows.per_sample) return 1;
  const int64_t entries = (tile - 2) / rows.elements + 2;
  return static_cast<int>(entries < rows.samples ? entries : rows.samples);
}

template <class C, int D, int N>
void run_dense(Launcher& launcher, Interpolation<C>& call, bool noise) {
  constexpr int kTile = kThreads * kUnroll * N;
  call.entries = table_entries(call.rows, kTile);
  const int64_t shared = static_cast<int64_t>(call.entries) * static_cast<int64_t>(sizeof(Coefficients<C>));
  const int64_t blocks = blocks_for(call.numel, kTile);
  if (noise) {
    launcher.run(interpolate_dense<C, D, N, true>, call, blocks, shared);
  } else {
    launcher.run(interpolate_dense<C, D, N, false>, call, blocks, shared);
  }
}

template <class C>
rfk_status run(const rfk_device& device, const rfk_tensor* const* operands, const rfk_noise* noise, const rfk_scalar& t,
               int path, const rfk_scalar* custom) {
  const bool drawn = operands[1] == nullptr;
  bool per_sample = drawn && noise->per_sample;
  StridedInterpolation<C> strided = {};
  Interpolation<C>& call = strided.call;
  call.x1 = operand(operands[0]);
  call.x0 = operand(operands[1]);
  call.xt = operand(operands[2]);
  call.target = operand(operands[3]);
  call.x0_out = operand(operands[4]);
  call.path = path;
  if (path == RFK_PATH_CUSTOM) {
    for (int k = 0; k < 4; ++k) {
      call.custom[k] = scalar<C>(custom[k]);
      per_sample = per_sample || varies(custom[k]);
    }
  } else {
    call.t = scalar<C>(t);
    per_sample = per_sample || varies(t);
  }
  if (drawn) call.noise = noise_source(*noise);
  const Order order = drawn ? Order::kLogical : per_sample ? Order::kSamplesFirst : Order::kAny;
  strided.space = make_space(operands, kOperands, 2, order);
  call.numel = strided.space.numel;
  Launcher launcher(device, RFK_OP_INTERPOLATE);
  if (call.numel == 0) return launcher.status();

  const int dtype = common_dtype(operands, kOperands);
  const bool halves = dtype == RFK_BFLOAT16 || dtype == RFK_FLOAT16;
  call.rows = rows(strided.space, per_sample);
  const auto fits = [&](int n) { return packable(strided.space, operands, kOperands, n) && whole_packs(call.rows, n); };
  const int pack = halves && fits(8) ? 8 : 4;
  if (!fits(pack)) {
    call.entries = table_entries(call.rows, kStridedTile);
    launcher.run(interpolate_strided<C>, strided, blocks_for(call.numel, kStridedTile),
                 static_cast<int64_t>(call.entries) * static_cast<int64_t>(sizeof(Coefficients<C>)));
    return launcher.status();
  }
  if constexpr (sizeof(C) == 8) {
    run_dense<C, kAny, 4>(launcher, call, drawn);
  } else if (dtype == RFK_FLOAT32) {
    run_dense<C, RFK_FLOAT32, 4>(launcher, call, drawn);
  } else if (pack == 8 && dtype == RFK_BFLOAT16) {
    run_dense<C, RFK_BFLOAT16, 8>(launcher, call, drawn);
  } else if (pack == 8) {
    run_dense<C, RFK_FLOAT16, 8>(launcher, call, drawn);
  } else {
    run_dense<C, kAny, 4>(launcher, call, drawn);
  }
  return launcher.status();
}

}  // namespace

rfk_status interpolate(const rfk_device& device, const rfk_tensor& x1, const rfk_tensor* x0, const rfk_noise* noise,
                       const rfk_scalar& t, int path, const rfk_scalar* custom, const rfk_tensor& xt,
                       const rfk_tensor& target, const rfk_tensor* x0_out) {
  const rfk_tensor* operands[kOperands] = {&x1, x0, &xt, &target, x0_out};
  const auto chosen = x1.dtype == RFK_FLOAT64 ? run<double> : run<float>;
  return chosen(device, operands, noise, t, path, custom);
}

}  // namespace cuda
}  // namespace rfk
