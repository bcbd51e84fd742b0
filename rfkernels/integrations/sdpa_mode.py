"""A torch function mode in which torch's scaled_dot_product_attention goes to `rf.attention`.

Unlike the patch of `torch_sdpa` it holds for one thread and one call, so it can carry a precision
of its own for one layer; `torch.compile(fullgraph=True)` traces through it. While it is active
every torch function costs about a microsecond more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from rfkernels.integrations.routing import TORCH_SDPA, RouteCounts, route

__all__ = ["SdpaMode"]


class SdpaMode(TorchFunctionMode):
    """Calls of torch's own function inside go through `route`; see there for the arguments."""

    def __init__(self, precision: str, training: bool, counts: RouteCounts) -> None:
        super().__init__()
        self.precision, self.training, self.counts = precision, training, counts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is TORCH_SDPA:
            return route(
                *args,
                **(kwargs or {}),
                original=TORCH_SDPA,
                precision=self.precision,
                training=self.training,
                counts=self.counts,
            )
        return func(*args, **(kwargs or {}))
