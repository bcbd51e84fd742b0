// philox.h: the project's random numbers, shared by CPU and CUDA.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//   key     = (low, high word of seed)
//   counter = (low, high word of element index / 4, low, high word of offset);   lane = element index % 4
// Uniform of the open-closed kind for the radius: u1 = ((w >> 8) + 1) 2^-24, of the closed-open kind for the angle:
// u2 = (w >> 8) 2^-24. Lane pairs (0,1) and (2,3) give two normals each by Box-Muller, cosine on the even lane:
//   z_even = sqrt(-2 ln u1) cos(2 pi u2),   z_odd = sqrt(-2 ln u1) sin(2 pi u2).
//
// ln, cos and sin are the polynomials below, in float products and sums that are never contracted to fma, so the numbers
// are the same bits on every ISA level and device (build with -ffp-contract=off, nvcc -fmad=false). The polynomials are
// minimax fits: relative error 6e-9 (ln), 4e-9 (sin), 1e-10 (cos), below the 6e-8 of one float rounding.
#ifndef RFK_PHILOX_H_
#define RFK_PHILOX_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rfk/host_device.h"

namespace rfk {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Ten rounds in place: c0..c3 counter in, words out.
RFK_HD void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

RFK_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

RFK_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

RFK_HD float uniform_from_word(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// sqrt(-2 ln u), u = ((word >> 8) + 1) 2^-24. With u 2^24 = 2^e (1 + f), 1 + f in [1/sqrt2, sqrt2):
// ln u = (f^3 P(f) + e lo) - f^2 / 2 + f + e hi, where hi + lo = ln 2 and hi has few bits, so e hi is exact.
RFK_HD float radius_from_word(uint32_t word) {
  const float scaled = static_cast<float>(static_cast<int32_t>((word >> 8) + 1));
  const uint32_t shifted = bits_from_float(scaled) + (0x3f800000u - 0x3f3504f3u);
  const float e = static_cast<float>(static_cast<int32_t>(shifted >> 23) - (127 + 24));
  const float f = float_from_bits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float ff = f * f;
  float p = -0.0763449967f;
  p = p * f + 0.127615824f;
  p = p * f + -0.13160184f;
  p = p * f + 0.142017573f;
  p = p * f + -0.166233569f;
  p = p * f + 0.200012267f;
  p = p * f + -0.250008196f;
  p = p * f + 0.333333313f;
  float log_u = p * (ff * f) + e * -2.12194440e-4f;
  log_u = log_u - 0.5f * ff;
  log_u = log_u + f;
  log_u = log_u + e * 0.693359375f;
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(-2.0f * log_u);
#else
  return sqrtf(-2.0f * log_u);
#endif
}

// cos and sin of 2 pi u2. The nearest quarter turn is taken off in integers, which is exact; the rest lies in
// [-pi/4, pi/4).
RFK_HD void turn_from_word(uint32_t word, float& cosine, float& sine) {
  const uint32_t k = word >> 8;
  const uint32_t quarter = (k + 0x200000u) >> 22;
  const float a = static_cast<float>(static_cast<int32_t>(k - (quarter << 22))) * 3.74507039e-07f;  // 2 pi 2^-24
  const float aa = a * a;
  float s = -1.95152815e-4f;
  s = s * aa + 8.33216030e-3f;
  s = s * aa + -1.66666552e-1f;
  s = (s * aa) * a + a;
  float c = 2.44331568e-5f;
  c = c * aa + -1.38873165e-3f;
  c = c * aa + 4.16666456e-2f;
  c = (c * aa) * aa + (1.0f - 0.5f * aa);
  const bool swap = (quarter & 1u) != 0u;
  const float cos_size = swap ? s : c;
  const float sin_size = swap ? c : s;
  // The sign bits: cosine is negative in quarters 1 and 2, sine in 2 and 3.
  cosine = float_from_bits(bits_from_float(cos_size) ^ (((quarter + 1u) & 2u) << 30));
  sine = float_from_bits(bits_from_float(sin_size) ^ ((quarter & 2u) << 30));
}

// Four words to four standard normals.
RFK_HD void normals_from_words(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, float& z0, float& z1, float& z2,
                               float& z3) {
  const float r0 = radius_from_word(w0), r2 = radius_from_word(w2);
  float c1, s1, c3, s3;
  turn_from_word(w1, c1, s1);
  turn_from_word(w3, c3, s3);
  z0 = r0 * c1;
  z1 = r0 * s1;
  z2 = r2 * c3;
  z3 = r2 * s3;
}

}  // namespace rfk

#endif  // RFK_PHILOX_H_
