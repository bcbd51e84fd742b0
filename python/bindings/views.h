// views.h: torch tensors, scalars and seeds as the structs of the C ABI, borrowed for the length of one call.
#ifndef RFK_PYTHON_VIEWS_H_
#define RFK_PYTHON_VIEWS_H_

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack_abi.h"
#include "rfk/rfk.h"

namespace rfk_python {

namespace py = pybind11;

// Looks the exchange table of torch.Tensor up, once. `enabled` false keeps to attributes (older torch; tests).
void use_exchange_api(bool enabled);
bool exchange_api_in_use();
const dlpack::ExchangeApi* exchange_api();

// Gives the calling thread torch's thread count: OpenMP keeps one per thread, and torch sets it at a thread's first
// parallel call.
void match_torch_threads();

// Fills a borrowed DLTensor; the attribute route keeps its shape and strides in `sizes`.
struct Borrowed {
  dlpack::Tensor tensor;
  int64_t sizes[2 * RFK_MAX_DIMS];
};
void borrow(py::handle object, const char* name, Borrowed* out);

// The tensors of one call, which must share a device.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // A view, or NULL for None. Valid as long as the Call.
  const rfk_tensor* tensor(py::handle object, const char* name);
  // The same for a mask, which may hold bools.
  const rfk_tensor* mask(py::handle object, const char* name);
  rfk_scalar scalar(py::handle object, const char* name);
  rfk_noise noise(py::handle seed, py::handle offset);

  const rfk_device& device();
  // Runs `launch` with the GIL released where the call is large, and turns a failure into an exception.
  template <class Launch>
  void run(const Launch& launch) {
    const rfk_device& where = device();
    match_torch_threads();
    rfk_status status;
    if (elements_ > 32768) {
      py::gil_scoped_release release;
      status = launch(where);
    } else {
      status = launch(where);
    }
    if (status != RFK_OK) fail(status);
  }

 private:
  const rfk_tensor* view(py::handle object, const char* name, bool boolean);
  void check_device(const dlpack::Device& device, const char* name);
  void check_memory(const dlpack::Tensor& source, const char* name);
  [[noreturn]] void fail(rfk_status status) const;

  static constexpr int kMaxTensors = 14;
  const char* op_;
  rfk_tensor tensors_[kMaxTensors];
  int count_ = 0;
  int64_t elements_ = 0;
  bool device_known_ = false, stream_known_ = false;
  rfk_device device_{RFK_CPU, 0, nullptr};
};

// The dtype of a floating point DLTensor, or -1.
inline int32_t float_dtype(const dlpack::DataType& type) {
  if (type.lanes != 1) return -1;
  if (type.code == dlpack::kFloat) {
    return type.bits == 32 ? RFK_FLOAT32 : type.bits == 64 ? RFK_FLOAT64 : type.bits == 16 ? RFK_FLOAT16 : -1;
  }
  return type.code == dlpack::kBfloat && type.bits == 16 ? RFK_BFLOAT16 : -1;
}

}  // namespace rfk_python

#endif  // RFK_PYTHON_VIEWS_H_
