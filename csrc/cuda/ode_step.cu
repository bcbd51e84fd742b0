// ode_step.cu: Euler, Taylor and linear-combination steps, one launch each.
//
//   linear   out = ((c0 x + c1 t1) + ... + cn tn) + cz z      z: standard normal of the element, drawn here
//   taylor   linear with c0 = 1, c1 = dt, c2 = (dt dt) 0.5, c3 = ((dt dt) dt) C(1/6)
//   euler    linear with c0 = 1, c1 = dt; guided: w = u + g (v - u), out = x + dt w
//
// each product and sum rounded in C (double where x is, else float). cast receives the stored state in its own dtype.
//
// Contiguous tensors with aligned starts go through step_dense: packs of four elements (eight where every tensor has
// 16-bit elements), kUnroll packs a thread, one tile a block. It moves every byte once: 12 an element for a float32 Euler
// step, 16 guided, 12 with a float32 state, bfloat16 velocity and bfloat16 copy. Anything else (strides, unaligned
// starts) goes through step_strided, element by element. Limits: RFK_MAX_TERMS terms, RFK_MAX_DIMS dimensions,
// 2^31 - 1 tiles. out may be x or a term itself: every thread reads its elements before it writes them.
#include "cuda/common.cuh"

namespace rfk {
namespace cuda {
namespace {

constexpr int kUnroll = 2;

enum Form { kLinear, kGuided, kTaylor };

template <class C>
struct Step {
  Operand x, out, cast, terms[RFK_MAX_TERMS];  // guided: terms = {v, v_uncond}
  Scalar<C> x_coefficient, noise_scale;
  Scalar<C> coefficients[RFK_MAX_TERMS];  // guided: {dt, guidance}; taylor: {dt}
  int32_t count, form, has_noise;
  int64_t numel;
  Rows rows;
  Noise noise;

