"""transformers' models on `rf.attention`: `attn_implementation="rfkernels"`.

transformers looks the attention function and the function that makes masks up by the same name, in
two tables. Without an entry in the second one a model gets no mask at all and padded rows come out
wrong without a word, so both are registered here; masks are made by transformers' own function for
`sdpa`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn

from rfkernels.integrations.code_names import called_names
from rfkernels.integrations.routing import RouteCounts, check_precision, route
from rfkernels.integrations.sdpa_mode import SdpaMode

__all__ = [
    "attention_stats",
    "is_attention",
    "layer_precision",
    "register_attention",
    "set_layer_precision",
]

_counts = RouteCounts()
_ours: dict[str, str] = {}  # name -> precision
_LAYER = "_rfkernels_precision"  # an attribute of an attention module
# What a model asks of its attention and neither torch's function nor this one can do.
_REFUSED = ("softcap", "s_aux")


def is_attention(module: nn.Module) -> bool:
    """True for a transformers layer that takes its attention function from the table of them."""
    return "ALL_ATTENTION_FUNCTIONS" in called_names(type(module).forward)


def set_layer_precision(module: nn.Module, precision: str) -> None:
    """Give one attention layer a precision of its own; "sdpa" is transformers' own function."""
    setattr(module, _LAYER, precision)


def layer_precision(module: nn.Module) -> str | None:
    """The precision of an attention layer of a model that runs on `rf.attention`, else None."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name not in _ours:
        return None
    return getattr(module, _LAYER, _ours[name])


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    default_precision: str,
    training: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (B, H, S, D) in, ((B, S, H, D), None) out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"rfkernels: {type(module).__name__} asks for {name}, which rf.attention has not; use "
                'attn_implementation="eager"'
            )
    precision = getattr(module, _LAYER, default_precision)
    own = functools.partial(
        sdpa_attention_forward,
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    if precision == "sdpa":
        return own()
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        # Rare, and transformers' business: its own function, with torch's function routed inside.
        with SdpaMode(precision, training, _counts):
            return own()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = attention_mask
    if mask is not None and mask.shape[-1] > key.shape[-2]:
        mask = mask[..., : key.shape[-2]]
    out = route(
        query,
        key,
        value,
        mask,
        dropout,
        query.shape[2] > 1 and mask is None and is_causal,
        scaling,
        key.shape[1] != query.shape[1],
        original=lambda *args, **options: own()[0].transpose(1, 2),
        precision=precision,
        training=training,
        counts=_counts,
    )
    return out.transpose(1, 2).contiguous(), None


def register_attention(
    name: str = "rfkernels", precision: str = "int8", training: bool = False
) -> None:
    """Make `rf.attention` an attention implementation of transformers.

    Afterwards `attn_implementation=name` in `from_pretrained` and `from_config`, and
    `model.set_attn_implementation(name)`, choose it, with masks, causal models and grouped queries.
    Calling it again with the same name replaces precision and training.

    Args:
        name: letters, digits, underscores.
        precision: of `rf.attention`.
        training: take calls that need a gradient too; without it they go to transformers' `sdpa`,
            as do calls with dropout or in dtypes that `rf.attention` does not take.

    Raises:
        ImportError: transformers is missing or has no table of masks.
        ValueError: the name is malformed or one of transformers' own, or an unknown precision.

    A model whose attention has a logit cap or learned sinks is refused when it is called.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "register_attention: needs transformers 5 or later; install it with: pip install "
            '"rfkernels[transformers]"'
        ) from error
    check_precision("register_attention", precision)
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"register_attention: name must be letters, digits and underscores; got {name!r}"
        )
    if name not in _ours and (name == "eager" or name in ALL_ATTENTION_FUNCTIONS):
        raise ValueError(
            f"register_attention: name must not be one of transformers' own; got {name!r}"
        )
    _ours[name] = precision
    AttentionInterface.register(
        name,
        functools.partial(_attention_forward, default_precision=precision, training=training),
    )
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_stats(reset: bool = False) -> dict[str, Any]:
    """{"calls": int, "routed": int, "fallbacks": {reason: int}} over all transformers layers.

    Calls in compiled graphs are not counted here; `rf.attention_stats()` has them.
    """
    return _counts.as_dict(reset)
