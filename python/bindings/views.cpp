// views.cpp: see views.h.
#include "views.h"

#include <atomic>
#include <cstring>

namespace rfk_python {
namespace {

struct ExchangeState {  // atomic: the extension runs without a GIL too
  std::atomic<bool> looked_up{false}, enabled{true};
  std::atomic<const dlpack::ExchangeApi*> api{nullptr};
};

ExchangeState& exchange_state() {
  static ExchangeState state;
  return state;
}

const dlpack::ExchangeApi* find_exchange_api() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;  // torch before 2.10
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  while (api != nullptr && api->version.major > dlpack::kMajor) api = api->previous;
  if (api == nullptr || api->version.major != dlpack::kMajor || api->tensor_from_object == nullptr) return nullptr;
  return api;
}

dlpack::DataType dtype_from_attribute(py::handle object) {
  const std::string name = py::str(object.attr("dtype"));
  if (name == "torch.float32") return {dlpack::kFloat, 32, 1};
  if (name == "torch.float64") return {dlpack::kFloat, 64, 1};
  if (name == "torch.float16") return {dlpack::kFloat, 16, 1};
  if (name == "torch.bfloat16") return {dlpack::kBfloat, 16, 1};
  if (name == "torch.bool") return {dlpack::kBool, 8, 1};
  if (name == "torch.int64") return {dlpack::kInt, 64, 1};
  return {255, 0, 1};
}

// The route for torch without the exchange table: about 1.5 us a tensor.
void borrow_by_attributes(py::handle object, const char* name, Borrowed* out) {
  const py::tuple shape(object.attr("shape")), strides(object.attr("stride")());
  const size_t ndim = shape.size();
  if (ndim > RFK_MAX_DIMS) {
    throw py::value_error(std::string(name) + " must have at most 16 dimensions; got " + std::to_string(ndim));
  }
  for (size_t d = 0; d < ndim; ++d) {
    out->sizes[d] = shape[d].cast<int64_t>();
    out->sizes[RFK_MAX_DIMS + d] = strides[d].cast<int64_t>();
  }
  const py::object device = object.attr("device");
  const std::string kind = device.attr("type").cast<std::string>();
  if (kind != "cpu" && kind != "cuda") throw py::value_error(std::string(name) + " is on device " + kind);
  const py::object index = device.attr("index");
  dlpack::Tensor& t = out->tensor;
  t.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  t.device = {kind == "cpu" ? dlpack::kCpu : dlpack::kCuda, index.is_none() ? 0 : index.cast<int32_t>()};
  t.ndim = static_cast<int32_t>(ndim);
  t.dtype = dtype_from_attribute(object);
  t.shape = out->sizes;
  t.strides = out->sizes + RFK_MAX_DIMS;
  t.byte_offset = 0;
}

}  // namespace

void use_exchange_api(bool enabled) { exchange_state().enabled = enabled; }

const dlpack::ExchangeApi* exchange_api() {
  ExchangeState& state = exchange_state();
  if (!state.looked_up) {
    state.api = find_exchange_api();
    state.looked_up = true;
  }
  return state.enabled ? state.api.load() : nullptr;
}

void match_torch_threads() {
  thread_local bool matched = false;
  if (matched) return;
  matched = true;
  py::module_::import("torch").attr("get_num_threads")();
}

bool exchange_api_in_use() { return exchange_api() != nullptr; }

void borrow(py::handle object, const char* name, Borrowed* out) {
  const dlpack::ExchangeApi* api = exchange_api();
  if (api == nullptr) {
    if (!py::hasattr(object, "data_ptr")) throw py::type_error(std::string(name) + " must be a tensor");
    borrow_by_attributes(object, name, out);
  } else if (api->tensor_from_object(object.ptr(), &out->tensor) != 0) {
    throw py::error_already_set();
  }
}

const rfk_tensor* Call::tensor(py::handle object, const char* name) { return view(object, name, false); }

const rfk_tensor* Call::mask(py::handle object, const char* name) { return view(object, name, true); }

const rfk_tensor* Call::view(py::handle object, const char* name, bool boolean) {
  if (object.is_none()) return nullptr;
  if (count_ == kMaxTensors) throw py::value_error(std::string(op_) + ": too many tensors");
  Borrowed borrowed;
  borrow(object, name, &borrowed);
  const dlpack::Tensor& source = borrowed.tensor;
  check_device(source.device, name);
  rfk_tensor& result = tensors_[count_];
  result.dtype = float_dtype(source.dtype);
  if (boolean && source.dtype.code == dlpack::kBool && source.dtype.bits == 8) result.dtype = RFK_BOOL;
  if (result.dtype < 0) throw py::type_error(std::string(op_) + ": " + name + " must be a floating point tensor");
  if (source.ndim > RFK_MAX_DIMS) {
    throw py::value_error(std::string(op_) + ": " + name + " must have at most 16 dimensions; got " +
                          std::to_string(source.ndim));
  }
  result.ndim = source.ndim;
  int64_t numel = 1;
  for (int32_t d = source.ndim - 1; d >= 0; --d) {
    result.shape[d] = source.shape[d];
    result.strides[d] = source.strides != nullptr ? source.strides[d] : numel;
    numel *= source.shape[d];
  }
  result.data = static_cast<char*>(source.data) + source.byte_offset;
  if (numel == 0) result.data = nullptr;
  if (numel > elements_) elements_ = numel;
  return &tensors_[count_++];
}