  __device__ __forceinline__ C coefficient(int k, int64_t sample) const {
    if (form != kTaylor) return coefficients[k].at(sample);
    const C dt = coefficients[0].at(sample);
    if (k == 0) return dt;
    return k == 1 ? (dt * dt) * static_cast<C>(0.5) : ((dt * dt) * dt) * static_cast<C>(1.0 / 6.0);
  }
};

template <class C>
struct StridedStep {
  Step<C> step;
  Space space;  // operands: x, out, cast, terms
};

// One element; term(k) loads its k-th term, z() its normal. kUnrolled: RFK_MAX_TERMS where term needs a constant k, else 1.
template <int kUnrolled, class C, class Term, class Normal>
__device__ __forceinline__ C step_value(const Step<C>& p, int64_t sample, C x, const Term& term, const Normal& z) {
  if (p.form == kGuided) {
    const C v = term(0), u = term(1);
    const C w = u + p.coefficients[1].at(sample) * (v - u);
    return x + p.coefficients[0].at(sample) * w;
  }
  C total = p.x_coefficient.at(sample) * x;
#pragma unroll(kUnrolled)
  for (int k = 0; k < RFK_MAX_TERMS; ++k) {
    if (k < p.count) total = total + p.coefficient(k, sample) * term(k);
  }
  if (p.has_noise) total = total + p.noise_scale.at(sample) * static_cast<C>(z());
  return total;
}

// One element of a contiguous call; not inlined, to keep it out of the registers and the compile time of every kernel.
template <class C>
__device__ RFK_NOINLINE void step_tail(const Step<C>& p, Spot spot) {
  if (!spot.inside) return;
  const C value = step_value<1>(
      p, spot.sample, load_element<C>(p.x.data, p.x.dtype, spot.index),
      [&](int k) { return load_element<C>(p.terms[k].data, p.terms[k].dtype, spot.index); },
      [&] { return draw_one<false>(p.noise, spot); });
  store_element(p.out.data, p.out.dtype, spot.index, value);
  if (p.cast.data != nullptr) store_element(p.cast.data, p.cast.dtype, spot.index, rounded(p.out.dtype, value));
}

// S, V, K: dtypes of the state, of the terms and of the cast copy.
template <class C, int S, int V, int K, int N, bool kGuidedForm, bool kNoise>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 2 : S == kAny || N == 8 ? 3 : 4) step_dense(const __grid_constant__ Step<C> p) {
  constexpr int kTile = kThreads * kUnroll * N;
  const int thread = static_cast<int>(threadIdx.x);
  const Spot start = tile_start(p.rows, static_cast<int64_t>(blockIdx.x) * kTile);
  const int64_t limit = p.numel - p.numel % N;

  Spot spot[kUnroll];
  Raw<S, N> raw_x[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    spot[u] = advance<kTile>(p.rows, start, (u * kThreads + thread) * N, limit);
    clear_pack(raw_x[u]);
    if (spot[u].inside) load_pack<S, N>(p.x.data, p.x.dtype, spot[u].index, raw_x[u]);
  }

  C total[kUnroll][N];
  if constexpr (kGuidedForm) {
    Raw<V, N> raw_v[kUnroll], raw_u[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      clear_pack(raw_v[u]);
      clear_pack(raw_u[u]);
      if (spot[u].inside) {
        load_pack<V, N>(p.terms[0].data, p.terms[0].dtype, spot[u].index, raw_v[u]);
        load_pack<V, N>(p.terms[1].data, p.terms[1].dtype, spot[u].index, raw_u[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      C x[N], v[N], w[N];
      unpack<S, N>(raw_x[u], p.x.dtype, x);
      unpack<V, N>(raw_v[u], p.terms[0].dtype, v);
      unpack<V, N>(raw_u[u], p.terms[1].dtype, w);
      const C dt = p.coefficients[0].at(spot[u].sample), g = p.coefficients[1].at(spot[u].sample);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C guided = w[j] + g * (v[j] - w[j]);
        total[u][j] = x[j] + dt * guided;
      }
    }
  } else {
    // The first term is loaded before x is waited for; the others follow one by one.
    Raw<V, N> raw_t[kUnroll];
    const auto load_term = [&](int k) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        clear_pack(raw_t[u]);
        if (spot[u].inside) load_pack<V, N>(p.terms[k].data, p.terms[k].dtype, spot[u].index, raw_t[u]);
      }
    };
    if (p.count > 0) load_term(0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      C x[N];
      unpack<S, N>(raw_x[u], p.x.dtype, x);
      const C c = p.x_coefficient.at(spot[u].sample);
#pragma unroll
      for (int j = 0; j < N; ++j) total[u][j] = c * x[j];
    }
#pragma unroll 1
    for (int k = 0; k < p.count; ++k) {
      C t[kUnroll][N];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) unpack<V, N>(raw_t[u], p.terms[k].dtype, t[u]);
      if (k + 1 < p.count) load_term(k + 1);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const C c = p.coefficient(k, spot[u].sample);
#pragma unroll
        for (int j = 0; j < N; ++j) total[u][j] = total[u][j] + c * t[u][j];
      }
    }
    if constexpr (kNoise) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float z[N];
        draw_pack<N, false>(p.noise, spot[u], z);
        const C c = p.noise_scale.at(spot[u].sample);
#pragma unroll
        for (int j = 0; j < N; ++j) total[u][j] = total[u][j] + c * static_cast<C>(z[j]);
      }
    }
  }

#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!spot[u].inside) continue;
    store_pack<S, N>(p.out.data, p.out.dtype, spot[u].index, total[u]);
    if (p.cast.data != nullptr) {
#pragma unroll
      for (int j = 0; j < N; ++j) total[u][j] = rounded(S == kAny ? p.out.dtype : S, total[u][j]);
      store_pack<K, N>(p.cast.data, p.cast.dtype, spot[u].index, total[u]);
    }
  }

  if (holds_tail()) step_tail(p, tail_spot<kTile>(p.rows, start, limit, p.numel));
}

