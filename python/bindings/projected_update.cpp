// projected_update.cpp: lists of tensors as the parameter table of rfk_projected_update.
//
// The kernels see a parameter as rows x columns without gaps, and everything of it in one order. That is checked here,
// tensor by tensor: a list may hold hundreds of them, and a Call (views.h) has room for fourteen.
#include "projected_update.h"

#include <string>
#include <vector>

#include "rfk/rfk.h"
#include "views.h"

namespace py = pybind11;

namespace rfk_python {
namespace {

constexpr const char* kOp = "projected_update";

[[noreturn]] void refuse(const char* name, size_t index, const char* rule) {
  throw py::value_error(std::string(kOp) + ": " + name + "[" + std::to_string(index) + "] " + rule);
}

// Sizes and strides of a tensor, row-major where the source leaves strides out.
struct Layout {
  int32_t ndim;
  int64_t shape[RFK_MAX_DIMS], strides[RFK_MAX_DIMS], numel = 1;

  explicit Layout(const dlpack::Tensor& t) : ndim(t.ndim) {
    for (int32_t d = ndim - 1; d >= 0; --d) {
      shape[d] = t.shape[d];
      strides[d] = t.strides != nullptr ? t.strides[d] : numel;
      numel *= shape[d];
    }
  }

  bool same(const Layout& other) const {
    bool equal = ndim == other.ndim;
    for (int32_t d = 0; equal && d < ndim; ++d) {
      equal = shape[d] == other.shape[d] && (shape[d] <= 1 || numel == 0 || strides[d] == other.strides[d]);
    }
    return equal;
  }

  // Without gaps, the first dimension outermost; the others in any order.
  bool rows_are_dense() const {
    if (numel == 0) return true;
    if (ndim > 0 && shape[0] > 1 && strides[0] != numel / shape[0]) return false;
    int64_t expected = 1;
    for (int32_t left = 0; left < ndim; ++left) {
      if (shape[left] == 1) continue;
      int32_t next = -1;
      for (int32_t d = 0; d < ndim && next < 0; ++d) next = shape[d] > 1 && strides[d] == expected ? d : -1;
      if (next < 0) return false;
      expected *= shape[next];
    }
    return expected == numel;
  }
};

class Table {
 public:
  // A tensor of a parameter, of the given dtype (-1: any) and, where `model` is given, its shape and order.
  dlpack::Tensor tensor(py::handle object, const char* name, size_t index, const Layout* model, int32_t dtype) {
    Borrowed borrowed;
    borrow(object, name, &borrowed);
    const dlpack::Tensor& t = borrowed.tensor;
    if (t.ndim > RFK_MAX_DIMS) refuse(name, index, "must have at most 16 dimensions");
    const int32_t type = t.device.type == dlpack::kCpu ? RFK_CPU : t.device.type == dlpack::kCuda ? RFK_CUDA : -1;
    if (type < 0 || (known_ && (type != device.type || t.device.id != device.index))) {
      refuse(name, index, "must be on the CPU or the CUDA device of the first weight");
    }
    known_ = true;
    device.type = type;
    device.index = t.device.id;
    const int32_t found = float_dtype(t.dtype);
    if (found < 0 || (dtype >= 0 && found != dtype)) refuse(name, index, "has a dtype that does not belong to its weight");
    if (model != nullptr && !Layout(t).same(*model)) refuse(name, index, "must have the shape and strides of its weight");
    dlpack::Tensor result = t;
    result.data = static_cast<char*>(t.data) + t.byte_offset;
    return result;
  }

  rfk_device device{RFK_CPU, 0, nullptr};

