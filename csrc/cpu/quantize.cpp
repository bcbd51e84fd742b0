// quantize.cpp: queries, keys and values of attention to int8 codes (or bfloat16), packed as the products read them.
//
// All arithmetic is float32 in the order that rfkernels/backends/reference/quantize.py states, so the codes are the same on every ISA
// level and backend: mean of the keys by blocks of 64 (blocks summed in double), minus the mean, random signs, Walsh-Hadamard with
// stages 1, 2, 4, ..., rows scaled to their largest magnitude / 127. Values carry a scale per key and one per channel.
#include "cpu/quantize.h"

#include <cmath>
#include <cstring>

#include "core/rotation.h"
#include "cpu/convert.h"
#include "cpu/lanes.h"
#include "cpu/products.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

constexpr float kTiny = 0x1p-100f;       // below this a group counts as zero: 127 / a stays finite
constexpr float kKeyScaleMin = 0x1p-40f;

// What turns a group of largest magnitude `top` into codes; `scale` receives what a code is worth.
RFK_INLINE Floats code_factor(float top, float* scale) {
  *scale = top < kTiny ? 0.0f : top / 127.0f;
  return splat(top < kTiny ? 0.0f : 127.0f / top);
}

struct Signs {
  float value[kMaxChannels];
};
constexpr Signs make_signs() {
  Signs signs{};
  for (int d = 0; d < kMaxChannels; ++d) signs.value[d] = (kSignWords[d / 32] >> (d % 32)) & 1u ? -1.0f : 1.0f;
  return signs;
}
constexpr Signs kSigns = make_signs();  // constexpr: an initialiser of this level must not run on a lesser CPU

// Sixteen channels from `channel` of a contiguous row, where the storage type allows that at once.
RFK_INLINE bool vector_rows(const HeadView& view) {
  return view.channel_stride == 1 && view.channels % kLanes == 0 &&
         (view.dtype == RFK_FLOAT32 || view.dtype == RFK_BFLOAT16);
}
RFK_INLINE Floats load_vector(const HeadView& view, int64_t row, int64_t channel) {
  const char* p = view.data + row * view.row_bytes;
  return view.dtype == RFK_FLOAT32 ? load(reinterpret_cast<const float*>(p) + channel)
                                   : load_bfloat16(reinterpret_cast<const uint16_t*>(p) + channel);
}

RFK_INLINE void load_row(const HeadView& view, int64_t row, float* out) {
  if (vector_rows(view)) {
    for (int64_t d = 0; d < view.channels; d += kLanes) store(out + d, load_vector(view, row, d));
  } else {
    load_run(view.data + row * view.row_bytes, view.dtype, view.channel_stride, static_cast<int>(view.channels), out);
  }
}

// The unnormalised Walsh-Hadamard transform of V * 16 values, or of the first `length` of 16.
template <int V>
RFK_INLINE void hadamard(Floats* x, int64_t length) {
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    if (V > 1 || length >= 2) x[i] = butterfly<1>(x[i]);
    if (V > 1 || length >= 4) x[i] = butterfly<2>(x[i]);
    if (V > 1 || length >= 8) x[i] = butterfly<4>(x[i]);
    if (V > 1 || length >= 16) x[i] = butterfly<8>(x[i]);
  }
#pragma GCC unroll 4
  for (int h = 1; h < V; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < V; i += 2 * h) {
#pragma GCC unroll 8
      for (int j = i; j < i + h; ++j) {
        const Floats a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
}

template <int V>
struct Vectors {
  static constexpr int value = V;
};

// f(Vectors<V>) for rows of V * 16 rotated channels.
template <class F>
RFK_INLINE void for_width(int64_t width, const F& f) {
  switch (width / kLanes) {
    case 1: return f(Vectors<1>());
    case 2: return f(Vectors<2>());
    case 4: return f(Vectors<4>());
    case 8: return f(Vectors<8>());
    default: return f(Vectors<16>());
  }
}

// y = H (sign * (x - mean)) of one row, zero beyond its channels; returns the lanes' largest magnitudes. staged: zero padded room.
template <int V>
RFK_INLINE Floats rotate(const HeadView& view, int64_t row, const float* mean, int64_t length, float* staged, Floats* y) {
  // Every loop is unrolled, so that the row stays in registers.
  const char* place = view.data + row * view.row_bytes;
  const bool direct = vector_rows(view) && view.channels == V * kLanes;
  if (direct && view.dtype == RFK_BFLOAT16) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) y[i] = load_bfloat16(reinterpret_cast<const uint16_t*>(place) + kLanes * i);
  } else {
    if (!direct) load_row(view, row, staged);
    const float* values = direct ? reinterpret_cast<const float*>(place) : staged;
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) y[i] = load(values + kLanes * i);
  }
  if (mean != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) y[i] = y[i] - load(mean + kLanes * i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) y[i] = y[i] * load(kSigns.value + kLanes * i);
  hadamard<V>(y, length);
  Floats largest = abs(y[0]);
