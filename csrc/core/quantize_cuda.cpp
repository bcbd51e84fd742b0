// quantize_cuda.cpp: the C ABI of quantization on CUDA. Validates arguments, so that no kernel reads or writes out of bounds.
#include "core/attention_checks.h"
#include "core/status.h"
#include "rfk/rfk.h"

#if RFK_HAS_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace {

using rfk::set_error;
using rfk::valid_channels;
using rfk::valid_heads;
using rfk::valid_pair;

constexpr const char* kOp = "quantize";

bool on_cuda(const rfk_device* device) {
  if (device == nullptr || device->type != RFK_CUDA) {
    set_error("%s: these kernels run on CUDA", kOp);
    return false;
  }
#if !RFK_HAS_CUDA
  set_error("%s: this build has no CUDA kernels; rebuild with nvcc on the path and RFK_CUDA=ON", kOp);
  return false;
#else
  return true;
#endif
}

bool known_scheme(int32_t scheme) {
  if (scheme == RFK_ATTENTION_INT8_BF16 || scheme == RFK_ATTENTION_INT8_FP8 || scheme == RFK_ATTENTION_FP8) return true;
  set_error("%s: scheme %d is not quantized on CUDA", kOp, scheme);
  return false;
}

bool single(const char* name, const rfk_tensor* t) {
  if (t->dtype != RFK_FLOAT64) return true;
  set_error("%s: %s must be float32, bfloat16 or float16; got float64", kOp, name);
  return false;
}

bool memory(const char* name, const void* place, uintptr_t alignment) {
  if (place == nullptr) {
    set_error("%s: %s is missing", kOp, name);
    return false;
  }
  if (reinterpret_cast<uintptr_t>(place) % alignment == 0) return true;
  set_error("%s: %s must be aligned to %d bytes", kOp, name, static_cast<int>(alignment));
  return false;
}

bool valid_keys(const rfk_tensor* valid, const rfk_tensor* k) {
  if (!valid_heads(kOp, "valid", valid, 3, true)) return false;
  bool same = valid->dtype == RFK_BOOL;
  for (int d = 0; d < 3; ++d) same = same && valid->shape[d] == k->shape[d];
  if (!same) set_error("%s: valid must be bool (batch, heads of k, keys)", kOp);
  return same;
}

}  // namespace

extern "C" {

rfk_status rfk_quantize_queries_cuda(const rfk_device* device, const rfk_tensor* q, int32_t scheme, void* codes,
                                     float* scale, uint8_t* finite) {
  if (!on_cuda(device) || !known_scheme(scheme) || !valid_heads(kOp, "q", q) || !single("q", q) ||
      !valid_channels(kOp, "q", q->shape[3])) {
    return RFK_INVALID;
  }
  if (q->shape[0] * q->shape[1] * q->shape[2] == 0) return RFK_OK;
  if (!memory("codes", codes, 8) || !memory("scale", scale, 4)) return RFK_INVALID;
#if RFK_HAS_CUDA
  return rfk::cuda::quantize_queries(*device, *q, scheme == RFK_ATTENTION_FP8, static_cast<uint8_t*>(codes), scale, finite);
#else
  (void)finite;
  return RFK_UNSUPPORTED;
#endif
}

int64_t rfk_quantize_workspace(int64_t batch_heads, int64_t keys, int64_t channels, int64_t value_channels) {
#if RFK_HAS_CUDA
  return rfk::cuda::quantize_workspace(batch_heads, keys, channels, value_channels);
#else
  (void)batch_heads, (void)keys, (void)channels, (void)value_channels;
  return 0;
#endif
}

rfk_status rfk_quantize_keys_cuda(const rfk_device* device, const rfk_tensor* k, const rfk_tensor* v,
                                  const rfk_tensor* valid, int32_t scheme, const rfk_quantized_heads* out,
                                  void* workspace) {
  if (!on_cuda(device) || !known_scheme(scheme)) return RFK_INVALID;
  const bool e4m3_values = scheme != RFK_ATTENTION_INT8_BF16;
  if (v == nullptr && e4m3_values) {
    set_error("%s: v is missing; only int8_bf16 quantizes keys by themselves", kOp);
    return RFK_INVALID;
  }
  if (!valid_pair(kOp, k, v == nullptr ? k : v) || !single("k", k)) return RFK_INVALID;
  if (v != nullptr && v->dtype != k->dtype) {
    set_error("%s: k and v must have one dtype", kOp);
    return RFK_INVALID;
  }
  if (valid != nullptr && !valid_keys(valid, k)) return RFK_INVALID;
  if (k->shape[0] * k->shape[1] == 0) return RFK_OK;
  if (out == nullptr) {
    set_error("%s: the outputs are missing", kOp);
    return RFK_INVALID;
  }
  const bool filled = k->shape[2] > 0;
  if (!memory("mean", out->mean, 16) || (filled && !memory("codes", out->codes, 8)) ||
      (filled && !memory("scale", out->scale, 4)) || (e4m3_values && !memory("value_scale", out->value_scale, 4)) ||
      (filled && e4m3_values && !memory("value_codes", out->value_codes, 16)) ||
      (filled && out->value_codes != nullptr && !memory("value_codes", out->value_codes, 16)) ||
      !memory("workspace", workspace, 256)) {
    return RFK_INVALID;
  }
#if RFK_HAS_CUDA
  return rfk::cuda::quantize_keys(*device, *k, v, valid, scheme == RFK_ATTENTION_FP8, e4m3_values, *out, workspace);
#else
  return RFK_UNSUPPORTED;
#endif
}

}  // extern "C"
