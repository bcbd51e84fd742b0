"""Conversions: every quantity from every other on every path, end points, other conventions."""

import itertools
import math

import pytest
import torch

from rfkernels.flow import conversions as cv
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.flow.paths import CustomPath, LinearPath, SubVPPath, TrigonometricPath, VPPath

QUANTITIES = ("velocity", "x1", "x0", "score")
PATHS = [
    LinearPath(),
    TrigonometricPath(),
    VPPath(),
    SubVPPath(),
    CustomPath(alpha=lambda t: t**2, sigma=lambda t: 1 - t**2, name="quadratic"),
]


def truth(path):
    """A state and all four quantities made from the same x0 and x1, with one time per sample."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 64, 3, 5, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(64, generator=generator, dtype=torch.float64)
    alpha, sigma, dalpha, dsigma = (c[:, None, None] for c in path.coefficients(t))
    x = alpha * x1 + sigma * x0
    return x, t, {"velocity": dalpha * x1 + dsigma * x0, "x1": x1, "x0": x0, "score": -x0 / sigma}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(QUANTITIES, 2)))
def test_every_quantity_from_every_other(path, source, target):
    x, t, known = truth(path)
    result = cv.convert(known[source], x, t, source=source, target=target, path=path)
    scale = known[target].abs().amax()
    assert (result - known[target]).abs().amax() <= 1e-12 * scale


@pytest.mark.parametrize("name", ["linear", "trigonometric", "vp", "sub-vp"])
def test_named_functions_are_convert(name):
    x, t, known = truth(cv.get_path(name))
    for function, source, target in (
        (cv.x1_from_velocity, "velocity", "x1"),
        (cv.x0_from_velocity, "velocity", "x0"),
        (cv.score_from_velocity, "velocity", "score"),
        (cv.velocity_from_x1, "x1", "velocity"),
        (cv.velocity_from_x0, "x0", "velocity"),
        (cv.velocity_from_score, "score", "velocity"),
    ):
        torch.testing.assert_close(
            function(known[source], x, t, name), known[target], rtol=1e-11, atol=1e-11
        )


def test_straight_path_formulas_hold_at_both_ends():
    x, v = torch.randn(2, 4, 6, dtype=torch.float64)
    for t in (0.0, 1.0, 0.3):
        torch.testing.assert_close(
            cv.x1_from_velocity(v, x, t), x + (1 - t) * v, rtol=0, atol=1e-15
        )
        torch.testing.assert_close(cv.x0_from_velocity(v, x, t), x - t * v, rtol=0, atol=1e-15)


def test_undetermined_samples_are_nan_and_touch_no_other():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x, value = torch.randn(2, 3, 4, dtype=torch.float64)
    nan_rows = {
        ("x1", "x0"): [2],
        ("x1", "velocity"): [2],
        ("velocity", "score"): [2],
        ("x0", "score"): [2],
        ("x0", "x1"): [0],
        ("x0", "velocity"): [0],
        ("score", "x1"): [0],
        ("score", "velocity"): [0],
        ("score", "x0"): [],
        ("velocity", "x1"): [],
        ("velocity", "x0"): [],
    }
    for path in ("linear", "trigonometric"):
        for (source, target), rows in nan_rows.items():
            result = cv.convert(value, x, t, source=source, target=target, path=path)
            bad = torch.isnan(result)
            assert torch.equal(bad.any(1), bad.all(1))
            assert bad.all(1).nonzero().flatten().tolist() == rows, (path, source, target)
            assert not torch.isinf(result).any()


def test_vp_at_its_singular_end():
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    x, v = torch.randn(2, 2, 4, dtype=torch.float64)
    assert torch.equal(cv.x1_from_velocity(v, x, t, "vp")[0], x[0])
    assert torch.isnan(cv.x0_from_velocity(v, x, t, "vp")[0]).all()
    assert torch.isnan(cv.velocity_from_x1(v, x, t, "vp")[0]).all()
    assert torch.isfinite(cv.x0_from_velocity(v, x, t, "vp")[1]).all()


def test_dtypes_follow_the_value_and_low_precision_is_computed_in_float32():
    x, t, known = truth(LinearPath())
    wide = cv.convert(known["x1"].float(), x.float(), t, source="x1", target="velocity")
    half = known["x1"].bfloat16()
    result = cv.convert(half, x.bfloat16(), t, source="x1", target="velocity")
    again = cv.convert(half.float(), x.bfloat16().float(), t, source="x1", target="velocity")
    assert wide.dtype == torch.float32
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, again.bfloat16())


def test_the_score_is_the_gradient_of_the_log_density():
    flow = GaussianMixtureFlow.ring()
    x = torch.randn(200, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(flow.log_density(x, t).sum(), x)
    with torch.no_grad():
        score = cv.score_from_velocity(flow(x, t), x, t)
    torch.testing.assert_close(score, gradient, rtol=1e-11, atol=1e-11)


def test_guidance():
    cond, uncond = torch.randn(2, 5, 3, dtype=torch.float64)
    tight = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(cv.guided_velocity(cond, uncond, 1.0), cond, **tight)
    assert torch.equal(cv.guided_velocity(cond, uncond, 0.0), uncond)
    scale = torch.tensor([0.0, 1.0, 2.5, 7.0, -1.0], dtype=torch.float64)
    expected = scale[:, None] * cond + (1 - scale[:, None]) * uncond
    torch.testing.assert_close(cv.guided_velocity(cond, uncond, scale), expected, **tight)
    with pytest.raises(ValueError, match="must have the shape of conditional"):
        cv.guided_velocity(cond, uncond[:2], 1.0)


def test_diffusers_convention():
    """Noise level s = 1 - t, state (1-s) x1 + s x0, output x0 - x1."""
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64)
    t = 0.3
    s = cv.diffusers_sigma_from_time(t)
    state = (1 - s) * x1 + s * x0
    output = x0 - x1
    assert cv.time_from_diffusers_sigma(s) == pytest.approx(t, abs=1e-15)
    assert cv.diffusers_timestep_from_time(t) == pytest.approx(700)
    assert cv.time_from_diffusers_timestep(700) == pytest.approx(t)
    velocity = cv.velocity_from_diffusers(output)
    assert torch.equal(cv.diffusers_from_velocity(velocity), output)
    torch.testing.assert_close(cv.x1_from_velocity(velocity, state, t), state - s * output)
    torch.testing.assert_close(cv.x0_from_velocity(velocity, state, t), state + (1 - s) * output)


def test_edm_translation_gives_the_exact_flow_from_a_denoiser():
    """The VE denoiser of one Gaussian, m + c^2 / (c^2 + sigma^2) (y - m), as a velocity."""
    flow = GaussianMixtureFlow([[1.0, -2.0]], 0.7)
    x = torch.randn(6, 2, dtype=torch.float64)
    t = torch.tensor([0.02, 0.1, 0.3, 0.7, 0.9, 0.98], dtype=torch.float64)
    sigma = cv.edm_sigma_from_time(t)
    y = cv.edm_state_from_linear(x, t)
    gain = (0.7**2 / (0.7**2 + sigma**2))[:, None]
    denoised = flow.means[0] + gain * (y - flow.means[0])
    torch.testing.assert_close(
        cv.velocity_from_x1(denoised, x, t), flow(x, t), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(cv.linear_state_from_edm(y, sigma), x)
    torch.testing.assert_close(cv.time_from_edm_sigma(sigma), t)


def test_a_velocity_of_one_path_becomes_the_velocity_of_the_straight_path():
    """E[x1 | state] of the VP path, computed for one Gaussian, gives the straight path's flow."""
    flow = GaussianMixtureFlow([[0.5, 3.0]], 0.4)
    path = VPPath()
    x = torch.randn(5, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    vp_t = cv.vp_time_from_linear(t)
    torch.testing.assert_close(cv.linear_time_from_path(vp_t, path), t, rtol=1e-12, atol=0)
    vp_x = cv.path_state_from_linear(x, vp_t, path)
    torch.testing.assert_close(cv.linear_state_from_path(vp_x, vp_t, "vp"), x)
    alpha, sigma, _, _ = (c[:, None] for c in path.coefficients(vp_t))
    gain = alpha * 0.4**2 / (alpha**2 * 0.4**2 + sigma**2)
    denoised = flow.means[0] + gain * (vp_x - alpha * flow.means[0])
    torch.testing.assert_close(
        cv.velocity_from_x1(denoised, x, t), flow(x, t), rtol=1e-11, atol=1e-11
    )


def test_trigflow_angle_and_state():
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.8, 1.0], dtype=torch.float64)
    angle = cv.trigflow_angle_from_time(t)[:, None]
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    expected = angle.cos() * x1 + angle.sin() * x0
    torch.testing.assert_close(cv.trigflow_state_from_linear(x, t), expected)
    assert cv.trigflow_angle_from_time(0.0).item() == pytest.approx(math.pi / 2)


def test_errors_name_the_argument():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"target must be one of .*; got 'epsilon'"):
        cv.convert(x, x, 0.5, source="x1", target="epsilon")
    with pytest.raises(ValueError, match=r"velocity must have the shape of x, \(3, 4\)"):
        cv.x1_from_velocity(x[:2], x, 0.5)
    with pytest.raises(ValueError, match=r"t must be a number or have shape \(3,\); got \(4,\)"):
        cv.x1_from_velocity(x, x, torch.rand(4))
