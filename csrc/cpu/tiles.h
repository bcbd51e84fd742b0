// tiles.h: how the CPU kernels walk tensors of any strides and dtypes.
//
// The common shape is coalesced to as few dimensions as the strides allow and cut into tiles of kTile elements in logical
// order. A tile of an operand is either the tensor's own memory (dense, of the compute type) or a copy of it in the compute
// type, a buffer that stays in the first-level cache. So every kernel is one loop over plain arrays, whatever it is given.
#ifndef RFK_CPU_TILES_H_
#define RFK_CPU_TILES_H_

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/convert.h"
#include "rfk/rfk.h"

// The loop that follows reads an element before it writes the same one, and no other: vectorise without alias checks.
#if defined(__GNUC__) && !defined(__clang__)
#define RFK_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(__clang__)
#define RFK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define RFK_INDEPENDENT
#endif

namespace rfk {
namespace RFK_ISA_NAMESPACE {

constexpr int kTile = 1024;            // elements; 4 KiB in float, a tenth of a first-level cache
constexpr int kMaxOperands = 12;       // tensors of one call
constexpr int64_t kSmallSample = 256;  // below this many elements a sample, tiles span samples

struct Operand {
  char* data = nullptr;
  int32_t dtype = RFK_FLOAT32;
  int item = 4;
  bool dense = true;  // its elements lie in logical order without gaps
  int64_t strides[RFK_MAX_DIMS] = {};

