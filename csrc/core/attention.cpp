// attention.cpp: the C ABI of quantize and attention. Validates arguments, so that no kernel reads out of bounds, then hands them to the
// kernels of the instruction set level.
#include "core/attention_checks.h"
#include "core/attention_layout.h"
#include "core/status.h"
#include "cpu/attention_ops.h"
#include "rfk/rfk.h"

namespace {

using rfk::set_error;
using rfk::valid_channels;
using rfk::valid_heads;
using rfk::valid_pair;

const rfk::AttentionOps& attention_ops(rfk_op op) {
  const int32_t isa = rfk_attention_isa();
  rfk::count_launch(op, isa);
#if RFK_X86
  if (isa == RFK_ISA_AMX) return rfk::amx::kAttentionOps;
  if (isa == RFK_ISA_AVX512) return rfk::avx512::kAttentionOps;
  if (isa == RFK_ISA_AVX2) return rfk::avx2::kAttentionOps;
#endif
  return rfk::baseline::kAttentionOps;
}

bool on_cpu(const char* op, const rfk_device* device) {
  if (device != nullptr && device->type == RFK_CPU) return true;
  set_error("%s: these kernels run on the CPU", op);
  return false;
}

bool known_scheme(const char* op, int32_t scheme) {
  if (scheme >= RFK_ATTENTION_INT8_U8 && scheme <= RFK_ATTENTION_BF16) return true;
  set_error("%s: unknown scheme %d", op, scheme);
  return false;
}

bool own_memory(const char* op, const char* name, const rfk_tensor* t) {
  for (int32_t d = 0; d < t->ndim; ++d) {
    if (t->shape[d] > 1 && t->strides[d] == 0) {
      set_error("%s: %s must have memory of its own for every element", op, name);
      return false;
    }
  }
  return true;
}

rfk_status finished(const char* op, bool done) {
  if (done) return RFK_OK;
  set_error("%s: no memory for the packed keys and values", op);
  return RFK_UNSUPPORTED;
}

}  // namespace

