"""A precision of attention per layer: `set_precision(model, {pattern: precision})`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from rfkernels.backends.attention_schemes import PRECISIONS
from rfkernels.integrations import transformers
from rfkernels.integrations.compiled import uncompiled
from rfkernels.integrations.diffusers import processors
from rfkernels.integrations.diffusers.attention import set_layer
from rfkernels.models.dit import DiTBlock

__all__ = ["attention_layers", "set_precision"]

_ALLOWED = ("sdpa", *PRECISIONS)


def _current(module: nn.Module) -> str | None:
    """The precision in force in an attention layer whose precision can be set; None for others."""
    if isinstance(module, DiTBlock):
        return module.attention
    if processors.kind_of(module) in processors.KINDS:
        return processors.options_of(module.processor)[0]
    if transformers.is_attention(module):
        return transformers.layer_precision(module)
    return None


def _set(module: nn.Module, precision: str) -> None:
    if isinstance(module, DiTBlock):
        module.attention = precision
    elif processors.kind_of(module) in processors.KINDS:
        training = processors.options_of(module.processor)[1]
        set_layer(module, precision, training)
    else:
        transformers.set_layer_precision(module, precision)


def attention_layers(model: nn.Module) -> dict[str, str]:
    """{name: precision in force} of the layers that `set_precision` can set, in model order."""
    model = uncompiled(model)  # whose wrapper prefixes every name
    return {
        name: precision
        for name, module in model.named_modules()
        if (precision := _current(module)) is not None
    }


def set_precision(model: nn.Module, precisions: Mapping[str, str]) -> dict[str, str]:
    """Choose the precision of attention layer by layer.

    Args:
        model: this package's `DiT`; a diffusers model (layers not matched keep what they have,
            PyTorch's attention unless `set_attention` was called); or a transformers model that
            runs under an implementation made by `register_attention`.
        precisions: {pattern: precision}. A pattern is compared with the layers' names in
            `model.named_modules()` as in a shell ("*" crosses dots), e.g. "blocks.0",
            "transformer_blocks.*.attn". A precision is one of `rf.attention`'s, or "sdpa" for
            PyTorch's. Where several patterns match a layer the last one decides.

    Returns:
        {name: precision} of all attention layers, as they now are.

    Raises:
        TypeError: model is not a module, or precisions is not a mapping.
        ValueError: a pattern matches no attention layer, an unknown precision, or no pattern. Then
            nothing was changed.

    Example:
        >>> rf.integrations.set_precision(model, {"blocks.*": "int8", "blocks.0": "bf16"})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_precision: model must be a torch.nn.Module; got {type(model).__name__}"
        )
    if not isinstance(precisions, Mapping):
        raise TypeError(
            "set_precision: precisions must be a mapping from patterns to precisions; got "
            f"{type(precisions).__name__}"
        )
    if not precisions:
        raise ValueError("set_precision: precisions must have at least one pattern; got none")
    layers = attention_layers(model)
    chosen: dict[str, str] = {}
    for pattern, precision in precisions.items():
        if precision not in _ALLOWED:
            raise ValueError(
                f"set_precision: precision must be one of {', '.join(_ALLOWED)}; got {precision!r}"
            )
        matched = list(filter(partial(fnmatchcase, pat=pattern), layers))
        if not matched:
            some = ", ".join(list(layers)[:3]) or "none whose precision can be set"
            raise ValueError(
                f"set_precision: pattern {pattern!r} must match an attention layer of "
                f"{type(model).__name__}; its layers are {some}{', ...' * (len(layers) > 3)}"
            )
        chosen.update(dict.fromkeys(matched, precision))
    model = uncompiled(model)
    for name, precision in chosen.items():
        _set(model.get_submodule(name), precision)
    return attention_layers(model)
