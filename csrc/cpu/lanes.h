// lanes.h: sixteen floats or 32-bit integers at a time, on AVX-512 with VNNI, on AVX2 pairs, and as plain loops.
//
// Every operation is correctly rounded (fma included) and gives the same bits on each, but for the fraction of a number just below
// an integer: there AVX-512 rounds down and the others to nearest, a difference in the last place.
// Included inside one ISA level's namespace (RFK_ISA_NAMESPACE).
#ifndef RFK_CPU_LANES_H_
#define RFK_CPU_LANES_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if RFK_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define RFK_INLINE __attribute__((always_inline)) static inline
#else
#define RFK_INLINE static inline
#endif

namespace rfk {
namespace RFK_ISA_NAMESPACE {

constexpr int kLanes = 16;
constexpr float kMinusInfinity = -HUGE_VALF;

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};

RFK_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
RFK_INLINE Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
RFK_INLINE Floats load_bfloat16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
RFK_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
RFK_INLINE void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
RFK_INLINE Floats splat(float a) { return {_mm512_set1_ps(a)}; }
RFK_INLINE Ints splat(int32_t a) { return {_mm512_set1_epi32(a)}; }
RFK_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
RFK_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
RFK_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
RFK_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
RFK_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
RFK_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
RFK_INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
RFK_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
RFK_INLINE Floats to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
RFK_INLINE Ints to_int(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest, ties to even
RFK_INLINE Floats select(uint32_t bits, Floats yes, Floats no) {
  return {_mm512_mask_mov_ps(no.v, static_cast<__mmask16>(bits), yes.v)};
}
// Lane by lane: whether `set` and `bit` have a common bit.
RFK_INLINE Floats select(Ints set, Ints bit, Floats yes, Floats no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_test_epi32_mask(set.v, bit.v), yes.v)};
}
// A bit for every lane in which a < b.
RFK_INLINE uint32_t less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
RFK_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }

// The fraction t - floor(t), and q * 2^floor(t) for q in [1, 2]; t may be -infinity (then 0).
RFK_INLINE Floats fraction(Floats t) { return {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF)}; }
RFK_INLINE Floats scale_by_exponent(Floats q, Floats t) { return {_mm512_scalef_ps(q.v, t.v)}; }

// Four vectors of integers in [0, 255] as bytes [lane][4].
RFK_INLINE void store_bytes(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(a.v, b.v), _mm512_packus_epi32(c.v, d.v));
  _mm512_storeu_si512(p, _mm512_shuffle_epi8(packed, order));
}
// The same for integers in [-127, 127].
RFK_INLINE void store_signed_bytes(int8_t* p, Ints a, Ints b, Ints c, Ints d) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  _mm512_storeu_si512(p, _mm512_shuffle_epi8(packed, order));
}
// Sixteen integers that add up to the sum of 64 signed bytes.
RFK_INLINE Ints byte_sums(const int8_t* p) {
  return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(p))};
}
// The low bytes of sixteen integers, in order.
RFK_INLINE void store_low_bytes(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// One stage of the Walsh-Hadamard butterfly inside the vector: (a, b) at distance h -> (a + b, a - b).
template <int H>
RFK_INLINE Floats butterfly(Floats x) {
  __m512 other;
  if constexpr (H == 1) other = _mm512_permute_ps(x.v, 0xB1);
  if constexpr (H == 2) other = _mm512_permute_ps(x.v, 0x4E);
  if constexpr (H == 4) other = _mm512_shuffle_f32x4(x.v, x.v, 0xB1);
  if constexpr (H == 8) other = _mm512_shuffle_f32x4(x.v, x.v, 0x4E);
  constexpr int kUpper = H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00;
  const __m512 sign = _mm512_mask_blend_ps(static_cast<__mmask16>(kUpper), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return {_mm512_fmadd_ps(x.v, sign, other)};  // one rounding, of the sum or the difference
}

// A 16 x 16 block of dwords: rows `source_stride` dwords apart to rows `target_stride` apart, transposed.
template <class T>
RFK_INLINE void transpose(const T* source, int64_t source_stride, T* target, int64_t target_stride) {
  static_assert(sizeof(T) == 4, "dwords");
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(source + i * source_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + i * target_stride, r[i]);
}

#elif defined(__AVX2__)

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};

RFK_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
RFK_INLINE Ints load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
RFK_INLINE Floats load_bfloat16(const uint16_t* p) {
  const auto eight = [](const uint16_t* place) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  };
  return {eight(p), eight(p + 8)};
}
RFK_INLINE void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
RFK_INLINE void store(int32_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
RFK_INLINE Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
RFK_INLINE Ints splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
RFK_INLINE Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
RFK_INLINE Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
RFK_INLINE Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
RFK_INLINE Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
RFK_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
RFK_INLINE Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
RFK_INLINE Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
RFK_INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
RFK_INLINE Floats to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
RFK_INLINE Ints to_int(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
RFK_INLINE Floats select(uint32_t bits, Floats yes, Floats no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto chosen = [&](uint32_t part) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(part)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
  };
  return {_mm256_blendv_ps(no.a, yes.a, chosen(bits & 255u)), _mm256_blendv_ps(no.b, yes.b, chosen((bits >> 8) & 255u))};
}
RFK_INLINE Floats select(Ints set, Ints bit, Floats yes, Floats no) {
  const auto half = [](__m256i s, __m256i b, __m256 y, __m256 n) {
    const __m256i none = _mm256_cmpeq_epi32(_mm256_and_si256(s, b), _mm256_setzero_si256());
    return _mm256_blendv_ps(y, n, _mm256_castsi256_ps(none));
  };
  return {half(set.a, bit.a, yes.a, no.a), half(set.b, bit.b, yes.b, no.b)};
}
RFK_INLINE uint32_t less(Floats x, Floats y) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ));
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 8;
}
RFK_INLINE float reduce_max(Floats x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 n = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  n = _mm_max_ps(n, _mm_movehl_ps(n, n));
  return _mm_cvtss_f32(_mm_max_ss(n, _mm_shuffle_ps(n, n, 1)));
}

