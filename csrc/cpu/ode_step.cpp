// ode_step.cpp: out = c0 x + c1 t1 + ... + cn tn (+ cnoise z), or x + dt (u + g (v - u)); Euler and Taylor are the former.
//
// Bytes an element (float): 4 for each tensor read, 4 for the state written, 2 or 4 for the cast copy; noise costs none.
// Each product and each sum is rounded to the compute type; terms are added left to right, noise last. `out` may be the
// very memory of x or of a term. Up to four terms are summed in one loop, so an element is read before it is written;
// more go through a buffer.
#include "cpu/cpu_ops.h"
#include "cpu/noise.h"
#include "cpu/tiles.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

constexpr int kFused = 4;

// The value of a coefficient for every element of a tile, or one for all.
template <class C>
struct Coefficient {
  C value = C(0);
  C each[kTile];
};

template <bool kEach, class C>
inline C at(const Coefficient<C>& c, int i) {
  return kEach ? c.each[i] : c.value;
}

// out = c0 x + sum of kTerms terms.
template <class C, class S, bool kEach, int kTerms>
void combine(int n, const S* x, const Coefficient<C>& c0, const S* const* t, const Coefficient<C>* c, S* out) {
  const S *t0 = t[0], *t1 = t[1], *t2 = t[2], *t3 = t[3];
  RFK_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    C sum = at<kEach>(c0, i) * get(x[i]);
    if constexpr (kTerms > 0) sum = sum + at<kEach>(c[0], i) * get(t0[i]);
    if constexpr (kTerms > 1) sum = sum + at<kEach>(c[1], i) * get(t1[i]);
    if constexpr (kTerms > 2) sum = sum + at<kEach>(c[2], i) * get(t2[i]);
    if constexpr (kTerms > 3) sum = sum + at<kEach>(c[3], i) * get(t3[i]);
    put(out + i, sum);
  }
}

template <class C, class S, bool kEach>
void combine_some(int terms, int n, const S* x, const Coefficient<C>& c0, const S* const* t, const Coefficient<C>* c,
                  S* out) {
  switch (terms) {
    case 0: return combine<C, S, kEach, 0>(n, x, c0, t, c, out);
    case 1: return combine<C, S, kEach, 1>(n, x, c0, t, c, out);
    case 2: return combine<C, S, kEach, 2>(n, x, c0, t, c, out);
    case 3: return combine<C, S, kEach, 3>(n, x, c0, t, c, out);
    default: return combine<C, S, kEach, 4>(n, x, c0, t, c, out);
  }
}

template <class C, class S, bool kEach>
void guided(int n, const S* x, const S* v, const S* u, const Coefficient<C>& dt, const Coefficient<C>& g, S* out) {
  RFK_INDEPENDENT
  for (int i = 0; i < n; ++i) {
    const C w = get(u[i]) + at<kEach>(g, i) * (get(v[i]) - get(u[i]));
    put(out + i, get(x[i]) + at<kEach>(dt, i) * w);
  }
}

template <class C>
struct Scratch {
  alignas(64) C x[kTile];
  alignas(64) C terms[kFused][kTile];
  alignas(64) C sum[kTile];
  alignas(64) float noise[kTile];
  Coefficient<C> coefficients[RFK_MAX_TERMS + 2];  // x, terms, noise
};

template <class C>
class Step {
 public:
  explicit Step(const StepArguments& arguments) : a_(arguments) {
    const rfk_tensor* tensors[kMaxOperands] = {a_.out, a_.x};
    int count = 2;
    for (int k = 0; k < a_.count; ++k) tensors[count++] = a_.terms[k];
    tensors[count++] = a_.cast;
    space_ = make_space(tensors, count, a_.noise != nullptr, operands_);
    cast_ = a_.cast != nullptr ? count - 1 : -1;
    source_ = {a_.noise, RFK_NORMAL, 24, space_.per_sample};
    // scalars_[0] belongs to x, 1.. to the terms, the last to the noise.
    scalars_[0] = a_.x_coefficient;
    for (int k = 0; k < a_.count; ++k) scalars_[1 + k] = a_.coefficients[a_.form == StepArguments::kTaylor ? 0 : k];
    scalars_[1 + a_.count] = a_.noise_scale;
    scalar_count_ = 1 + a_.count + (a_.noise != nullptr ? 1 : 0);
    for (int k = 0; k < scalar_count_; ++k) varies_ = varies_ || varies(scalars_[k]);
    each_ = varies_ && space_.per_sample < kSmallSample;
    stream_ = streams(space_, operands_[0], operands_ + 1, 1 + a_.count);
    bfloat16_ = a_.noise == nullptr && a_.cast == nullptr && a_.count <= kFused && !stream_;
    for (int k = 0; k < 2 + a_.count; ++k) {
      bfloat16_ = bfloat16_ && operands_[k].dense && operands_[k].dtype == RFK_BFLOAT16;
    }
    stream_cast_ = cast_ >= 0 && streams(space_, operands_[cast_], operands_, 2 + a_.count);
  }

  void run() const {
    if (space_.numel == 0) return;
    parallel_ranges(space_.numel, kTile, space_.numel, [&](int64_t begin, int64_t end) {
      Scratch<C> scratch;
      if (!varies_) fill_coefficients(0, scratch);
      for_tiles(space_, begin, end, varies_ && !each_, [&](int64_t start, int n, int64_t sample) {
        if (each_) {
          expand_coefficients(start, n, scratch);
          tile<true>(start, n, scratch);
        } else {
          if (varies_) fill_coefficients(sample, scratch);
          tile<false>(start, n, scratch);
        }
      });
      if (stream_ || stream_cast_) stream_fence();
    });
  }

