// products.h: the matrix products of attention, 32 rows of A times 32 columns of B, on AMX tiles, VNNI, AVX2 and plain loops.
//
// A lies in tiles of 16 rows x 64 bytes; B in rows of 128 bytes, each holding for 32 columns the 4 (8 bit) or 2 (16 bit)
// consecutive values along k of one dword. One step is 64 bytes of k. The same layout serves scores^T = K Q^T (A = K, B = Q) and
// out^T = V^T P^T (A = V^T, B = P), with queries as columns throughout: their statistics are vertical operations then.
// Integer sums are exact and the same on every level.
// Included inside one ISA level's namespace (RFK_ISA_NAMESPACE).
#ifndef RFK_CPU_PRODUCTS_H_
#define RFK_CPU_PRODUCTS_H_

#include "cpu/lanes.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define RFK_AMX 1
#else
#define RFK_AMX 0
#endif

namespace rfk {
namespace RFK_ISA_NAMESPACE {

enum class Numbers {
  kSigned,    // s8 x s8
  kUnsigned,  // s8 (A) x u8 (B)
  kBfloat16   // bfloat16 x bfloat16, float sums
};

constexpr int kBlock = 32;              // rows and columns of one product
constexpr int kStepBytes = 16 * 128;    // of B
constexpr int kTileBytes = 16 * 64;     // of A

// VNNI multiplies u8 by s8 only: there the scores' B is stored with 128 added, and 128 times A's row sums taken back.
#if defined(__AVX512VNNI__) && !RFK_AMX
constexpr bool kShiftedQueries = true;
#else
constexpr bool kShiftedQueries = false;
#endif

struct Product {
  const char* a;             // tile of rows 0..15, step 0
  int64_t a_rows;            // bytes from there to the tile of rows 16..31
  int64_t a_step;            // bytes from step to step
  const char* b;             // step 0
  int steps;
  const int32_t* a_row_sums;  // of the 32 rows, where kShiftedQueries asks for them
  void* c;                   // 32 x 32 int32 or float
};

#if RFK_AMX

// Step `step` of the product; the sums stay in tiles 0 to 3 from step 0 until product_store.
template <Numbers N>
RFK_INLINE void product_step(const Product& p, int step) {
  if (step == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* a = p.a + step * p.a_step;
  const char* b = p.b + step * kStepBytes;
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 128);
  _tile_loadd(7, b + 64, 128);
  _tile_loadd(5, a + p.a_rows, 64);
  if constexpr (N == Numbers::kSigned) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  } else if constexpr (N == Numbers::kUnsigned) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <Numbers N>
RFK_INLINE void product_store(const Product& p) {
  char* c = static_cast<char*>(p.c);
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 64, 128);
  _tile_stored(2, c + 16 * 128, 128);
  _tile_stored(3, c + 16 * 128 + 64, 128);
}

#else

RFK_INLINE int32_t dword(const char* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

#if defined(__AVX512VNNI__)

template <bool Shifted>
RFK_INLINE void integer_rows(const Product& p, int row) {
  __m512i sums[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    sums[r][0] = sums[r][1] = _mm512_set1_epi32(Shifted ? -128 * p.a_row_sums[row + r] : 0);
  }
  const char* a = p.a + (row >= 16 ? p.a_rows : 0) + (row % 16) * 64;
  for (int step = 0; step < p.steps; ++step) {
    const char* rows = a + step * p.a_step;
    const char* b = p.b + step * kStepBytes;
    for (int k = 0; k < 16; ++k) {
      const __m512i b0 = _mm512_loadu_si512(b + k * 128), b1 = _mm512_loadu_si512(b + k * 128 + 64);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const __m512i value = _mm512_set1_epi32(dword(rows + r * 64 + k * 4));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], b0, value);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], b1, value);
      }
    }
  }
  int32_t* c = static_cast<int32_t*>(p.c) + row * kBlock;
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    _mm512_storeu_si512(c + r * kBlock, sums[r][0]);
    _mm512_storeu_si512(c + r * kBlock + 16, sums[r][1]);
  }
}

template <Numbers N>
RFK_INLINE void integer_product(const Product& p) {
  for (int row = 0; row < kBlock; row += 8) integer_rows<N == Numbers::kSigned>(p, row);
}

#elif defined(__AVX2__)

// Signed (or unsigned) bytes of 8 dwords as 16-bit numbers, the even ones and the odd ones apart.
template <bool Signed>
RFK_INLINE void widen(const char* bytes, int16_t* even, int16_t* odd) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i low = Signed ? _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8) : _mm256_and_si256(x, _mm256_set1_epi16(255));
  const __m256i high = Signed ? _mm256_srai_epi16(x, 8) : _mm256_srli_epi16(x, 8);
  _mm256_store_si256(reinterpret_cast<__m256i*>(even), low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(odd), high);
}

constexpr int kMaxSteps = 4;  // of an integer product: 256 channels, or 256 keys

