// common.cuh: what the CUDA kernels share: packs of elements, dtype conversion, scalars, noise, positions, the launcher.
//
// A pack is N consecutive elements moved by one access a thread where they are 16 bytes or fewer (float32 x 4, float16 or
// bfloat16 x 4 or x 8), by two for float64 x 4. Four elements share one Philox counter, so N is a multiple of four.
//
// Conversions: float16 and bfloat16 widen exactly and round to nearest even; double reaches them through float, as torch
// and the CPU kernels convert. Compiled with -fmad=false: every product and sum of the formulas is rounded by itself.
#ifndef RFK_CUDA_COMMON_CUH_
#define RFK_CUDA_COMMON_CUH_

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "core/status.h"
#include "cuda/cuda_ops.h"
#include "cuda/space.h"
#include "rfk/philox.h"
#include "rfk/rfk.h"

namespace rfk {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kAny = -1;  // a dtype known at run time only

__host__ __device__ __forceinline__ int item_size(int dtype) {
  return dtype == RFK_FLOAT64 ? 8 : dtype == RFK_FLOAT32 ? 4 : 2;
}

#define RFK_NOINLINE __attribute__((noinline))

// Shared memory whose size the launch gives.
#if !defined(RFK_CUDA_EMULATION)
#define RFK_DYNAMIC_SHARED(Type, name)                           \
  extern __shared__ __align__(16) unsigned char rfk_dynamic[]; \
  Type* const name = reinterpret_cast<Type*>(rfk_dynamic)
#endif

// Square roots rounded as IEEE asks, and sums over lanes.
__device__ __forceinline__ float root(float value) {
#if defined(RFK_CUDA_EMULATION)
  return sqrtf(value);
#else
  return __fsqrt_rn(value);
#endif
}
__device__ __forceinline__ double root(double value) { return sqrt(value); }

// Sum over lanes whose numbers differ in the low bits of `width` (a power of two up to 32); every lane gets it.
__device__ __forceinline__ double lanes_sum(double value, int width) {
  for (int step = 1; step < width; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// conversions ------------------------------------------------------------------------------------------------------

#if defined(RFK_CUDA_EMULATION)
inline float half_to_float(uint16_t bits) { return emulation::half_to_float(bits); }
inline uint16_t float_to_half(float value) { return emulation::float_to_half(value); }
inline uint16_t float_to_bfloat16(float value) { return emulation::float_to_bfloat16(value); }
#else
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

template <class C>
__device__ __forceinline__ C load_element(const char* data, int dtype, int64_t index) {
  switch (dtype) {
    case RFK_FLOAT32: return static_cast<C>(reinterpret_cast<const float*>(data)[index]);
    case RFK_FLOAT64: return static_cast<C>(reinterpret_cast<const double*>(data)[index]);
    case RFK_BFLOAT16:
      return static_cast<C>(float_from_bits(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(data)[index]) << 16));
    default: return static_cast<C>(half_to_float(reinterpret_cast<const uint16_t*>(data)[index]));
  }
}

template <class C>
__device__ __forceinline__ void store_element(char* data, int dtype, int64_t index, C value) {
  switch (dtype) {
    case RFK_FLOAT32: reinterpret_cast<float*>(data)[index] = static_cast<float>(value); return;
    case RFK_FLOAT64: reinterpret_cast<double*>(data)[index] = static_cast<double>(value); return;
    case RFK_BFLOAT16:
      reinterpret_cast<uint16_t*>(data)[index] = float_to_bfloat16(static_cast<float>(value));
      return;
    default: reinterpret_cast<uint16_t*>(data)[index] = float_to_half(static_cast<float>(value));
  }
}

// The value as it stands after being stored in that dtype.
template <class C>
__device__ __forceinline__ C rounded(int dtype, C value) {
  switch (dtype) {
    case RFK_FLOAT32: return static_cast<C>(static_cast<float>(value));
    case RFK_FLOAT64: return value;
    case RFK_BFLOAT16:
      return static_cast<C>(float_from_bits(static_cast<uint32_t>(float_to_bfloat16(static_cast<float>(value))) << 16));
    default: return static_cast<C>(half_to_float(float_to_half(static_cast<float>(value))));
  }
}

// packs ------------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int static_item_size(int dtype) {
  return dtype == RFK_FLOAT32 ? 4 : dtype == RFK_BFLOAT16 || dtype == RFK_FLOAT16 ? 2 : 8;  // kAny: room for the largest
}

// The bits of N elements of dtype D, held between the load and the conversion so that several loads are under way at once.
template <int D, int N>
struct Raw {
  static constexpr int kWords = N * static_item_size(D) / 4;
  uint32_t word[kWords];
};

template <int D, int N>
__device__ __forceinline__ void load_pack(const char* data, int dtype, int64_t index, Raw<D, N>& raw) {
  const int item = D == kAny ? item_size(dtype) : static_item_size(D);
  const char* place = data + index * item;
  if (N * item == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(place);
    raw.word[0] = v.x;
    raw.word[1] = v.y;
    return;
  }
  const uint4 v = *reinterpret_cast<const uint4*>(place);
  raw.word[0] = v.x;
  raw.word[1] = v.y;
  if constexpr (Raw<D, N>::kWords > 2) {
    raw.word[2] = v.z;
    raw.word[3] = v.w;
  }
  if constexpr (Raw<D, N>::kWords > 4) {
    if (N * item == 32) {
      const uint4 w = *reinterpret_cast<const uint4*>(place + 16);
      raw.word[4] = w.x;
      raw.word[5] = w.y;
      raw.word[6] = w.z;
      raw.word[7] = w.w;
    }
  }
}

template <int D, int N>
__device__ __forceinline__ void clear_pack(Raw<D, N>& raw) {
#pragma unroll
  for (int i = 0; i < Raw<D, N>::kWords; ++i) raw.word[i] = 0;
}

__device__ __forceinline__ double double_from_words(uint32_t low, uint32_t high) {
#if defined(RFK_CUDA_EMULATION)
  return emulation::double_from_words(low, high);
#else
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
#endif
}

template <int D, int N, class C>
__device__ __forceinline__ void unpack_static(const uint32_t* word, C (&out)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (D == RFK_FLOAT32) {
      out[j] = static_cast<C>(float_from_bits(word[j]));
    } else if constexpr (D == RFK_FLOAT64) {
      out[j] = static_cast<C>(double_from_words(word[2 * j], word[2 * j + 1]));
    } else if constexpr (D == RFK_BFLOAT16) {
      out[j] = static_cast<C>(float_from_bits(j % 2 ? word[j / 2] & 0xffff0000u : word[j / 2] << 16));
    } else {
      out[j] = static_cast<C>(half_to_float(static_cast<uint16_t>(j % 2 ? word[j / 2] >> 16 : word[j / 2] & 0xffffu)));
    }
  }
}

