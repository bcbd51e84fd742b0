"""`torch.nn.functional.scaled_dot_product_attention` taken by `rf.attention`, for a block or until
undone.

The name in torch.nn.functional is replaced by one function that looks up, at every call, which of
the patches now enabled is the newest, and by torch's own function again when none is left. The
replacement belongs to the process, as the name does: it holds for every thread, and of two patches
enabled by two threads the one enabled later decides for both. Enabling and undoing are guarded by a
lock. Code that took the function by `from torch.nn.functional import ...` before does not see it;
calls inside `torch.jit.script` do not either.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rfkernels.integrations.routing import RouteCounts, check_precision, route

__all__ = ["SdpaPatch", "sdpa"]

_NAME = "scaled_dot_product_attention"
_lock = threading.RLock()
_layers: list[_Layer] = []


class _Layer:
    """A function put in place of another one, and the patches that decide what it does.

    There is one layer, unless somebody else replaced the name after it; then a patch enabled on top
    of that gets a layer of its own. A layer without patches passes every call on unchanged.
    """

    def __init__(self, original: Callable[..., torch.Tensor]) -> None:
        self.original = original
        self.patches: list[SdpaPatch] = []
        self.newest: SdpaPatch | None = None

        def scaled_dot_product_attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            *,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> torch.Tensor:
            patch = self.newest
            if patch is None:
                return original(
                    query,
                    key,
                    value,
                    attn_mask=attn_mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                )
            return route(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                original=original,
                precision=patch.precision,
                training=patch.training,
                counts=patch.counts,
            )

        scaled_dot_product_attention.__doc__ = original.__doc__
        self.function = scaled_dot_product_attention


def _layer_in_place() -> _Layer | None:
    """The layer whose function now has torch's name."""
    current = getattr(F, _NAME)
    return next((layer for layer in _layers if layer.function is current), None)


def _drop_empty_layers() -> None:
    """Give the name back, as long as it belongs to a layer without patches."""
    while (layer := _layer_in_place()) is not None and not layer.patches:
        setattr(F, _NAME, layer.original)
        _layers.remove(layer)


class SdpaPatch:
    """One patch of torch's function; made by `sdpa`.

    A context manager, or `enable()` and `disable()`. Patches nest, and may be undone in any order.
    """

    def __init__(self, precision: str, training: bool) -> None:
        self.precision = check_precision("sdpa", precision)
        if not isinstance(training, bool):
            raise TypeError(f"sdpa: training must be a bool; got {type(training).__name__}")
        self.training = training
        self.counts = RouteCounts()
        self._layer: _Layer | None = None

    @property
    def enabled(self) -> bool:
        """True between `enable` and `disable`."""
        return self._layer is not None

    def stats(self) -> dict[str, Any]:
        """{"calls": int, "routed": int, "fallbacks": {reason: int}} since this patch was made.

        Calls in compiled graphs are not counted here; `rf.attention_stats()` has them.
        """
        return self.counts.as_dict()

    def enable(self) -> SdpaPatch:
        """Route torch's function from now on; returns self.

        Raises:
            RuntimeError: this patch is enabled already.
        """
        with _lock:
            if self._layer is not None:
                raise RuntimeError("sdpa: this patch is enabled already; make another one to nest")
            _drop_empty_layers()
            layer = _layer_in_place()
            if layer is None:
                layer = _Layer(getattr(F, _NAME))
                _layers.append(layer)
                setattr(F, _NAME, layer.function)
            layer.patches.append(self)
            layer.newest = self
            self._layer = layer
        return self

    def disable(self) -> None:
        """Undo `enable`; with the last patch torch's name gets back the very object that it had.

        Somebody else who replaced the name after `enable` keeps it: then this patch's function
        stays under theirs and passes every call on unchanged, and a RuntimeWarning says so.

        Raises:
            RuntimeError: this patch is not enabled.
        """
        with _lock:
            layer = self._layer
            if layer is None:
                raise RuntimeError("sdpa: this patch is not enabled")
            layer.patches.remove(self)
            layer.newest = layer.patches[-1] if layer.patches else None
            self._layer = None
            _drop_empty_layers()
            covered = not layer.patches and layer in _layers
            owner = getattr(F, _NAME)
        if covered:
            module = getattr(owner, "__module__", None)
            warnings.warn(
                f"sdpa: torch.nn.functional.{_NAME} was replaced while this patch was enabled (now "
                f"{module}.{getattr(owner, '__qualname__', owner)}); the replacement was left in "
                "place, and what this patch put under it passes every call on unchanged",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> SdpaPatch:
        return self.enable()

    def __exit__(self, *_: object) -> None:
        self.disable()


def sdpa(precision: str = "int8", training: bool = False) -> SdpaPatch:
    """Let `rf.attention` take the calls of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        precision: of `rf.attention`.
        training: take calls that need a gradient too: forward quantized, backward through torch's
            function on the same inputs. Without it they go to torch's function.

    Calls with dropout, in other dtypes, on other devices, with a head_dim over 256 or of shapes
    that `rf.attention` does not take go to the function that was there before; `stats()` has how
    many and why.

    Example:
        >>> with rf.integrations.sdpa("int8") as patch:
        ...     out = model(x)
        >>> patch.stats()
        {'calls': 12, 'routed': 12, 'fallbacks': {}}
        >>> patch = rf.integrations.sdpa().enable()  # until patch.disable()

    The replacement holds for the whole process (all threads). `torch.compile` inside the block
    traces into it.
    """
    return SdpaPatch(precision, training)
