"""Attention layers of diffusers' networks that let their features be exchanged, as `rfkernels.editing` asks.

A layer's class gets a subclass of its own name with the attribute `exchange`. Where that is set, the layer
runs under a torch function mode in which the arguments of torch's scaled_dot_product_attention go through
it. So the processors stay diffusers', whatever they do around their attention.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rfkernels.integrations.diffusers import processors
from rfkernels.integrations.routing import TORCH_SDPA

__all__ = ["allow_exchange", "forbid_exchange"]

_NAMES = ("query", "key", "value")
# How diffusers names cross-attention in blocks whose attention class does not say it (LTX, Kandinsky, ...).
_CROSS = re.compile(r"attn2$|cross|_to_[^.]*$")


class _ExchangeMode(TorchFunctionMode):
    """The first call of torch's function inside takes what `exchange` returns.

    Further calls of a layer are for other sources, such as the image of an IP adapter.
    """

    def __init__(self, exchange: Callable[..., Any]) -> None:
        super().__init__()
        self.exchange, self.met = exchange, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not TORCH_SDPA or self.met:
            return func(*args, **(kwargs or {}))
        self.met = True
        given = dict(zip(_NAMES, args, strict=False)) | dict(kwargs or {})
        heads = self.exchange(*(given.pop(name) for name in _NAMES))
        return TORCH_SDPA(*heads, *args[3:], **given)


@functools.cache
def _exchanging_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name that looks at `exchange` first."""
    # torch.compile does not trace such modes. Here and not where it is defined: this loads Dynamo.
    exchanged = torch.compiler.disable(_exchanged)

    # Not in `forward`, which hooks of accelerate and diffusers replace in single layers.
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.exchange is None:
            return cls.__call__(self, *args, **kwargs)
        return exchanged(cls, self, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (cls,), self.__dict__

    body = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "exchange": None,
        "__module__": cls.__module__,
    }
    return type(cls.__name__, (cls,), body)


def _exchanged(
    cls: type[nn.Module], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The layer's answer with its features exchanged."""
    mode = _ExchangeMode(layer.exchange)
    with mode:
        result = cls.__call__(layer, *args, **kwargs)
    if not mode.met:
        raise ValueError(
            f"features: attention must be torch's scaled_dot_product_attention, where features "
            f"can be reached; this {cls.__name__} has another backend or a cache (reset_attention, "
            "the end of rf.integrations.sdpa(), set_attention_backend('native') and disable_cache "
            "give torch's back)"
        )
    return result


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """An empty layer, for copies and pickles."""
    exchanging = _exchanging_class(cls)
    return exchanging.__new__(exchanging)


def _is_cross(name: str, module: nn.Module) -> bool:
    """Whether keys and values of a layer come from other tokens than its queries."""
    said = getattr(module, "is_cross_attention", None)
    return bool(_CROSS.search(name.rpartition(".")[2])) if said is None else said


def allow_exchange(model: nn.Module, layers: str | None = None) -> list[str]:
    """Makes the attention layers of a diffusers model serve `features` of `rfkernels.editing.edit`.

    Results do not change by it, nor do names of parameters. Layers that run torch's attention are
    served, those of either kind of processor; not `rf.attention` under `set_attention`. Where a layer
    calls attention more than once, the first call is meant. Undone by :func:`forbid_exchange`.

    Args:
        model: a network, e.g. ``pipe.transformer``, or a velocity around one.
        layers: a regular expression that is searched in the layers' names; None for all of image or
            image and text tokens, that is, all but cross-attention.

    Returns:
        the names of the layers, in the order that ``Features(blocks=...)`` counts them.

    Raises:
        TypeError: not a module. ValueError: no layer that could serve.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "allow_exchange: model must be a torch.nn.Module, e.g. pipe.transformer; got "
            f"{type(model).__name__}"
        )
    found = []
    for name, module in model.named_modules():
        if processors.kind_of(module) not in processors.KINDS:
            continue
        if layers is None:
            wanted = not _is_cross(name, module)
        else:
            wanted = re.search(layers, name) is not None
        if wanted:
            found.append(name)
    if not found:
        raise ValueError(
            f"allow_exchange: {type(model).__name__} must have attention layers with processors"
            f"{'' if layers is None else f' and names like {layers!r}'}; got none"
        )
    forbid_exchange(model)
    for name in found:
        module = model.get_submodule(name)
        module.__class__ = _exchanging_class(type(module))
    return found


def forbid_exchange(model: nn.Module) -> None:
    """Gives every layer its own class back."""
    for module in model.modules():
        base = type(module).__base__
        if "exchange" in vars(type(module)) and _exchanging_class(base) is type(module):
            module.__class__ = base