#pragma GCC unroll 16
  for (int i = 1; i < V; ++i) largest = max(largest, abs(y[i]));
  return largest;
}

RFK_INLINE bool all_zero(Floats a) {
  float values[kLanes], sum = 0.0f;
  store(values, a);
  for (int i = 0; i < kLanes; ++i) sum += values[i];
  return sum == 0.0f;
}

// x is zero padded to a multiple of 16.
RFK_INLINE bool all_finite(const float* x, int64_t n) {
  Floats sum = splat(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) sum = fma(load(x + i), splat(0.0f), sum);
  return all_zero(sum);
}

// Channels [channel, channel + 16 * V) of 64 keys added up in order.
template <int V>
RFK_INLINE void sum_vectors(const HeadView& k, int64_t begin, int64_t end, int64_t channel, float* block) {
  Floats sum[V];
  for (int i = 0; i < V; ++i) sum[i] = splat(0.0f);
  for (int64_t j = begin; j < end; ++j) {
    for (int i = 0; i < V; ++i) sum[i] = sum[i] + load_vector(k, j, channel + 16 * i);
  }
  for (int i = 0; i < V; ++i) store(block + channel + 16 * i, sum[i]);
}

// Mean over the valid keys into mean[channels]; false when an input is not finite.
bool mean_of_keys(const HeadView& k, const uint8_t* valid, int64_t keys, float* mean, float* scratch) {
  float* row = scratch;
  float* block = scratch + kMaxChannels;
  double total[kMaxChannels] = {};
  int64_t count = 0;
  bool finite = true;
  for (int64_t d = 0; d < kMaxChannels; ++d) row[d] = block[d] = 0.0f;
  const bool vectors = valid == nullptr && vector_rows(k);
  for (int64_t begin = 0; begin < keys; begin += kKeyGroup) {
    const int64_t end = begin + kKeyGroup < keys ? begin + kKeyGroup : keys;
    if (vectors) {
      count += end - begin;
      int64_t d = 0;
      for (; d + 64 <= k.channels; d += 64) sum_vectors<4>(k, begin, end, d, block);
      for (; d < k.channels; d += 16) sum_vectors<1>(k, begin, end, d, block);
    } else {
      for (int64_t d = 0; d < k.channels; ++d) block[d] = 0.0f;
      for (int64_t j = begin; j < end; ++j) {
        load_row(k, j, row);
        if (valid != nullptr && valid[j] == 0) {
          finite = finite && all_finite(row, k.channels);
          continue;
        }
        ++count;
        for (int64_t d = 0; d < k.channels; ++d) block[d] += row[d];
      }
    }
    for (int64_t d = 0; d < k.channels; ++d) total[d] += static_cast<double>(block[d]);
  }
  for (int64_t d = 0; d < k.channels; ++d) {
    mean[d] = count > 0 ? static_cast<float>(total[d] / static_cast<double>(count)) : 0.0f;
  }
  return finite && all_finite(mean, k.channels);
}

// The sums, or the largest, of sixteen rows of sixteen values.
template <class T, class Combine>
RFK_INLINE auto across_rows(const T* rows, const Combine& combine) {
  alignas(64) T turned[256];
  transpose(rows, 16, turned, 16);
  auto result = load(turned);
  for (int i = 1; i < 16; ++i) result = combine(result, load(turned + 16 * i));
  return result;
}

