// space.h: the index space of an elementwise CUDA call, laid out on the host. Plain C++.
//
// Dimensions of size one are dropped, and dimensions that every operand steps through without a gap are merged. Where the
// result does not depend on the visiting order (no noise), dimensions are first sorted by the strides of the output, so a
// permuted but dense layout (channels_last) becomes one run. With per-sample arguments dimension 0 stays outermost: the
// sample of linear position p is p / elements_per_sample whatever the strides are.
#ifndef RFK_CUDA_SPACE_H_
#define RFK_CUDA_SPACE_H_

#include <cstdint>

#include "rfk/rfk.h"

namespace rfk {
namespace cuda {

constexpr int kMaxOperands = RFK_MAX_TERMS + 3;  // x, the terms, out, cast

struct Space {
  int64_t numel;
  int64_t samples;
  int64_t per_sample;  // elements of one sample
  int32_t ndim;        // at least 1
  int64_t shape[RFK_MAX_DIMS];
  int64_t strides[kMaxOperands][RFK_MAX_DIMS];  // in elements; rows of absent operands are zero
};

enum class Order { kAny, kSamplesFirst, kLogical };

inline int64_t magnitude(int64_t value) { return value < 0 ? -value : value; }

// operands: count tensors of one shape, NULL where absent. `sorted_by` is the operand whose memory order is followed.
// Dimensions below first_dim are left out (flow_loss walks samples itself).
inline Space make_space(const rfk_tensor* const* operands, int count, int sorted_by, Order order, int first_dim = 0) {
  Space space = {};
  const rfk_tensor& model = *operands[sorted_by];
  space.samples = model.ndim > 0 ? model.shape[0] : 1;
  space.numel = 1;
  int dims[RFK_MAX_DIMS];
  int kept = 0;
  for (int d = first_dim; d < model.ndim; ++d) {
    space.numel *= model.shape[d];
    if (model.shape[d] != 1) dims[kept++] = d;
  }
  space.per_sample = first_dim > 0 ? space.numel : space.samples > 0 ? space.numel / space.samples : 0;
  if (order != Order::kLogical) {
    const int first = order == Order::kSamplesFirst && kept > 0 && dims[0] == 0 ? 1 : 0;
    for (int i = first + 1; i < kept; ++i) {  // insertion sort, stable: descending stride
      for (int j = i; j > first && magnitude(model.strides[dims[j]]) > magnitude(model.strides[dims[j - 1]]); --j) {
        const int held = dims[j];
        dims[j] = dims[j - 1];
        dims[j - 1] = held;
      }
    }
  }
  for (int i = 0; i < kept; ++i) {
    const int d = dims[i];
    bool merged = space.ndim > 0;
    for (int k = 0; merged && k < count; ++k) {
      merged = operands[k] == nullptr ||
               space.strides[k][space.ndim - 1] == operands[k]->strides[d] * model.shape[d];
    }
    const int at = merged ? space.ndim - 1 : space.ndim++;
    space.shape[at] = merged ? space.shape[at] * model.shape[d] : model.shape[d];
    for (int k = 0; k < count; ++k) {
      if (operands[k] != nullptr) space.strides[k][at] = operands[k]->strides[d];
    }
  }
  if (space.ndim == 0) {
    space.ndim = 1;
    space.shape[0] = 1;
    for (int k = 0; k < count; ++k) space.strides[k][0] = operands[k] != nullptr;
  }
  return space;
}

// True when the operand's offset equals the linear position.
inline bool contiguous(const Space& space, int operand) {
  int64_t expected = 1;
  for (int d = space.ndim - 1; d >= 0; --d) {
    if (space.shape[d] != 1 && space.strides[operand][d] != expected) return false;
    expected *= space.shape[d];
  }
  return true;
}

inline bool aligned(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace cuda
}  // namespace rfk

#endif  // RFK_CUDA_SPACE_H_
