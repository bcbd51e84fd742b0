// quantize.cu: queries, keys and values of attention to int8 or e4m3 codes, bit for bit the reference's.
//
//   query_codes   one launch: rows rotated, a scale a row; 3 bytes an element from bfloat16
//   block_sums    keys: float32 sums of 64 keys in order; e4m3 values: largest magnitudes of 64 keys a channel
//   finish        a block a head: mean of the keys (sums added in order in double), channel scales of the values, the flag
//   codes         keys minus mean, rotated, a scale every 64 keys; values times their inverse, transposed; or bfloat16 values
//
// The last three serve keys and values together: 5 bytes an element of each from bfloat16, 4 of values kept in bfloat16. A
// query's element costs about 20 instructions (sm_90, 128 channels), five of them shuffles and maxima.
#include "cuda/quantize.cuh"
#include "cuda/quantize_values.cuh"

namespace rfk {
namespace cuda {
namespace {

Heads heads_view(const rfk_tensor& t) {
  const int item = item_size(t.dtype);
  Heads view = {static_cast<const char*>(t.data),
                t.strides[0],
                t.strides[1],
                t.strides[2],
                t.strides[3],
                static_cast<int32_t>(t.shape[1]),
                static_cast<int32_t>(t.shape[3]),
                0};
  bool vector = t.shape[3] % kRun == 0 && t.strides[3] == 1 && aligned(t.data, 16);
  for (int d = 0; d < 3; ++d) vector = vector && (t.shape[d] == 1 || t.strides[d] * item % 16 == 0);
  view.vector = vector;
  return view;
}

int padded_channels(int64_t channels) {
  int padded = 1;
  while (padded < channels) padded *= 2;
  return padded;
}

// queries ----------------------------------------------------------------------------------------------------------

constexpr int kQueryPasses = 2;  // rows of a thread, whose loads are under way together

struct Queries {
  Heads q;
  uint8_t* codes;
  float* scale;
  uint8_t* finite;  // or NULL
  int64_t queries, tiles;  // of a head
  int32_t rotated, e4m3;
};

template <int T, int G>
__global__ void __launch_bounds__(kThreads) query_codes(const __grid_constant__ Queries p) {
  constexpr int kRows = kThreads / G;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t unit = static_cast<int64_t>(blockIdx.x), pair = unit / p.tiles;
  const int64_t first_row = (unit - pair * p.tiles) * (kRows * kQueryPasses) + thread / G;
  const char* head = p.q.head<T>(pair);
  Raw<T, kRun> raw[kQueryPasses][2];
#pragma unroll
  for (int pass = 0; pass < kQueryPasses; ++pass) {
    const int64_t row = first_row + pass * kRows;
    const char* place = head + row * p.q.row_stride * static_item_size(T);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_channels<T>(p.q, place, first_channel<G>(half), row < p.queries, raw[pass][half]);
    }
  }
  uint32_t sign[2 * kRun];
  load_signs<G>(p.q.channels, sign);
#pragma unroll
  for (int pass = 0; pass < kQueryPasses; ++pass) {
    const int64_t row = first_row + pass * kRows;
    float y[2 * kRun];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[kRun];
      unpack_static<T, kRun>(raw[pass][half].word, x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[half * kRun + i] = flipped(x[i], sign[half * kRun + i]);
    }
    rotate<G>(y, p.rotated);
    const float largest = largest_of(largest_magnitude(y, 0.0f), G);
    const Factors f = factors(largest, p.e4m3 ? 448.0f : 127.0f);
    if (row >= p.queries) continue;
    const int64_t at = pair * p.queries + row;
    const bool spoiled = !finite(largest);
    store_codes<G>(y, f.inverse, spoiled, p.e4m3 != 0, p.rotated, p.codes + at * p.rotated);
    if (thread % G == 0) {
      p.scale[at] = f.scale;
      if (spoiled && p.finite != nullptr) p.finite[pair] = 0;
    }
  }
}

// keys and values --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_run(uint32_t* place, int count, bool vector, const uint32_t (&word)[kRun]) {
  if (vector) {
    uint4* const places = reinterpret_cast<uint4*>(place);
    places[0] = make_uint4(word[0], word[1], word[2], word[3]);
    places[1] = make_uint4(word[4], word[5], word[6], word[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) place[i] = word[i];
  }
}

// The 64 keys of one block for eight channels: `take` receives every key's values and whether it is valid, in order.
template <int T, int kVector, int kUnroll, class Take>
__device__ __forceinline__ void walk_block(const KeysValues& p, const Heads& x, int64_t pair, int64_t block, int first,
                                           const Take& take) {
  const uint8_t* valid = valid_head(p, pair);
  const char* head = x.head<T>(pair);
#pragma unroll 1
  for (int begin = 0; begin < kBlockKeys; begin += kUnroll) {
    Raw<T, kRun> raw[kUnroll];
    bool open[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t key = block * kBlockKeys + begin + j;
      open[j] = open_key(p, valid, key);
      load_channels<T, kVector>(x, head + key * x.row_stride * static_item_size(T), first, key < p.keys, raw[j]);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      float value[kRun];
      unpack_static<T, kRun>(raw[j].word, value);
      take(value, open[j]);
    }
  }
}

// With several loads under way where they are whole runs.
template <int T, class Take>
__device__ __forceinline__ void walk(const KeysValues& p, const Heads& x, int64_t pair, int64_t block, int first,
                                     const Take& take) {
  if (x.vector) {
    walk_block<T, 1, T == RFK_FLOAT32 ? 4 : 8>(p, x, pair, block, first, take);
  } else {
    walk_block<T, 0, 1>(p, x, pair, block, first, take);
  }
}

template <int T>
__global__ void __launch_bounds__(kThreads) block_sums(const __grid_constant__ KeysValues p) {
  const bool of_keys = static_cast<int64_t>(blockIdx.x) < p.sum_blocks;
  const int64_t index =
      (static_cast<int64_t>(blockIdx.x) - (of_keys ? 0 : p.sum_blocks)) * kThreads + static_cast<int>(threadIdx.x);
  const Heads& x = of_keys ? p.k : p.v;
  const int runs = of_keys ? p.key_runs : p.value_runs;
  const int64_t item = index / runs;  // (head, block)
  if (item >= p.pairs * p.blocks) return;
  const int first = static_cast<int>(index - item * runs) * kRun;
  const int64_t pair = item / p.blocks, block = item - pair * p.blocks;
  const int64_t at = item * x.channels + first;
  const bool vector = x.channels % kRun == 0;
  bool spoiled = false;
  if (of_keys) {
    float sum[kRun] = {};
    int count = 0;
    walk<T>(p, x, pair, block, first, [&](const float(&value)[kRun], bool open) {
      count += open;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (open) {
          sum[i] = sum[i] + value[i];
        } else {
          spoiled = spoiled || !finite(value[i]);
        }
      }
    });
    uint32_t bits[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) bits[i] = bits_from_float(sum[i]);
    store_run(reinterpret_cast<uint32_t*>(p.sums) + at, x.channels - first, vector, bits);
    if (p.valid != nullptr) p.counts[index] = count + (spoiled ? kSpoiled : 0);
  } else {
    uint32_t largest[kRun] = {};
    walk<T>(p, x, pair, block, first, [&](const float(&value)[kRun], bool open) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t size = bits_from_float(value[i]) & 0x7fffffffu;
        if (open) {
          largest[i] = largest[i] > size ? largest[i] : size;
        } else {
          spoiled = spoiled || size >= 0x7f800000u;
        }
      }
    });
    if (spoiled) largest[0] |= 0x80000000u;
    store_run(p.maxima + at, x.channels - first, vector, largest);
  }
}