template <int D, int N, class C>
__device__ __forceinline__ void unpack(const Raw<D, N>& raw, int dtype, C (&out)[N]) {
  if constexpr (D != kAny) {
    unpack_static<D, N>(raw.word, out);
  } else {
    switch (dtype) {
      case RFK_FLOAT32: return unpack_static<RFK_FLOAT32, N>(raw.word, out);
      case RFK_FLOAT64: return unpack_static<RFK_FLOAT64, N>(raw.word, out);
      case RFK_BFLOAT16: return unpack_static<RFK_BFLOAT16, N>(raw.word, out);
      default: return unpack_static<RFK_FLOAT16, N>(raw.word, out);
    }
  }
}

template <int D, int N, class C>
__device__ __forceinline__ void store_pack_static(char* data, int64_t index, const C (&value)[N]) {
  constexpr int kWords = N * static_item_size(D) / 4;
  uint32_t word[kWords];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (D == RFK_FLOAT32) {
      word[j] = bits_from_float(static_cast<float>(value[j]));
    } else if constexpr (D == RFK_FLOAT64) {
#if defined(RFK_CUDA_EMULATION)
      emulation::words_from_double(static_cast<double>(value[j]), word[2 * j], word[2 * j + 1]);
#else
      word[2 * j] = static_cast<uint32_t>(__double2loint(static_cast<double>(value[j])));
      word[2 * j + 1] = static_cast<uint32_t>(__double2hiint(static_cast<double>(value[j])));
#endif
    } else {
      const float narrow = static_cast<float>(value[j]);
      const uint32_t bits = D == RFK_BFLOAT16 ? float_to_bfloat16(narrow) : float_to_half(narrow);
      word[j / 2] = j % 2 ? word[j / 2] | bits << 16 : bits;
    }
  }
  char* place = data + index * static_item_size(D);
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(place) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4*>(place + 4 * i) = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
    }
  }
}

