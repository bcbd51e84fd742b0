// e4m3.h: float32 to the 8-bit float e4m3 (4 exponent bits, 3 of mantissa, largest 448, no infinities), in integers.
#ifndef RFK_CORE_E4M3_H_
#define RFK_CORE_E4M3_H_

#include <cstdint>

#include "rfk/host_device.h"

namespace rfk {

// `bits` of a float32 that is a number; nearest, ties to even; beyond 448 the largest code.
RFK_HD uint32_t e4m3_from_float_bits(uint32_t bits) {
  const uint32_t size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size >= 121u << 23) {  // 2^-6, the least normal number: drop 20 bits of mantissa, move the bias from 127 to 7
    const uint32_t code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
    return sign | (code < 0x7eu ? code : 0x7eu);
  }
  // Multiples of 2^-9: the mantissa shifted right by 21 (just below 2^-6) or more; from 25 on (below 2^-10) less than half.
  const uint32_t shift = 141u - (size >> 23);
  if (shift > 24u) return sign;
  const uint32_t mantissa = (size & 0x7fffffu) | 0x800000u, half = 1u << (shift - 1u);
  const uint32_t code = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u);
  return sign | (code + (rest > half || (rest == half && (code & 1u)) ? 1u : 0u));
}

}  // namespace rfk

#endif  // RFK_CORE_E4M3_H_
