"""The few-step rule of 2-rectified flow++, and Euler as the original rectified-flow code steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import Euler, InitialNoise, invert, sample

RING = GaussianMixtureFlow.ring()


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 2)))


@pytest.fixture(scope="module")
def truth(noise):
    return sample(RING, noise, steps=300, solver="rk4")


def distance(a, b):
    """Root mean square over samples of the distance between points."""
    return (a - b).square().sum(1).mean().sqrt().item()


@pytest.mark.parametrize("grid", [None, 3.0])
def test_it_is_the_rule_written_out_on_the_noise_level(noise, grid):
    """x <- (1 - s') x1 + s' z, x1 = x - s v, v pointing from data to noise, s from 1 to 0."""
    info = sample(RING, noise, steps=5, solver="rf++", grid=grid, return_info=True)
    levels = 1 - info.times.numpy()
    z, x = noise.numpy(), noise.numpy()
    for s, after in pairwise(levels):
        velocity = -RING(torch.from_numpy(x), float(1 - s)).numpy()
        x = (1 - after) * (x - s * velocity) + after * z
    np.testing.assert_allclose(info.x.numpy(), x, atol=1e-12)
    assert info.nfe == 5
    torch.testing.assert_close(info.trajectory[-1], info.x, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_are_eulers_on_any_field(noise, steps):
    ours, euler = (sample(RING, noise, steps=steps, solver=s) for s in ("rf++", "euler"))
    torch.testing.assert_close(ours, euler, rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [3, 8, 64])
def test_every_step_count_is_eulers_on_straight_paths(noise, steps):
    """v = x1 - z fixed per pair: both land on x1."""
    target = torch.linspace(-3, 3, noise.numel(), dtype=torch.float64).reshape(noise.shape)
    for solver in ("rf++", "euler"):
        result = sample(lambda x, t: target - noise, noise, steps=steps, solver=solver)
        torch.testing.assert_close(result, target, rtol=0, atol=1e-13)


def test_on_a_curved_flow_it_is_better_at_four_steps_and_diverges_with_more(noise, truth):
    found = {
        (solver, n): distance(sample(RING, noise, steps=n, solver=solver), truth)
        for solver, n in (("rf++", 2), ("rf++", 4), ("euler", 4), ("rf++", 8), ("rf++", 64))
    }
    known = dict(zip(found, (1.283, 0.150, 0.584, 0.619, 1.70), strict=True))
    assert found == pytest.approx(known, rel=0.015)
    assert distance(sample(RING, noise, steps=64), truth) < 0.04
    # Whoever takes it must be able to read that.
    assert "Few-step only" in InitialNoise.__doc__
    assert "error grows with the number of steps" in " ".join(InitialNoise.__doc__.split())


def test_it_refuses_what_has_no_initial_noise(noise):
    with pytest.raises(ValueError, match=r"invert: solver 'rf\+\+' needs the initial noise"):
        invert(RING, noise, steps=4, solver="rf++")
    with pytest.raises(ValueError, match=r"t_start must be 0; got 0.2"):
        sample(RING, noise, steps=4, solver=InitialNoise(), t_start=0.2)


def test_guidance_low_precision_and_gradients(noise):
    def velocity(x, t, shift=0.0):
        return -x + shift

    options = {"steps": 3, "solver": "rf++"}
    mixed = sample(velocity, noise, condition={"shift": 0.5 + 2.0 * (1.5 - 0.5)}, **options)
    guided = sample(
        velocity,
        noise,
        condition={"shift": 1.5},
        uncondition={"shift": 0.5},
        guidance_scale=2.0,
        **options,
    )
    torch.testing.assert_close(guided, mixed, rtol=0, atol=1e-13)
    low = sample(velocity, noise.bfloat16(), condition={"shift": 1.0}, **options)
    assert low.dtype == torch.bfloat16
    high = sample(velocity, noise.bfloat16().double(), condition={"shift": 1.0}, **options)
    torch.testing.assert_close(low.double(), high, rtol=0.02, atol=0.02)
    few = noise[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sample(RING, x, **options), few)


def test_euler_of_the_original_code(noise):
    """z + v(z, (i / N) (1 - eps) + eps) / N."""
    steps, eps, x = 6, 1e-3, noise
    for i in range(steps):
        x = x + RING(x, (i / steps) * (1 - eps) + eps) / steps
    original = sample(RING, noise, steps=steps, solver=Euler(original_eps=eps))
    torch.testing.assert_close(original, x, rtol=0, atol=1e-13)
    assert distance(original, sample(RING, noise, steps=steps)) > 1e-4
    seen = []

    def velocity(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    invert(velocity, noise, steps=2, solver=Euler(original_eps=eps))
    assert seen == pytest.approx([1.0, 0.5 * (1 - eps) + eps])
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"original_eps must lie in \[0, 1\); got"):
            Euler(original_eps=wrong)
