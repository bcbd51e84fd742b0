// fast_calls.cpp: the steps and the interpolation in one call, for plain dense tensors on the CPU.
//
// A sampler's inner call. It checks in C++ what the public function checks in Python and declines (returns False) whatever
// is not plainly right, so that errors and rare cases have one place: the public function. Under 1 us above the kernel.
#include "fast_calls.h"

#include <pybind11/gil_safe_call_once.h>

#include <cstring>
#include <initializer_list>

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
  // Not a plain static: the import may let go of the GIL to a thread that would then wait for it inside the static.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> cached;
  return cached.call_once_and_store_result([] {
    Names n;
    const py::module_ torch = py::module_::import("torch");
    n.tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    n.increment_version = py::object(torch.attr("_C").attr("_increment_version")).release().ptr();
    return n;
  }).get_stored();
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

int64_t item_bytes(int32_t dtype) { return dtype == RFK_FLOAT64 ? 8 : dtype == RFK_FLOAT32 ? 4 : 2; }

int64_t bytes(const rfk_tensor& t) {
  int64_t n = item_bytes(t.dtype);
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

bool same_shape(const rfk_tensor& a, const rfk_tensor& b) {
  return a.ndim == b.ndim && std::memcmp(a.shape, b.shape, sizeof(int64_t) * static_cast<size_t>(a.ndim)) == 0;
}

// Dense memory without a common byte.
bool separate(const rfk_tensor& a, const rfk_tensor& b) {
  const char *from = static_cast<const char*>(a.data), *other = static_cast<const char*>(b.data);
  return from + bytes(a) <= other || other + bytes(b) <= from;
}

// The very same elements, or no common byte.
bool separate_or_same(const rfk_tensor& out, const rfk_tensor& in) {
  return out.data == in.data ? out.dtype == in.dtype : separate(out, in);
}

// Whether the memory of a dense tensor meets the range from the scalar's first to its last value.
bool meets(const rfk_tensor& t, const rfk_scalar& scalar) {
  if (scalar.data == nullptr) return false;
  const int64_t last = t.ndim > 0 ? (t.shape[0] - 1) * scalar.stride : 0;
  const char *begin = static_cast<const char*>(t.data), *from = static_cast<const char*>(scalar.data);
  return from < begin + bytes(t) && begin < from + (last + 1) * item_bytes(scalar.dtype);
}

enum Form { kLinear = 0, kEuler = 1, kGuidedEuler = 2, kTaylor = 3 };  // as rfkernels.ops.ode_step passes them

// A Python number, or a 0-d or (B,) CPU tensor that nothing watches.
bool plain_scalar(py::handle object, const dlpack::ExchangeApi* api, bool grad_enabled, const rfk_tensor& x,
                  rfk_scalar* scalar) {
  if (PyFloat_Check(object.ptr())) {
    *scalar = {PyFloat_AS_DOUBLE(object.ptr()), nullptr, 0, RFK_FLOAT64};
    return true;
  }
  rfk_tensor view;
  bool dense;
  if (!plain(object, api, grad_enabled, &view, &dense) || view.ndim > 1) return false;
  if (view.ndim == 1 && (x.ndim == 0 || view.shape[0] != x.shape[0])) return false;
  *scalar = {0.0, view.data, view.ndim == 0 ? 0 : view.strides[0], view.dtype};
  return true;
}

// Runs the launch, with the GIL released where it is long, and tells autograd which tensors were written.
template <class Launch>
bool launched(const rfk_tensor& size, std::initializer_list<py::handle> outputs, const Launch& launch) {
  match_torch_threads();
  rfk_status status;
  if (bytes(size) > 32768 * 4) {
    py::gil_scoped_release release;
    status = launch();
  } else {
    status = launch();
  }
  if (status != RFK_OK) return false;
  for (const py::handle output : outputs) {
    if (output.is_none()) continue;
    PyObject* written = PyTuple_Pack(1, output.ptr());
    PyObject* done = PyObject_CallOneArg(names().increment_version, written);
    if (done == nullptr) PyErr_Clear();  // an inference tensor has no version
    Py_XDECREF(done);
    Py_DECREF(written);
  }
  return true;
}

const rfk_device kCpu{RFK_CPU, 0, nullptr};

}  // namespace

