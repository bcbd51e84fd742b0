"""Values of conditions: tensors, and what holds them, dicts, lists and tuples, as pipelines pass them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["leaves", "map_leaves"]


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with ``change`` made to everything in them that is not one itself.

    Containers are dicts, lists and tuples themselves, and named tuples; other classes count as values.
    """
    if type(value) is dict:
        return {key: map_leaves(change, inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_leaves(change, inner) for inner in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(map_leaves(change, inner) for inner in value))
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in the containers that is not one itself."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return iter(found)
