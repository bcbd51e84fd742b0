// attention_checks.h: what the C ABI of quantize and attention asks of its tensors, on the CPU and on CUDA.
#ifndef RFK_CORE_ATTENTION_CHECKS_H_
#define RFK_CORE_ATTENTION_CHECKS_H_

#include <cstdint>

#include "core/status.h"
#include "rfk/rfk.h"

namespace rfk {

// A (B, H, S, D) tensor of floats (masks: or bools).
static inline bool valid_heads(const char* op, const char* name, const rfk_tensor* t, int32_t ndim = 4, bool boolean = false) {
  if (t == nullptr || t->ndim != ndim) {
    set_error("%s: %s must have %d dimensions", op, name, ndim);
    return false;
  }
  if ((t->dtype < RFK_FLOAT32 || t->dtype > RFK_FLOAT16) && !(boolean && t->dtype == RFK_BOOL)) {
    set_error("%s: %s has dtype %d, which these kernels do not take", op, name, t->dtype);
    return false;
  }
  int64_t numel = 1;
  for (int32_t d = 0; d < ndim; ++d) {
    if (t->shape[d] < 0) {
      set_error("%s: %s has a negative size", op, name);
      return false;
    }
    numel *= t->shape[d];
  }
  if (t->data == nullptr && numel > 0) {
    set_error("%s: %s has elements but no memory", op, name);
    return false;
  }
  return true;
}

static inline bool valid_channels(const char* op, const char* name, int64_t channels) {
  if (channels >= 1 && channels <= RFK_MAX_CHANNELS) return true;
  set_error("%s: %s must have 1 to %d channels a head; got %lld", op, name, RFK_MAX_CHANNELS, static_cast<long long>(channels));
  return false;
}

static inline bool valid_pair(const char* op, const rfk_tensor* k, const rfk_tensor* v) {
  if (!valid_heads(op, "k", k) || !valid_heads(op, "v", v) || !valid_channels(op, "k", k->shape[3]) ||
      !valid_channels(op, "v", v->shape[3])) {
    return false;
  }
  for (int d = 0; d < 3; ++d) {
    if (k->shape[d] != v->shape[d]) {
      set_error("%s: k and v must have the same batch, heads and keys", op);
      return false;
    }
  }
  return true;
}

}  // namespace rfk

#endif  // RFK_CORE_ATTENTION_CHECKS_H_