// Sixteen keys' codes as rows of the tiles at `tile`, and the codes' sums.
RFK_INLINE void store_key_codes(const float* rotated, int64_t width, int64_t tiles, Floats inverse, char* tile, int32_t* row_sum) {
  int8_t* codes = reinterpret_cast<int8_t*>(tile);
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t d = 0; d < width; d += kLanes) {
      store_low_bytes(codes + d / 64 * kTileBytes + i * 64 + d % 64, to_int(load(rotated + i * width + d) * inverse));
    }
  }
  alignas(64) int32_t sums[256];
  for (int64_t i = 0; i < 16; ++i) {
    Ints sum = byte_sums(codes + i * 64);
    for (int64_t t = 1; t < tiles; ++t) sum = sum + byte_sums(codes + t * kTileBytes + i * 64);
    store(sums + 16 * i, sum);
  }
  store(row_sum, across_rows(sums, [](Ints a, Ints b) { return a + b; }));
}

bool pack_int8_keys(const HeadView& k, const uint8_t* valid, const AttentionLayout& l, char* packed, float* scratch) {
  float* mean = reinterpret_cast<float*>(packed + l.mean_at);
  for (int64_t d = 0; d < round_up(l.channels, 16); ++d) mean[d] = 0.0f;
  bool finite = mean_of_keys(k, valid, l.keys, mean, scratch);
  const int64_t width = round_up(l.rotated, 16);
  float* padded_mean = scratch;
  float* row = scratch + kMaxChannels;
  float* rotated = scratch + 2 * kMaxChannels;  // 64 rows
  for (int64_t d = 0; d < kMaxChannels; ++d) {
    padded_mean[d] = d < l.channels ? mean[d] : 0.0f;
    row[d] = 0.0f;
  }
  char* keys = packed + l.keys_at;
  if (width < l.padded_channels) std::memset(keys, 0, static_cast<size_t>(l.padded_keys * l.padded_channels));
  float* scale = reinterpret_cast<float*>(packed + l.key_scale_at);
  int32_t* row_sum = reinterpret_cast<int32_t*>(packed + l.row_sum_at);
  const int64_t tiles = l.padded_channels / 64;
  for (int64_t group = 0; group < l.padded_keys / kKeyGroup; ++group) {
    Floats largest = splat(0.0f);
    for_width(width, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (int64_t i = 0; i < kKeyGroup; ++i) {
        const int64_t j = group * kKeyGroup + i;
        Floats y[V];
        if (j < l.keys && (valid == nullptr || valid[j] != 0)) {
          largest = max(largest, rotate<V>(k, j, padded_mean, l.rotated, row, y));
        } else {
          for (int v = 0; v < V; ++v) y[v] = splat(0.0f);
        }
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(rotated + i * width + kLanes * v, y[v]);
      }
    });
    const float top = reduce_max(largest);
    finite = finite && top <= 3.0e38f;
    const Floats inverse = code_factor(top, scale + group);
    for (int64_t begin = 0; begin < kKeyGroup; begin += 16) {
      store_key_codes(rotated + begin * width, width, tiles, inverse, keys + (group * 4 + begin / 16) * tiles * kTileBytes,
                      row_sum + group * kKeyGroup + begin);
    }
  }
  return finite;
}

// x is zero padded to a multiple of 16.
RFK_INLINE float largest_magnitude(const float* x, int64_t n) {
  Floats top = splat(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) top = max(top, abs(load(x + i)));
  return reduce_max(top);
}

bool pack_bfloat16_keys(const HeadView& k, const AttentionLayout& l, char* packed, float* scratch) {
  float* row = scratch;
  float* scale = reinterpret_cast<float*>(packed + l.key_scale_at);
  std::memset(packed + l.mean_at, 0, static_cast<size_t>(round_up(l.channels, 16) * 4));
  std::memset(packed + l.row_sum_at, 0, static_cast<size_t>(l.padded_keys * 4));
  for (int64_t d = 0; d < kMaxChannels; ++d) row[d] = 0.0f;
  bool finite = true;
  const int64_t tiles = l.padded_channels / 32;
  for (int64_t j = 0; j < l.padded_keys; ++j) {
    if (j % kKeyGroup == 0) scale[j / kKeyGroup] = 0.0f;
    if (j < l.keys) {
      load_row(k, j, row);
      finite = finite && all_finite(row, l.channels);
      float& top = scale[j / kKeyGroup];
      top = std::fmax(top, largest_magnitude(row, l.channels));
    } else {
      for (int64_t d = 0; d < l.channels; ++d) row[d] = 0.0f;
    }
    for (int64_t d = 0; d < l.padded_channels; d += 32) {
      char* place = packed + l.keys_at + (j / 16 * tiles + d / 32) * kTileBytes + j % 16 * 64;
      store_run(place, RFK_BFLOAT16, 1, 32, row + d);
    }
  }
  return finite;
}

