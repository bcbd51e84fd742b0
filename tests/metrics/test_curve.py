"""Quality curves: rows, counted evaluations, and the curve of an exact flow."""

from types import SimpleNamespace

import pytest
import torch

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.metrics import energy_distance, quality_curve


def test_an_exact_flow_improves_with_its_steps():
    flow = GaussianMixtureFlow.ring()
    x0, reference = rf.randn(2000, 2, seed=1), flow.sample(2000, seed=2)
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return flow(x, t)

    rows = quality_curve(
        {"ring": counted}, x0, reference, steps=(1, 4, 32), metric=energy_distance, solver="heun"
    )
    assert [(row.model, row.steps) for row in rows] == [("ring", 1), ("ring", 4), ("ring", 32)]
    assert sum(row.nfe for row in rows) == len(calls)
    assert rows[0].value > 10 * rows[2].value
    assert rows[2].value < 0.02


def test_models_metrics_and_samplers_are_passed_on():
    x0 = torch.zeros(3, 2)

    def sampler(velocity, x, *, steps, return_info, scale):
        assert return_info
        return SimpleNamespace(x=x + steps * scale * velocity, nfe=torch.tensor([steps, steps + 1]))

    rows = quality_curve(
        {"a": 1.0, "b": 10.0},
        x0,
        x0,
        steps=[1, 2],
        metric=lambda samples, reference: (samples - reference).mean(),
        sampler=sampler,
        scale=2.0,
    )
    assert [tuple(row) for row in rows] == [
        ("a", 1, 1.5, 2.0),
        ("a", 2, 2.5, 4.0),
        ("b", 1, 1.5, 20.0),
        ("b", 2, 2.5, 40.0),
    ]


def test_errors_name_the_argument():
    x0 = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="at least one model"):
        quality_curve({}, x0, x0)
    for steps in ((), (4, 0)):
        with pytest.raises(ValueError, match="steps must be numbers of at least 1"):
            quality_curve({"a": GaussianMixtureFlow.ring()}, x0, x0, steps=steps)
