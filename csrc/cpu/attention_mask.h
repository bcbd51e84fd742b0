// attention_mask.h: masks of attention, 32 keys by 32 queries at a time.
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

// What 32 queries may attend of 32 keys.
struct OpenKeys {
  alignas(64) int32_t rows[kQueryRows];  // bit j: the query of this place may attend key j
  bool any, all;                         // of the queries that there are
};

// open[c] for keys key + 32 c .. key + 32 c + 31, c < chunks, from a boolean mask (where there is one) and causality.
inline void open_keys(const MaskView& mask, bool causal, int64_t query, int queries, int64_t key, int chunks, int64_t keys,
                      OpenKeys* open) {
  constexpr int kMost = 8;
  const bool masked = mask.data != nullptr && mask.boolean();
  const int64_t whole = !masked || keys < key ? 0 : mask.key_stride == 1 ? (keys - key) / 32 : 0;
  uint32_t some[kMost] = {}, every[kMost];
  for (int c = 0; c < chunks; ++c) every[c] = ~0u;
  for (int i = 0; i < queries; ++i) {  // a row at a time: its bytes lie together
    const char* p = masked ? mask.at(query + i, key) : nullptr;
    for (int c = 0; c < chunks; ++c) {
      uint32_t bits = ~0u;
      if (c < whole) {
        bits = nonzero_bytes(p + 32 * c);
      } else if (masked) {
        bits = 0;
        for (int64_t j = 32 * c; j < 32 * c + 32 && key + j < keys; ++j) {
          bits |= static_cast<uint32_t>(p[j * mask.key_stride] != 0) << (j % 32);
        }
      }
      if (causal) {
        const int64_t last = query + i - key - 32 * c;  // of the 32 keys
        bits &= last < 0 ? 0u : last >= 31 ? ~0u : (2u << last) - 1u;
      }
      open[c].rows[i] = static_cast<int32_t>(bits);
      some[c] |= bits;
      every[c] &= bits;
    }
  }
  for (int c = 0; c < chunks; ++c) {
    for (int i = queries; i < kQueryRows; ++i) open[c].rows[i] = 0;
    open[c].any = some[c] != 0;
    open[c].all = every[c] == ~0u;
  }
}

// A float mask's values for 32 queries and keys in log2 units, as [key][query]; false when a value is NaN or above 1e30.
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

// Marks in valid[key] (zero before) the keys of [begin, end) that some query may attend.
inline void mark_valid(const MaskView& mask, bool causal, int64_t queries, int64_t begin, int64_t end, uint8_t* valid) {
  if (mask.data == nullptr) {  // causal alone
    for (int64_t j = begin; j < end; ++j) valid[j] = j < queries ? 1 : 0;
    return;
  }
  const int64_t rows = mask.query_stride == 0 && !causal ? (queries > 0 ? 1 : 0) : queries;
  for (int64_t i = causal ? begin : 0; i < rows; ++i) {
    const int64_t stop = causal && i + 1 < end ? i + 1 : end;
    if (mask.boolean()) {
      const char* p = mask.at(i, 0);
      if (mask.key_stride == 1) {
        for (int64_t j = begin; j < stop; ++j) valid[j] |= static_cast<uint8_t>(p[j]);
      } else {
        for (int64_t j = begin; j < stop; ++j) valid[j] |= static_cast<uint8_t>(p[j * mask.key_stride] != 0);
      }
    } else {
      float values[64];
      for (int64_t j = begin; j < stop; j += 64) {
        const int count = stop - j < 64 ? static_cast<int>(stop - j) : 64;
        load_run(mask.at(i, j), mask.dtype, mask.key_stride, count, values);
        for (int c = 0; c < count; ++c) valid[j + c] |= static_cast<uint8_t>(values[c] > kMasked);
      }
    }
    // Most masks leave no key closed to all of a few queries.
    if (i % 32 == 31 && std::memchr(valid + begin, 0, static_cast<size_t>(end - begin)) == nullptr) return;
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_ATTENTION_MASK_H_