RFK_INLINE __m256 fraction(__m256 t) {
  t = _mm256_max_ps(t, _mm256_set1_ps(-127.0f));
  return _mm256_sub_ps(t, _mm256_floor_ps(t));
}
RFK_INLINE Floats fraction(Floats t) { return {fraction(t.a), fraction(t.b)}; }
RFK_INLINE __m256 scale_by_exponent(__m256 q, __m256 t) {
  t = _mm256_floor_ps(_mm256_max_ps(t, _mm256_set1_ps(-127.0f)));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(t), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(q, _mm256_castsi256_ps(exponent));
}
RFK_INLINE Floats scale_by_exponent(Floats q, Floats t) {
  return {scale_by_exponent(q.a, t.a), scale_by_exponent(q.b, t.b)};
}

RFK_INLINE void store_bytes(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto half = [&](uint8_t* place, __m256i w, __m256i x, __m256i y, __m256i z) {
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(w, x), _mm256_packus_epi32(y, z));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm256_shuffle_epi8(packed, order));
  };
  half(p, a.a, b.a, c.a, d.a);
  half(p + 32, a.b, b.b, c.b, d.b);
}
RFK_INLINE void store_signed_bytes(int8_t* p, Ints a, Ints b, Ints c, Ints d) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto half = [&](int8_t* place, __m256i w, __m256i x, __m256i y, __m256i z) {
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(w, x), _mm256_packs_epi32(y, z));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm256_shuffle_epi8(packed, order));
  };
  half(p, a.a, b.a, c.a, d.a);
  half(p + 32, a.b, b.b, c.b, d.b);
}
RFK_INLINE Ints byte_sums(const int8_t* p) {
  const auto half = [](const int8_t* place) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
  };
  return {half(p), half(p + 32)};
}
RFK_INLINE void store_low_bytes(int8_t* p, Ints x) {
  alignas(32) int32_t values[16];
  store(values, x);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(values[i]);
}

template <int H>
RFK_INLINE Floats butterfly(Floats x) {
  if constexpr (H == 8) return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
  const auto half = [](__m256 v) {
    __m256 other;
    if constexpr (H == 1) other = _mm256_permute_ps(v, 0xB1);
    if constexpr (H == 2) other = _mm256_permute_ps(v, 0x4E);
    if constexpr (H >= 4) other = _mm256_permute2f128_ps(v, v, 1);
    constexpr int kUpper = H == 1 ? 0xAA : H == 2 ? 0xCC : 0xF0;
    return _mm256_blend_ps(_mm256_add_ps(other, v), _mm256_sub_ps(other, v), kUpper);
  };
  return {half(x.a), half(x.b)};
}

template <class T>
RFK_INLINE void transpose(const T* source, int64_t source_stride, T* target, int64_t target_stride) {
  static_assert(sizeof(T) == 4, "dwords");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) target[j * target_stride + i] = source[i * source_stride + j];
  }
}

#else

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};

