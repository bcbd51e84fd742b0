// dlpack_abi.h: the part of the DLPack 1.x binary interface that the glue reads.
//
// A tensor type offers __dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api" with a table of C functions; one
// of them fills a borrowed DLTensor in about 30 ns, and one names the current stream. The layouts are those of the DLPack
// standard (https://dmlc.github.io/dlpack); only fields up to the last one used are declared.
#ifndef RFK_PYTHON_DLPACK_ABI_H_
#define RFK_PYTHON_DLPACK_ABI_H_

#include <cstdint>

namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;
constexpr uint32_t kMajor = 1;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // NULL: row-major
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // may be NULL
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace dlpack

#endif  // RFK_PYTHON_DLPACK_ABI_H_
