"""One optimizer step: AdamP and SGDP against the authors' package, and beside AdamW, which projects nothing.

Shapes are weight matrices and convolutions, and one list of equal matrices (count, rows, columns). Weights move in place;
gradients stay, and are orthogonal to the starting weights row by row where a case says so. torch's AdamW is no rival: it is
what the step costs without the projection (28 bytes an element; the projection's tests need 8 more, on CUDA 12).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from registry import Built, Case, Setting, Variant

import rfkernels as rf

LARGE = {
    "matrix-1152x1152": (1152, 1152),
    "matrix-4608x1152": (4608, 1152),
    "conv-512x512x3x3": (512, 512, 3, 3),
    "many-96x256x256": (96, 256, 256),
}
TINY = {"tiny": (12, 20)}
SHAPES = {"cpu": {**LARGE, **TINY}, "cuda": {**LARGE, **TINY}}


def _orthogonal(g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a, b = g.flatten(1).double(), w.flatten(1).double()
    return (a - b * ((a * b).sum(1) / (b * b).sum(1))[:, None]).reshape(g.shape).to(g.dtype)


def _inputs(setting: Setting, projected: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weight, grad = setting.normal(0), setting.normal(1)
    many = setting.shape_name.startswith("many")
    weights, grads = ([*t] if many else [t] for t in (weight, grad))
    if projected:
        grads = [_orthogonal(g, w) for g, w in zip(grads, weights, strict=True)]
    else:  # no test passes
        grads = [g + w for g, w in zip(grads, weights, strict=True)]
    return weights, grads


def _stepper(make: Callable[..., torch.optim.Optimizer], weights, grads, dtype=None):
    """A call that moves copies of the weights by one step and returns the first of them."""
    parameters = [torch.nn.Parameter(w.to(dtype or w.dtype, copy=True)) for w in weights]
    optimizer = make(parameters)
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.to(p.dtype)

    def call():
        optimizer.step()
        return parameters[0].detach()

    return call


def _package() -> object | None:
    """The authors' package, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import adamp
    except ImportError:
        return None
    return adamp


def _adamw(parameters, **switches: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, **switches)


def _case(name: str, projected: bool, nesterov: bool = False, **options: object):
    def build(setting: Setting) -> Built:
        weights, grads = _inputs(setting, projected)
        step = lambda make: _stepper(make, weights, grads)  # noqa: E731
        ours = lambda p: getattr(rf.optim, name)(p, nesterov=nesterov, **options)  # noqa: E731
        variants = [Variant(name, "fused", "inplace", step(ours))]
        if (package := _package()) is not None:
            theirs = step(lambda p: getattr(package, name)(p, nesterov=nesterov, **options))
            variants.append(Variant("package adamp", "naive", "inplace", theirs))
        for switch in ("foreach", "fused"):
            call = step(lambda p, switch=switch: _adamw(p, **{switch: True}))
            # Another task: its numbers are not compared.
            plain = Variant(f"AdamW({switch}=True)", "part", "inplace", call, lambda _: None)
            variants.append(plain)

        def expected():
            with rf.use_backend("reference"):
                return (_stepper(ours, weights, grads, torch.float64)(),)

        return Built(variants, expected)

    return build


def _bytes(moments: int) -> Callable[[Setting], int]:
    """Gradient read, weights and so many moments read and written."""
    return lambda s: s.n * (3 * s.state.itemsize + 8 * moments)


def _of(name: str, build: Callable[[Setting], Built], moments: int) -> Case:
    return Case("projected_update", name, build, _bytes(moments), shapes=SHAPES)


CASES = [
    _of("adamp_projected", _case("AdamP", True, lr=1e-3, weight_decay=0.01), 2),
    _of("adamp_not_projected", _case("AdamP", False, lr=1e-3, weight_decay=0.01), 2),
    _of("sgdp_projected", _case("SGDP", True, True, lr=0.1, momentum=0.9), 1),
]
