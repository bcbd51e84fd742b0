"""diffusers' models on `rf.attention`: a backend of its dispatcher, and whole models at once.

diffusers (0.35 and later) sends the attention of its newer models through a dispatcher that knows
its backends from a closed string Enum and a registry. `register_attention_backend` adds a member
and a function to them, after which diffusers' own ways to choose a backend work. Models that do not
ask the dispatcher accept the name as well and go on as before, without a word: `set_attention`
covers both kinds and raises where it could cover nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rfkernels.integrations.diffusers import processors
from rfkernels.integrations.diffusers.processors import COUNTS
from rfkernels.integrations.routing import TORCH_SDPA, check_precision, route

__all__ = [
    "attention_stats",
    "register_attention_backend",
    "reset_attention",
    "set_attention",
    "set_layer",
]

_ours: set[str] = set()


def _dispatch_module() -> ModuleType:
    """diffusers.models.attention_dispatch.

    Raises:
        ImportError: diffusers is missing, or older than its dispatcher.
    """
    try:
        from diffusers.models import attention_dispatch
    except ImportError as error:
        raise ImportError(
            "register_attention_backend: needs diffusers 0.35 or later; install it with: pip "
            'install "rfkernels[diffusers]"'
        ) from error
    return attention_dispatch


def _key_mask(
    attn_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """A mask (B, Sk) as (B, 1, 1, Sk); others as they are. query, key: (B, S, H, D)."""
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        return attn_mask[:, None, None, :]
    return attn_mask


def _check_devices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_others: Any
) -> None:
    """What DIFFUSERS_ATTN_CHECKS asks before a call."""
    if not query.device == key.device == value.device:
        raise ValueError(
            f"rfkernels: query, key and value must be on one device; got {query.device}, "
            f"{key.device} and {value.device}"
        )


def _backend_function(precision: str, training: bool) -> Callable[..., torch.Tensor]:
    # The dispatcher reads the signature to decide what to pass; query, key and value are (B, S, H, D).
    def rfkernels_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        if return_lse:
            raise ValueError("rfkernels: return_lse must be False in diffusers; got True")
        if _parallel_config is not None:
            raise ValueError("rfkernels: context parallelism is not supported by this backend")
        out = route(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            _key_mask(attn_mask, query, key),
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            original=TORCH_SDPA,
            precision=precision,
            training=training,
            counts=COUNTS,
        )
        return out.transpose(1, 2)

    return rfkernels_attention


def _member(dispatch: ModuleType, name: str) -> Any:
    """The Enum's member of that value, made if need be."""
    names = dispatch.AttentionBackendName
    if name in names._value2member_map_:
        return names(name)
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    setattr(names, member._name_, member)  # before the maps: the Enum refuses to rebind a member
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    return member


def register_attention_backend(
    name: str = "rfkernels", precision: str = "int8", training: bool = False
) -> None:
    """Make `rf.attention` a backend of diffusers' dispatcher.

    Afterwards `model.set_attention_backend(name)`, `diffusers.attention_backend(name)` and the
    variable DIFFUSERS_ATTN_CHECKS work as for diffusers' own backends, and compiled models trace
    through it. Calling it again with the same name replaces precision and training.

    Args:
        name: the backend's name: lower-case letters, digits and underscores.
        precision: of `rf.attention`.
        training: take calls that need a gradient too; without it they go to torch's function, as
            do calls with dropout or of shapes and dtypes that `rf.attention` does not take
            (`attention_stats` counts them with the reason).

    Raises:
        ImportError: diffusers is missing or has no dispatcher.
        ValueError: the name is malformed or one of diffusers' own backends, or the precision is
            unknown.
    """
    dispatch = _dispatch_module()
    check_precision("register_attention_backend", precision)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(
            f"register_attention_backend: name must be lower-case letters, digits and underscores; "
            f"got {name!r}"
        )
    known = dispatch.AttentionBackendName._value2member_map_
    if name not in _ours and name in known:
        raise ValueError(
            f"register_attention_backend: name must not be a backend of diffusers; got {name!r}"
        )
    _ours.add(name)
    register = dispatch._AttentionBackendRegistry.register(
        _member(dispatch, name), constraints=[_check_devices]
    )
    register(_backend_function(precision, training))


def set_layer(module: nn.Module, precision: str, training: bool = False) -> str:
    """One attention layer on `rf.attention`, or with "sdpa" back to what it was.

    Returns:
        how: "dispatcher", "processor", or a sentence that begins with "none: " and says why the
        layer was left alone.
    """
    if precision == "sdpa":
        processors.restore(module)
        return str(processors.kind_of(module))
    check_precision("set_layer", precision)
    member = None
    if processors.kind_of(module) == "dispatcher":
        name = f"_rfkernels_{precision}" + ("_training" if training else "")
        if name not in _ours:
            register_attention_backend(name, precision, training)
        member = _member(_dispatch_module(), name)
    return processors.install(module, precision, training, member)


def set_attention(
    model: nn.Module, precision: str = "int8", training: bool = False
) -> dict[str, str]:
    """Every attention layer of a diffusers model on `rf.attention`.

    Through diffusers' dispatcher where a layer asks it, through a processor of our own where it
    calls torch's function directly. Unlike `model.set_attention_backend`, it concerns this model
    alone (that method also sets diffusers' process-wide default).

    Args:
        model: a diffusers model, e.g. `pipe.transformer` or `pipe.unet`.
        precision: of `rf.attention`; "sdpa" undoes it, like `reset_attention`.
        training: take calls that need a gradient too.

    Returns:
        for every attention layer by its name "dispatcher", "processor", or a sentence that begins
        with "none: " and says why it was left alone.

    Raises:
        TypeError: model is not a torch.nn.Module (a pipeline is not one).
        ValueError: no layer of the model can take `rf.attention`; unknown precision.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "set_attention: model must be a torch.nn.Module, e.g. pipe.transformer; got "
            f"{type(model).__name__}"
        )
    if precision != "sdpa":
        check_precision("set_attention", precision)
    kinds = {
        name: kind
        for name, module in model.named_modules()
        if (kind := processors.kind_of(module)) is not None
    }
    if not any(kind in processors.KINDS for kind in kinds.values()):
        found = "; ".join(f"{name}: {kind}" for name, kind in list(kinds.items())[:3])
        raise ValueError(
            f"set_attention: {type(model).__name__} has no attention layer that could take "
            f"rf.attention; {found or 'no attention layer was found'}"
        )
    return {name: set_layer(model.get_submodule(name), precision, training) for name in kinds}


def reset_attention(model: nn.Module) -> None:
    """Undo `set_attention` and `set_precision`: every layer gets its own processor object back."""
    for module in model.modules():
        processors.restore(module)


def attention_stats(reset: bool = False) -> dict[str, Any]:
    """{"calls": int, "routed": int, "fallbacks": {reason: int}} over all diffusers layers.

    Calls in compiled graphs are not counted here; `rf.attention_stats()` has them.
    """
    return COUNTS.as_dict(reset)