template <class C>
__global__ void __launch_bounds__(kThreads) step_strided(const __grid_constant__ StridedStep<C> q) {
  const Step<C>& p = q.step;
  const Spot start = tile_start(p.rows, static_cast<int64_t>(blockIdx.x) * kStridedTile);
  NumberCache<false> numbers;
#pragma unroll 1
  for (int j = 0; j < kStridedPerThread; ++j) {
    const Spot spot = advance<kStridedTile>(p.rows, start, strided_shift(p.has_noise, j), p.numel);
    if (!spot.inside) continue;
    int64_t at[kMaxOperands];
    offsets(q.space, 3 + p.count, spot.index, at);
    const C value = step_value<RFK_MAX_TERMS>(
        p, spot.sample, load_element<C>(p.x.data, p.x.dtype, at[0]),
        [&](int k) { return load_element<C>(p.terms[k].data, p.terms[k].dtype, at[3 + k]); },
        [&] { return numbers.at(p.noise, spot); });
    store_element(p.out.data, p.out.dtype, at[1], value);
    if (p.cast.data != nullptr) store_element(p.cast.data, p.cast.dtype, at[2], rounded(p.out.dtype, value));
  }
}

template <class C, int S, int V, int K, int N>
void run_dense(Launcher& launcher, const Step<C>& step) {
  const int64_t blocks = blocks_for(step.numel, kThreads * kUnroll * N);
  if (step.form == kGuided) {
    launcher.run(step_dense<C, S, V, K, N, true, false>, step, blocks);
  } else if (step.has_noise) {
    // Drawing is bound by arithmetic, so two kernels that know the dtypes only at run time do for the rarer mixes.
    if constexpr (S == RFK_FLOAT32 && V == RFK_FLOAT32) {
      launcher.run(step_dense<C, S, V, kAny, N, false, true>, step, blocks);
    } else {
      launcher.run(step_dense<C, kAny, kAny, kAny, 4, false, true>, step, blocks_for(step.numel, kThreads * kUnroll * 4));
    }
  } else {
    launcher.run(step_dense<C, S, V, K, N, false, false>, step, blocks);
  }
}

template <class C>
rfk_status run(const rfk_device& device, const rfk_tensor* const* operands, int form, const rfk_scalar& x_coefficient,
               const rfk_scalar* coefficients, int count, const rfk_noise* noise, const rfk_scalar* noise_scale) {
  const int used = 3 + count;
  bool per_sample = varies(x_coefficient) || (noise != nullptr && (noise->per_sample || varies(*noise_scale)));
  const int scalars = form == kTaylor ? 1 : count;
  StridedStep<C> call = {};
  Step<C>& step = call.step;
  step.x = operand(operands[0]);
  step.out = operand(operands[1]);
  step.cast = operand(operands[2]);
  for (int k = 0; k < count; ++k) step.terms[k] = operand(operands[3 + k]);
  for (int k = 0; k < scalars; ++k) {
    step.coefficients[k] = scalar<C>(coefficients[k]);
    per_sample = per_sample || varies(coefficients[k]);
  }
  step.x_coefficient = scalar<C>(x_coefficient);
  step.count = count;
  step.form = form;
  if (noise != nullptr) {
    step.has_noise = 1;
    step.noise = noise_source(*noise);
    step.noise_scale = scalar<C>(*noise_scale);
  }
  const Order order = noise != nullptr ? Order::kLogical : per_sample ? Order::kSamplesFirst : Order::kAny;
  call.space = make_space(operands, used, 1, order);
  step.numel = call.space.numel;
  Launcher launcher(device, RFK_OP_ODE_STEP);
  if (step.numel == 0) return launcher.status();

  const int state = operands[0]->dtype;
  const int velocity = count > 0 ? common_dtype(operands + 3, count) : state;
  const int copy = operands[2] != nullptr ? operands[2]->dtype : velocity;
  const bool halves = sizeof(C) == 4 && noise == nullptr && state != RFK_FLOAT32 && velocity == state && copy == state;
  step.rows = rows(call.space, per_sample);
  const auto fits = [&](int pack) { return packable(call.space, operands, used, pack) && whole_packs(step.rows, pack); };
  const int pack = halves && fits(8) ? 8 : 4;
  if (!fits(pack)) {
    launcher.run(step_strided<C>, call, blocks_for(step.numel, kStridedTile));
    return launcher.status();
  }
  if constexpr (sizeof(C) == 8) {
    run_dense<C, kAny, kAny, kAny, 4>(launcher, step);
  } else if (pack == 8 && state == RFK_BFLOAT16) {
    run_dense<C, RFK_BFLOAT16, RFK_BFLOAT16, RFK_BFLOAT16, 8>(launcher, step);
  } else if (pack == 8) {
    run_dense<C, RFK_FLOAT16, RFK_FLOAT16, RFK_FLOAT16, 8>(launcher, step);
  } else if (state == RFK_FLOAT32 && velocity == RFK_FLOAT32) {
    run_dense<C, RFK_FLOAT32, RFK_FLOAT32, kAny, 4>(launcher, step);
  } else if (state == RFK_FLOAT32 && velocity == RFK_BFLOAT16 && copy == RFK_BFLOAT16) {
    run_dense<C, RFK_FLOAT32, RFK_BFLOAT16, RFK_BFLOAT16, 4>(launcher, step);
  } else if (state == RFK_FLOAT32 && velocity == RFK_FLOAT16 && copy == RFK_FLOAT16) {
    run_dense<C, RFK_FLOAT32, RFK_FLOAT16, RFK_FLOAT16, 4>(launcher, step);
  } else {
    run_dense<C, kAny, kAny, kAny, 4>(launcher, step);
  }
  return launcher.status();
}