__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ KeysValues p) {
  constexpr int kUnroll = 16;
  __shared__ int64_t counts[kThreads];
  __shared__ int32_t spoiled_by[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pair = static_cast<int64_t>(blockIdx.x), base = pair * p.blocks;
  int64_t count = 0;
  bool spoiled = false;
  if (p.valid != nullptr) {
    for (int64_t i = thread; i < p.blocks * p.key_runs; i += kThreads) {
      const int32_t word = p.counts[base * p.key_runs + i];
      if (i % p.key_runs == 0) count += word & (kSpoiled - 1);
      spoiled = spoiled || (word & kSpoiled);
    }
    counts[thread] = count;
    __syncthreads();
    count = 0;
    for (int i = 0; i < kThreads; ++i) count += counts[i];
  } else {
    count = p.keys;
  }
  const int channels = p.k.channels, value_channels = p.value_form == kE4m3 ? p.v.channels : 0;
  for (int c = thread; c < channels + value_channels; c += kThreads) {
    if (c < channels) {
      double total = 0.0;
#pragma unroll 1
      for (int64_t begin = 0; begin < p.blocks; begin += kUnroll) {
        float part[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) part[j] = begin + j < p.blocks ? p.sums[(base + begin + j) * channels + c] : 0.0f;
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) total = total + static_cast<double>(part[j]);
      }
      const float mean = count > 0 ? static_cast<float>(total / static_cast<double>(count)) : 0.0f;
      p.mean[pair * channels + c] = mean;
      spoiled = spoiled || !finite(mean);
    } else {
      const int d = c - channels;
      uint32_t largest = 0;
#pragma unroll 1
      for (int64_t begin = 0; begin < p.blocks; begin += kUnroll) {
        uint32_t part[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          part[j] = begin + j < p.blocks ? p.maxima[(base + begin + j) * value_channels + d] : 0u;
        }
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          spoiled = spoiled || part[j] >> 31;
          const uint32_t size = part[j] & 0x7fffffffu;
          largest = largest > size ? largest : size;
        }
      }
      const float size = float_from_bits(largest);
      const Factors f = factors(size, 448.0f);
      p.value_scale[pair * value_channels + d] = finite(size) ? size / 448.0f : f.scale;
      p.value_inverse[pair * value_channels + d] = f.inverse;
      spoiled = spoiled || !finite(size);
    }
  }
  if (p.finite == nullptr) return;
  spoiled_by[thread] = spoiled;
  __syncthreads();
  if (thread != 0) return;
  int32_t any = 0;
  for (int i = 0; i < kThreads; ++i) any |= spoiled_by[i];
  p.finite[pair] = any == 0;
}

