"""Which functions a piece of Python calls by name, read from its code without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

__all__ = ["called_names"]


def called_names(function: Callable[..., Any]) -> frozenset[str]:
    """Global and attribute names in the function's code and in functions defined inside it.

    Decorators that set `__wrapped__` are looked through; of a callable without Python code the
    answer is empty.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    names: set[str] = set()
    pending = [] if code is None else [code]
    while pending:
        current = pending.pop()
        names.update(current.co_names)
        pending.extend(c for c in current.co_consts if isinstance(c, CodeType))
    return frozenset(names)
