// convert.h: runs of elements between storage dtypes and the compute type, and stores that bypass the cache.
//
// Included by the kernels of one ISA level inside its namespace (RFK_ISA_NAMESPACE), so every level gets its own code.
// bfloat16 and float16 round to nearest even; NaN stays NaN. The conversions are branch-free integer code that compilers
// vectorise; float16 takes F16C instructions where the level has them (5x faster), with the same results.
#ifndef RFK_CPU_CONVERT_H_
#define RFK_CPU_CONVERT_H_

#include <cstdint>
#include <cstring>

#include "rfk/philox.h"
#include "rfk/rfk.h"

#if RFK_X86
#include <immintrin.h>
#endif

// Called once per run of elements: one copy of each, or every kernel carries them all (23 s to compile one file, and a
// binary twice the size).
#if defined(__GNUC__)
#define RFK_NOINLINE __attribute__((noinline))
#else
#define RFK_NOINLINE
#endif

namespace rfk {
namespace RFK_ISA_NAMESPACE {

inline int item_size(int32_t dtype) {
  return dtype == RFK_FLOAT64 ? 8 : dtype == RFK_FLOAT32 ? 4 : dtype == RFK_BOOL ? 1 : 2;
}

inline float float_from_bfloat16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float float_from_float16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
  // Subnormals come from an integer: as bits they would be float subnormals too, which a thread may flush to zero.
  const uint32_t subnormal = bits_from_float(static_cast<float>(static_cast<int32_t>(half & 0x7fffu)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : magnitude + 0x38000000u;
  const uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
  return float_from_bits(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

inline uint16_t float16_from_float(float value) {
  const uint32_t all = bits_from_float(value), sign = (all >> 16) & 0x8000u, magnitude = all & 0x7fffffffu;
  // Normal results: rebias and round to nearest even on the 13 bits that fall away.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lines the bits up and rounds them in the floating point adder.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return static_cast<uint16_t>(half | sign);
}

// Kernels loop over S, the storage type: C itself (memory or buffers), or bfloat16 converted in registers, which lets loads and
// arithmetic overlap where a large call in bfloat16 would alternate between them.
struct Bfloat16 {
  uint16_t bits;
};
inline float get(float v) { return v; }
inline double get(double v) { return v; }
inline float get(Bfloat16 v) { return float_from_bfloat16(v.bits); }
inline void put(float* place, float v) { *place = v; }
inline void put(double* place, double v) { *place = v; }
inline void put(Bfloat16* place, float v) { place->bits = bfloat16_from_float(v); }

template <class C>
inline void load_bfloat16(const uint16_t* source, int64_t stride, int n, C* out) {
  if (stride == 1) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<C>(float_from_bfloat16(source[i]));
  } else {
    for (int i = 0; i < n; ++i) out[i] = static_cast<C>(float_from_bfloat16(source[i * stride]));
  }
}

template <class C>
inline void load_float16(const uint16_t* source, int64_t stride, int n, C* out) {
  int i = 0;
#if defined(__F16C__)
  if (stride == 1) {
    for (; i + 8 <= n; i += 8) {
      const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
      if constexpr (sizeof(C) == sizeof(float)) {
        _mm256_storeu_ps(reinterpret_cast<float*>(out) + i, part);
      } else {
        alignas(32) float values[8];
        _mm256_store_ps(values, part);
        for (int j = 0; j < 8; ++j) out[i + j] = static_cast<C>(values[j]);
      }
    }
  }
#endif
  for (; i < n; ++i) out[i] = static_cast<C>(float_from_float16(source[i * stride]));
}

template <class S, class C>
inline void load_plain(const S* source, int64_t stride, int n, C* out) {
  if (stride == 1) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<C>(source[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = static_cast<C>(source[i * stride]);
  }
}

// n elements of `dtype`, `stride` elements apart, to the compute type.
template <class C>
RFK_NOINLINE void load_run(const char* source, int32_t dtype, int64_t stride, int n, C* out) {
  switch (dtype) {
    case RFK_FLOAT32: return load_plain(reinterpret_cast<const float*>(source), stride, n, out);
    case RFK_FLOAT64: return load_plain(reinterpret_cast<const double*>(source), stride, n, out);
    case RFK_BFLOAT16: return load_bfloat16(reinterpret_cast<const uint16_t*>(source), stride, n, out);
    default: return load_float16(reinterpret_cast<const uint16_t*>(source), stride, n, out);
  }
}

// double goes to the half types through float, as torch's conversions do.
template <class C>
inline float narrow(C value) {
  return static_cast<float>(value);
}

template <class C>
RFK_NOINLINE void store_run(char* target, int32_t dtype, int64_t stride, int n, const C* values) {
  switch (dtype) {
    case RFK_FLOAT32: {
      float* out = reinterpret_cast<float*>(target);
      if (stride == 1) {
        for (int i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
      } else {
        for (int i = 0; i < n; ++i) out[i * stride] = static_cast<float>(values[i]);
      }
      return;
    }
    case RFK_FLOAT64: {
      double* out = reinterpret_cast<double*>(target);
      if (stride == 1) {
        for (int i = 0; i < n; ++i) out[i] = static_cast<double>(values[i]);
      } else {
        for (int i = 0; i < n; ++i) out[i * stride] = static_cast<double>(values[i]);
      }
      return;
    }
    case RFK_BFLOAT16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(target);
      if (stride == 1) {
        for (int i = 0; i < n; ++i) out[i] = bfloat16_from_float(narrow(values[i]));
      } else {
        for (int i = 0; i < n; ++i) out[i * stride] = bfloat16_from_float(narrow(values[i]));
      }
      return;
    }
    default: {
      uint16_t* out = reinterpret_cast<uint16_t*>(target);
      int i = 0;
#if defined(__F16C__)
      if (stride == 1) {
        for (; i + 8 <= n; i += 8) {
          alignas(32) float part[8];
          __m256 eight;
          if constexpr (sizeof(C) == sizeof(float)) {
            eight = _mm256_loadu_ps(reinterpret_cast<const float*>(values) + i);
          } else {
            for (int j = 0; j < 8; ++j) part[j] = narrow(values[i + j]);
            eight = _mm256_load_ps(part);
          }
          const __m128i half = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
        }
      }
#endif
      for (; i < n; ++i) out[i * stride] = float16_from_float(narrow(values[i]));
    }
  }
}

// Copy bytes past the cache: a store that misses would first read the line it overwrites, a third of the traffic of a
// large step. Lines that are not whole go the ordinary way.
RFK_NOINLINE inline void stream_bytes(char* target, const char* source, int64_t bytes) {
#if RFK_X86 && defined(__SSE2__)
  constexpr int64_t kLine = 64;
  int64_t head = (kLine - static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kLine)) % kLine;
  if (head > bytes) head = bytes;
  std::memcpy(target, source, static_cast<size_t>(head));
  int64_t i = head;
#if defined(__AVX512F__)
  for (; i + kLine <= bytes; i += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
#elif defined(__AVX2__)
  for (; i + kLine <= bytes; i += kLine) {
    for (int part = 0; part < 64; part += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + part),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + part)));
    }
  }
#else
  for (; i + kLine <= bytes; i += kLine) {
    for (int part = 0; part < 64; part += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + part)));
    }
  }
#endif
  std::memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(target, source, static_cast<size_t>(bytes));
#endif
}

inline void stream_fence() {
#if RFK_X86 && defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_CONVERT_H_