template <int T, int G>
__device__ __forceinline__ void key_codes(const KeysValues& p, int64_t unit, float* parts) {
  constexpr int kRows = kThreads / G;
  constexpr int kPasses = kBlockKeys / kRows;
  static_assert(kRows <= kBlockKeys, "one block of keys");
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pair = unit / p.blocks, block = unit - pair * p.blocks, first_key = block * kBlockKeys + thread / G;
  const uint8_t* valid = valid_head(p, pair);
  const char* head = p.k.head<T>(pair);
  Raw<T, kRun> raw[kPasses][2];
  bool open[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t key = first_key + pass * kRows;
    open[pass] = open_key(p, valid, key);
    const char* place = head + key * p.k.row_stride * static_item_size(T);
#pragma unroll
    for (int half = 0; half < 2; ++half) load_channels<T>(p.k, place, first_channel<G>(half), open[pass], raw[pass][half]);
  }
  uint32_t sign[2 * kRun];
  load_signs<G>(p.k.channels, sign);
  float mean[2 * kRun];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Raw<RFK_FLOAT32, kRun> bits;
    const Heads means = {nullptr, 0, 0, 0, 1, 1, p.k.channels, p.k.channels % kRun == 0};
    load_channels<RFK_FLOAT32>(means, reinterpret_cast<const char*>(p.mean + pair * p.k.channels), first_channel<G>(half), true,
                               bits);
#pragma unroll
    for (int i = 0; i < kRun; ++i) mean[half * kRun + i] = float_from_bits(bits.word[i]);
  }
  float y[kPasses][2 * kRun];
  float largest = 0.0f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[kRun];
      unpack_static<T, kRun>(raw[pass][half].word, x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int at = half * kRun + i;
        y[pass][at] = open[pass] ? flipped(x[i] - mean[at], sign[at]) : 0.0f;
      }
    }
    rotate<G>(y[pass], p.rotated);
    largest = largest_magnitude(y[pass], largest);
  }
  largest = largest_of(largest, 32);
  if (thread % 32 == 0) parts[thread / 32] = largest;
  __syncthreads();
  largest = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) largest = larger(largest, parts[i]);
  const Factors f = factors(largest, p.e4m3 ? 448.0f : 127.0f);
  const bool spoiled = !finite(largest);
  if (thread == 0) {
    p.scale[unit] = f.scale;
    if (spoiled && p.finite != nullptr) p.finite[pair] = 0;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t key = first_key + pass * kRows;
    if (key >= p.keys) continue;
    store_codes<G>(y[pass], f.inverse, spoiled, p.e4m3 != 0, p.rotated, p.codes + (pair * p.keys + key) * p.rotated);
  }
}

