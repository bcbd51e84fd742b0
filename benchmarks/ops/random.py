"""Standard normals: rf.randn against torch.randn. The package has no ``out=`` here, so each call allocates."""

from __future__ import annotations

import math

import torch
from registry import Built, Case, Setting, Variant, compiled, relative_error

import rfkernels as rf

SEED = 1234
_PREFIX = 2**20  # elements compared with the float64 truth; the Philox of the reference is slow


def prefix_normals(n: int, seed: int, device: str) -> torch.Tensor:
    """The first min(n, 2^20) normals of a seed in float64, flat: Box-Muller on the reference's uniforms.

    The uniforms hold the leading 24 bits of each Philox word exactly; the normal adds 2^-24 to the first of a pair.
    """
    count = min(n, _PREFIX)
    with rf.use_backend("reference"):
        u = rf.rand(-(-count // 2) * 2, seed=seed, device=device).double()
    radius, angle = torch.sqrt(-2 * torch.log(u[0::2] + 2.0**-24)), 2 * math.pi * u[1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 1).flatten()[:count]


def _normal(setting: Setting) -> Built:
    device, dtype, shape = setting.device, setting.state, setting.shape
    buffer = setting.empty()

    def moments(drawn) -> float | None:
        """None when mean and deviation are a standard normal's within six standard errors or more, inf otherwise."""
        spread = 6 / math.sqrt(setting.n)
        wide = drawn.double()
        return (
            None
            if abs(wide.mean().item()) < spread and abs(wide.std().item() - 1) < spread
            else math.inf
        )

    def exact(drawn) -> float:
        noise = prefix_normals(setting.n, SEED, device)
        return (
            relative_error(drawn.flatten()[: len(noise)], (noise,))
            if moments(drawn) is None
            else math.inf
        )

    def draw():
        return torch.randn(shape, device=device, dtype=dtype)

    whole = compiled(draw)
    return Built(
        [
            Variant(
                "fused",
                "fused",
                "new",
                lambda: rf.randn(shape, seed=SEED, device=device, dtype=dtype),
                exact,
            ),
            Variant("torch.randn", "naive", "new", draw, moments),
            Variant("normal_ in place", "best", "out", buffer.normal_, moments),
            Variant("torch.compile", "compile", "new", whole, moments),
        ],
        tuple,
    )


CASES = [Case("random", "randn", _normal, lambda s: s.n * s.state.itemsize)]