bool pack_int8_values(const HeadView& v, const uint8_t* valid, const AttentionLayout& l, char* packed, float* scratch) {
  const int64_t width = round_up(l.value_channels, 16);
  float* row = scratch;
  float* inverse = scratch + kMaxChannels;
  float* scaled = scratch + 2 * kMaxChannels;                                         // 16 rows
  int32_t* words = reinterpret_cast<int32_t*>(scaled + kKeyGroup * kMaxChannels);     // [width / 16][16 groups of 4 keys][16]
  float* scale = reinterpret_cast<float*>(packed + l.value_scale_at);
  float* addend = reinterpret_cast<float*>(packed + l.addend_at);
  float* key_inverse = reinterpret_cast<float*>(packed + l.inverse_at);
  bool finite = true;
  const bool direct = vector_rows(v);
  for (int64_t d = 0; d < kMaxChannels; ++d) row[d] = inverse[d] = 0.0f;
  {
    Floats largest[kMaxChannels / 16], spoiled = splat(0.0f);
    for (int64_t i = 0; i < width / 16; ++i) largest[i] = splat(0.0f);
    if (valid == nullptr && direct) {
      for (int64_t begin = 0; begin < l.keys; begin += kKeyGroup) {
        const int64_t end = begin + kKeyGroup < l.keys ? begin + kKeyGroup : l.keys;
        for (int64_t i = 0; i < width / 16; ++i) {
          Floats top = largest[i];
          for (int64_t j = begin; j < end; ++j) {
            const Floats x = load_vector(v, j, 16 * i);
            spoiled = fma(x, splat(0.0f), spoiled);
            top = max(top, abs(x));
          }
          largest[i] = top;
        }
      }
    } else {
      for (int64_t j = 0; j < l.keys; ++j) {
        load_row(v, j, row);
        const bool counts = valid == nullptr || valid[j] != 0;
        for (int64_t i = 0; i < width / 16; ++i) {
          const Floats x = load(row + 16 * i);
          spoiled = fma(x, splat(0.0f), spoiled);
          if (counts) largest[i] = max(largest[i], abs(x));
        }
      }
    }
    finite = all_zero(spoiled);
    for (int64_t i = 0; i < width / 16; ++i) store(inverse + 16 * i, largest[i]);
  }
  for (int64_t d = 0; d < l.padded_value_channels; ++d) {
    const float top = d < l.value_channels ? inverse[d] : 0.0f;
    scale[d] = top < kTiny ? 0.0f : top / 127.0f;
    if (d < kMaxChannels) inverse[d] = top < kTiny ? 0.0f : 1.0f / top;
  }
  for (int64_t group = 0; group < l.padded_keys / kKeyGroup; ++group) {
    char* tiles = packed + l.values_at + group * l.padded_value_channels / 16 * kTileBytes;
    for (int64_t begin = 0; begin < kKeyGroup; begin += 16) {
      alignas(64) float tops[256], key_scale[16], factor[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t j = group * kKeyGroup + begin + i;
        float* w = scaled + i * width;
        Floats largest = splat(0.0f);
        if (j < l.keys && (valid == nullptr || valid[j] != 0)) {
          if (!direct) load_row(v, j, row);
          for (int64_t d = 0; d < width; d += 16) {
            const Floats x = (direct ? load_vector(v, j, d) : load(row + d)) * load(inverse + d);
            store(w + d, x);
            largest = max(largest, abs(x));
          }
        } else {
          for (int64_t d = 0; d < width; ++d) w[d] = 0.0f;
          largest = splat(j < l.keys ? 1.0f : 0.0f);  // a masked key: scale 1, codes 0
        }
        store(tops + 16 * i, largest);
      }
      store(key_scale, max(across_rows(tops, [](Floats a, Floats b) { return max(a, b); }), splat(kKeyScaleMin)));
      store(factor, splat(127.0f) / load(key_scale));
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t j = group * kKeyGroup + begin + i;
        addend[j] = j < l.keys ? std::log2(key_scale[i]) : kMinusInfinity;
        key_inverse[j] = j < l.keys ? 1.0f / key_scale[i] : 1.0f;
      }
      for (int64_t i = 0; i < 16; i += 4) {
        const float* w = scaled + i * width;
        for (int64_t d = 0; d < width; d += 16) {
          Ints codes[4];
          for (int64_t r = 0; r < 4; ++r) codes[r] = to_int(load(w + r * width + d) * splat(factor[i + r]));
          store_signed_bytes(reinterpret_cast<int8_t*>(words + d * 16 + (begin + i) / 4 * 16), codes[0], codes[1], codes[2],
                             codes[3]);
        }
      }
    }
    for (int64_t d = 0; d < width; d += 16) {
      transpose(words + d * 16, 16, reinterpret_cast<int32_t*>(tiles + d / 16 * kTileBytes), 16);
    }
    if (width < l.padded_value_channels) std::memset(tiles + width / 16 * kTileBytes, 0, kTileBytes);
  }
  return finite;
}

