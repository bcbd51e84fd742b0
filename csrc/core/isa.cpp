// isa.cpp: which instruction set level this CPU runs, capped by RFK_MAX_ISA (read once) and by rfk_isa_cap; its cache.
//
// Levels follow feature bits, never a CPU model: avx2 is x86-64-v3 (AVX2, FMA, F16C, BMI2), avx512 is x86-64-v4 (F, BW,
// CD, DQ, VL), amx is that with VNNI, AMX-INT8 and AMX-BF16 and the tile state granted by the system. Every other processor is at
// the baseline. Attention on avx512 asks for VNNI too.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/parallel.h"
#include "core/status.h"
#include "rfk/rfk.h"

namespace {

// Whether tiles may be used: the CPU has them, the system saves them, and the process was granted them (once, for all threads).
bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kBfloat16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & (1u << 27)) == 0) return false;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_vnni() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

int32_t detect() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && has_vnni() && tiles_granted()) return RFK_ISA_AMX;
  return v4 ? RFK_ISA_AVX512 : v3 ? RFK_ISA_AVX2 : RFK_ISA_BASELINE;
#else
  return RFK_ISA_BASELINE;
#endif
}

int32_t environment_cap() {
  const char* value = std::getenv("RFK_MAX_ISA");
  if (value == nullptr || *value == '\0') return RFK_ISA_COUNT - 1;
  const char* names[RFK_ISA_COUNT] = {"baseline", "avx2", "avx512", "amx"};
  for (int32_t level = 0; level < RFK_ISA_COUNT; ++level) {
    if (std::strcmp(value, names[level]) == 0) return level;
  }
  return RFK_ISA_COUNT - 1;  // the Python side refuses an unknown name with a message
}

std::atomic<int32_t>& cap() {
  static std::atomic<int32_t> level{environment_cap()};
  return level;
}

}  // namespace

namespace rfk {

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : static_cast<int64_t>(32) << 20;
  }();
  return bytes;
}

}  // namespace rfk

extern "C" int32_t rfk_isa_detected(void) {
  static const int32_t level = detect();
  return level;
}

extern "C" int32_t rfk_isa_used(void) {
  int32_t level = rfk_isa_detected();
  const int32_t limit = cap().load(std::memory_order_relaxed);
  if (level > limit) level = limit;
  while (level > RFK_ISA_BASELINE && !rfk_isa_compiled(level)) --level;
  return level;
}

extern "C" int32_t rfk_attention_isa(void) {
  static const bool vnni = has_vnni();
  const int32_t level = rfk_isa_used();
  return level == RFK_ISA_AVX512 && !vnni ? RFK_ISA_AVX2 : level;
}

extern "C" rfk_status rfk_isa_cap(int32_t level) {
  if (level < 0 || level >= RFK_ISA_COUNT) {
    rfk::set_error("isa level must be 0 to %d; got %d", RFK_ISA_COUNT - 1, level);
    return RFK_INVALID;
  }
  cap().store(level, std::memory_order_relaxed);
  return RFK_OK;
}
