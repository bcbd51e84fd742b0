// tiles.h: AMX's tile instructions in plain C++, included before the attention kernels, so that their AMX code is tested on CPUs
// without AMX. Only what the kernels use: eight tiles of 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig rfk_tiles::configure
#define _tile_release rfk_tiles::release
#define _tile_zero rfk_tiles::zero
#define _tile_loadd rfk_tiles::load
#define _tile_stored rfk_tiles::store
#define _tile_dpbssd rfk_tiles::multiply<int8_t>
#define _tile_dpbsud rfk_tiles::multiply<uint8_t>
#define _tile_dpbf16ps rfk_tiles::multiply_bfloat16

namespace rfk_tiles {

inline thread_local unsigned char tile[8][16][64];
inline thread_local bool configured = false;

// What a tile holds after configuring is for nobody to rely on.
inline void configure(const void*) {
  configured = true;
  std::memset(tile, 0x77, sizeof tile);
}

inline void release() { configured = false; }

inline void check() {
  if (!configured) __builtin_trap();  // real tiles fault, too
}

inline void zero(int t) {
  check();
  std::memset(tile[t], 0, sizeof tile[t]);
}

inline void load(int t, const void* from, int64_t stride) {
  check();
  for (int row = 0; row < 16; ++row) std::memcpy(tile[t][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int t, void* to, int64_t stride) {
  check();
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tile[t][row], 64);
}

template <class T>
inline T element(int t, int row, int index) {
  T value;
  std::memcpy(&value, tile[t][row] + index * static_cast<int>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
inline void set(int t, int row, int index, T value) {
  std::memcpy(tile[t][row] + index * static_cast<int>(sizeof(T)), &value, sizeof(T));
}

// c += a b: a holds signed bytes, b groups of four rows of bytes of type B.
template <class B>
inline void multiply(int c, int a, int b) {
  check();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum = element<int32_t>(c, m, n);
      for (int k = 0; k < 64; ++k) sum += element<int8_t>(a, m, k) * element<B>(b, k / 4, 4 * n + k % 4);
      set(c, m, n, sum);
    }
  }
}

inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void multiply_bfloat16(int c, int a, int b) {
  check();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = element<float>(c, m, n);
      for (int k = 0; k < 32; ++k) sum += widen(element<uint16_t>(a, m, k)) * widen(element<uint16_t>(b, k / 2, 2 * n + k % 2));
      set(c, m, n, sum);
    }
  }
}

}  // namespace rfk_tiles