template <int T, int G>
__global__ void __launch_bounds__(kThreads, G == 16 ? 2 : 3) codes(const __grid_constant__ KeysValues p) {
  alignas(16) __shared__ uint32_t words[kValueKeys / 4 * kValueChannels];
  const int64_t unit = static_cast<int64_t>(blockIdx.x);
  if (unit < p.key_units) {
    key_codes<T, G>(p, unit, reinterpret_cast<float*>(words));
  } else if (p.value_form == kE4m3) {
    value_codes<T>(p, unit - p.key_units, words);
  } else {
    value_copy<T>(p, unit - p.key_units);
  }
}

// launching --------------------------------------------------------------------------------------------------------

using QueryKernel = void (*)(Queries);
using KeyKernel = void (*)(KeysValues);

template <int T>
QueryKernel query_kernel(int lanes) {
  switch (lanes) {
    case 4: return query_codes<T, 4>;
    case 8: return query_codes<T, 8>;
    default: return query_codes<T, 16>;
  }
}

template <int T>
KeyKernel codes_kernel(int lanes) {
  switch (lanes) {
    case 4: return codes<T, 4>;
    case 8: return codes<T, 8>;
    default: return codes<T, 16>;
  }
}

int lanes_of(int rotated) { return rotated < 2 * kRun * kLeastLanes ? kLeastLanes : rotated / (2 * kRun); }

template <class T>
T* take(char*& at, int64_t count) {
  T* const place = reinterpret_cast<T*>(at);
  at += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  return place;
}

// Hands the workspace out; returns its size.
int64_t divide_workspace(char* workspace, int64_t pairs, int64_t blocks, int64_t channels, int64_t value_channels,
                         KeysValues* p) {
  char* at = workspace;
  p->sums = take<float>(at, pairs * blocks * channels);
  p->counts = take<int32_t>(at, pairs * blocks * blocks_for(channels, kRun));
  p->maxima = take<uint32_t>(at, pairs * blocks * value_channels);
  p->value_inverse = take<float>(at, pairs * value_channels);
  return at - workspace;
}

}  // namespace

rfk_status quantize_queries(const rfk_device& device, const rfk_tensor& q, bool e4m3, uint8_t* codes, float* scale,
                            uint8_t* finite) {
  Queries p = {};
  p.q = heads_view(q);
  p.codes = codes;
  p.scale = scale;
  p.finite = finite;
  p.queries = q.shape[2];
  p.rotated = padded_channels(q.shape[3]);
  p.e4m3 = e4m3;
  const int lanes = lanes_of(p.rotated);
  p.tiles = blocks_for(p.queries, kThreads / lanes * kQueryPasses);
  const QueryKernel kernel = q.dtype == RFK_FLOAT32    ? query_kernel<RFK_FLOAT32>(lanes)
                             : q.dtype == RFK_BFLOAT16 ? query_kernel<RFK_BFLOAT16>(lanes)
                                                       : query_kernel<RFK_FLOAT16>(lanes);
  Launcher launcher(device, RFK_OP_QUANTIZE);
  launcher.run(kernel, p, q.shape[0] * q.shape[1] * p.tiles);
  return launcher.status();
}

