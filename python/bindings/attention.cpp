// attention.cpp: attention and its quantization on CPU tensors.
#include "attention.h"

#include <vector>

#include "views.h"

namespace rfk_python {
namespace {

void quantize_keys(py::object k, py::object v, uintptr_t valid, int32_t scheme, uintptr_t packed) {
  Call call("quantize");
  const rfk_tensor* vk = call.tensor(k, "k");
  const rfk_tensor* vv = call.tensor(v, "v");
  call.run([&](const rfk_device& device) {
    return rfk_quantize_keys(&device, vk, vv, reinterpret_cast<const uint8_t*>(valid), scheme,
                             reinterpret_cast<void*>(packed));
  });
}

void quantize_queries(py::object q, int32_t scheme, uintptr_t codes, uintptr_t scale, uintptr_t finite) {
  Call call("quantize");
  const rfk_tensor* vq = call.tensor(q, "q");
  call.run([&](const rfk_device& device) {
    auto* const scales = reinterpret_cast<float*>(scale);
    auto* const flags = reinterpret_cast<uint8_t*>(finite);
    if (device.type == RFK_CUDA) {
      return rfk_quantize_queries_cuda(&device, vq, scheme, reinterpret_cast<void*>(codes), scales, flags);
    }
    return rfk_quantize_queries(&device, vq, scheme, reinterpret_cast<int8_t*>(codes), scales, flags);
  });
}

void quantize_keys_cuda(py::object k, py::object v, py::object valid, int32_t scheme, uintptr_t codes, uintptr_t scale,
                        uintptr_t mean, uintptr_t value_codes, uintptr_t value_scale, uintptr_t finite,
                        uintptr_t workspace) {
  Call call("quantize");
  const rfk_tensor* vk = call.tensor(k, "k");
  const rfk_tensor* vv = call.tensor(v, "v");
  const rfk_tensor* vm = call.mask(valid, "valid");
  const rfk_quantized_heads out = {reinterpret_cast<void*>(codes),        reinterpret_cast<float*>(scale),
                                   reinterpret_cast<float*>(mean),        reinterpret_cast<void*>(value_codes),
                                   reinterpret_cast<float*>(value_scale), reinterpret_cast<uint8_t*>(finite)};
  call.run([&](const rfk_device& device) {
    return rfk_quantize_keys_cuda(&device, vk, vv, vm, scheme, &out, reinterpret_cast<void*>(workspace));
  });
}

// Returns the heads (batch * heads + head) that the caller must compute another way.
py::list attention(py::object q, py::object k, py::object v, uintptr_t packed, int64_t keys, int64_t value_channels,
                   int64_t key_heads, py::object mask, bool causal, double scale, int32_t scheme, py::object out,
                   py::object lse) {
  Call call("attention");
  const rfk_tensor* vq = call.tensor(q, "q");
  const rfk_tensor* vk = call.tensor(k, "k");
  const rfk_tensor* vv = call.tensor(v, "v");
  const rfk_tensor* vm = call.mask(mask, "attn_mask");
  const rfk_tensor* vo = call.tensor(out, "out");
  const rfk_tensor* vl = call.tensor(lse, "lse");
  if (vq == nullptr || vq->ndim != 4) throw py::value_error("attention: q must have 4 dimensions");
  std::vector<uint8_t> exact(static_cast<size_t>(vq->shape[0] * vq->shape[1]));
  call.run([&](const rfk_device& device) {
    return rfk_attention(&device, vq, vk, vv, reinterpret_cast<const void*>(packed), keys, value_channels, key_heads, vm,
                         causal ? 1 : 0, scale, scheme, vo, vl, exact.data());
  });
  py::list heads;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (exact[i] != 0) heads.append(i);
  }
  return heads;
}

py::tuple quantized_layout(int32_t scheme, int64_t keys, int64_t channels, int64_t value_channels) {
  int64_t offsets[9];
  const int64_t bytes = rfk_quantized_bytes(scheme, keys, channels, value_channels, offsets);
  const char* names[9] = {"keys",    "values",      "key_scale", "addend", "inverse",
                          "row_sum", "value_scale", "mean",      "flag"};
  py::dict places;
  for (int i = 0; i < 9; ++i) places[names[i]] = offsets[i];
  return py::make_tuple(bytes, places);
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("quantize_keys", &quantize_keys);
  m.def("quantize_queries", &quantize_queries);
  m.def("quantize_keys_cuda", &quantize_keys_cuda);
  m.def("quantize_workspace", &rfk_quantize_workspace, "Bytes of device memory that quantize_keys_cuda needs meanwhile.");
  m.def("quantized_layout", &quantized_layout, "Bytes of one head's quantized keys and values, and its parts' offsets.");
}

}  // namespace rfk_python