rfk_scalar Call::scalar(py::handle object, const char* name) {
  if (PyFloat_Check(object.ptr())) return {PyFloat_AS_DOUBLE(object.ptr()), nullptr, 0, RFK_FLOAT64};
  if (object.is_none()) return {0.0, nullptr, 0, RFK_FLOAT64};
  if (PyLong_Check(object.ptr())) return {object.cast<double>(), nullptr, 0, RFK_FLOAT64};
  Borrowed borrowed;
  borrow(object, name, &borrowed);
  const dlpack::Tensor& source = borrowed.tensor;
  check_device(source.device, name);
  const int32_t dtype = float_dtype(source.dtype);
  if (dtype < 0 || source.ndim > 1) {
    throw py::value_error(std::string(op_) + ": " + name + " must be a float, or a 0-d or (B,) floating point tensor");
  }
  // The batch: the first size of the first tensor of the call.
  if (source.ndim == 1 && (count_ == 0 || tensors_[0].ndim == 0 || tensors_[0].shape[0] != source.shape[0])) {
    throw py::value_error(std::string(op_) + ": " + name + " must have one value per sample");
  }
  check_memory(source, name);
  const int64_t stride = source.ndim == 0 ? 0 : source.strides != nullptr ? source.strides[0] : 1;
  return {0.0, static_cast<char*>(source.data) + source.byte_offset, stride, dtype};
}

rfk_noise Call::noise(py::handle seed, py::handle offset) {
  rfk_noise result{};
  result.present = 1;
  const auto read = [&](py::handle object, const char* name, uint64_t* value, const int64_t** data, int64_t* stride) {
    if (PyLong_Check(object.ptr())) {
      *value = object.cast<uint64_t>();
      return;
    }
    Borrowed borrowed;
    borrow(object, name, &borrowed);
    const dlpack::Tensor& source = borrowed.tensor;
    check_device(source.device, name);
    if (source.dtype.code != dlpack::kInt || source.dtype.bits != 64 || source.ndim > 1) {
      throw py::value_error(std::string(op_) + ": " + name + " must be an int, or a 0-d or (B,) int64 tensor");
    }
    if (source.ndim == 1 && (count_ == 0 || tensors_[0].ndim == 0 || tensors_[0].shape[0] != source.shape[0])) {
      throw py::value_error(std::string(op_) + ": " + name + " must have one value per sample");
    }
    check_memory(source, name);
    *data = reinterpret_cast<const int64_t*>(static_cast<const char*>(source.data) + source.byte_offset);
    *stride = source.ndim == 0 ? 0 : source.strides != nullptr ? source.strides[0] : 1;
    if (source.ndim == 1) result.per_sample = 1;
  };
  read(seed, "seed", &result.seed, &result.seed_data, &result.seed_stride);
  read(offset, "offset", &result.offset, &result.offset_data, &result.offset_stride);
  return result;
}

// A null pointer would say that the number itself was given.
void Call::check_memory(const dlpack::Tensor& source, const char* name) {
  if (source.data == nullptr && (source.ndim == 0 || source.shape[0] > 0)) {
    throw py::value_error(std::string(op_) + ": " + name + " has elements but no memory");
  }
}

void Call::check_device(const dlpack::Device& device, const char* name) {
  const int32_t type = device.type == dlpack::kCpu ? RFK_CPU : device.type == dlpack::kCuda ? RFK_CUDA : -1;
  if (type < 0) throw py::value_error(std::string(op_) + ": " + name + " is on a device without native kernels");
  if (!device_known_) {
    device_known_ = true;
    device_.type = type;
    device_.index = device.id;
  } else if (device_.type != type || device_.index != device.id) {
    throw py::value_error(std::string(op_) + ": " + name + " is on another device than the first tensor");
  }
}

const rfk_device& Call::device() {
  if (device_.type == RFK_CUDA && !stream_known_) {
    const dlpack::ExchangeApi* api = exchange_api();
    if (api != nullptr && api->current_stream != nullptr) {
      if (api->current_stream(dlpack::kCuda, device_.index, &device_.stream) != 0) throw py::error_already_set();
    } else {
      const py::object raw = py::module_::import("torch").attr("_C").attr("_cuda_getCurrentRawStream")(device_.index);
      device_.stream = reinterpret_cast<void*>(raw.cast<uintptr_t>());
    }
    stream_known_ = true;
  }
  return device_;
}

void Call::fail(rfk_status status) const {
  const std::string text = rfk_last_error();
  if (status == RFK_INVALID) throw py::value_error(text);
  throw std::runtime_error(text);
}

}  // namespace rfk_python
