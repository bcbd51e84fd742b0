// quantize.cuh: what the kernels of quantize.cu do with rows in registers: loads, the rotation, scales, codes.
//
// A row of D channels is padded to Dp, a power of two, and held by G = max(4, Dp / 16) neighbouring threads, sixteen channels
// each: 8 l .. 8 l + 7 and the same 8 G further on, so that loads are 16 bytes of neighbouring memory a thread.
// Butterflies of span 1, 2, 4 and the last one stay inside a thread, the others cost one shuffle and one fma an element
// (the product with +-1 is exact, so the fma rounds what an addition would).
#ifndef RFK_CUDA_QUANTIZE_CUH_
#define RFK_CUDA_QUANTIZE_CUH_

#include "core/e4m3.h"
#include "core/rotation.h"
#include "cuda/common.cuh"

namespace rfk {
namespace cuda {

constexpr int kBlockKeys = 64;  // keys that share a scale, and whose sum enters the mean as one term
constexpr float kTiny = 0x1p-100f;
constexpr int kMaxChannels = RFK_MAX_CHANNELS;
constexpr int kRun = 8;         // channels of one load
constexpr int kLeastLanes = 4;  // threads of a row

struct SignTable {
  uint32_t bit[kMaxChannels];
};
constexpr SignTable make_sign_table() {
  SignTable table{};
  for (int d = 0; d < kMaxChannels; ++d) table.bit[d] = (kSignWords[d / 32] >> (d % 32)) << 31;
  return table;
}
alignas(16) static __device__ const SignTable sign_table = make_sign_table();

// A (B, H, S, D) tensor inside a kernel.
struct Heads {
  const char* data;
  int64_t batch_stride, head_stride, row_stride, channel_stride;  // in elements
  int32_t heads, channels;
  int32_t vector;  // whole runs of eight channels, aligned to 16 bytes

  template <int T>
  __device__ __forceinline__ const char* head(int64_t pair) const {
    const int64_t batch = pair / heads;
    return data + (batch * batch_stride + (pair - batch * heads) * head_stride) * static_item_size(T);
  }
};

// Eight channels from `first` on of the row at `row`; zeros where there are none. kVector: 1 or 0 where x.vector is known.
template <int T, int kVector = -1>
__device__ __forceinline__ void load_channels(const Heads& x, const char* row, int first, bool inside, Raw<T, kRun>& raw) {
  clear_pack(raw);
  if (!inside || first >= x.channels) return;
  if (kVector == 1 || (kVector < 0 && x.vector)) {
    load_pack<T, kRun>(row, T, first, raw);
    return;
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    if (first + j >= x.channels) continue;
    const int64_t index = (first + j) * x.channel_stride;
    if constexpr (T == RFK_FLOAT32) {
      raw.word[j] = reinterpret_cast<const uint32_t*>(row)[index];
    } else {
      raw.word[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[index]) << (16 * (j % 2));
    }
  }
}

__device__ __forceinline__ bool finite(float value) {
  return (bits_from_float(value) & 0x7fffffffu) < 0x7f800000u;
}

// The larger one; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
#if defined(RFK_CUDA_EMULATION)
  return a != a || a > b ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// y of the thread whose number differs in `bit`. All threads of the block take part.
template <int N>
__device__ __forceinline__ void exchange(const float (&y)[N], int bit, float (&other)[N]) {
#if defined(RFK_CUDA_EMULATION)
  emulation::exchange(y, N, bit, other);
#else
#pragma unroll
  for (int i = 0; i < N; ++i) other[i] = __shfl_xor_sync(0xffffffffu, y[i], bit);
#endif
}

// The largest over threads whose numbers differ in bits below `width`.
__device__ __forceinline__ float largest_of(float value, int width) {
  for (int bit = 1; bit < width; bit *= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, bit));
  return value;
}

// The first channel of a thread's half.
template <int G>
__device__ __forceinline__ int first_channel(int half) {
  return half * (kRun * G) + static_cast<int>(threadIdx.x) % G * kRun;
}

// The signs of a thread's channels as sign bits; none beyond the last channel, so that padding stays +0.
template <int G>
__device__ __forceinline__ void load_signs(int channels, uint32_t (&sign)[2 * kRun]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = first_channel<G>(half);
    const uint4* words = reinterpret_cast<const uint4*>(sign_table.bit + first);
    const uint4 low = words[0], high = words[1];
    const uint32_t all[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kRun; ++i) sign[half * kRun + i] = all[i];
    if (channels - first < kRun) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first + i >= channels) sign[half * kRun + i] = 0;
      }
    }
  }
}

__device__ __forceinline__ float flipped(float value, uint32_t sign) { return float_from_bits(bits_from_float(value) ^ sign); }