extern "C" {

int64_t rfk_quantized_bytes(int32_t scheme, int64_t keys, int64_t channels, int64_t value_channels, int64_t* offsets) {
  const rfk::AttentionLayout l = rfk::attention_layout(scheme, keys, channels, value_channels);
  if (offsets != nullptr) {
    const int64_t all[9] = {l.keys_at,    l.values_at,      l.key_scale_at, l.addend_at, l.inverse_at,
                            l.row_sum_at, l.value_scale_at, l.mean_at,      l.flag_at};
    for (int i = 0; i < 9; ++i) offsets[i] = all[i];
  }
  return l.bytes;
}

rfk_status rfk_quantize_keys(const rfk_device* device, const rfk_tensor* k, const rfk_tensor* v, const uint8_t* valid,
                             int32_t scheme, void* packed) {
  const char* op = "quantize";
  if (!on_cpu(op, device) || !known_scheme(op, scheme) || !valid_pair(op, k, v)) return RFK_INVALID;
  if (k->shape[0] * k->shape[1] == 0) return RFK_OK;
  if (packed == nullptr) {
    set_error("%s: packed is missing", op);
    return RFK_INVALID;
  }
  rfk::QuantizeKeysArguments a{};
  a.k = k;
  a.v = v;
  a.valid = valid;
  a.layout = rfk::attention_layout(scheme, k->shape[2], k->shape[3], v->shape[3]);
  a.packed = static_cast<char*>(packed);
  return finished(op, attention_ops(RFK_OP_QUANTIZE).quantize_keys(a));
}

rfk_status rfk_quantize_queries(const rfk_device* device, const rfk_tensor* q, int32_t scheme, int8_t* codes, float* scale,
                                uint8_t* finite) {
  const char* op = "quantize";
  if (!on_cpu(op, device) || !known_scheme(op, scheme) || !valid_heads(op, "q", q) ||
      !valid_channels(op, "q", q->shape[3])) {
    return RFK_INVALID;
  }
  if (scheme == RFK_ATTENTION_BF16) {
    set_error("%s: the bf16 scheme has no codes", op);
    return RFK_INVALID;
  }
  if (q->shape[0] * q->shape[1] * q->shape[2] == 0) return RFK_OK;
  if (codes == nullptr || scale == nullptr || finite == nullptr) {
    set_error("%s: an output is missing", op);
    return RFK_INVALID;
  }
  rfk::QuantizeQueriesArguments a{};
  a.q = q;
  a.layout = rfk::attention_layout(scheme, 0, q->shape[3], 1);
  a.codes = codes;
  a.scale = scale;
  a.finite = finite;
  return finished(op, attention_ops(RFK_OP_QUANTIZE).quantize_queries(a));
}

rfk_status rfk_attention(const rfk_device* device, const rfk_tensor* q, const rfk_tensor* k, const rfk_tensor* v,
                         const void* packed, int64_t keys, int64_t value_channels, int64_t key_heads,
                         const rfk_tensor* mask, int32_t causal, double scale, int32_t scheme, const rfk_tensor* out,
                         const rfk_tensor* lse, uint8_t* exact) {
  const char* op = "attention";
  if (!on_cpu(op, device) || !known_scheme(op, scheme) || !valid_heads(op, "q", q) ||
      !valid_channels(op, "q", q->shape[3]) || !valid_heads(op, "out", out) || !own_memory(op, "out", out)) {
    return RFK_INVALID;
  }
  if (packed == nullptr) {
    if (!valid_pair(op, k, v)) return RFK_INVALID;
    if (k->shape[0] != q->shape[0] || k->shape[3] != q->shape[3]) {
      set_error("%s: k must have the batch and the channels of q", op);
      return RFK_INVALID;
    }
    keys = k->shape[2];
    value_channels = v->shape[3];
    key_heads = k->shape[1];
  } else if (keys < 0 || key_heads < 1 || !valid_channels(op, "packed", value_channels)) {
    set_error("%s: the shape of the packed keys must be given", op);
    return RFK_INVALID;
  }
  const int64_t batches = q->shape[0], heads = q->shape[1], queries = q->shape[2];
  if (batches * heads * queries == 0) return RFK_OK;
  if (key_heads < 1 || heads % key_heads != 0) {
    set_error("%s: the heads of q must be a multiple of those of k", op);
    return RFK_INVALID;
  }
  const int64_t shape[4] = {batches, heads, queries, value_channels};
  for (int d = 0; d < 4; ++d) {
    if (out->shape[d] != shape[d]) {
      set_error("%s: out must be (batch, heads of q, queries, channels of v)", op);
      return RFK_INVALID;
    }
  }
  if (lse != nullptr) {
    if (!valid_heads(op, "lse", lse, 3) || !own_memory(op, "lse", lse)) return RFK_INVALID;
    if (lse->dtype != RFK_FLOAT32 || lse->shape[0] != batches || lse->shape[1] != heads || lse->shape[2] != queries) {
      set_error("%s: lse must be float32 (batch, heads of q, queries)", op);
      return RFK_INVALID;
    }
  }
  if (mask != nullptr) {
    if (!valid_heads(op, "mask", mask, 4, true)) return RFK_INVALID;
    if (mask->shape[0] != batches || mask->shape[1] != heads || mask->shape[2] != queries || mask->shape[3] != keys) {
      set_error("%s: mask must be (batch, heads of q, queries, keys)", op);
      return RFK_INVALID;
    }
  }
  if (exact == nullptr) {
    set_error("%s: exact is missing", op);
    return RFK_INVALID;
  }
  rfk::AttentionArguments a{};
  a.q = q;
  a.k = k;
  a.v = v;
  a.packed = static_cast<const char*>(packed);
  a.layout = rfk::attention_layout(scheme, keys, q->shape[3], value_channels);
  a.key_heads = key_heads;
  a.mask = mask;
  a.causal = causal != 0;
  a.scale = scale;
  a.out = out;
  a.lse = lse;
  a.exact = exact;
  return finished(op, attention_ops(RFK_OP_ATTENTION).attention(a));
}

}  // extern "C"