int64_t quantize_workspace(int64_t pairs, int64_t keys, int64_t channels, int64_t value_channels) {
  KeysValues unused = {};
  const int64_t bytes = divide_workspace(nullptr, pairs, blocks_for(keys, kBlockKeys), channels, value_channels, &unused);
  return bytes > 0 ? bytes : 1;
}

rfk_status quantize_keys(const rfk_device& device, const rfk_tensor& k, const rfk_tensor* v, const rfk_tensor* valid,
                         bool e4m3_keys, bool e4m3_values, const rfk_quantized_heads& out, void* workspace) {
  KeysValues p = {};
  p.k = heads_view(k);
  p.pairs = k.shape[0] * k.shape[1];
  p.keys = k.shape[2];
  p.blocks = blocks_for(p.keys, kBlockKeys);
  p.rotated = padded_channels(k.shape[3]);
  p.e4m3 = e4m3_keys;
  p.key_runs = static_cast<int32_t>(blocks_for(k.shape[3], kRun));
  if (v != nullptr) {
    p.v = heads_view(*v);
    p.value_form = e4m3_values ? kE4m3 : out.value_codes != nullptr ? kCopy : kCheck;
    p.value_runs = static_cast<int32_t>(blocks_for(v->shape[3], kRun));
  }
  if (valid != nullptr) {
    p.valid = static_cast<const uint8_t*>(valid->data);
    p.valid_batch_stride = valid->strides[0];
    p.valid_head_stride = valid->strides[1];
    p.valid_key_stride = valid->strides[2];
  }
  divide_workspace(static_cast<char*>(workspace), p.pairs, p.blocks, k.shape[3], e4m3_values ? v->shape[3] : 0, &p);
  p.mean = out.mean;
  p.codes = static_cast<uint8_t*>(out.codes);
  p.scale = out.scale;
  p.value_codes = static_cast<uint8_t*>(out.value_codes);
  p.value_scale = out.value_scale;
  p.finite = out.finite;
  const int lanes = lanes_of(p.rotated);
  p.key_units = p.pairs * p.blocks;
  if (p.value_form == kE4m3) {
    p.value_tiles = blocks_for(p.keys, kValueKeys);
    p.channel_tiles = static_cast<int32_t>(blocks_for(v->shape[3], kValueChannels));
    p.value_units = p.pairs * p.value_tiles * p.channel_tiles;
  } else if (p.value_form != kNone) {
    p.value_tiles = blocks_for(p.keys * p.value_runs, kThreads * kCopies);
    p.value_units = p.pairs * p.value_tiles;
  }
  p.sum_blocks = blocks_for(p.pairs * p.blocks * p.key_runs, kThreads);
  const int64_t maxima_blocks = p.value_form == kE4m3 ? blocks_for(p.pairs * p.blocks * p.value_runs, kThreads) : 0;
  const int32_t dtype = k.dtype;
  Launcher launcher(device, RFK_OP_QUANTIZE);
  launcher.run(dtype == RFK_FLOAT32    ? block_sums<RFK_FLOAT32>
               : dtype == RFK_BFLOAT16 ? block_sums<RFK_BFLOAT16>
                                       : block_sums<RFK_FLOAT16>,
               p, p.sum_blocks + maxima_blocks);
  launcher.run(finish, p, p.pairs);
  launcher.run(dtype == RFK_FLOAT32    ? codes_kernel<RFK_FLOAT32>(lanes)
               : dtype == RFK_BFLOAT16 ? codes_kernel<RFK_BFLOAT16>(lanes)
                                       : codes_kernel<RFK_FLOAT16>(lanes),
               p, p.key_units + p.value_units);
  return launcher.status();
}

}  // namespace cuda
}  // namespace rfk
