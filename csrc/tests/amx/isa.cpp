// isa.cpp: the levels of a test that runs the AMX kernels on emulated tiles: any CPU with AVX-512 VNNI counts as amx.
#include <atomic>

#include "core/parallel.h"
#include "rfk/rfk.h"

namespace {
std::atomic<int32_t> cap{RFK_ISA_AMX};
}

namespace rfk {
int64_t last_level_cache_bytes() { return int64_t{32} << 20; }
}  // namespace rfk

extern "C" int32_t rfk_isa_detected(void) {
  __builtin_cpu_init();
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma");
  return vnni ? RFK_ISA_AMX : RFK_ISA_BASELINE;
}

extern "C" int32_t rfk_isa_used(void) {
  const int32_t detected = rfk_isa_detected(), limit = cap.load();
  return limit < detected ? limit : detected;
}

extern "C" int32_t rfk_attention_isa(void) { return rfk_isa_used(); }

extern "C" rfk_status rfk_isa_cap(int32_t level) {
  cap.store(level);
  return RFK_OK;
}
