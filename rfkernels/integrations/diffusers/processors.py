"""Attention processors of our own for diffusers layers, made from the ones that the layers have.

diffusers keeps what a layer does around its attention (projections, norms, rotary embedding, joint
streams) in a processor object per layer. There are two kinds. The newer ones hand the attention
itself to diffusers' dispatcher and carry the name of a backend; for these a copy with our backend's
name is enough. The older ones (SD3, DiT, PixArt, Sana, AuraFlow, CogVideoX, Lumina2, every UNet,
...) call torch's function directly and never ask the dispatcher. For these the copy gets a subclass
of its own class that runs the same code inside `SdpaMode`: nothing of the model is rewritten, so
what a processor does besides attention stays diffusers' in every version.

The layer's own object is never changed: the copy remembers it, and `restore` puts it back.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from rfkernels.integrations.code_names import called_names
from rfkernels.integrations.routing import RouteCounts
from rfkernels.integrations.sdpa_mode import SdpaMode

__all__ = ["COUNTS", "KINDS", "install", "kind_of", "options_of", "original_of", "restore"]

COUNTS = RouteCounts()  # of every diffusers layer, of both kinds
# What decides how a layer is covered; see `kind_of`.
KINDS = ("dispatcher", "processor")
_ORIGINAL, _OPTIONS = "_rfkernels_original", "_rfkernels_options"


def original_of(processor: Any) -> Any:
    """The layer's own processor, behind the copy that `install` made."""
    return getattr(processor, _ORIGINAL, processor)


def options_of(processor: Any) -> tuple[str, bool]:
    """(precision, training) that `install` gave the processor, or ("sdpa", False)."""
    return getattr(processor, _OPTIONS, ("sdpa", False))


def kind_of(module: nn.Module) -> str | None:
    """How the attention of a layer can be taken over; None when it is not an attention layer.

    "dispatcher": its processor asks diffusers' dispatcher and carries a backend. "processor": it
    calls torch's function, or the dispatcher without a backend of its own. Otherwise a sentence
    that begins with "none: " and says why neither works.
    """
    processor = getattr(module, "processor", None)
    if not callable(processor):
        if "scaled_dot_product_attention" in called_names(type(module).forward):
            return (
                "none: calls torch's function in its own forward; rf.integrations.sdpa() takes it"
            )
        return None
    processor = original_of(processor)
    names = called_names(type(processor).__call__)
    if "dispatch_attention_fn" in names:
        return "dispatcher" if hasattr(processor, "_attention_backend") else "processor"
    if "scaled_dot_product_attention" in names:
        return "processor"
    return f"none: {type(processor).__name__} does not call torch's function"


@functools.cache
def _routed_class(cls: type) -> type:
    """A subclass whose calls run inside `SdpaMode`, with the name and the signature of `cls`."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with SdpaMode(*options_of(self), COUNTS):
            return cls.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (cls,), self.__dict__

    # diffusers looks for words such as "Added" in the class name, hence the same one.
    body = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": __name__}
    return type(cls.__name__, (cls,), body)


def _rebuild(cls: type) -> Any:
    routed = _routed_class(cls)
    return routed.__new__(routed)


def install(module: nn.Module, precision: str, training: bool, backend: object) -> str:
    """Give the layer a copy of its processor that takes `rf.attention`; returns `kind_of`.

    `backend` is the dispatcher's member for this precision. Layers of kind "none" are left alone.
    """
    kind = kind_of(module)
    if kind not in KINDS:
        return str(kind)
    original = original_of(module.processor)
    new = copy.copy(original)
    if kind == "dispatcher":
        new._attention_backend = backend
    else:
        new.__class__ = _routed_class(type(original))
    # object.__setattr__: a processor that is an nn.Module must not list the original as its child.
    object.__setattr__(new, _ORIGINAL, original)
    setattr(new, _OPTIONS, (precision, training))
    module.processor = new
    return kind


def restore(module: nn.Module) -> None:
    """Give the layer its own processor back, if it had a copy."""
    processor = getattr(module, "processor", None)
    if processor is not None and original_of(processor) is not processor:
        module.processor = original_of(processor)