 private:
  bool known_ = false;
};

rfk_scalar learning_rate(Table& table, py::handle value) {
  if (PyFloat_Check(value.ptr())) return {PyFloat_AS_DOUBLE(value.ptr()), nullptr, 0, RFK_FLOAT64};
  const dlpack::Tensor t = table.tensor(value, "learning_rate", 0, nullptr, -1);
  if (t.ndim != 0) refuse("learning_rate", 0, "must have no dimensions");
  return {0.0, t.data, 0, float_dtype(t.dtype)};
}

// options: (rule, nesterov, learning rate, beta1, beta2, eps, weight_decay, delta, decay_ratio, average_decay).
// second, steps, averages: lists, or empty. totals: 0 stands for the tensor's own number of elements.
void projected_update(py::list weights, py::list grads, py::list first, py::list second, py::list steps,
                      py::list averages, py::list projected, py::list totals, py::tuple options, int32_t phase,
                      uintptr_t summary, uintptr_t workspace) {
  const size_t count = weights.size();
  const auto matches = [&](const py::list& list, bool optional) { return list.size() == count || (optional && list.empty()); };
  if (!matches(grads, false) || !matches(first, false) || !matches(second, true) || !matches(steps, true) ||
      !matches(averages, true) || !matches(projected, false) || !matches(totals, false) || options.size() != 10) {
    throw py::value_error(std::string(kOp) + ": one entry per weight in every list, and ten options");
  }
  if (count == 0) return;
  Table table;
  std::vector<rfk_update_parameter> parameters(count);
  int64_t elements = 0;
  for (size_t k = 0; k < count; ++k) {
    rfk_update_parameter& p = parameters[k];
    Borrowed borrowed;
    borrow(weights[k], "weights", &borrowed);
    const Layout layout(borrowed.tensor);
    const dlpack::Tensor weight = table.tensor(weights[k], "weights", k, nullptr, -1);
    if (!layout.rows_are_dense()) refuse("weights", k, "must be dense with the first dimension outermost");
    p.dtype = float_dtype(weight.dtype);
    const int32_t compute = p.dtype == RFK_FLOAT64 ? RFK_FLOAT64 : RFK_FLOAT32;
    p.projected = projected[k].cast<bool>() ? 1 : 0;
    if (p.projected != 0 && layout.ndim < 2) refuse("weights", k, "must have two dimensions or more to be projected");
    p.rows = p.projected != 0 ? layout.shape[0] : 1;
    p.columns = p.rows > 0 ? layout.numel / p.rows : 0;
    const int64_t whole = totals[k].cast<int64_t>();
    p.total = whole > 0 ? whole : layout.numel;
    p.weight = weight.data;
    p.grad = table.tensor(grads[k], "grads", k, &layout, p.dtype).data;
    p.first = table.tensor(first[k], "first", k, &layout, compute).data;
    p.second = second.empty() ? nullptr : table.tensor(second[k], "second", k, &layout, compute).data;
    if (!steps.empty()) {
      const dlpack::Tensor step = table.tensor(steps[k], "steps", k, nullptr, RFK_FLOAT32);
      if (step.ndim != 0) refuse("steps", k, "must have no dimensions");
      p.step = static_cast<float*>(step.data);
    }
    if (!averages.empty() && !averages[k].is_none()) {
      const dlpack::Tensor average = table.tensor(averages[k], "averages", k, &layout, -1);
      p.average = average.data;
      p.average_dtype = float_dtype(average.dtype);
    }
    elements += layout.numel;
  }
  const auto number = [&](size_t k) { return options[k].cast<double>(); };
  const rfk_update_options o{options[0].cast<int32_t>(), options[1].cast<bool>() ? 1 : 0, learning_rate(table, options[2]),
                             number(3), number(4), number(5), number(6), number(7), number(8), number(9)};
  std::vector<double> own;  // on the CPU; device memory is the caller's
  double* space = reinterpret_cast<double*>(workspace);
  if (space == nullptr && table.device.type == RFK_CPU) {
    own.resize(static_cast<size_t>(rfk_projected_update_workspace(parameters.data(), static_cast<int64_t>(count))));
    space = own.data();
  }
  if (table.device.type == RFK_CUDA) {
    const py::object raw = py::module_::import("torch").attr("_C").attr("_cuda_getCurrentRawStream")(table.device.index);
    table.device.stream = reinterpret_cast<void*>(raw.cast<uintptr_t>());
  }
  match_torch_threads();
  const auto launch = [&] {
    return rfk_projected_update(&table.device, parameters.data(), static_cast<int64_t>(count), &o, phase,
                                reinterpret_cast<double*>(summary), space);
  };
  rfk_status status;
  if (elements > 32768) {
    py::gil_scoped_release release;
    status = launch();
  } else {
    status = launch();
  }
  if (status == RFK_INVALID) throw py::value_error(rfk_last_error());
  if (status != RFK_OK) throw std::runtime_error(rfk_last_error());
}

// Doubles for tensors of these (rows, columns, projected).
int64_t workspace_of(py::list shapes) {
  int64_t doubles = 0;
  for (const py::handle item : shapes) {
    const py::tuple shape = py::reinterpret_borrow<py::tuple>(item);
    rfk_update_parameter p{};
    p.rows = shape[0].cast<int64_t>();
    p.columns = shape[1].cast<int64_t>();
    p.projected = shape[2].cast<bool>() ? 1 : 0;
    doubles += rfk_projected_update_workspace(&p, 1);
  }
  return doubles;
}

}  // namespace

void define_projected_update(py::module_& m) {
  m.def("projected_update", &projected_update);
  m.def("projected_update_workspace", &workspace_of, "Doubles of workspace for [(rows, columns, projected), ...].");
}

}  // namespace rfk_python
