// cuda_runtime.h: a stand-in for the CUDA runtime that runs kernels on the CPU, for tests without a GPU.
//
// Compiling a .cu file of this project as C++ with this header first on the include path and RFK_CUDA_EMULATION defined
// makes its kernels ordinary functions. A launch runs the blocks one after another; the threads of a block are fibers that
// switch at __syncthreads and at shuffles, so barriers mean what they mean on the device. Under AddressSanitizer every
// access outside a buffer or the dynamic shared memory and, by UBSan, every misaligned vector access is an error; a barrier
// that some threads of a block do not reach ends the program. Threads run in ascending or in descending order
// (emulation::descending), and dynamic shared memory starts as rubbish: a missing barrier shows as a wrong number in one of them.
#ifndef RFK_TESTS_EMULATION_CUDA_RUNTIME_H_
#define RFK_TESTS_EMULATION_CUDA_RUNTIME_H_

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

// The few runtime calls of the launcher: two devices, device 0 current at the start.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };

namespace emulation {

inline int current_device = 0, device_of_last_launch = -1;
inline bool descending = false;
inline std::vector<unsigned char> dynamic_shared;

// float16 and bfloat16 by way of exact arithmetic, written apart from the kernels under test.
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                          : std::ldexp(static_cast<float>(mantissa), -24));
}

// Nearest even number of `precision` bits with exponents from min_exponent on, as a value.
inline double nearest(double value, int precision, int min_exponent) {
  int exponent;
  std::frexp(value, &exponent);
  const int unit = (exponent < min_exponent ? min_exponent : exponent) - precision;
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7fff;
  const double size = std::isinf(value) ? value : nearest(std::fabs(value), 11, -13);
  if (!(std::fabs(size) <= 65504.0)) return sign | 0x7c00;
  if (size < std::ldexp(1.0, -14)) return sign | static_cast<uint16_t>(std::ldexp(size, 24));
  int exponent;
  const double fraction = std::frexp(size, &exponent);  // [0.5, 1)
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}

inline uint16_t float_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  double size = value;
  if (!std::isinf(value)) size = nearest(value, 8, -125);
  const float narrow = std::fabs(size) > 3.4e38 ? std::copysign(INFINITY, value) : static_cast<float>(size);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline double double_from_words(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void words_from_double(double value, uint32_t& low, uint32_t& high) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  low = static_cast<uint32_t>(bits);
  high = static_cast<uint32_t>(bits >> 32);
}

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int running = -1;
inline std::function<void()> body;
inline double slots[1024];  // what threads hand to each other in shuffles
inline void* scheduler_fake = nullptr;
inline const void* scheduler_bottom = nullptr;
inline size_t scheduler_size = 0;

inline void to_scheduler(bool ends) {
  Fiber& fiber = fibers[static_cast<size_t>(running)];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, scheduler_bottom, scheduler_size);
#endif
  swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
  (void)ends;
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  body();
  fibers[static_cast<size_t>(running)].done = true;
  to_scheduler(true);
}

inline void barrier() {
  to_scheduler(false);
}

inline void prepare(Fiber& fiber) {
  fiber.done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

inline void run_block(int threads) {
  for (Fiber& fiber : fibers) prepare(fiber);
  for (bool alive = true; alive;) {
    alive = false;
    bool ended = false;
    for (int i = 0; i < threads; ++i) {
      running = descending ? threads - 1 - i : i;
      Fiber& fiber = fibers[static_cast<size_t>(running)];
      if (fiber.done) {
        ended = true;
        continue;
      }
      threadIdx.x = static_cast<unsigned>(running);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.data(), fiber.stack.size());
#endif
      swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
      (fiber.done ? ended : alive) = true;
    }
    if (alive && ended) {
      std::fprintf(stderr, "emulation: some threads of block %u wait at a barrier that others never reach\n", blockIdx.x);
      std::abort();
    }
  }
}

template <class Parameters>
void launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int threads, int64_t shared_bytes) {
  fibers.resize(static_cast<size_t>(threads));
  for (Fiber& fiber : fibers) fiber.stack.resize(kStack);
  device_of_last_launch = current_device;
  gridDim.x = static_cast<unsigned>(blocks);
  body = [&] { kernel(parameters); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    std::vector<unsigned char>(static_cast<size_t>(shared_bytes), 0xff).swap(dynamic_shared);
    run_block(threads);
  }
}

// Shuffles of `count` numbers at once: a barrier switches every fiber.
inline float rows[1024][16];

inline void exchange(const float* values, int count, int lanes, float* received) {
  const int self = running;
  std::memcpy(rows[self], values, sizeof(float) * static_cast<size_t>(count));
  barrier();
  std::memcpy(received, rows[self ^ lanes], sizeof(float) * static_cast<size_t>(count));
  barrier();
}

template <class T>
T shuffle(T value, int source) {
  const int self = running;
  slots[self] = static_cast<double>(value);
  barrier();
  const T result = static_cast<T>(slots[source]);
  barrier();
  return result;
}

}  // namespace emulation

#define RFK_DYNAMIC_SHARED(Type, name) Type* const name = reinterpret_cast<Type*>(emulation::dynamic_shared.data())

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline void __syncthreads() { emulation::barrier(); }

// Stricter than the device: every thread of the block has to take part.
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulation::shuffle(value, emulation::running ^ lanes);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return emulation::shuffle(value, emulation::running / width * width + lane);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}

#endif  // RFK_TESTS_EMULATION_CUDA_RUNTIME_H_
