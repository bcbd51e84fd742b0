// attention_ops.h: the table of attention kernels, one per instruction set level; arguments are validated by core/attention.cpp.
#ifndef RFK_CPU_ATTENTION_OPS_H_
#define RFK_CPU_ATTENTION_OPS_H_

#include "core/attention_layout.h"
#include "rfk/rfk.h"

namespace rfk {

struct AttentionArguments {
  const rfk_tensor *q, *k, *v;  // (B, H, S, D); k and v NULL when `packed` is given
  const char* packed;           // (B, heads of k, layout.bytes), or NULL
  AttentionLayout layout;
  int64_t key_heads;
  const rfk_tensor* mask;  // (B, H, Sq, Sk) bool or float, or NULL
  bool causal;
  double scale;
  const rfk_tensor* out;
  const rfk_tensor* lse;  // (B, H, Sq) float32, or NULL
  uint8_t* exact;         // (B, H): set to 1 for a head that these kernels must not serve
};

struct QuantizeKeysArguments {
  const rfk_tensor *k, *v;
  const uint8_t* valid;  // (B, heads, keys), or NULL
  AttentionLayout layout;
  char* packed;
};

struct QuantizeQueriesArguments {
  const rfk_tensor* q;
  AttentionLayout layout;
  int8_t* codes;   // (B, H, S, layout.rotated)
  float* scale;    // (B, H, S)
  uint8_t* finite;  // (B, H)
};

struct AttentionOps {
  bool (*attention)(const AttentionArguments&);  // false: no memory
  bool (*quantize_keys)(const QuantizeKeysArguments&);
  bool (*quantize_queries)(const QuantizeQueriesArguments&);
};

namespace baseline {
extern const AttentionOps kAttentionOps;
}
#if RFK_X86
namespace avx2 {
extern const AttentionOps kAttentionOps;
}
namespace avx512 {
extern const AttentionOps kAttentionOps;
}
namespace amx {
extern const AttentionOps kAttentionOps;
}
#endif

}  // namespace rfk

#endif  // RFK_CPU_ATTENTION_OPS_H_