// Whether rows have a butterfly of that span; rows of less than 16 G channels occur with the smallest G only.
template <int G>
__device__ __forceinline__ bool spans(int rotated, int span) {
  return G > kLeastLanes || rotated > span;
}

// Walsh-Hadamard transform of the rows, spans 1, 2, 4, ... in order. rotated: their length.
template <int G>
__device__ __forceinline__ void rotate(float (&y)[2 * kRun], int rotated) {
#pragma unroll
  for (int span = 1; span < kRun; span *= 2) {
    if (!spans<G>(rotated, span)) continue;
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) {
      if (i & span) continue;
      const float a = y[i], b = y[i + span];
      y[i] = a + b;
      y[i + span] = a - b;
    }
  }
#pragma unroll
  for (int bit = 1; bit < G; bit *= 2) {
    if (!spans<G>(rotated, kRun * bit)) continue;
    const float sign = static_cast<int>(threadIdx.x) & bit ? -1.0f : 1.0f;
    float other[2 * kRun];
    exchange(y, bit, other);
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) y[i] = __fmaf_rn(y[i], sign, other[i]);
  }
  if (!spans<G>(rotated, kRun * G)) return;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const float a = y[i], b = y[i + kRun];
    y[i] = a + b;
    y[i + kRun] = a - b;
  }
}

template <int N>
__device__ __forceinline__ float largest_magnitude(const float (&y)[N], float largest) {
#pragma unroll
  for (int i = 0; i < N; ++i) largest = larger(largest, fabsf(y[i]));
  return largest;
}

// What a group with this largest magnitude is divided by and multiplied with. A group that holds a NaN or an infinity gets a
// NaN scale, which every score it takes part in inherits.
struct Factors {
  float scale, inverse;
};

__device__ __forceinline__ Factors factors(float largest, float limit) {
  if (!finite(largest)) return {float_from_bits(0x7fc00000u), 0.0f};
  if (largest < kTiny) return {0.0f, 0.0f};
  return {largest / limit, limit / largest};
}

// codes ------------------------------------------------------------------------------------------------------------

// Two e4m3 codes; the values are numbers of at most 448, up to rounding.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#if !defined(RFK_CUDA_EMULATION) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return e4m3_from_float_bits(bits_from_float(low)) | e4m3_from_float_bits(bits_from_float(high)) << 8;
#endif
}

__device__ __forceinline__ uint32_t e4m3_four(float a, float b, float c, float d) {
  return e4m3_pair(a, b) | e4m3_pair(c, d) << 16;
}

// Four int8 codes of magnitudes up to 127: adding 1.5 * 2^23 rounds to an integer, ties to even, in the low bits.
__device__ __forceinline__ uint32_t int8_four(float a, float b, float c, float d) {
  constexpr float kMagic = 12582912.0f;
  const uint32_t w = bits_from_float(a + kMagic), x = bits_from_float(b + kMagic);
  const uint32_t y = bits_from_float(c + kMagic), z = bits_from_float(d + kMagic);
#if defined(RFK_CUDA_EMULATION)
  return (w & 255u) | (x & 255u) << 8 | (y & 255u) << 16 | (z & 255u) << 24;
#else
  return __byte_perm(__byte_perm(w, x, 0x0040), __byte_perm(y, z, 0x0040), 0x5410);
#endif
}

// Codes of a row's part; `codes` is where the row's begin. The factor is 0 for groups that were not finite: their NaNs become 0.
template <int G>
__device__ __forceinline__ void store_codes(float (&y)[2 * kRun], float inverse, bool spoiled, bool e4m3, int rotated,
                                            uint8_t* codes) {
  if (spoiled) {
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) y[i] = finite(y[i]) ? y[i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 2 * kRun; ++i) y[i] = y[i] * inverse;
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word[i] = e4m3 ? e4m3_four(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3])
                   : int8_four(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
  }
  if (!spans<G>(rotated, kRun / 2)) {  // 1, 2 or 4 channels
    for (int i = 0; i < rotated && first_channel<G>(0) == 0; ++i) codes[i] = static_cast<uint8_t>(word[0] >> (8 * i));
    return;
  }
  if (spans<G>(rotated, first_channel<G>(0))) {
    *reinterpret_cast<uint2*>(codes + first_channel<G>(0)) = make_uint2(word[0], word[1]);
  }
  if (spans<G>(rotated, first_channel<G>(1))) {
    *reinterpret_cast<uint2*>(codes + first_channel<G>(1)) = make_uint2(word[2], word[3]);
  }
}

}  // namespace cuda
}  // namespace rfk

#endif  // RFK_CUDA_QUANTIZE_CUH_
