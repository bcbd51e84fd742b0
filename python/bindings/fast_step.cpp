// fast_step.cpp: the Euler step into `out=` in one call, for plain tensors on the CPU.
//
// A sampler's inner call. It checks in C++ what the public function checks in Python and declines (returns False) whatever
// is not plainly right, so that errors and rare cases have one place: the public function. Under 1 us above the kernel.
#include "fast_step.h"

#include <cstring>

#include "views.h"

namespace rfk_python {
namespace {

struct Names {
  PyObject* tensor_type;
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* increment_version;
};

const Names& names() {
  static const Names cached = [] {
    Names n;
    const py::module_ torch = py::module_::import("torch");
    n.tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    n.increment_version = py::object(torch.attr("_C").attr("_increment_version")).release().ptr();
    return n;
  }();
  return cached;
}

bool is_true(PyObject* value) {
  const bool result = value == Py_True;
  if (value == nullptr) PyErr_Clear();
  Py_XDECREF(value);
  return result;
}

// A strided CPU tensor that nothing watches, its dense view in `view`.
bool plain(py::handle object, const dlpack::ExchangeApi* api, bool grad_enabled, rfk_tensor* view, bool* dense) {
  const Names& n = names();
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != n.tensor_type) return false;
  if (grad_enabled && is_true(PyObject_GetAttr(object.ptr(), n.requires_grad))) return false;
  if (is_true(PyObject_CallMethodNoArgs(object.ptr(), n.is_neg))) return false;
  dlpack::Tensor source;
  if (api->tensor_from_object(object.ptr(), &source) != 0) {
    PyErr_Clear();
    return false;
  }
  view->dtype = float_dtype(source.dtype);
  if (source.device.type != dlpack::kCpu || view->dtype < 0 || source.ndim > RFK_MAX_DIMS || source.data == nullptr) {
    return false;
  }
  view->ndim = source.ndim;
  view->data = static_cast<char*>(source.data) + source.byte_offset;
  int64_t numel = 1;
  *dense = true;
  for (int32_t d = source.ndim - 1; d >= 0; --d) {
    view->shape[d] = source.shape[d];
    view->strides[d] = source.strides != nullptr ? source.strides[d] : numel;
    if (view->shape[d] != 1 && view->strides[d] != numel) *dense = false;
    numel *= source.shape[d];
  }
  return true;
}

int64_t bytes(const rfk_tensor& t) {
  int64_t n = t.dtype == RFK_FLOAT64 ? 8 : t.dtype == RFK_FLOAT32 ? 4 : 2;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

bool same_shape(const rfk_tensor& a, const rfk_tensor& b) {
  return a.ndim == b.ndim && std::memcmp(a.shape, b.shape, sizeof(int64_t) * static_cast<size_t>(a.ndim)) == 0;
}

// Dense memory: either the very same elements, or no common byte.
bool separate_or_same(const rfk_tensor& out, const rfk_tensor& in) {
  const char *a = static_cast<const char*>(out.data), *b = static_cast<const char*>(in.data);
  if (a == b) return out.dtype == in.dtype;
  return a + bytes(out) <= b || b + bytes(in) <= a;
}

}  // namespace

bool fast_euler_step(py::handle x, py::handle v, py::handle v_uncond, py::handle dt, py::handle guidance,
                     py::handle out, bool grad_enabled) {
  const dlpack::ExchangeApi* api = exchange_api();
  if (api == nullptr || !PyFloat_Check(dt.ptr())) return false;
  const bool guided = !v_uncond.is_none();
  if (guided != !guidance.is_none() || (guided && !PyFloat_Check(guidance.ptr()))) return false;
  const py::handle objects[4] = {out, x, v, v_uncond};
  rfk_tensor views[4];
  const int count = guided ? 4 : 3;
  for (int k = 0; k < count; ++k) {
    bool dense;
    if (!plain(objects[k], api, grad_enabled, &views[k], &dense) || !dense) return false;
    if (k > 0 && (!same_shape(views[0], views[k]) || !separate_or_same(views[0], views[k]))) return false;
    if (k > 1 && views[k].dtype == RFK_FLOAT64 && views[1].dtype != RFK_FLOAT64) return false;
  }
  if (views[0].dtype != views[1].dtype) return false;
  const rfk_device cpu{RFK_CPU, 0, nullptr};
  const rfk_scalar step{PyFloat_AS_DOUBLE(dt.ptr()), nullptr, 0, RFK_FLOAT64};
  const rfk_scalar scale{guided ? PyFloat_AS_DOUBLE(guidance.ptr()) : 0.0, nullptr, 0, RFK_FLOAT64};
  const auto launch = [&] {
    return rfk_euler_step(&cpu, &views[1], &views[2], guided ? &views[3] : nullptr, &step, guided ? &scale : nullptr,
                          &views[0], nullptr);
  };
  rfk_status status;
  if (bytes(views[0]) > 32768 * 4) {
    py::gil_scoped_release release;
    status = launch();
  } else {
    status = launch();
  }
  if (status != RFK_OK) return false;
  PyObject* written = PyTuple_Pack(1, out.ptr());
  PyObject* done = PyObject_CallOneArg(names().increment_version, written);
  if (done == nullptr) PyErr_Clear();  // an inference tensor has no version
  Py_XDECREF(done);
  Py_DECREF(written);
  return true;
}

}  // namespace rfk_python