rfk_status dispatch(const rfk_device& device, const rfk_tensor& x, const rfk_tensor& out, const rfk_tensor* cast,
                    const rfk_tensor* const* terms, int form, const rfk_scalar& x_coefficient,
                    const rfk_scalar* coefficients, int count, const rfk_noise* noise, const rfk_scalar* noise_scale) {
  const rfk_tensor* operands[kMaxOperands] = {&x, &out, cast};
  for (int k = 0; k < count; ++k) operands[3 + k] = terms[k];
  if (noise != nullptr && !noise->present) noise = nullptr;
  const auto chosen = x.dtype == RFK_FLOAT64 ? run<double> : run<float>;
  return chosen(device, operands, form, x_coefficient, coefficients, count, noise, noise_scale);
}

constexpr rfk_scalar kOne = {1.0, nullptr, 0, RFK_FLOAT64};

}  // namespace

rfk_status euler_step(const rfk_device& device, const rfk_tensor& x, const rfk_tensor& v, const rfk_tensor* v_uncond,
                      const rfk_scalar& dt, const rfk_scalar* guidance, const rfk_tensor& out, const rfk_tensor* cast) {
  const rfk_tensor* terms[2] = {&v, v_uncond};
  const bool guided = v_uncond != nullptr;
  const rfk_scalar coefficients[2] = {dt, guided ? *guidance : kOne};
  return dispatch(device, x, out, cast, terms, guided ? kGuided : kLinear, kOne, coefficients, guided ? 2 : 1, nullptr,
                  nullptr);
}

rfk_status taylor_step(const rfk_device& device, const rfk_tensor& x, const rfk_tensor* derivatives, int order,
                       const rfk_scalar& dt, const rfk_tensor& out, const rfk_tensor* cast) {
  const rfk_tensor* terms[3] = {};
  for (int k = 0; k < order; ++k) terms[k] = derivatives + k;
  return dispatch(device, x, out, cast, terms, kTaylor, kOne, &dt, order, nullptr, nullptr);
}

rfk_status linear_step(const rfk_device& device, const rfk_tensor& x, const rfk_scalar& x_coefficient,
                       const rfk_tensor* tensors, const rfk_scalar* coefficients, int count, const rfk_noise* noise,
                       const rfk_scalar* noise_scale, const rfk_tensor& out, const rfk_tensor* cast) {
  const rfk_tensor* terms[RFK_MAX_TERMS] = {};
  for (int k = 0; k < count; ++k) terms[k] = tensors + k;
  return dispatch(device, x, out, cast, terms, kLinear, x_coefficient, coefficients, count, noise, noise_scale);
}

}  // namespace cuda
}  // namespace rfk
