// quantize_values.cuh: the task that keys and values share, and what its kernels do with values.
#ifndef RFK_CUDA_QUANTIZE_VALUES_CUH_
#define RFK_CUDA_QUANTIZE_VALUES_CUH_

#include "cuda/quantize.cuh"

namespace rfk {
namespace cuda {

constexpr int kValueKeys = 128;     // keys of a tile of e4m3 values, and what their number is padded to
constexpr int kValueChannels = 64;  // channels of a tile
constexpr int kCopies = 4;          // runs of a thread that copies values

enum ValueForm { kNone, kE4m3, kCopy, kCheck };  // kCheck: bfloat16 that stays where it is, looked at for the flag only

struct KeysValues {
  Heads k, v;
  int64_t pairs, keys, blocks;  // blocks of 64 keys of a head
  const uint8_t* valid;         // or NULL
  int64_t valid_batch_stride, valid_head_stride, valid_key_stride;
  int32_t rotated, e4m3, value_form;
  int32_t key_runs, value_runs;  // runs of eight channels of a row
  // block_sums: one thread a (head, block, run)
  int64_t sum_blocks;  // of the grid that serve the keys; the others serve the values
  float* sums;         // (pairs, blocks, channels)
  int32_t* counts;     // (pairs, blocks, key_runs) where valid is given: valid keys, + kSpoiled
  uint32_t* maxima;    // (pairs, blocks, channels of v): bits of magnitudes, the sign bit as kSpoiled
  // outputs
  float* mean;
  uint8_t* codes;
  float* scale;
  uint8_t* value_codes;
  float* value_scale;
  float* value_inverse;
  uint8_t* finite;  // or NULL
  // codes
  int64_t key_units;                 // blocks of the grid that serve the keys
  int64_t value_tiles, value_units;  // tiles of keys of a head; blocks of the grid
  int32_t channel_tiles;
};

constexpr int32_t kSpoiled = 1 << 30;  // an invalid key holds a NaN or an infinity

__device__ __forceinline__ const uint8_t* valid_head(const KeysValues& p, int64_t pair) {
  if (p.valid == nullptr) return nullptr;
  const int64_t batch = pair / p.k.heads;
  return p.valid + batch * p.valid_batch_stride + (pair - batch * p.k.heads) * p.valid_head_stride;
}

__device__ __forceinline__ bool open_key(const KeysValues& p, const uint8_t* valid, int64_t key) {
  return key < p.keys && (valid == nullptr || valid[key * p.valid_key_stride] != 0);
}

// A tile of 128 keys x 64 channels through shared memory, four keys a word; the words of a channel are permuted in groups of
// four by the channel's run, so that neither side meets a bank conflict.
template <int T>
__device__ __forceinline__ void value_codes(const KeysValues& p, int64_t unit, uint32_t* words) {
  constexpr int kWords = kValueKeys / 4, kRuns = kValueChannels / kRun;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = p.value_tiles * p.channel_tiles, pair = unit / tiles, rest = unit - pair * tiles;
  const int64_t first_key = rest / p.channel_tiles * kValueKeys;
  const int first_tile_channel = static_cast<int>(rest % p.channel_tiles) * kValueChannels;
  const int run = thread % kRuns, quad = thread / kRuns, first = first_tile_channel + run * kRun;
  const uint8_t* valid = valid_head(p, pair);
  const char* head = p.v.head<T>(pair);
  Raw<T, kRun> raw[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t key = first_key + quad * 4 + j;
    load_channels<T>(p.v, head + key * p.v.row_stride * static_item_size(T), first, open_key(p, valid, key), raw[j]);
  }
  float inverse[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    inverse[i] = first + i < p.v.channels ? p.value_inverse[pair * p.v.channels + first + i] : 0.0f;
  }
  float value[4][kRun];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unpack_static<T, kRun>(raw[j].word, value[j]);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float scaled = value[j][i] * inverse[i];
      value[j][i] = scaled == scaled ? scaled : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    words[(run * kRun + i) * kWords + (quad ^ run * 4)] = e4m3_four(value[0][i], value[1][i], value[2][i], value[3][i]);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kValueChannels * kWords / 4 / kThreads; ++j) {
    const int index = thread + j * kThreads, channel = index / (kWords / 4), group = index % (kWords / 4);
    if (first_tile_channel + channel >= p.v.channels) continue;
    const uint4 four = *reinterpret_cast<const uint4*>(words + channel * kWords + (group ^ channel / kRun) * 4);
    const int64_t row = pair * p.v.channels + first_tile_channel + channel;
    *reinterpret_cast<uint4*>(p.value_codes + row * (p.value_tiles * kValueKeys) + first_key + group * 16) = four;
  }
}

// bfloat16 values: copied where value_codes is given, and checked.
template <int T>
__device__ __forceinline__ void value_copy(const KeysValues& p, int64_t unit) {
  const int64_t pair = unit / p.value_tiles, runs = p.keys * p.value_runs;
  const int64_t begin = (unit - pair * p.value_tiles) * (kThreads * kCopies) + static_cast<int>(threadIdx.x);
  const char* head = p.v.head<T>(pair);
  Raw<T, kRun> raw[kCopies];
  int64_t key[kCopies];
  int first[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; ++j) {
    const int64_t index = begin + j * kThreads;
    key[j] = runs <= 0x7fffffff ? static_cast<uint32_t>(index) / static_cast<uint32_t>(p.value_runs) : index / p.value_runs;
    first[j] = static_cast<int>(index - key[j] * p.value_runs) * kRun;
    load_channels<T>(p.v, head + key[j] * p.v.row_stride * static_item_size(T), first[j], index < runs, raw[j]);
  }
  bool spoiled = false;
#pragma unroll
  for (int j = 0; j < kCopies; ++j) {
    float value[kRun];
    unpack_static<T, kRun>(raw[j].word, value);
    uint16_t narrow[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      narrow[i] = float_to_bfloat16(value[i]);
      spoiled = spoiled || (narrow[i] & 0x7f80) == 0x7f80;
    }
    if (p.value_codes == nullptr || begin + j * kThreads >= runs) continue;
    uint16_t* place = reinterpret_cast<uint16_t*>(p.value_codes) + (pair * p.keys + key[j]) * p.v.channels + first[j];
    if (p.v.channels % kRun == 0) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = narrow[2 * i] | static_cast<uint32_t>(narrow[2 * i + 1]) << 16;
      *reinterpret_cast<uint4*>(place) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first[j] + i < p.v.channels) place[i] = narrow[i];
      }
    }
  }
  if (spoiled && p.finite != nullptr) p.finite[pair] = 0;
}

}  // namespace cuda
}  // namespace rfk

#endif  // RFK_CUDA_QUANTIZE_VALUES_CUH_