template <int D, int N, class C>
__device__ __forceinline__ void store_pack(char* data, int dtype, int64_t index, const C (&value)[N]) {
  if constexpr (D != kAny) {
    store_pack_static<D, N>(data, index, value);
  } else {
    switch (dtype) {
      case RFK_FLOAT32: return store_pack_static<RFK_FLOAT32, N>(data, index, value);
      case RFK_FLOAT64: return store_pack_static<RFK_FLOAT64, N>(data, index, value);
      case RFK_BFLOAT16: return store_pack_static<RFK_BFLOAT16, N>(data, index, value);
      default: return store_pack_static<RFK_FLOAT16, N>(data, index, value);
    }
  }
}

// The alignment a pack of N elements needs.
inline int pack_alignment(int dtype, int n) { return n * item_size(dtype) < 16 ? n * item_size(dtype) : 16; }

// A tensor inside a kernel.
struct Operand {
  char* data;  // NULL: absent
  int32_t dtype;
};

inline Operand operand(const rfk_tensor* tensor) {
  if (tensor == nullptr) return {nullptr, RFK_FLOAT32};
  return {static_cast<char*>(tensor->data), tensor->dtype};
}

// scalars ----------------------------------------------------------------------------------------------------------

template <class C>
struct Scalar {
  C value;
  const char* data;
  int64_t stride;
  int32_t dtype;

  __device__ __forceinline__ C at(int64_t sample) const {
    return data == nullptr ? value : load_element<C>(data, dtype, sample * stride);
  }
};

template <class C>
inline Scalar<C> scalar(const rfk_scalar& source) {
  return {static_cast<C>(source.value), static_cast<const char*>(source.data), source.stride, source.dtype};
}

inline bool varies(const rfk_scalar& source) { return source.data != nullptr && source.stride != 0; }

// positions --------------------------------------------------------------------------------------------------------

// Which sample an element belongs to, for calls with per-sample arguments.
struct Rows {
  int64_t elements;    // of one sample
  int64_t samples;
  int32_t per_sample;  // 0: every element counts as sample 0
};

inline Rows rows(const Space& space, bool per_sample) { return {space.per_sample, space.samples, per_sample}; }

// With per-sample arguments the packed kernels want every pack inside one sample.
inline bool whole_packs(const Rows& rows, int pack) { return !rows.per_sample || rows.elements % pack == 0; }

// One pack, or one element: its linear index, its sample and its index in the sample.
struct Spot {
  int64_t index, sample, rest;
  bool inside;
};

// The first element of a tile; one division for the whole tile.
__device__ __forceinline__ Spot tile_start(const Rows& rows, int64_t index) {
  if (!rows.per_sample) return {index, 0, index, true};
  const int64_t sample = index / rows.elements;
  return {index, sample, index - sample * rows.elements, true};
}

// `shift` elements on in the tile; outside the tensor (limit is exclusive) it points at element 0 and says so.
template <int kTile>
__device__ __forceinline__ Spot advance(const Rows& rows, const Spot& start, int shift, int64_t limit) {
  Spot spot = {start.index + shift, 0, start.index + shift, start.index + shift < limit};
  if (!spot.inside) return {0, 0, 0, false};
  if (!rows.per_sample) return spot;
  const int64_t rest = start.rest + shift;
  if (rows.elements >= kTile) {
    const bool next = rest >= rows.elements;
    spot.sample = start.sample + next;
    spot.rest = next ? rest - rows.elements : rest;
  } else {  // rest < 2 kTile
    const uint32_t skipped = static_cast<uint32_t>(rest) / static_cast<uint32_t>(rows.elements);
    spot.sample = start.sample + skipped;
    spot.rest = rest - static_cast<int64_t>(skipped) * rows.elements;
  }
  return spot;
}

// The last block sees to the numel % N elements behind the last whole pack (limit is where they begin); its first threads
// take one each. They lie in its tile, as tiles are counted over all elements.
__device__ __forceinline__ bool holds_tail() { return blockIdx.x == gridDim.x - 1; }

