"""The solver of flow maps: exact for the closed-form average velocity in one step, what it calls,
what it refuses."""

import pytest
import torch

import rfkernels as rf
from rfkernels import models
from rfkernels.sampling import FlowMap, invert, sample

MEAN, STD = 2.0, 0.5


def width(t):
    return ((1 - t) ** 2 + (t * STD) ** 2).sqrt()


def average(x, t, span):
    """The average velocity over [t, t + span] of the flow from N(0, I) to N(m, c^2 I), along which
    x_T = T m + (q_T / q_t) (x_t - t m), q_t = sqrt((1 - t)^2 + t^2 c^2); span may be negative."""
    t, span = t.to(x.dtype)[:, None], span.to(x.dtype)[:, None]
    end = t + span
    return (end * MEAN + width(end) / width(t) * (x - t * MEAN) - x) / span


def transported(x0):
    return MEAN + STD * x0


@pytest.fixture
def x0():
    return rf.randn(6, 3, seed=0, dtype=torch.float64)


@pytest.mark.parametrize("grid", [None, "shifted", [0.0, 0.1, 0.7, 1.0]])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_exact_for_the_closed_form_average_velocity(steps, grid, x0):
    listed = isinstance(grid, list)
    info = sample(
        average, x0, steps=None if listed else steps, grid=grid, solver="flow-map", return_info=True
    )
    torch.testing.assert_close(info.x, transported(x0), rtol=0, atol=1e-14)
    assert info.nfe == (3 if listed else steps)
    # Every state on the way lies on the flow.
    for t, x in zip(info.times, info.trajectory, strict=True):
        torch.testing.assert_close(x, t * MEAN + width(t) * x0, rtol=0, atol=1e-14)


def test_spans_are_the_intervals_and_come_with_the_condition(x0):
    seen = []

    def network(x, t, span, y):
        assert span.shape == t.shape == (6,)
        seen.append((t[0].item(), span[0].item(), y))
        span.zero_()  # a fresh tensor, which a network may write into
        return torch.zeros_like(x)

    options = {"condition": {"y": 1}, "uncondition": {"y": None}, "guidance_scale": 3.0}
    info = sample(
        network, x0, grid=[0.0, 0.25, 1.0], solver="flow-map", return_info=True, **options
    )
    assert info.nfe == 4
    assert seen == [(0.0, 0.25, 1), (0.0, 0.25, None), (0.25, 0.75, 1), (0.25, 0.75, None)]


def test_guidance_extrapolates_the_average(x0):
    def network(x, t, span, y):
        return average(x, t, span) + y

    options = {"condition": {"y": 1.5}, "uncondition": {"y": -0.5}, "guidance_scale": 2.0}
    guided = sample(network, x0, steps=4, solver="flow-map", **options)

    def mixed(x, t, span):
        return average(x, t, span) + (-0.5 + 2.0 * 2.0)

    torch.testing.assert_close(guided, sample(mixed, x0, steps=4, solver="flow-map"))


def test_invert_only_where_the_network_knows_the_way_back(x0):
    x1 = transported(x0)
    with pytest.raises(ValueError, match=r"'flow-map' goes backwards only .* got a step of -0\.5"):
        invert(average, x1, steps=2, solver="flow-map")
    back = invert(average, x1, steps=2, solver=FlowMap(negative_spans=True))
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"condition: span is given by the solver 'flow-map'"):
        sample(average, x0, steps=1, solver="flow-map", condition={"span": torch.zeros(6)})


def test_low_precision_and_a_reference_network():
    model = models.build("mlp", seed=0, sample_shape=(3,), width=16, depth=1, flow_map=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x0 = rf.randn(6, 3, seed=0)
    with torch.no_grad():
        half = torch.full((6,), 0.5)
        middle = x0 + 0.5 * model(x0, torch.zeros(6), span=half)
        expected = middle + 0.5 * model(middle, half, span=half)
        # At span 0 the network is a velocity, which every other solver takes.
        euler = x0 + model(x0, torch.zeros(6), span=torch.zeros(6))
    torch.testing.assert_close(sample(model, x0, steps=2, solver="flow-map"), expected)
    torch.testing.assert_close(sample(model, x0, steps=1), euler)
    low = sample(model.to(torch.bfloat16), x0.bfloat16(), steps=2, solver="flow-map")
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05)