bool pack_bfloat16_values(const HeadView& v, const AttentionLayout& l, char* packed, float* scratch) {
  float* row = scratch;
  uint16_t* rounded = reinterpret_cast<uint16_t*>(scratch + kMaxChannels);                    // 32 rows
  int32_t* words = reinterpret_cast<int32_t*>(scratch + kMaxChannels + 32 * kMaxChannels / 2);  // 16 x 16
  float* scale = reinterpret_cast<float*>(packed + l.value_scale_at);
  float* addend = reinterpret_cast<float*>(packed + l.addend_at);
  float* key_inverse = reinterpret_cast<float*>(packed + l.inverse_at);
  for (int64_t d = 0; d < l.padded_value_channels; ++d) scale[d] = 1.0f;
  for (int64_t d = 0; d < kMaxChannels; ++d) row[d] = 0.0f;
  bool finite = true;
  for (int64_t begin = 0; begin < l.padded_keys; begin += 32) {
    for (int64_t i = 0; i < 32; ++i) {
      const int64_t j = begin + i;
      addend[j] = j < l.keys ? 0.0f : kMinusInfinity;
      key_inverse[j] = 1.0f;
      if (j < l.keys) {
        load_row(v, j, row);
        finite = finite && all_finite(row, l.value_channels);
      } else {
        for (int64_t d = 0; d < l.value_channels; ++d) row[d] = 0.0f;
      }
      store_run(reinterpret_cast<char*>(rounded + i * l.padded_value_channels), RFK_BFLOAT16, 1,
                static_cast<int>(l.padded_value_channels), row);
    }
    for (int64_t d = 0; d < l.padded_value_channels; d += 16) {
      for (int64_t pair = 0; pair < 16; ++pair) {
        const uint16_t* first = rounded + 2 * pair * l.padded_value_channels + d;
        const uint16_t* second = first + l.padded_value_channels;
        for (int64_t i = 0; i < 16; ++i) {
          words[pair * 16 + i] = static_cast<int32_t>(first[i] | static_cast<uint32_t>(second[i]) << 16);
        }
      }
      char* tile = packed + l.values_at + (begin / 32 * l.padded_value_channels / 16 + d / 16) * kTileBytes;
      transpose(words, 16, reinterpret_cast<int32_t*>(tile), 16);
    }
  }
  return finite;
}

}  // namespace

void quantize_keys_values(const HeadView& k, const HeadView& v, const uint8_t* valid, const AttentionLayout& layout,
                          char* packed, float* scratch) {
  const bool keys = layout.int8_keys() ? pack_int8_keys(k, valid, layout, packed, scratch)
                                       : pack_bfloat16_keys(k, layout, packed, scratch);
  const bool values = layout.int8_values() ? pack_int8_values(v, valid, layout, packed, scratch)
                                           : pack_bfloat16_values(v, layout, packed, scratch);
  const int32_t flag = keys && values ? 0 : 1;
  std::memcpy(packed + layout.flag_at, &flag, sizeof flag);
}