  bool present() const { return data != nullptr; }
};

// The coalesced index space of a call.
struct Space {
  int ndim = 0;
  int64_t shape[RFK_MAX_DIMS] = {};
  int64_t numel = 1;
  int64_t samples = 1;
  int64_t per_sample = 1;
};

// Lays the space of the given tensors (NULL entries are absent) and their operands out. Where `ordered` is false, inner
// dimensions are visited in the memory order of the first tensor: the result of an elementwise call does not depend on it.
RFK_NOINLINE inline Space make_space(const rfk_tensor* const* tensors, int count, bool ordered, Operand* operands) {
  Space space;
  const rfk_tensor& first = *tensors[0];
  int order[RFK_MAX_DIMS];
  int ndim = 0;
  for (int d = 0; d < first.ndim; ++d) {
    space.numel *= first.shape[d];
    if (first.shape[d] != 1) order[ndim++] = d;
  }
  space.samples = first.ndim > 0 ? first.shape[0] : 1;
  space.per_sample = space.samples > 0 ? space.numel / space.samples : 0;
  if (!ordered) {  // insertion sort of the dimensions inside a sample by descending stride
    const int fixed = ndim > 0 && order[0] == 0 ? 1 : 0;
    for (int i = fixed + 1; i < ndim; ++i) {
      for (int j = i; j > fixed && first.strides[order[j]] > first.strides[order[j - 1]]; --j) {
        const int swap = order[j];
        order[j] = order[j - 1];
        order[j - 1] = swap;
      }
    }
  }
  for (int i = 0; i < ndim; ++i) {
    const int d = order[i];
    bool merged = space.ndim > 0;
    for (int k = 0; merged && k < count; ++k) {
      if (tensors[k] == nullptr) continue;
      merged = operands[k].strides[space.ndim - 1] == tensors[k]->strides[d] * first.shape[d];
    }
    const int at = merged ? space.ndim - 1 : space.ndim++;
    space.shape[at] = merged ? space.shape[at] * first.shape[d] : first.shape[d];
    for (int k = 0; k < count; ++k) {
      if (tensors[k] != nullptr) operands[k].strides[at] = tensors[k]->strides[d];
    }
  }
  if (space.ndim == 0) {
    space.ndim = 1;
    space.shape[0] = 1;
    for (int k = 0; k < count; ++k) operands[k].strides[0] = 1;
  }
  for (int k = 0; k < count; ++k) {
    if (tensors[k] == nullptr) continue;
    operands[k].data = static_cast<char*>(tensors[k]->data);
    operands[k].dtype = tensors[k]->dtype;
    operands[k].item = item_size(tensors[k]->dtype);
    int64_t expected = 1;
    for (int d = space.ndim - 1; d >= 0; --d) {
      if (space.shape[d] != 1 && operands[k].strides[d] != expected) operands[k].dense = false;
      expected *= space.shape[d];
    }
  }
  return space;
}

// Calls body(byte address, stride in elements, first index in the tile, run length) for the runs of [start, start + n).
template <class Body>
inline void for_runs(const Space& space, const Operand& operand, int64_t start, int n, const Body& body) {
  if (operand.dense) {
    body(operand.data + start * operand.item, static_cast<int64_t>(1), 0, n);
    return;
  }
  int64_t index[RFK_MAX_DIMS];
  int64_t rest = start, place = 0;
  for (int d = space.ndim - 1; d >= 0; --d) {
    index[d] = rest % space.shape[d];
    rest /= space.shape[d];
    place += index[d] * operand.strides[d];
  }
  const int last = space.ndim - 1;
  int done = 0;
  while (done < n) {
    const int64_t left = space.shape[last] - index[last];
    const int run = left < n - done ? static_cast<int>(left) : n - done;
    body(operand.data + place * operand.item, operand.strides[last], done, run);
    done += run;
    place += run * operand.strides[last];
    index[last] += run;
    for (int d = last; d > 0 && index[d] == space.shape[d]; --d) {
      place += operand.strides[d - 1] - index[d] * operand.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class C>
constexpr int32_t compute_dtype() {
  return sizeof(C) == 8 ? RFK_FLOAT64 : RFK_FLOAT32;
}

template <class C>
RFK_NOINLINE const C* load_tile(const Space& space, const Operand& operand, int64_t start, int n, C* buffer) {
  if (operand.dense && operand.dtype == compute_dtype<C>()) return reinterpret_cast<const C*>(operand.data) + start;
#if defined(__GNUC__)
  if (operand.dense) {  // ask for the next tile while this one is converted: loads and arithmetic alternate otherwise
    const char* next = operand.data + (start + n) * operand.item;
    for (int64_t i = 0; i < static_cast<int64_t>(n) * operand.item; i += 64) __builtin_prefetch(next + i);
  }
#endif
  for_runs(space, operand, start, n, [&](const char* source, int64_t stride, int at, int run) {
    load_run(source, operand.dtype, stride, run, buffer + at);
  });
  return buffer;
}

// Where the kernel may write its tile: the tensor itself, or a buffer that store_tile puts away.
template <class C>
inline C* output_tile(const Operand& operand, int64_t start, bool stream, C* buffer) {
  if (!stream && operand.dense && operand.dtype == compute_dtype<C>()) return reinterpret_cast<C*>(operand.data) + start;
  return buffer;
}

template <class C>
RFK_NOINLINE void store_tile(const Space& space, const Operand& operand, int64_t start, int n, bool stream, const C* values) {
  char* place = operand.data + start * operand.item;
  if (reinterpret_cast<const char*>(values) == place && operand.dense) return;
  if (stream) {
    if (operand.dtype == compute_dtype<C>()) {
      stream_bytes(place, reinterpret_cast<const char*>(values), static_cast<int64_t>(n) * operand.item);
    } else {
      alignas(64) char narrow_values[kTile * sizeof(double)];
      store_run(narrow_values, operand.dtype, 1, n, values);
      stream_bytes(place, narrow_values, static_cast<int64_t>(n) * operand.item);
    }
    return;
  }
  for_runs(space, operand, start, n, [&](char* target, int64_t stride, int at, int run) {
    store_run(target, operand.dtype, stride, run, values + at);
  });
}

// A dense output larger than the last-level cache that no input shares is written past the cache. Smaller ones stay: the
// next reader finds them there (2-core CPU with a large cache: 29 against 40 ms for 16 Mi elements into fresh memory).
inline bool streams(const Space& space, const Operand& output, const Operand* inputs, int count) {
  if (!output.present() || !output.dense || space.numel * output.item < last_level_cache_bytes()) return false;
  for (int k = 0; k < count; ++k) {
    if (inputs[k].data == output.data) return false;
  }
  return true;
}

// One scalar as the kernel meets it: rounded to the compute type, for the call or for a sample.
template <class C>
inline C scalar_at(const rfk_scalar& scalar, int64_t sample) {
  if (scalar.data == nullptr) return static_cast<C>(scalar.value);
  C value;
  load_run(static_cast<const char*>(scalar.data) + sample * scalar.stride * item_size(scalar.dtype), scalar.dtype, 1, 1,
           &value);
  return value;
}

inline bool varies(const rfk_scalar& scalar) { return scalar.data != nullptr && scalar.stride != 0; }

// body(start, n, sample) over the tiles of [begin, end). With `by_sample` a tile lies within one sample.
template <class Body>
inline void for_tiles(const Space& space, int64_t begin, int64_t end, bool by_sample, const Body& body) {
  int64_t sample = by_sample ? begin / space.per_sample : 0;
  while (begin < end) {
    int64_t n = end - begin < kTile ? end - begin : kTile;
    if (by_sample) {
      const int64_t left = (sample + 1) * space.per_sample - begin;
      if (left < n) n = left;
    }
    body(begin, static_cast<int>(n), sample);
    begin += n;
    if (by_sample && begin == (sample + 1) * space.per_sample) ++sample;
  }
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk

#endif  // RFK_CPU_TILES_H_
