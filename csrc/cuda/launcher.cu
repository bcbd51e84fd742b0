// launcher.cu: the current device, launch errors as sentences, launch counters, and the list of compiled architectures.
#include "cuda/common.cuh"

#if !defined(RFK_CUDA_ARCHS)
#error "define RFK_CUDA_ARCHS, the architectures this is compiled for, as a string"
#endif

namespace rfk {
namespace cuda {

std::atomic<uint64_t> launches[RFK_OP_COUNT];

const char* archs() { return RFK_CUDA_ARCHS; }

uint64_t launch_count(int op) { return op >= 0 && op < RFK_OP_COUNT ? launches[op].load(std::memory_order_relaxed) : 0; }

Launcher::Launcher(const rfk_device& device, rfk_op op)
    : op_(op), device_(device.index), stream_(static_cast<cudaStream_t>(device.stream)) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device_) {
    error = cudaSetDevice(device_);
    if (error == cudaSuccess) previous_ = current;
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    set_error("CUDA: device %d cannot be used: %s (%s)", device_, cudaGetErrorString(error), cudaGetErrorName(error));
    status_ = RFK_CUDA_ERROR;
  }
}

Launcher::~Launcher() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void Launcher::check(cudaError_t error) {
  if (error == cudaSuccess) {
    launches[op_].fetch_add(1, std::memory_order_relaxed);
    return;
  }
  cudaGetLastError();  // clears an error that is not sticky
  status_ = RFK_CUDA_ERROR;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_);
    set_error("CUDA: no kernel image for this GPU (compute capability %d.%d); this build has %s", major, minor, archs());
    return;
  }
  set_error("CUDA: launch failed on device %d: %s (%s)", device_, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace cuda
}  // namespace rfk
