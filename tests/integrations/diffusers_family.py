"""A small random configuration of a diffusers model, of at least three blocks, with the number of
attention calls of one evaluation: `build(family)` gives the model and the arguments of its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def text(length: int = 7, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, width)


def padding() -> torch.Tensor:
    """1 at the tokens of `text`; the last three of the second sample are padding."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return mask


def ids(rows: int, columns: int, axes: int = 3) -> torch.Tensor:
    grid = torch.zeros(rows, columns, axes)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None]
    return grid.reshape(rows * columns, axes)


def images(channels: int = 4, side: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, side, side)


def video() -> torch.Tensor:
    return torch.randn(2, 4, 2, 8, 8)


def steps() -> torch.Tensor:
    return torch.tensor([3, 700])


@dataclass(frozen=True)
class Family:
    """One model: its class in diffusers, options, inputs, and what is known of its attention."""

    cls: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    calls: int  # attention calls of one evaluation
    mask: str | None = None  # the argument that is a mask of the text tokens


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def build(family: Family) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model with weights that are nowhere zero, in eval mode, and the inputs of a call.

    Every matrix is scaled so that its layer keeps the size of what goes in; with diffusers' own
    initialisation some models begin as zero fields, in which attention changes nothing.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, family.cls)(**family.options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = family.inputs()
    return model.eval().requires_grad_(False), inputs


def evaluate(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The output tensor of one evaluation; lists of tensors are stacked."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out
