// parallel.h: a static split of an index range over OpenMP threads, torch's own pool where torch loaded libgomp first.
//
// Everything is static: a shared inline function compiled for AVX-512 could be the copy that the linker keeps for all.
#ifndef RFK_CORE_PARALLEL_H_
#define RFK_CORE_PARALLEL_H_

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rfk {

// Size of the last-level cache as the system reports it, else 32 MiB (core/isa.cpp).
int64_t last_level_cache_bytes();

// Below this many elements one thread is faster than waking others.
constexpr int64_t kSerialElements = 32768;

static inline int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// body(begin, end) on contiguous parts of [0, count), every part but the last a multiple of `grain`.
template <class Body>
static inline void parallel_ranges(int64_t count, int64_t grain, int64_t elements, const Body& body) {
  if (count <= 0) return;
#if defined(_OPENMP)
  const int64_t grains = (count + grain - 1) / grain;
  int threads = elements < kSerialElements ? 1 : max_threads();
  if (threads > grains) threads = static_cast<int>(grains);
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      const int64_t begin = grains * rank / team * grain, last = grains * (rank + 1) / team * grain;
      const int64_t end = last < count ? last : count;
      if (begin < end) body(begin, end);
    }
    return;
  }
#else
  (void)grain;
  (void)elements;
#endif
  body(static_cast<int64_t>(0), count);
}

// body(task, worker) for every task in [0, count), in order, each to the next free thread of `threads`.
template <class Body>
static inline void parallel_tasks(int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count; ++task) body(task, worker);
    }
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t task = 0; task < count; ++task) body(task, 0);
}

}  // namespace rfk

#endif  // RFK_CORE_PARALLEL_H_