template <int kTile>
__device__ __forceinline__ Spot tail_spot(const Rows& rows, const Spot& start, int64_t limit, int64_t numel) {
  return advance<kTile>(rows, start, static_cast<int>(limit - start.index) + static_cast<int>(threadIdx.x), numel);
}

// The memory offsets of the element at linear position `position`, for the first `used` operands.
template <int kOperands>
__device__ __forceinline__ void offsets(const Space& space, int used, int64_t position, int64_t (&out)[kOperands]) {
#pragma unroll
  for (int k = 0; k < kOperands; ++k) out[k] = 0;
  const bool narrow = space.numel <= 0x7fffffff;
  int64_t rest = position;
#pragma unroll 1
  for (int d = space.ndim - 1; d >= 0; --d) {
    int64_t coordinate = rest;
    if (d > 0) {
      const int64_t size = space.shape[d];
      const int64_t quotient =
          narrow ? static_cast<int64_t>(static_cast<uint32_t>(rest) / static_cast<uint32_t>(size)) : rest / size;
      coordinate = rest - quotient * size;
      rest = quotient;
    }
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      if (k < used) out[k] += coordinate * space.strides[k][d];
    }
  }
}

// noise ------------------------------------------------------------------------------------------------------------

struct Noise {
  uint64_t seed, offset;
  const int64_t *seed_data, *offset_data;
  int64_t seed_stride, offset_stride;
  int32_t per_sample;
  int32_t distribution;  // rfk_distribution
  int32_t uniform_bits;
};

inline Noise noise_source(const rfk_noise& source, int distribution = RFK_NORMAL, int dtype = RFK_FLOAT32) {
  const int bits = dtype == RFK_BFLOAT16 ? 8 : dtype == RFK_FLOAT16 ? 11 : 24;
  return {source.seed,        source.offset,        source.seed_data,  source.offset_data, source.seed_stride,
          source.offset_stride, source.per_sample, distribution, bits};
}

// Key and offset words of one sample.
struct Stream {
  uint32_t key[2], offset[2];
};

__device__ __forceinline__ Stream stream_of(const Noise& noise, int64_t sample) {
  const uint64_t seed =
      noise.seed_data == nullptr ? noise.seed : static_cast<uint64_t>(noise.seed_data[sample * noise.seed_stride]);
  const uint64_t offset = noise.offset_data == nullptr
                              ? noise.offset
                              : static_cast<uint64_t>(noise.offset_data[sample * noise.offset_stride]);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}};
}

struct Four {
  float z0, z1, z2, z3;
  __device__ __forceinline__ float lane(int64_t index) const {
    const int lane = static_cast<int>(index & 3);
    const float low = lane & 1 ? z1 : z0, high = lane & 1 ? z3 : z2;
    return lane & 2 ? high : low;
  }
};

// The four numbers of a counter. kUniform false leaves the uniform branch out of kernels that draw normals only.
template <bool kUniform>
__device__ __forceinline__ Four draw(const Noise& noise, const Stream& stream, int64_t counter) {
  uint32_t w0 = static_cast<uint32_t>(counter), w1 = static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32);
  uint32_t w2 = stream.offset[0], w3 = stream.offset[1];
  philox4x32(w0, w1, w2, w3, stream.key[0], stream.key[1]);
  Four four;
  if (kUniform && noise.distribution == RFK_UNIFORM) {
    const int drop = 32 - noise.uniform_bits;
    const float unit = 1.0f / static_cast<float>(1 << noise.uniform_bits);
    four.z0 = static_cast<float>(static_cast<int32_t>(w0 >> drop)) * unit;
    four.z1 = static_cast<float>(static_cast<int32_t>(w1 >> drop)) * unit;
    four.z2 = static_cast<float>(static_cast<int32_t>(w2 >> drop)) * unit;
    four.z3 = static_cast<float>(static_cast<int32_t>(w3 >> drop)) * unit;
  } else {
    normals_from_words(w0, w1, w2, w3, four.z0, four.z1, four.z2, four.z3);
  }
  return four;
}

// One number by itself (tails).
template <bool kUniform>
__device__ __forceinline__ float draw_one(const Noise& noise, const Spot& spot) {
  const int64_t index = noise.per_sample ? spot.rest : spot.index;
  return draw<kUniform>(noise, stream_of(noise, noise.per_sample ? spot.sample : 0), index >> 2).lane(index);
}

