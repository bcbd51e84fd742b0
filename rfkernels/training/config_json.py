"""Configs to and from the JSON values of config.json; unknown options are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from rfkernels import flow
from rfkernels.training.config import OwnObject, TrainConfig

__all__ = ["from_dict", "to_dict"]

Config = TypeVar("Config")


def _plain(value: Any) -> Any:
    """JSON for a value: itself; for an object its class, and a dataclass's fields."""
    if isinstance(value, TrainConfig):
        return to_dict(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    cls = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    described: dict[str, Any] = {"object": f"{cls.__module__}.{cls.__qualname__}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        described.update(
            {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return described


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _revived(value: Any) -> Any:
    """An object of `rfkernels.flow` from its description; an OwnObject for any other."""
    if not isinstance(value, Mapping) or "object" not in value:
        return value
    module, _, name = str(value["object"]).rpartition(".")
    fields = {key: _revived(field) for key, field in value.items() if key != "object"}
    known = f"{module}.".startswith("rfkernels.flow.") and hasattr(flow, name)
    if not known or any(isinstance(field, OwnObject) for field in fields.values()):
        return OwnObject(str(value["object"]))
    return getattr(flow, name)(**fields)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The config of class `cls` in JSON values; a missing option has its default.

    Raises:
        ValueError: an unknown option, or a bad value.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{cls.__name__}: must be a mapping of options; got {type(values).__name__}"
        )
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {cls.__name__} has no such option; it has {', '.join(sorted(fields))}"
        )
    arguments = {key: _revived(value) for key, value in values.items() if key != "train"}
    if "train" in values:
        train = values["train"]
        arguments["train"] = (
            train if isinstance(train, TrainConfig) else from_dict(TrainConfig, train)
        )
    return cls(**arguments)
