// quantize.h: what the attention kernel asks of quantize.cpp, and the views both take.
//
// Included inside one ISA level's namespace (RFK_ISA_NAMESPACE).
#ifndef RFK_CPU_QUANTIZE_H_
#define RFK_CPU_QUANTIZE_H_

#include <cstdint>

#include "core/attention_layout.h"
#include "rfk/rfk.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {

// Rows of channels of one head.
struct HeadView {
  const char* data;
  int32_t dtype;
  int64_t row_bytes;       // from row to row
  int64_t channel_stride;  // in elements
  int64_t channels;
};

constexpr int64_t kMaxChannels = 256;
constexpr int kQueryRows = 32;  // queries of one block: the columns of a product

// Up to 32 quantized queries.
struct alignas(64) Queries {
  char codes[kMaxChannels * 2 / 64 * 16 * 128];  // as B of a product (products.h)
  float scale[kQueryRows];                       // of the row; bfloat16: its largest magnitude
  float mean_dot[kQueryRows];                    // q . mean of the keys, where asked for
  bool finite;
};

// Scratch of quantize_keys_values and quantize_queries, in floats.
constexpr int64_t kQuantizeScratch = (64 * kMaxChannels + 64 * kMaxChannels / 4 + 4 * kMaxChannels) + 1024;

// Keys and values of one head into `packed` (layout.bytes). valid: a byte per key, NULL when all are.
void quantize_keys_values(const HeadView& k, const HeadView& v, const uint8_t* valid, const AttentionLayout& layout,
                          char* packed, float* scratch);

// Rows row .. row + count - 1 of q; the others of the 32 become zero. mean: (channels), NULL when mean_dot is not needed.
void quantize_queries(const HeadView& q, int64_t row, int count, const AttentionLayout& layout, const float* mean,
                      Queries* out, float* scratch);

// The same codes as plain rows: (count, layout.rotated) int8 and a scale a row; returns whether all values are finite.
bool quantize_query_rows(const HeadView& q, int64_t row, int count, const AttentionLayout& layout, int8_t* codes,
                         float* scale, float* scratch);

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_QUANTIZE_H_
