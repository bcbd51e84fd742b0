"""The first-order defect: zero for straight flows and matched noise, and what it is for a known flow."""

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.metrics import first_order_defect
from rfkernels.models import NoisePrediction

X0 = rf.randn(200, 3, seed=1, dtype=torch.float64)


def test_straight_flows_have_none():
    found = first_order_defect(lambda x, t: torch.ones_like(x), X0)
    assert found.defect < 1e-14
    assert list(found.by_steps) == [1, 2, 4]


def test_a_known_flow():
    """dx/dt = x: n Euler steps end at (1 + 1/n)^n x0."""
    found = first_order_defect(lambda x, t: x, X0, steps=(8, 1, 2))
    end = (1 + 1 / 8) ** 8
    scale = X0.norm() / (X0 - X0.mean(0)).norm()
    for n in (1, 2):
        expected = abs((1 + 1 / n) ** n - end) / end * float(scale)
        assert found.by_steps[n] == pytest.approx(expected, rel=1e-12)
    assert found.defect == found.by_steps[1]


def test_diffusion_networks_are_sampled_by_ddim():
    """Constant noise along a path, which bends, is first-order; the Euler steps of a bent path are not."""

    class Matched(nn.Module):
        def forward(self, x, k):
            return X0.flip(0)

    model = NoisePrediction(Matched(), "linear")
    assert first_order_defect(model, X0).defect < 1e-12
    seen = []
    first_order_defect(
        model,
        X0,
        steps=(1, 3),
        sampler=lambda v, x, steps, extra: seen.append((steps, extra)) or x,
        extra=7,
    )
    assert seen == [(1, 7), (3, 7)]


def test_bad_requests():
    for steps in ((), (4,), (4, 4), (0, 2)):
        with pytest.raises(ValueError, match="steps must be at least two different numbers"):
            first_order_defect(lambda x, t: x, X0, steps=steps)
    with pytest.raises(ValueError, match="x0 must hold at least 2 samples; got 1"):
        first_order_defect(lambda x, t: x, X0[:1])
