"""ComfyUI's attention on `rf.attention`.

ComfyUI calls an attention function f(q, k, v, heads, mask=None, attn_precision=None,
skip_reshape=False, skip_output_reshape=False, **options) and lets a model replace it through
`transformer_options["optimized_attention_override"]`, called as override(f, *args, **kwargs) with
the function it replaces first. `attention_override()` makes such a replacement; `attention` has the
signature of f and can be given to ComfyUI's `register_attention_function`. Neither needs ComfyUI to
be installed.

    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = rf.integrations.comfyui.attention_override()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rfkernels.integrations.routing import TORCH_SDPA, RouteCounts, check_precision, route

__all__ = ["attention", "attention_override", "attention_stats"]

_counts = RouteCounts()
# Options of ComfyUI's call that change no number here: bookkeeping of its wrapper and of the model.
_IGNORED = {"transformer_options", "_inside_attn_wrapper"}
_KNOWN = {*_IGNORED, "low_precision_attention", "scale", "enable_gqa"}


class _TorchTakesIt(Exception):
    """Raised in place of torch's function, so that ComfyUI's own function takes the call."""


def _mask_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """ComfyUI's (Sq, Sk) or (B, Sq, Sk) mask as (1 or B, 1, Sq, Sk)."""
    if mask is not None and mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask is not None and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    return mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    precision: str = "int8",
    original: Callable[..., torch.Tensor] = TORCH_SDPA,
    **options: Any,
) -> torch.Tensor:
    """ComfyUI's attention function.

    Args:
        q, k, v: (B, S, heads * D), or (B, heads, S, D) with skip_reshape.
        heads: of q; with the option enable_gqa k and v may have fewer.
        mask: bool (True may attend) or added to the scores: (Sq, Sk), (B, Sq, Sk) or broadcasting to
            (B, heads, Sq, Sk).
        attn_precision: the dtype that ComfyUI's own functions compute scores in; without meaning
            here, where they are integer sums.
        skip_reshape: the inputs have their heads apart.
        skip_output_reshape: return (B, heads, S, D) instead of (B, S, heads * D).
        precision: of `rf.attention`.
        original: what takes calls that `rf.attention` does not (a gradient is needed, a dtype or a
            head_dim that it has not), with the signature of torch's function.
        options: ComfyUI's: transformer_options, low_precision_attention, scale, enable_gqa; with
            low_precision_attention=False the call goes to `original`.

    Raises:
        TypeError: an option that is not known here.
    """
    check_precision("attention", precision)
    unknown = sorted(options.keys() - _KNOWN)
    if unknown:
        raise TypeError(
            f"attention: options must be known ones, {sorted(_KNOWN)}; got {unknown[0]}"
        )
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    mask = _mask_of(mask)
    named = {"scale": options.get("scale"), "enable_gqa": bool(options.get("enable_gqa", False))}
    if options.get("low_precision_attention", True) is False:
        _counts.count("low_precision_attention=False")
        out = original(q, k, v, mask, 0.0, False, **named)
    else:
        out = route(
            q, k, v, mask, 0.0, False, **named,
            original=original, precision=precision, training=False, counts=_counts,
        )  # fmt: skip
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention_override(precision: str = "int8") -> Callable[..., torch.Tensor]:
    """A value for ComfyUI's transformer_options["optimized_attention_override"].

    Calls that `rf.attention` does not take, or that carry an option not known here, go to the
    function that ComfyUI would have called, with the arguments as they came; `attention_stats` has
    how many and why.

    Raises:
        ValueError: an unknown precision.
    """
    check_precision("attention_override", precision)

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise _TorchTakesIt

    def override(func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        own = {"attn_precision", "mask", "skip_reshape", "skip_output_reshape"}
        unknown = sorted(kwargs.keys() - _KNOWN - own - {"q", "k", "v", "heads"})
        if unknown:
            _counts.count(f"the option {unknown[0]}")
            return func(*args, **kwargs)
        try:
            return attention(*args, **kwargs, precision=precision, original=refuse)
        except _TorchTakesIt:
            return func(*args, **kwargs)

    return override


def attention_stats(reset: bool = False) -> dict[str, Any]:
    """{"calls": int, "routed": int, "fallbacks": {reason: int}} of this module's functions."""
    return _counts.as_dict(reset)
