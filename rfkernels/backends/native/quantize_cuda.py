"""Attention's quantization by the compiled CUDA kernels: Q in one launch, K and V together in three, the reference's bits.

The layouts are the reference's, so that other kernels read them. Memory comes from torch, launches go to the current stream
and nothing is read back: the calls may be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from rfkernels import _C
from rfkernels.backends.attention_schemes import KEY_BLOCK, SCHEMES, Scheme, padded_dim
from rfkernels.backends.reference.quantize import KV as HeadsKV
from rfkernels.backends.reference.quantize import V_TILE

_NUMBERS = {"int8_bf16": 1, "int8_fp8": 3, "fp8": 4}  # rfk_attention_scheme


def _new(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty((*like.shape[:2], *shape), dtype=dtype, device=like.device)


def _code_type(scheme: Scheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme.qk == "e4m3" else torch.int8


def _place(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_codes(
    q: torch.Tensor, scheme: Scheme, finite: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes (B, H, S, Dp), scales (B, H, S)) of Q; rows with a NaN or an infinity have a NaN scale.

    ``bf16``: (bfloat16 q, None). ``finite``: (B, H) bool of True, where False is stored for such heads.
    """
    if not scheme.rotated:
        return q.to(torch.bfloat16), None
    queries, dim = q.shape[2:]
    codes = _new(q, queries, padded_dim(dim), dtype=_code_type(scheme))
    scale = _new(q, queries)
    _C.quantize_queries(q, _NUMBERS[scheme.name], _place(codes), _place(scale), _place(finite))
    return codes, scale


def key_value_codes(
    k: torch.Tensor,
    v: torch.Tensor,
    scheme: Scheme,
    valid: torch.Tensor | None,
    finite: torch.Tensor | None = None,
) -> HeadsKV:
    """K and V quantized; ``valid`` (B, Hk, Sk) bool of any strides marks the keys that count, None all.

    Blocks and channels with a NaN or an infinity have a NaN scale. bfloat16 tensors that are used as they are, are not
    copied, and looked at only for ``finite``, (B, Hk) bool, which is written where given.
    """
    if not scheme.rotated:
        return HeadsKV(k.to(torch.bfloat16), None, None, v.to(torch.bfloat16), None, None, finite)
    (keys, dim), v_dim = k.shape[2:], v.shape[-1]
    e4m3_v = scheme.pv == "e4m3"
    codes = _new(k, keys, padded_dim(dim), dtype=_code_type(scheme))
    scale, mean = _new(k, -(-keys // KEY_BLOCK)), _new(k, dim)
    v_scale, target = None, None
    if e4m3_v:
        v_codes = target = _new(v, v_dim, keys + -keys % V_TILE, dtype=torch.float8_e4m3fn)
        v_scale = _new(v, v_dim)
    elif v.dtype == torch.bfloat16:
        v_codes = v
    else:
        v_codes = target = _new(v, keys, v_dim, dtype=torch.bfloat16)
    read = v if target is not None or finite is not None else None
    pairs = k.shape[0] * k.shape[1]
    workspace = torch.empty(
        _C.quantize_workspace(pairs, keys, dim, v_dim if e4m3_v else 0),
        dtype=torch.uint8,
        device=k.device,
    )
    _C.quantize_keys_cuda(
        k, read, valid, _NUMBERS[scheme.name], _place(codes), _place(scale), _place(mean),
        _place(target), _place(v_scale), _place(finite), _place(workspace),
    )  # fmt: skip
    return HeadsKV(codes, scale, mean, v_codes, None, v_scale, finite)


def quantize_q(
    q: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See ``rfkernels.backends.reference.quantize.quantize_q``."""
    finite = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    codes, scale = row_codes(q, SCHEMES[scheme], finite)
    return codes, scale, finite if scale is not None else codes.isfinite().all(-1).all(-1)


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, scheme: str, valid: torch.Tensor | None
) -> HeadsKV:
    """See ``rfkernels.backends.reference.quantize.quantize_kv``."""
    kind = SCHEMES[scheme]
    if kind.rotated:
        return key_value_codes(k, v, kind, valid, _new(k, dtype=torch.bool))
    kv = key_value_codes(k, v, kind, valid)
    finite = kv.k_codes.isfinite().all(-1).all(-1) & kv.v_codes.isfinite().all(-1).all(-1)
    return kv._replace(finite=finite)