 private:
  // Coefficient k of a sample; Taylor's are made from dt in the compute type: dt, dt^2 / 2, dt^3 / 6.
  C coefficient(int k, int64_t sample) const {
    const C value = scalar_at<C>(scalars_[k], sample);
    if (a_.form != StepArguments::kTaylor || k < 2) return value;
    const C square = value * value;
    return k == 2 ? square * C(0.5) : (square * value) * C(1.0 / 6.0);
  }

  void fill_coefficients(int64_t sample, Scratch<C>& s) const {
    for (int k = 0; k < scalar_count_; ++k) s.coefficients[k].value = coefficient(k, sample);
  }

  void expand_coefficients(int64_t start, int n, Scratch<C>& s) const {
    int64_t sample = start / space_.per_sample, left = space_.per_sample - start % space_.per_sample;
    for (int i = 0; i < n;) {
      const int run = left < n - i ? static_cast<int>(left) : n - i;
      for (int k = 0; k < scalar_count_; ++k) {
        const C value = coefficient(k, sample);
        for (int j = i; j < i + run; ++j) s.coefficients[k].each[j] = value;
      }
      i += run;
      ++sample;
      left = space_.per_sample;
    }
  }

  // All of it in bfloat16: no buffers.
  template <bool kEach>
  void bfloat16_tile(int64_t start, int n, const Coefficient<C>* c) const {
    const auto place = [&](int k) { return reinterpret_cast<Bfloat16*>(operands_[k].data) + start; };
    const Bfloat16* terms[kFused] = {};
    for (int k = 0; k < a_.count; ++k) terms[k] = place(2 + k);
    if (a_.form == StepArguments::kGuided) {
      guided<float, Bfloat16, kEach>(n, place(1), terms[0], terms[1], c[1], c[2], place(0));
    } else {
      combine_some<float, Bfloat16, kEach>(a_.count, n, place(1), c[0], terms, c + 1, place(0));
    }
  }

  template <bool kEach>
  void tile(int64_t start, int n, Scratch<C>& s) const {
    if constexpr (sizeof(C) == sizeof(float)) {
      if (bfloat16_) return bfloat16_tile<kEach>(start, n, s.coefficients);
    }
    const C* x = load_tile(space_, operands_[1], start, n, s.x);
    C* out = output_tile(operands_[0], start, stream_, s.sum);
    const Coefficient<C>* c = s.coefficients;
    const C* terms[kFused] = {};
    if (a_.form == StepArguments::kGuided) {
      const C* v = load_tile(space_, operands_[2], start, n, s.terms[0]);
      const C* u = load_tile(space_, operands_[3], start, n, s.terms[1]);
      guided<C, C, kEach>(n, x, v, u, c[1], c[2], out);
    } else {
      const int total = a_.count + (a_.noise != nullptr ? 1 : 0);
      if (total > kFused) out = s.sum;  // a later pass must not read what this one wrote
      int done = 0;
      do {
        const int part = total - done < kFused ? total - done : kFused;
        for (int k = 0; k < part; ++k) terms[k] = load_term(done + k, start, n, s, s.terms[k]);
        if (done == 0) {
          combine_some<C, C, kEach>(part, n, x, c[0], terms, c + 1, out);
        } else {
          Coefficient<C>& one = s.coefficients[0];
          for (int i = 0; i < (kEach ? n : 0); ++i) one.each[i] = C(1);
          one.value = C(1);  // 1 * sum is sum, bit for bit
          combine_some<C, C, kEach>(part, n, out, one, terms, c + 1 + done, out);
        }
        done += part;
      } while (done < total);
      if (total > kFused && !varies_) s.coefficients[0].value = coefficient(0, 0);
    }
    store_tile(space_, operands_[0], start, n, stream_, out);
    if (cast_ >= 0) store_cast(start, n, out, s);
  }

  const C* load_term(int k, int64_t start, int n, Scratch<C>& s, C* buffer) const {
    if (k < a_.count) return load_tile(space_, operands_[2 + k], start, n, buffer);
    source_.fill(start, n, s.noise);
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<C>(s.noise[i]);
    return buffer;
  }

  // The copy is of the stored state: where the state is stored in fewer bits, they are lost here too.
  void store_cast(int64_t start, int n, const C* state, Scratch<C>& s) const {
    if (operands_[0].dtype != compute_dtype<C>()) {
      alignas(64) char stored[kTile * sizeof(double)];
      store_run(stored, operands_[0].dtype, 1, n, state);
      load_run(stored, operands_[0].dtype, 1, n, s.x);
      state = s.x;
    }
    store_tile(space_, operands_[cast_], start, n, stream_cast_, state);
  }

  const StepArguments& a_;
  Operand operands_[kMaxOperands];  // out, x, terms, cast
  Space space_;
  NoiseSource source_;
  rfk_scalar scalars_[RFK_MAX_TERMS + 2];
  int scalar_count_ = 0, cast_ = -1;
  bool varies_ = false, each_ = false, stream_ = false, stream_cast_ = false, bfloat16_ = false;
};

}  // namespace

void step(const StepArguments& arguments) {
  if (arguments.x->dtype == RFK_FLOAT64) {
    Step<double>(arguments).run();
  } else {
    Step<float>(arguments).run();
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
