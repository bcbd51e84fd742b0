// attention.cpp: attention and its quantization on CPU tensors.
#include "attention.h"

#include <pybind11/gil_safe_call_once.h>

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

struct Torch {
  PyObject *tensor_type, *mode_depth, *function_mode_depth, *tracing, *functorch_level, *forward_ad;
  PyObject* forward_level = PyUnicode_InternFromString("_current_level");
};

const Torch& torch_parts() {
  // Not a plain static: the import may let go of the GIL to a thread that would then wait for it inside the static.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> cached;
  return cached.call_once_and_store_result([] {
    Torch t;
    const auto keep = [](const py::object& object) { return py::object(object).release().ptr(); };
    const py::module_ torch = py::module_::import("torch");
    const py::object internals = torch.attr("_C");
    t.tensor_type = keep(torch.attr("Tensor"));
    t.mode_depth = keep(internals.attr("_len_torch_dispatch_stack"));
    t.function_mode_depth = keep(internals.attr("_len_torch_function_stack"));
    t.tracing = keep(internals.attr("_is_tracing"));
    t.functorch_level = keep(internals.attr("_functorch").attr("maybe_current_level"));
    t.forward_ad = keep(py::module_::import("torch.autograd.forward_ad"));
    return t;
  }).get_stored();
}

// Whether `value`, a new reference, is the number `quiet` or False or None; errors count as no.
bool is_quiet(PyObject* value, long quiet) {
  if (value == nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool result = value == Py_None || value == Py_False || (PyLong_CheckExact(value) && PyLong_AsLong(value) == quiet);
  Py_DECREF(value);
  return result;
}

// rfkernels._dispatch.watched, but for compilation.
bool watched(const Torch& t) {
  return !(is_quiet(PyObject_CallNoArgs(t.mode_depth), 0) && is_quiet(PyObject_CallNoArgs(t.function_mode_depth), 0) &&
           is_quiet(PyObject_CallNoArgs(t.tracing), 0) && is_quiet(PyObject_CallNoArgs(t.functorch_level), -1) &&
           is_quiet(PyObject_GetAttr(t.forward_ad, t.forward_level), -1));
}

// handover_key(q, k, v, attn_mask, is_causal): what the hand-over rule reads of a plain CPU call, packed into a number. -1 where
// anything is unusual: watched by a mode or transform, a subclass, shapes or dtypes that the public function may have to refuse.
PyObject* handover_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto unusual = [] { return PyLong_FromLong(-1); };
  const dlpack::ExchangeApi* api = exchange_api();
  if (count != 5 || api == nullptr || (args[4] != Py_False && args[4] != Py_True)) return unusual();
  const Torch& torch = torch_parts();
  const bool causal = args[4] == Py_True, masked = args[3] != Py_None;
  dlpack::Tensor t[4];  // q, k, v, mask
  for (int i = 0; i < (masked ? 4 : 3); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(args[i])) != torch.tensor_type) return unusual();
    if (api->tensor_from_object(args[i], &t[i]) != 0) {
      PyErr_Clear();
      return unusual();
    }
    if (t[i].device.type != dlpack::kCpu) return unusual();
  }
  const int32_t dtype = float_dtype(t[0].dtype);
  if (dtype < 0 || float_dtype(t[1].dtype) != dtype || float_dtype(t[2].dtype) != dtype) return unusual();
  if (t[0].ndim != 4 || t[1].ndim != 4 || t[2].ndim != 4) return unusual();
  for (int d = 0; d < 4; ++d) {
    if (t[1].shape[d] != t[2].shape[d] || (d != 2 && t[0].shape[d] != t[1].shape[d])) return unusual();
  }
  const int64_t queries = t[0].shape[2], keys = t[1].shape[2], channels = t[0].shape[3];
  if (channels < 1 || channels >= 1 << 9 || queries >= 1 << 24 || keys >= 1 << 24) return unusual();
  if (masked) {
    if (causal || t[3].dtype.code != dlpack::kBool || t[3].ndim < 2 || t[3].ndim > 4) return unusual();
    const int64_t full[4] = {t[0].shape[0], t[0].shape[1], queries, keys};
    for (int32_t d = 0; d < t[3].ndim; ++d) {
      const int64_t size = t[3].shape[d];
      if (size != 1 && size != full[4 - t[3].ndim + d]) return unusual();
    }
  }
  if (watched(torch)) return unusual();
  const int64_t mask = masked ? 2 : causal ? 1 : 0;
  return PyLong_FromLongLong((((dtype * 4 + mask) << 9 | channels) << 24 | queries) << 24 | keys);
}

PyMethodDef kDirect[] = {
    {"handover_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(handover_key)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("quantize_keys", &quantize_keys);
  m.def("quantize_queries", &quantize_queries);
  m.def("quantize_keys_cuda", &quantize_keys_cuda);
  m.def("quantize_workspace", &rfk_quantize_workspace, "Bytes of device memory that quantize_keys_cuda needs meanwhile.");
  m.def("quantized_layout", &quantized_layout, "Bytes of one head's quantized keys and values, and its parts' offsets.");
  // Without pybind11's dispatcher: it runs before every call of attention.
  if (PyModule_AddFunctions(m.ptr(), kDirect) != 0) throw py::error_already_set();
}

}  // namespace rfk_python
