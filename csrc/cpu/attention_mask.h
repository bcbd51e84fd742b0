// attention_mask.h: masks of attention, 32 keys by 32 queries at a time, turned so that a key's queries lie together.
//
// Included inside one ISA level's namespace (RFK_ISA_NAMESPACE).
#ifndef RFK_CPU_ATTENTION_MASK_H_
#define RFK_CPU_ATTENTION_MASK_H_

#include "cpu/convert.h"
#include "cpu/lanes.h"
#include "cpu/quantize.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {

constexpr float kMasked = -1e30f;  // mask values up to here exclude a key
constexpr float kLog2E = 1.44269504088896341f;

// The mask of one query head: element (query, key), strides in elements.
struct MaskView {
  const char* data = nullptr;  // NULL: none
  int32_t dtype = 0;
  int64_t query_stride = 0, key_stride = 0;
  bool boolean() const { return dtype == RFK_BOOL; }
  const char* at(int64_t query, int64_t key) const {
    return data + (query * query_stride + key * key_stride) * item_size(dtype);
  }
};

// Float mask values to log2 units, excluded ones to -infinity; false when one is NaN or above 1e30.
inline bool scale_mask(float* values, int n) {
  bool good = true;
  for (int i = 0; i < n; ++i) {
    good = good && values[i] <= -kMasked;
    values[i] = values[i] > kMasked ? values[i] * kLog2E : kMinusInfinity;
  }
  return good;
}

// Bit j of the result: the query may attend key + j, j < count <= 32.
inline uint32_t allowed_bits(const MaskView& mask, int64_t query, int64_t key, int count) {
  const char* p = mask.at(query, key);
  uint32_t bits = 0;
  if (mask.key_stride == 1 && count == 32) {
    for (int i = 0; i < 4; ++i) {
      uint64_t eight;  // bools are the bytes 0 and 1
      std::memcpy(&eight, p + 8 * i, 8);
      bits |= static_cast<uint32_t>((eight * 0x0102040810204080ull) >> 56) << (8 * i);
    }
    return bits;
  }
  for (int i = 0; i < count; ++i) bits |= static_cast<uint32_t>(p[i * mask.key_stride] != 0) << i;
  return bits;
}

// A 32 x 32 bit matrix: bit j of row i to bit i of row j.
inline void transpose_bits(uint32_t* rows) {
  uint32_t mask = 0x0000ffffu;
  for (int width = 16; width != 0; width >>= 1, mask ^= mask << width) {
    for (int i = 0; i < 32; i = (i + width + 1) & ~width) {
      const uint32_t swap = ((rows[i] >> width) ^ rows[i + width]) & mask;
      rows[i + width] ^= swap;
      rows[i] ^= swap << width;
    }
  }
}

// For keys key .. key + 31: the queries (bits) that may attend each, from a boolean mask and causality.
inline void allowed_queries(const MaskView& mask, bool causal, int64_t query, int queries, int64_t key, int64_t keys,
                            uint32_t* bits) {
  if (mask.data != nullptr && mask.boolean()) {
    const int count = keys - key >= 32 ? 32 : keys > key ? static_cast<int>(keys - key) : 0;
    for (int i = 0; i < kQueryRows; ++i) bits[i] = i < queries ? allowed_bits(mask, query + i, key, count) : ~0u;
    transpose_bits(bits);
  } else {
    for (int j = 0; j < 32; ++j) bits[j] = ~0u;
  }
  if (causal) {
    for (int j = 0; j < 32; ++j) {
      const int64_t first = key + j - query;  // the first query of the 32 that may attend the key
      bits[j] &= first <= 0 ? ~0u : first >= 32 ? 0u : ~0u << first;
    }
  }
}

// The float mask of the same block in log2 units, as [key][query]; false when a value is NaN or above 1e30.
inline bool turned_bias(const MaskView& mask, int64_t query, int queries, int64_t key, int64_t keys, float* bias) {
  alignas(64) float rows[32 * 32];
  const int count = keys - key >= 32 ? 32 : keys > key ? static_cast<int>(keys - key) : 0;
  bool good = true;
  for (int i = 0; i < 32; ++i) {
    float* row = rows + 32 * i;
    for (int j = i < queries ? count : 0; j < 32; ++j) row[j] = 0.0f;
    if (i < queries && count > 0) {
      load_run(mask.at(query + i, key), mask.dtype, mask.key_stride, count, row);
      good = scale_mask(row, count) && good;
    }
  }
  for (int i = 0; i < 32; i += 16) {
    for (int j = 0; j < 32; j += 16) transpose(rows + 32 * i + j, 32, bias + 32 * j + i, 32);
  }
  return good;
}

// Marks in valid[] (keys bytes, zero before) the keys that some query may attend.
inline void mark_valid(const MaskView& mask, bool causal, int64_t queries, int64_t keys, uint8_t* valid) {
  const int64_t rows = mask.query_stride == 0 && !causal ? (queries > 0 ? 1 : 0) : queries;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t end = causal && i + 1 < keys ? i + 1 : keys;
    if (mask.boolean()) {
      const char* p = mask.at(i, 0);
      for (int64_t j = 0; j < end; ++j) valid[j] |= static_cast<uint8_t>(p[j * mask.key_stride] != 0);
      continue;
    }
    float values[64];
    for (int64_t j = 0; j < end; j += 64) {
      const int count = end - j < 64 ? static_cast<int>(end - j) : 64;
      load_run(mask.at(i, j), mask.dtype, mask.key_stride, count, values);
      for (int c = 0; c < count; ++c) valid[j + c] |= static_cast<uint8_t>(values[c] > kMasked);
    }
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_ATTENTION_MASK_H_
