"""Discrete noise schedules against diffusers' tables, the continuous paths, and their inverses."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from rfkernels import flow
from rfkernels.flow import (
    CosineBetas,
    LinearBetas,
    ScaledLinearBetas,
    SubVPPath,
    SubVPSchedule,
    VPPath,
    VPSchedule,
    get_schedule,
)
from rfkernels.training.config_json import _plain, _revived

ALL = ("linear", "scaled-linear", "cosine", "vp", "sub-vp")
K = torch.arange(1000)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (LinearBetas(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}),
        (LinearBetas(1e-4, 0.02), {}),
        (
            ScaledLinearBetas(),
            {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        ),
        (CosineBetas(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_tables_are_those_of_diffusers(schedule, options):
    from diffusers import DDPMScheduler

    found = DDPMScheduler(**options).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha_bar, found, rtol=2e-4, atol=1e-9)


def test_constants():
    """The last alpha_bar of the two schedules that Rectified Diffusion compares, and the gradient's
    weight there."""
    assert round(float(LinearBetas().alpha_bar[-1]), 6) == 0.001579
    assert round(float(ScaledLinearBetas().alpha_bar[-1]), 6) == 0.004660
    assert round(float(LinearBetas().noise_ratio[-1]), 1) == 25.1
    betas = np.linspace(0.00085, 0.012, 1000)
    np.testing.assert_allclose(LinearBetas().alpha_bar, np.cumprod(1 - betas), rtol=1e-13)


@pytest.mark.parametrize(
    ("schedule", "path"), [(VPSchedule(), VPPath()), (SubVPSchedule(), SubVPPath())]
)
def test_continuous_ones_are_their_paths_on_a_grid(schedule, path):
    alpha, sigma, _, _ = path.coefficients(1 - (K.double() + 1) / 1000)
    torch.testing.assert_close(schedule.alpha, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma, sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_indices_and_noise_ratios_are_each_others_inverse(name):
    schedule = get_schedule(name)
    assert (schedule.noise_ratio.diff() > 0).all()
    back = schedule.index_of_noise_ratio(schedule.noise_ratio)
    torch.testing.assert_close(back, K.double(), rtol=0, atol=1e-7)
    between = torch.linspace(0, 999, 3001, dtype=torch.float64)
    alpha, sigma = schedule.coefficients(between)
    torch.testing.assert_close(
        schedule.index_of_noise_ratio(sigma / alpha), between, rtol=0, atol=1e-7
    )
    # Whole numbers give the table, whatever their type, and the ends hold beyond them.
    for k in (K, K.float(), K.int()):
        alpha, sigma = schedule.coefficients(k)
        torch.testing.assert_close(alpha, schedule.alpha, rtol=1e-14, atol=0)
        torch.testing.assert_close(sigma, schedule.sigma, rtol=1e-13, atol=0)
    ends = schedule.index_of_noise_ratio(torch.tensor([0.0, math.inf]))
    assert ends.tolist() == [0.0, 999.0]
    assert schedule.coefficients(torch.tensor([-3.0, 2000.0]))[0].tolist() == pytest.approx(
        [float(schedule.alpha[0]), float(schedule.alpha[-1])], rel=1e-12
    )


@pytest.mark.parametrize("name", ALL)
def test_alpha_follows_from_the_noise_ratio(name):
    schedule = get_schedule(name)
    alpha = schedule.alpha_of_noise_ratio(schedule.noise_ratio)
    torch.testing.assert_close(alpha, schedule.alpha, rtol=1e-12, atol=0)
    sigma = schedule.sigma
    other = 1 - alpha.square() if name == "sub-vp" else torch.sqrt(1 - alpha.square())
    torch.testing.assert_close(sigma, other, rtol=1e-8, atol=0)
    torch.testing.assert_close(schedule.linear_times, alpha / (alpha + sigma))
    assert schedule.alpha_of_noise_ratio(torch.tensor(0.0)) == 1


def test_the_inverse_is_differentiable():
    schedule = ScaledLinearBetas()
    ratio = torch.tensor([0.05, 0.7, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(schedule.index_of_noise_ratio, ratio)
    k = torch.tensor([1.3, 400.6, 998.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: torch.stack(schedule.coefficients(k)), k)


def test_tables_of_inference_serve_training():
    schedule = LinearBetas()
    with torch.inference_mode():
        schedule.coefficients(K)
    k = torch.tensor([3.5], requires_grad=True)
    schedule.coefficients(k)[0].backward()
    assert k.grad.isfinite().all()
    assert copy.deepcopy(schedule) == schedule


@pytest.mark.parametrize("name", ALL)
def test_json(name):
    schedule = get_schedule(name)
    schedule.coefficients(K)
    assert _revived(_plain(schedule)) == schedule
    assert dataclasses.replace(schedule, steps=10).alpha.shape == (10,)
    assert getattr(flow, type(schedule).__name__) is type(schedule)


def test_bad_options():
    for make, message in (
        (lambda: LinearBetas(0.02, 1e-4), "LinearBetas: betas must satisfy"),
        (lambda: ScaledLinearBetas(steps=1), "ScaledLinearBetas: steps must be at least 2; got 1"),
        (lambda: CosineBetas(beta_max=1.0), "CosineBetas: offset must be finite"),
        (lambda: SubVPSchedule(beta_min=0.0), "SubVPSchedule: betas must satisfy"),
        (lambda: get_schedule("quadratic"), "schedule: must be one of linear"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="steps must be a whole number"):
        VPSchedule(steps=10.0)
    with pytest.raises(TypeError, match="schedule: must be a name or a NoiseSchedule; got int"):
        get_schedule(3)
