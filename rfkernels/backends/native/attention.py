"""Attention by the compiled CPU kernels: AMX, AVX-512 VNNI, AVX2 or portable code.

The int8 codes and integer sums are the same on each; outputs of ``int8_u8`` differ in the last place at most.
"""

from __future__ import annotations

import torch

from rfkernels import _C
from rfkernels.backends.native.quantize import scheme_number
from rfkernels.backends.reference.exact_attention import exact_heads


def attention(q, k, v, kv, attn_mask, is_causal, scale, scheme, out, lse) -> int:
    """See ``rfkernels.backends.reference.attention``; heads that the kernels must not serve take PyTorch's attention."""
    number = scheme_number(scheme)
    if kv is None:
        exact = _C.attention(q, k, v, 0, 0, 0, 0, attn_mask, is_causal, scale, number, out, lse)
    else:
        keys, _, value_channels = kv.shape.tolist()
        heads = kv.packed.shape[1]
        place = kv.packed.data_ptr()
        exact = _C.attention(
            q, None, None, place, keys, value_channels, heads, attn_mask, is_causal, scale, number, out, lse
        )  # fmt: skip
    if not exact:
        return 0
    marked = torch.zeros(q.shape[:2], dtype=torch.bool)
    marked.view(-1)[exact] = True
    finite = None if kv is None else _finite(kv, number)
    return exact_heads(q, k, v, attn_mask, is_causal, scale, marked, out, lse, finite)


def _finite(kv, number: int) -> torch.Tensor:
    """(B, Hk) bool: heads whose keys and values held no NaN or infinity."""
    _, places = _C.quantized_layout(number, *kv.shape.tolist())
    flag = places["flag"]
    return kv.packed[..., flag : flag + 4].contiguous().view(torch.int32)[..., 0] == 0