template <class F>
RFK_INLINE Floats each(F f) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
RFK_INLINE Floats load(const float* p) {
  Floats r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
RFK_INLINE Ints load(const int32_t* p) {
  Ints r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
RFK_INLINE Floats load_bfloat16(const uint16_t* p) {
  Floats r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
RFK_INLINE void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
RFK_INLINE void store(int32_t* p, Ints a) { std::memcpy(p, a.v, sizeof a.v); }
RFK_INLINE Floats splat(float a) {
  return each([&](int) { return a; });
}
RFK_INLINE Ints splat(int32_t a) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = a;
  return r;
}
RFK_INLINE Floats operator+(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
RFK_INLINE Floats operator-(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
RFK_INLINE Floats operator*(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
RFK_INLINE Floats operator/(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
RFK_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
RFK_INLINE Floats max(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
RFK_INLINE Floats abs(Floats a) {
  return each([&](int i) { return std::fabs(a.v[i]); });
}
RFK_INLINE Ints operator+(Ints a, Ints b) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
RFK_INLINE Floats to_float(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
RFK_INLINE Ints to_int(Floats a) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i]));
  return r;
}
RFK_INLINE Floats select(uint32_t bits, Floats yes, Floats no) {
  return each([&](int i) { return (bits >> i) & 1u ? yes.v[i] : no.v[i]; });
}
RFK_INLINE Floats select(Ints set, Ints bit, Floats yes, Floats no) {
  return each([&](int i) { return (set.v[i] & bit.v[i]) != 0 ? yes.v[i] : no.v[i]; });
}
RFK_INLINE uint32_t less(Floats a, Floats b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
RFK_INLINE float reduce_max(Floats a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
RFK_INLINE Floats fraction(Floats t) {
  return each([&](int i) {
    const float clamped = t.v[i] > -127.0f ? t.v[i] : -127.0f;
    return clamped - std::floor(clamped);
  });
}
RFK_INLINE Floats scale_by_exponent(Floats q, Floats t) {
  return each([&](int i) {
    const float clamped = t.v[i] > -127.0f ? t.v[i] : -127.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(std::floor(clamped)) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return q.v[i] * power;
  });
}
RFK_INLINE void store_bytes(uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
  for (int i = 0; i < 16; ++i) {
    p[4 * i] = static_cast<uint8_t>(a.v[i]);
    p[4 * i + 1] = static_cast<uint8_t>(b.v[i]);
    p[4 * i + 2] = static_cast<uint8_t>(c.v[i]);
    p[4 * i + 3] = static_cast<uint8_t>(d.v[i]);
  }
}
RFK_INLINE void store_signed_bytes(int8_t* p, Ints a, Ints b, Ints c, Ints d) {
  store_bytes(reinterpret_cast<uint8_t*>(p), a, b, c, d);
}
RFK_INLINE Ints byte_sums(const int8_t* p) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[4 * i] + p[4 * i + 1] + p[4 * i + 2] + p[4 * i + 3];
  return r;
}
RFK_INLINE void store_low_bytes(int8_t* p, Ints a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
template <int H>
RFK_INLINE Floats butterfly(Floats x) {
  return each([&](int i) { return (i & H) != 0 ? x.v[i - H] - x.v[i] : x.v[i] + x.v[i + H]; });
}
template <class T>
RFK_INLINE void transpose(const T* source, int64_t source_stride, T* target, int64_t target_stride) {
  static_assert(sizeof(T) == 4, "dwords");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) target[j * target_stride + i] = source[i * source_stride + j];
  }
}

#endif

// 2^t by a polynomial of the fraction. Two terms: 1.7e-3 relative, a fifth of the step of an 8-bit P at its top; three
// terms: 7.5e-5, for P in bfloat16; five terms: 7e-8, for factors whose errors add up over the blocks.
template <int Terms>
RFK_INLINE Floats exp2(Floats t) {
  const Floats f = fraction(t);
  Floats q;
  if constexpr (Terms == 2) {
    q = fma(splat(0.33718944f), f, splat(0.65763628f));
    q = fma(q, f, splat(1.00172472f));
  } else if constexpr (Terms == 3) {
    q = fma(splat(0.07802301f), f, splat(0.22606939f));
    q = fma(q, f, splat(0.69583285f));
    q = fma(q, f, splat(0.99992526f));
  } else {
    static_assert(Terms == 5, "2, 3 or 5 terms");
    q = fma(splat(0.0018814297f), f, splat(0.0089800246f));
    q = fma(q, f, splat(0.0558339916f));
    q = fma(q, f, splat(0.2401512265f));
    q = fma(q, f, splat(0.6931532621f));
    q = fma(q, f, splat(1.0f));
  }
  return scale_by_exponent(q, t);
}

// Bit j of the result: byte j of the 32 is not 0.
RFK_INLINE uint32_t nonzero_bytes(const char* p) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return bits;
#endif
}

// Two vectors of non-negative finite floats as bfloat16 pairs [lane][2], rounded to nearest even.
RFK_INLINE void store_bfloat16_pairs(uint8_t* p, Floats a, Floats b) {
#if defined(__AVX512VNNI__)
  const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
  const auto rounded = [&](__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    return _mm512_add_epi32(bits, _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(bits, 16), one)));
  };
  const __m512i low = _mm512_srli_epi32(rounded(a.v), 16);
  const __m512i high = _mm512_and_si512(rounded(b.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
#else
  float low[16], high[16];
  store(low, a);
  store(high, b);
  uint16_t* out = reinterpret_cast<uint16_t*>(p);
  for (int i = 0; i < 16; ++i) {
    uint32_t x, y;
    std::memcpy(&x, &low[i], 4);
    std::memcpy(&y, &high[i], 4);
    out[2 * i] = static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
    out[2 * i + 1] = static_cast<uint16_t>((y + 0x7fffu + ((y >> 16) & 1u)) >> 16);
  }
#endif
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_LANES_H_