// In 16-bit pairs (vpmaddwd), which is exact for every code. Both sides are widened once a product, a tenth of its time.
template <Numbers N>
RFK_INLINE void integer_product(const Product& p) {
  alignas(32) int16_t a[2][kMaxSteps * kBlock * 32], b[2][kMaxSteps * kBlock * 32];  // [even, odd][step][row or k][..]
  for (int step = 0; step < p.steps; ++step) {
    for (int row = 0; row < kBlock; ++row) {
      const char* codes = p.a + step * p.a_step + (row >= 16 ? p.a_rows : 0) + row % 16 * 64;
      const int at = (step * kBlock + row) * 32;
      for (int i = 0; i < 2; ++i) widen<true>(codes + 32 * i, a[0] + at + 16 * i, a[1] + at + 16 * i);
    }
    for (int i = 0; i < 64; ++i) {
      const int at = step * 1024 + 16 * i;
      widen<N == Numbers::kSigned>(p.b + step * kStepBytes + 32 * i, b[0] + at, b[1] + at);
    }
  }
  constexpr int kRows = 4;
  const auto pairs = [](const int16_t* place) {
    int32_t value;
    std::memcpy(&value, place, 4);
    return _mm256_set1_epi32(value);
  };
  for (int part = 0; part < kBlock; part += 16) {
    for (int row = 0; row < kBlock; row += kRows) {
      __m256i sums[kRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
      for (int step = 0; step < p.steps; ++step) {
        for (int k = 0; k < 16; ++k) {
          const int column = (step * 16 + k) * 64 + part * 2;
          const auto values = [&](int odd, int i) {
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(b[odd] + column + 16 * i));
          };
          const __m256i even0 = values(0, 0), even1 = values(0, 1), odd0 = values(1, 0), odd1 = values(1, 1);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int at = (step * kBlock + row + r) * 32 + 2 * k;
            const __m256i even = pairs(a[0] + at), odd = pairs(a[1] + at);
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(even0, even));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(even1, even));
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(odd0, odd));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(odd1, odd));
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t* c = static_cast<int32_t*>(p.c) + (row + r) * kBlock + part;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), sums[r][0]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + 8), sums[r][1]);
      }
    }
  }
}

#else

template <Numbers N>
RFK_INLINE void integer_product(const Product& p) {
  for (int row = 0; row < kBlock; ++row) {
    const char* a = p.a + (row >= 16 ? p.a_rows : 0) + (row % 16) * 64;
    int32_t sums[kBlock] = {};
    for (int step = 0; step < p.steps; ++step) {
      for (int k = 0; k < 64; ++k) {
        const int32_t value = reinterpret_cast<const int8_t*>(a + step * p.a_step)[k];
        const char* b = p.b + step * kStepBytes + k / 4 * 128 + k % 4;
        for (int column = 0; column < kBlock; ++column) {
          const char byte = b[4 * column];
          const int32_t other = N == Numbers::kUnsigned ? static_cast<int32_t>(static_cast<uint8_t>(byte))
                                                        : static_cast<int32_t>(static_cast<int8_t>(byte));
          sums[column] += value * other;
        }
      }
    }
    std::memcpy(static_cast<int32_t*>(p.c) + row * kBlock, sums, sizeof sums);
  }
}

#endif

// A 16-bit product without tiles: bfloat16 is widened to float and multiplied with fma, k in order.
RFK_INLINE void bfloat16_product(const Product& p) {
  constexpr int kRows = 4;
  for (int row = 0; row < kBlock; row += kRows) {
    const char* a = p.a + (row >= 16 ? p.a_rows : 0) + (row % 16) * 64;
    Floats sums[kRows][2];
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = splat(0.0f);
    for (int step = 0; step < p.steps; ++step) {
      for (int k = 0; k < 16; ++k) {
        alignas(64) uint32_t pairs[kBlock], even_bits[kBlock], odd_bits[kBlock];
        alignas(64) float even[kBlock], odd[kBlock];
        std::memcpy(pairs, p.b + step * kStepBytes + k * 128, sizeof pairs);
        for (int i = 0; i < kBlock; ++i) {
          even_bits[i] = pairs[i] << 16;
          odd_bits[i] = pairs[i] & 0xffff0000u;
        }
        std::memcpy(even, even_bits, sizeof even);
        std::memcpy(odd, odd_bits, sizeof odd);
        for (int r = 0; r < kRows; ++r) {
          const uint32_t bits = static_cast<uint32_t>(dword(a + step * p.a_step + r * 64 + k * 4));
          const uint32_t first_bits = bits << 16, second_bits = bits & 0xffff0000u;
          float first, second;
          std::memcpy(&first, &first_bits, 4);
          std::memcpy(&second, &second_bits, 4);
          for (int i = 0; i < 2; ++i) {
            sums[r][i] = fma(load(even + 16 * i), splat(first), sums[r][i]);
            sums[r][i] = fma(load(odd + 16 * i), splat(second), sums[r][i]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* c = static_cast<float*>(p.c) + (row + r) * kBlock;
      store(c, sums[r][0]);
      store(c + 16, sums[r][1]);
    }
  }
}

// Without tiles the whole product is computed where it is stored.
template <Numbers N>
RFK_INLINE void product_step(const Product&, int) {}

template <Numbers N>
RFK_INLINE void product_store(const Product& p) {
  if constexpr (N == Numbers::kBfloat16) {
    bfloat16_product(p);
  } else {
    integer_product<N>(p);
  }
}

#endif

// The tile registers of the calling thread for the time of a task; nothing where there are none.
class TileState {
 public:
  TileState() {
#if RFK_AMX
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.column_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
#endif
  }
  ~TileState() {
#if RFK_AMX
    _tile_release();
#endif
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;
};

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_PRODUCTS_H_
