// host_device.h: the one macro that lets the per-element maths compile for the CPU and for CUDA from the same text.
#ifndef RFK_HOST_DEVICE_H_
#define RFK_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define RFK_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define RFK_HD inline __attribute__((always_inline))
#else
#define RFK_HD inline
#endif

#endif  // RFK_HOST_DEVICE_H_
