"""Classifier-free guidance with every solver: identities, per-sample scales, what is called."""

import pytest
import torch

from rfkernels.sampling import Dopri5, Taylor, invert, sample

JVP = Taylor(derivative="jvp")
ALL = ["euler", "midpoint", "heun", "rk4", "ab2", "taylor", JVP, Dopri5(rtol=1e-9, atol=1e-9)]
LABEL = torch.tensor([0.5, -1.0, 2.0, 0.0])


def velocity(x, t, label):
    return (label[:, None] - x) * (1 + t[:, None]) + (x * label[:, None]).sin()


@pytest.fixture
def x0():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conditions(dtype=torch.float64):
    label = LABEL.to(dtype)
    return {"condition": {"label": label}, "uncondition": {"label": torch.zeros_like(label)}}


@pytest.mark.parametrize("direction", [sample, invert])
@pytest.mark.parametrize("scale", [-0.5, 0.3, 2.5, 7.0])
@pytest.mark.parametrize("solver", ALL, ids=str)
def test_guidance_is_the_velocity_extrapolated(solver, scale, direction, x0):
    def mixed(x, t):
        u = velocity(x, t, torch.zeros(4, dtype=x.dtype))
        return u + scale * (velocity(x, t, LABEL.to(x)) - u)

    options = {"steps": 6, "solver": solver, "t_end": 0.5}
    if isinstance(solver, Dopri5):
        mixed_solver = Dopri5(rtol=1e-9, atol=1e-9, finished="keep")
        expected = direction(mixed, x0, **{**options, "solver": mixed_solver})
    else:
        expected = direction(mixed, x0, **options)
    guided = direction(velocity, x0, guidance_scale=scale, **conditions(), **options)
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_scale_one_is_the_condition_and_zero_the_lack_of_it(solver, x0):
    given = conditions()
    options = {"steps": 5, "solver": solver}
    conditional = sample(velocity, x0, condition=given["condition"], **options)
    unconditional = sample(velocity, x0, condition=given["uncondition"], **options)
    one = torch.tensor(1.0)
    for scale in (None, 1, 1.0):
        result = sample(velocity, x0, guidance_scale=scale, **given, **options)
        assert torch.equal(result, conditional)
    result = sample(velocity, x0, guidance_scale=one, **given, **options)
    torch.testing.assert_close(result, conditional, rtol=0, atol=1e-8)
    result = sample(velocity, x0, guidance_scale=0.0, **given, **options)
    torch.testing.assert_close(result, unconditional, rtol=0, atol=1e-8)


def test_a_number_one_skips_the_unconditional_call(x0):
    def conditional_only(x, t, label):
        assert label is not None
        return velocity(x, t, label)

    given = {"condition": {"label": LABEL.double()}, "uncondition": {"label": None}}
    info = sample(conditional_only, x0, steps=3, guidance_scale=1.0, return_info=True, **given)
    assert info.nfe == 3
    # and without guidance there is nothing to demand `uncondition` for
    sample(velocity, x0, steps=3, guidance_scale=1.0, condition=given["condition"])


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_scales_per_sample_and_as_zero_dimensional_tensors(solver, x0):
    scales = torch.tensor([0.0, 1.0, 1.5, 4.0])
    options = {"steps": 4, "solver": solver}
    together = sample(velocity, x0, guidance_scale=scales, **conditions(), **options)
    for row, scale in enumerate(scales):
        number = sample(velocity, x0, guidance_scale=float(scale), **conditions(), **options)
        tensor = sample(velocity, x0, guidance_scale=scale, **conditions(), **options)
        torch.testing.assert_close(together[row], number[row], rtol=0, atol=1e-7)
        torch.testing.assert_close(tensor, number, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", JVP], ids=str)
def test_guidance_in_low_precision(solver, x0):
    given = conditions(torch.bfloat16)
    low = sample(
        velocity, x0.bfloat16(), steps=50, solver=solver, guidance_scale=2.0, t_end=0.5, **given
    )
    full = sample(
        velocity, x0, steps=50, solver=solver, guidance_scale=2.0, t_end=0.5, **conditions()
    )
    assert low.dtype == torch.bfloat16
    # The velocity reads x rounded to 8 bits and t is float32, so the answer is float32.
    torch.testing.assert_close(low.double(), full, rtol=0, atol=0.06)