namespace {

// One row's codes (V * 16 bytes) and its scale; false when it is not finite.
template <int V>
RFK_INLINE bool quantize_row(const HeadView& q, int64_t row, const AttentionLayout& l, float* staged, int8_t* codes, float* scale) {
  Floats y[V];
  const float top = reduce_max(rotate<V>(q, row, nullptr, l.rotated, staged, y));
  const Floats inverse = code_factor(top, scale);
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) store_low_bytes(codes + kLanes * i, to_int(y[i] * inverse));
  // A rotated value is a sum over its whole row, so that beyond one vector no maximum can pass over a NaN; `staged` holds the others.
  return top <= 3.0e38f && (V > 1 || (vector_rows(q) && q.channels == kLanes) || all_finite(staged, l.channels));
}

}  // namespace

bool quantize_query_rows(const HeadView& q, int64_t row, int count, const AttentionLayout& l, int8_t* codes,
                         float* scale, float* scratch) {
  float* staged = scratch;
  alignas(16) int8_t bytes[kMaxChannels];
  for (int64_t d = 0; d < kMaxChannels; ++d) staged[d] = 0.0f;
  bool finite = true;
  for_width(round_up(l.rotated, kLanes), [&](auto vectors) {
    for (int i = 0; i < count; ++i) {
      finite = quantize_row<decltype(vectors)::value>(q, row + i, l, staged, bytes, scale + i) && finite;
      std::memcpy(codes + i * l.rotated, bytes, static_cast<size_t>(l.rotated));
    }
  });
  return finite;
}

void quantize_queries(const HeadView& q, int64_t row, int count, const AttentionLayout& l, const float* mean, Queries* out,
                      float* scratch) {
  const int64_t dwords = l.padded_channels / (l.int8_keys() ? 4 : 2);
  float* x = scratch;
  char* rows = reinterpret_cast<char*>(scratch + kMaxChannels);  // 32 rows of codes
  for (int64_t d = 0; d < kMaxChannels; ++d) x[d] = 0.0f;
  for (int i = 0; i < kQueryRows; ++i) out->scale[i] = out->mean_dot[i] = 0.0f;
  out->finite = true;
  if (l.int8_keys()) {
    if (count < kQueryRows || l.rotated < 64) std::memset(rows, 0, static_cast<size_t>(kQueryRows * dwords * 4));
    for_width(round_up(l.rotated, kLanes), [&](auto vectors) {
      for (int i = 0; i < count; ++i) {
        int8_t* codes = reinterpret_cast<int8_t*>(rows + i * dwords * 4);
        out->finite = quantize_row<decltype(vectors)::value>(q, row + i, l, x, codes, out->scale + i) && out->finite;
      }
    });
  } else {
    std::memset(rows, 0, static_cast<size_t>(kQueryRows * dwords * 4));
    for (int i = 0; i < count; ++i) {
      load_row(q, row + i, x);
      out->finite = out->finite && all_finite(x, l.channels);
      out->scale[i] = largest_magnitude(x, l.channels);
      store_run(rows + i * dwords * 4, RFK_BFLOAT16, 1, static_cast<int>(l.padded_channels), x);
    }
  }
  for (int i = 0; mean != nullptr && i < count; ++i) {
    load_row(q, row + i, x);
    float dot = 0.0f;
    for (int64_t d = 0; d < l.channels; ++d) dot += x[d] * mean[d];
    out->mean_dot[i] = dot;
  }
  if (kShiftedQueries && l.int8_keys()) {
    for (int64_t i = 0; i < kQueryRows * dwords * 4; ++i) rows[i] = static_cast<char>(rows[i] ^ 0x80);
  }
  const float* source = reinterpret_cast<const float*>(rows);
  float* turned = reinterpret_cast<float*>(out->codes);
  for (int64_t d = 0; d < dwords; d += 16) {
    transpose(source + d, dwords, turned + d * kQueryRows, kQueryRows);
    transpose(source + 16 * dwords + d, dwords, turned + d * kQueryRows + 16, kQueryRows);
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
