// attention_layout.h: where a head's quantized keys and values lie in one block of bytes, the same on every ISA level.
//
// keys      tiles [keys / 16][channels / c][16 keys][c channels]   int8 (c = 64) or bfloat16 (c = 32), padded with zeros
// values    tiles [keys / g][value channels / 16][16][g keys]      int8 (g = 64) or bfloat16 (g = 32): transposed
// then, as float32 (int32 for the row sums): key_scale[keys / 64], addend[keys] (log2 of the key's V scale; -infinity for padding),
// inverse[keys] (1 / V scale), row_sum[keys] (sum of a key's codes), value_scale[value channels], mean[channels], and one int32 flag:
// 1 when an input was not finite.
#ifndef RFK_CORE_ATTENTION_LAYOUT_H_
#define RFK_CORE_ATTENTION_LAYOUT_H_

#include <cstdint>

#include "rfk/rfk.h"

namespace rfk {

constexpr int64_t kKeyGroup = 64;  // keys that share one scale; keys are padded to a multiple of it

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static inline int64_t next_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

struct AttentionLayout {
  int32_t scheme;
  int64_t keys, padded_keys;
  int64_t channels;         // of q and k
  int64_t rotated;          // channels after the rotation (a power of two); int8 schemes
  int64_t padded_channels;  // stored: a multiple of 64 (int8) or 32 (bfloat16)
  int64_t value_channels, padded_value_channels;
  int64_t keys_at, values_at, key_scale_at, addend_at, inverse_at, row_sum_at, value_scale_at, mean_at, flag_at, bytes;

  bool int8_keys() const { return scheme != RFK_ATTENTION_BF16; }
  bool int8_values() const { return scheme == RFK_ATTENTION_INT8_U8; }
};

static inline AttentionLayout attention_layout(int32_t scheme, int64_t keys, int64_t channels, int64_t value_channels) {
  AttentionLayout l{};
  l.scheme = scheme;
  l.keys = keys;
  l.padded_keys = round_up(keys, kKeyGroup);
  l.channels = channels;
  l.rotated = next_power_of_two(channels);
  l.padded_channels = l.int8_keys() ? round_up(l.rotated, 64) : round_up(channels, 32);
  l.value_channels = value_channels;
  l.padded_value_channels = round_up(value_channels, 32);
  int64_t at = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 64);
    return begin;
  };
  l.keys_at = place(l.padded_keys * l.padded_channels * (l.int8_keys() ? 1 : 2));
  l.values_at = place(l.padded_keys * l.padded_value_channels * (l.int8_values() ? 1 : 2));
  l.key_scale_at = place(l.padded_keys / kKeyGroup * 4);
  l.addend_at = place(l.padded_keys * 4);
  l.inverse_at = place(l.padded_keys * 4);
  l.row_sum_at = place(l.padded_keys * 4);
  l.value_scale_at = place(l.padded_value_channels * 4);
  l.mean_at = place(round_up(channels, 16) * 4);
  l.flag_at = place(4);
  l.bytes = at;
  return l;
}

}  // namespace rfk

#endif  // RFK_CORE_ATTENTION_LAYOUT_H_