bool fast_step(int form, py::handle x, py::tuple tensors, py::tuple coefficients, py::handle x_coefficient,
               py::handle out, py::handle cast, bool grad_enabled) {
  const dlpack::ExchangeApi* api = exchange_api();
  const size_t count = tensors.size();
  if (api == nullptr || count > RFK_MAX_TERMS || coefficients.size() > RFK_MAX_TERMS) return false;
  const size_t tensors_needed = form == kEuler ? 1 : form == kGuidedEuler ? 2 : count;
  const size_t scalars_needed = form == kLinear ? count : form == kGuidedEuler ? 2 : 1;
  if (count != tensors_needed || coefficients.size() != scalars_needed) return false;
  rfk_tensor view_out, view_cast, view_x, terms[RFK_MAX_TERMS];
  bool dense;
  if (!plain(out, api, grad_enabled, &view_out, &dense) || !dense) return false;
  const bool casting = !cast.is_none();
  if (casting && (!plain(cast, api, grad_enabled, &view_cast, &dense) || !dense || !same_shape(view_out, view_cast) ||
                  !separate(view_cast, view_out))) {
    return false;
  }
  const auto input = [&](py::handle object, rfk_tensor* view) {
    return plain(object, api, grad_enabled, view, &dense) && dense && same_shape(view_out, *view) &&
           separate_or_same(view_out, *view) && !(casting && !separate(view_cast, *view)) &&
           (view->dtype != RFK_FLOAT64 || view_out.dtype == RFK_FLOAT64);
  };
  if (!input(x, &view_x) || view_x.dtype != view_out.dtype) return false;
  for (size_t k = 0; k < count; ++k) {
    if (!input(tensors[k], &terms[k])) return false;
  }
  rfk_scalar scalars[RFK_MAX_TERMS], c0;
  const auto scalar = [&](py::handle object, rfk_scalar* value) {
    return plain_scalar(object, api, grad_enabled, view_out, value) &&
           !meets(view_out, *value) && !(casting && meets(view_cast, *value));
  };
  if (!scalar(x_coefficient, &c0)) return false;
  for (size_t k = 0; k < coefficients.size(); ++k) {
    if (!scalar(coefficients[k], &scalars[k])) return false;
  }
  const rfk_tensor* copy = casting ? &view_cast : nullptr;
  return launched(view_out, {out, cast}, [&]() -> rfk_status {
    switch (form) {
      case kEuler: return rfk_euler_step(&kCpu, &view_x, &terms[0], nullptr, &scalars[0], nullptr, &view_out, copy);
      case kGuidedEuler:
        return rfk_euler_step(&kCpu, &view_x, &terms[0], &terms[1], &scalars[0], &scalars[1], &view_out, copy);
      case kTaylor:
        return rfk_taylor_step(&kCpu, &view_x, terms, static_cast<int32_t>(count), &scalars[0], &view_out, copy);
      default:
        return rfk_linear_step(&kCpu, &view_x, &c0, terms, scalars, static_cast<int32_t>(count), nullptr, nullptr,
                               &view_out, copy);
    }
  });
}

bool fast_interpolate(py::handle x1, py::handle x0, py::handle t, int path, py::handle seed, py::handle offset,
                      py::handle xt, py::handle target, bool grad_enabled) {
  const dlpack::ExchangeApi* api = exchange_api();
  if (api == nullptr) return false;
  rfk_tensor data, source, point, direction;
  bool dense;
  if (!plain(x1, api, grad_enabled, &data, &dense) || !dense) return false;
  const auto output = [&](py::handle object, rfk_tensor* view) {
    return plain(object, api, grad_enabled, view, &dense) && dense && view->dtype == data.dtype &&
           same_shape(data, *view) && separate_or_same(*view, data);
  };
  if (!output(xt, &point) || !output(target, &direction) || !separate(point, direction)) return false;
  rfk_scalar time;
  if (!plain_scalar(t, api, grad_enabled, data, &time)) return false;
  if (meets(point, time) || meets(direction, time)) return false;
  rfk_noise noise{};
  const bool given = !x0.is_none();
  if (given) {
    if (!plain(x0, api, grad_enabled, &source, &dense) || !dense || !same_shape(data, source) || !seed.is_none() ||
        !separate_or_same(point, source) || !separate_or_same(direction, source) ||
        (source.dtype == RFK_FLOAT64 && data.dtype != RFK_FLOAT64)) {
      return false;
    }
  } else {
    if (!PyLong_CheckExact(seed.ptr()) || !PyLong_CheckExact(offset.ptr())) return false;
    const long long key = PyLong_AsLongLong(seed.ptr()), start = PyLong_AsLongLong(offset.ptr());
    if (PyErr_Occurred() != nullptr) PyErr_Clear();  // out of range: -1
    if (key < 0 || start < 0) return false;
    noise.seed = static_cast<uint64_t>(key);
    noise.offset = static_cast<uint64_t>(start);
    noise.present = 1;
  }
  return launched(data, {xt, target}, [&]() -> rfk_status {
    return rfk_interpolate(&kCpu, &data, given ? &source : nullptr, &noise, &time, path, nullptr, &point, &direction,
                           nullptr);
  });
}

}  // namespace rfk_python