// The numbers of N elements from `index` of the sample on; index is a multiple of four.
template <int N, bool kUniform>
__device__ __forceinline__ void draw_run(const Noise& noise, int64_t sample, int64_t index, float (&z)[N]) {
  const Stream stream = stream_of(noise, sample);
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const Four four = draw<kUniform>(noise, stream, (index >> 2) + j / 4);
    z[j] = four.z0;
    z[j + 1] = four.z1;
    z[j + 2] = four.z2;
    z[j + 3] = four.z3;
  }
}

// The numbers of a pack of a contiguous tensor; packs lie inside samples.
template <int N, bool kUniform>
__device__ __forceinline__ void draw_pack(const Noise& noise, const Spot& spot, float (&z)[N]) {
  draw_run<N, kUniform>(noise, noise.per_sample ? spot.sample : 0, noise.per_sample ? spot.rest : spot.index, z);
}

// One number after another, remembering the last counter (strided kernels).
template <bool kUniform>
struct NumberCache {
  Four four;
  int64_t sample = -1, counter = -1;

  __device__ __forceinline__ float at(const Noise& noise, const Spot& spot) {
    return at(noise, noise.per_sample ? spot.sample : 0, noise.per_sample ? spot.rest : spot.index);
  }

  __device__ __forceinline__ float at(const Noise& noise, int64_t in_sample, int64_t index) {
    if (index >> 2 != counter || in_sample != sample) {
      sample = in_sample;
      counter = index >> 2;
      four = draw<kUniform>(noise, stream_of(noise, sample), counter);
    }
    return four.lane(index);
  }
};

// strided walks ----------------------------------------------------------------------------------------------------

constexpr int kStridedPerThread = 4;
constexpr int kStridedTile = kThreads * kStridedPerThread;

// The shift in the tile of a thread's j-th element: consecutive elements where they share a Philox counter, else spaced so
// that a warp touches consecutive memory.
__device__ __forceinline__ int strided_shift(bool noise, int j) {
  const int thread = static_cast<int>(threadIdx.x);
  return noise ? thread * kStridedPerThread + j : thread + j * kThreads;
}

// launching --------------------------------------------------------------------------------------------------------

extern std::atomic<uint64_t> launches[RFK_OP_COUNT];

// Makes device.index current for the life of the object.
class Launcher {
 public:
  Launcher(const rfk_device& device, rfk_op op);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  rfk_status status() const { return status_; }

  // One kernel of kThreads threads a block; after a failure nothing more is launched.
  template <class Parameters>
  void run(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int64_t shared_bytes = 0) {
    static_assert(sizeof(Parameters) <= 4096, "kernel parameters hold 4 KiB");
    if (status_ != RFK_OK || blocks == 0) return;
    if (blocks > 0x7fffffff) {
      set_error("CUDA: a launch holds 2^31 - 1 blocks; got %lld", static_cast<long long>(blocks));
      status_ = RFK_UNSUPPORTED;
      return;
    }
#if defined(RFK_CUDA_EMULATION)
    emulation::launch(kernel, parameters, blocks, kThreads, shared_bytes);
    check(cudaSuccess);
#else
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                           arguments, static_cast<size_t>(shared_bytes), stream_));
#endif
  }

 private:
  void check(cudaError_t error);

  rfk_op op_;
  int device_ = 0, previous_ = -1;
  cudaStream_t stream_;
  rfk_status status_ = RFK_OK;
};

inline int64_t blocks_for(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Dtypes shared by all present tensors of a list, or kAny.
inline int common_dtype(const rfk_tensor* const* tensors, int count) {
  int dtype = kAny;
  for (int i = 0; i < count; ++i) {
    if (tensors[i] == nullptr) continue;
    if (dtype != kAny && dtype != tensors[i]->dtype) return kAny;
    dtype = tensors[i]->dtype;
  }
  return dtype;
}

// True when every present tensor is one contiguous run that packs of n elements may start in.
inline bool packable(const Space& space, const rfk_tensor* const* tensors, int count, int n) {
  for (int k = 0; k < count; ++k) {
    if (tensors[k] == nullptr) continue;
    if (!contiguous(space, k) || !aligned(tensors[k]->data, pack_alignment(tensors[k]->dtype, n))) return false;
  }
  return true;
}

}  // namespace cuda
}  // namespace rfk

#endif  // RFK_CUDA_COMMON_CUH_
