"""Quantized keys and values by the compiled kernels: on the CPU packed in the order in which the attention kernel reads
them, on CUDA in the reference's layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rfkernels import _C
from rfkernels._errors import BackendUnavailableError
from rfkernels.backends.native import quantize_cuda

SCHEMES = {"int8_u8": 0, "int8_bf16": 1, "bf16": 2}  # rfk_attention_scheme


class KV(NamedTuple):
    """Quantized keys and values of every head."""

    packed: torch.Tensor  # (B, Hk, bytes) uint8, csrc/core/attention_layout.h
    shape: torch.Tensor  # (3,) int64: keys, channels, value channels


def scheme_number(scheme: str) -> int:
    """The C ABI's number of a scheme.

    Raises:
        BackendUnavailableError: an e4m3 scheme.
    """
    if scheme not in SCHEMES:
        raise BackendUnavailableError(
            f"attention: the native kernels serve {', '.join(SCHEMES)}; got {scheme!r}, which needs a GPU"
        )
    return SCHEMES[scheme]


def quantize_q(q: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (B, H, S, Dp) int8, scale (B, H, S) float32, finite (B, H) bool) of queries, as attention makes them itself."""
    if q.is_cuda:
        return quantize_cuda.quantize_q(q, scheme)
    number = scheme_number(scheme)
    batch, heads, rows, channels = q.shape
    width = 1 << (channels - 1).bit_length()
    codes = torch.zeros((batch, heads, rows, width), dtype=torch.int8)
    scale = torch.zeros((batch, heads, rows), dtype=torch.float32)
    finite = torch.ones((batch, heads), dtype=torch.bool)
    _C.quantize_queries(q, number, codes.data_ptr(), scale.data_ptr(), finite.data_ptr())
    return codes, scale, finite


def k_mean(kv: KV, scheme: str) -> torch.Tensor | None:
    """(B, Hk, D) float32, the mean that was taken off K; None where none was."""
    if scheme == "bf16":
        return None
    keys, channels, value_channels = kv.shape.tolist()
    _, places = _C.quantized_layout(scheme_number(scheme), keys, channels, value_channels)
    at = places["mean"]
    return kv.packed[..., at : at + 4 * channels].contiguous().view(torch.float32)


def empty_kv(k: torch.Tensor, v: torch.Tensor, scheme: str) -> list[torch.Tensor]:
    """Tensors like those of ``quantize_kv`` on the CPU, nothing computed."""
    batch, heads, keys, channels = k.shape
    size, _ = _C.quantized_layout(scheme_number(scheme), keys, channels, v.shape[-1])
    return [k.new_empty((batch, heads, size), dtype=torch.uint8), k.new_empty(3, dtype=torch.int64)]


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, scheme: str, valid: torch.Tensor | None
) -> KV | quantize_cuda.HeadsKV:
    """Quantize and pack; ``valid`` (B, Hk, Sk) bool marks the keys that count in means and scales, None all."""
    if k.is_cuda:
        return quantize_cuda.quantize_kv(k, v, scheme, valid)
    number = scheme_number(scheme)
    batch, heads, keys, channels = k.shape
    size, _ = _C.quantized_layout(number, keys, channels, v.shape[-1])
    packed = torch.empty((batch, heads, size), dtype=torch.uint8)
    if valid is not None:
        valid = valid.contiguous()
    _C.quantize_keys(k, v, 0 if valid is None else valid.data_ptr(), number, packed.data_ptr())
    return KV(packed, torch.tensor((keys, channels, v.shape[-1])))
