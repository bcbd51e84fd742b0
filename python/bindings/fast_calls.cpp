// fast_calls.cpp: the steps and the interpolation in one call, for plain dense tensors on the CPU.
//
// A sampler's inner call. It checks in C++ what the public function checks in Python and declines (returns None or False)
// whatever is not plainly right, so that errors and rare cases have one place: the public function. Under 1 us above the
// kernel and the memory of the result.
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
  PyObject* is_neg;  // Tensor's method: called with the tensor, it is not looked up each time
  PyObject* current_level = PyUnicode_InternFromString("_current_level");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* dtype_keyword = PyTuple_Pack(1, dtype);
  PyObject* dtype_type;
  PyObject* empty_like;
  PyObject* increment_version;
  PyObject* is_grad_enabled;
  PyObject* depths[3];  // of dispatch modes, of function modes, and whether torch.jit traces
  PyObject* functorch_level;
  PyObject* forward_ad;
  PyObject* forced_backend;  // a ContextVar
};

const Names& names() {
  // Not a plain static: the import may let go of the GIL to a thread that would then wait for it inside the static.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> cached;
  return cached.call_once_and_store_result([] {
    Names n;
    const py::module_ torch = py::module_::import("torch");
    const auto keep = [](py::object object) { return object.release().ptr(); };
    n.tensor_type = keep(torch.attr("Tensor"));
    n.is_neg = keep(torch.attr("Tensor").attr("is_neg"));
    n.dtype_type = keep(torch.attr("dtype"));
    n.empty_like = keep(torch.attr("empty_like"));
    n.increment_version = keep(torch.attr("_C").attr("_increment_version"));
    n.is_grad_enabled = keep(torch.attr("is_grad_enabled"));
    const py::object internal = torch.attr("_C");
    n.depths[0] = keep(internal.attr("_len_torch_dispatch_stack"));
    n.depths[1] = keep(internal.attr("_len_torch_function_stack"));
    n.depths[2] = keep(internal.attr("_is_tracing"));
    n.functorch_level = keep(internal.attr("_functorch").attr("maybe_current_level"));
    n.forward_ad = keep(py::module_::import("torch.autograd.forward_ad"));
    n.forced_backend = keep(py::module_::import("rfkernels._dispatch").attr("_forced"));
    return n;
  }).get_stored();
}

bool is_true(PyObject* value) {
  const bool result = value == Py_True;
  if (value == nullptr) PyErr_Clear();
  Py_XDECREF(value);
  return result;
}

bool asked_torch() {
  const Names& n = names();
  for (PyObject* depth : n.depths) {
    const py::object found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(depth));
    if (!found || PyObject_IsTrue(found.ptr()) != 0) return true;
  }
  const py::object level = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(n.functorch_level));
  if (!level || !level.is_none()) return true;
  const py::object forward = py::reinterpret_steal<py::object>(PyObject_GetAttr(n.forward_ad, n.current_level));
  if (!forward || PyLong_AsLong(forward.ptr()) >= 0) return true;
  PyObject* forced = nullptr;
  if (PyContextVar_Get(n.forced_backend, nullptr, &forced) != 0) return true;
  const py::object backend = py::reinterpret_steal<py::object>(forced);
  return backend && !backend.is_none() && PyUnicode_CompareWithASCIIString(backend.ptr(), "native") != 0;
}

// Whether something besides the numbers matters to a call: rfkernels._dispatch.watched() without torch.compile, which
// never comes here (torch.export does, with tensors that are not plain), or a forced backend other than native.
bool watched() {
  const bool found = asked_torch();
  if (PyErr_Occurred() == nullptr) return found;
  PyErr_Clear();
  return true;
}

// Fills `view`, and `dense` with whether the elements lie in order. False for what is no strided floating point tensor of
// the CPU.
bool read_view(py::handle object, const dlpack::ExchangeApi* api, rfk_tensor* view, bool* dense) {
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

// The same of a tensor that nothing watches.
bool plain(py::handle object, const dlpack::ExchangeApi* api, bool grad_enabled, rfk_tensor* view, bool* dense) {
  const Names& n = names();
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != n.tensor_type) return false;
  if (grad_enabled && is_true(PyObject_GetAttr(object.ptr(), n.requires_grad))) return false;
  if (is_true(PyObject_CallOneArg(n.is_neg, object.ptr()))) return false;
  return read_view(object, api, view, dense);
}

