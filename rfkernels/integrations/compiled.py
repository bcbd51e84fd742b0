"""What torch.compile wraps."""

from __future__ import annotations

from typing import Any

__all__ = ["uncompiled"]


def uncompiled(model: Any) -> Any:
    """The module inside what torch.compile returned; anything else as it is."""
    return getattr(model, "_orig_mod", model)