// New memory like x, of its dtype or the one given; null where there is none, and the public function says why.
py::object empty_like(py::handle x, py::handle dtype) {
  const Names& n = names();
  PyObject* const arguments[] = {x.ptr(), dtype.ptr()};
  PyObject* made = PyObject_Vectorcall(n.empty_like, arguments, 1, dtype.is_none() ? nullptr : n.dtype_keyword);
  if (made == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(made);
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

py::object step(int form, py::handle x, py::tuple tensors, py::tuple coefficients, py::handle x_coefficient,
                py::handle out, py::handle cast) {
  const py::none declined;
  const dlpack::ExchangeApi* api = exchange_api();
  const size_t count = tensors.size();
  if (api == nullptr || count > RFK_MAX_TERMS || coefficients.size() > RFK_MAX_TERMS || watched()) return declined;
  const size_t tensors_needed = form == kEuler ? 1 : form == kGuidedEuler ? 2 : count;
  const size_t scalars_needed = form == kLinear ? count : form == kGuidedEuler ? 2 : 1;
  if (count != tensors_needed || coefficients.size() != scalars_needed) return declined;
  const bool grad_enabled = is_true(PyObject_CallNoArgs(names().is_grad_enabled));
  rfk_tensor view_x, view_out, view_cast, terms[RFK_MAX_TERMS];
  bool dense;
  if (!plain(x, api, grad_enabled, &view_x, &dense) || !dense) return declined;
  for (size_t k = 0; k < count; ++k) {
    if (!plain(tensors[k], api, grad_enabled, &terms[k], &dense) || !dense || !same_shape(view_x, terms[k]) ||
        (terms[k].dtype == RFK_FLOAT64 && view_x.dtype != RFK_FLOAT64)) {
      return declined;
    }
  }
  rfk_scalar scalars[RFK_MAX_TERMS], c0;
  if (!plain_scalar(x_coefficient, api, grad_enabled, view_x, &c0)) return declined;
  for (size_t k = 0; k < coefficients.size(); ++k) {
    if (!plain_scalar(coefficients[k], api, grad_enabled, view_x, &scalars[k])) return declined;
  }

  // An output is dense and like x. One that was given meets nothing that is read; the state may be x or a term itself.
  const auto writable = [&](py::handle object, bool in_place, rfk_tensor* view) {
    if (!plain(object, api, grad_enabled, view, &dense) || !dense || !same_shape(view_x, *view)) return false;
    const auto apart = [&](const rfk_tensor& read) {
      return in_place ? separate_or_same(*view, read) : separate(*view, read);
    };
    if (!apart(view_x) || meets(*view, c0)) return false;
    for (size_t k = 0; k < count; ++k) {
      if (!apart(terms[k])) return false;
    }
    for (size_t k = 0; k < coefficients.size(); ++k) {
      if (meets(*view, scalars[k])) return false;
    }
    return true;
  };
  const bool fresh_out = out.is_none(), casting = !cast.is_none();
  const bool fresh_cast = casting && reinterpret_cast<PyObject*>(Py_TYPE(cast.ptr())) == names().dtype_type;
  if (!fresh_out && (!writable(out, true, &view_out) || view_out.dtype != view_x.dtype)) return declined;
  if (casting && !fresh_cast &&
      (!writable(cast, false, &view_cast) || (!fresh_out && !separate(view_cast, view_out)))) {
    return declined;
  }
  const py::object state = fresh_out ? empty_like(x, py::none()) : py::reinterpret_borrow<py::object>(out);
  if (fresh_out && (!state || !read_view(state, api, &view_out, &dense) || !dense)) return declined;
  const py::object copy = fresh_cast ? empty_like(x, cast) : py::reinterpret_borrow<py::object>(cast);
  if (fresh_cast && (!copy || !read_view(copy, api, &view_cast, &dense) || !dense)) return declined;

  const rfk_tensor* copy_view = casting ? &view_cast : nullptr;
  const py::handle none(Py_None);  // new memory: no autograd graph can have seen it
  const py::handle written_out = fresh_out ? none : out, written_cast = fresh_cast ? none : cast;
  const bool done = launched(view_out, {written_out, written_cast}, [&]() -> rfk_status {
    switch (form) {
      case kEuler:
        return rfk_euler_step(&kCpu, &view_x, &terms[0], nullptr, &scalars[0], nullptr, &view_out, copy_view);
      case kGuidedEuler:
        return rfk_euler_step(&kCpu, &view_x, &terms[0], &terms[1], &scalars[0], &scalars[1], &view_out, copy_view);
      case kTaylor:
        return rfk_taylor_step(&kCpu, &view_x, terms, static_cast<int32_t>(count), &scalars[0], &view_out, copy_view);
      default:
        return rfk_linear_step(&kCpu, &view_x, &c0, terms, scalars, static_cast<int32_t>(count), nullptr, nullptr,
                               &view_out, copy_view);
    }
  });
  if (!done) return declined;
  return casting ? py::object(py::make_tuple(state, copy)) : state;
}

PyObject* fast_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7 || !PyLong_Check(arguments[0]) || !PyTuple_Check(arguments[2]) || !PyTuple_Check(arguments[3])) {
    PyErr_SetString(PyExc_TypeError, "fast_step: (form, x, tensors, coefficients, x_coefficient, out, cast)");
    return nullptr;
  }
  try {
    return step(static_cast<int>(PyLong_AsLong(arguments[0])), arguments[1],
                py::reinterpret_borrow<py::tuple>(arguments[2]), py::reinterpret_borrow<py::tuple>(arguments[3]),
                arguments[4], arguments[5], arguments[6])
        .release()
        .ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace

void define_fast_step(py::module_& m) {
  static PyMethodDef methods[] = {
      {"fast_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast_step)), METH_FASTCALL,
       "See fast_calls.h."},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

bool fast_interpolate(py::handle x1, py::handle x0, py::handle t, int path, py::handle seed, py::handle offset,
                      py::handle xt, py::handle target) {
  const dlpack::ExchangeApi* api = exchange_api();
  if (api == nullptr || watched()) return false;
  const bool grad_enabled = is_true(PyObject_CallNoArgs(names().is_grad_enabled));
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
