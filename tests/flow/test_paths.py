"""Paths: coefficients against independent formulas, derivatives, end points, custom functions."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from rfkernels.flow.paths import (
    CustomPath,
    LinearPath,
    Path,
    SubVPPath,
    TrigonometricPath,
    VPPath,
    get_path,
)

BUILT_IN = [LinearPath(), TrigonometricPath(), VPPath(), SubVPPath()]
INNER = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.name)
def test_derivatives_agree_with_automatic_differentiation(path):
    by_jvp = CustomPath(
        alpha=lambda t: path.coefficients(t).alpha, sigma=lambda t: path.coefficients(t).sigma
    ).coefficients(INNER)
    for ours, derived in zip(path.coefficients(INNER), by_jvp, strict=True):
        torch.testing.assert_close(ours, derived, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.name)
def test_the_data_end_is_exact_and_half_precision_times_keep_their_dtype(path):
    alpha, sigma, _, _ = path.coefficients(1.0)
    assert alpha == 1
    assert sigma == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = path.coefficients(torch.rand(3, 2).to(dtype))
        assert all(v.dtype == dtype and v.shape == (3, 2) for v in values)
    assert isinstance(path, Path)
    assert all(torch.isfinite(v) for v in path.coefficients(path.t_end))


@pytest.mark.parametrize("path", BUILT_IN[:2], ids=lambda p: p.name)
def test_the_source_end_is_exact(path):
    alpha, sigma, _, _ = path.coefficients(0.0)
    assert alpha == 0
    assert sigma == 1


def test_vp_is_the_diffusion_with_linear_beta():
    """alpha^2 = exp(-integral of beta over diffusion time), the definition, by quadrature."""
    path = VPPath(beta_min=0.3, beta_max=12.0)
    for t in (0.0, 0.2, 0.7, 0.95, 1 - 1e-6):
        integral, _ = quad(lambda u: 0.3 + (12.0 - 0.3) * u, 0, 1 - t, epsabs=0, epsrel=1e-13)
        alpha, sigma, _, _ = path.coefficients(t)
        assert alpha.item() == pytest.approx(math.exp(-integral / 2), rel=1e-12)
        assert sigma.item() == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-12)
        sub_alpha, sub_sigma, _, _ = SubVPPath(0.3, 12.0).coefficients(t)
        assert sub_alpha == alpha
        assert sub_sigma.item() == pytest.approx(-math.expm1(-integral), rel=1e-12)


def test_vp_keeps_its_precision_next_to_the_data_and_names_its_singularity():
    path = VPPath()
    remaining = 1e-12
    t = 1 - remaining
    exact = math.sqrt(-math.expm1(-(19.9 / 2) * (1 - t) ** 2 - 0.1 * (1 - t)))
    assert path.coefficients(t).sigma.item() == pytest.approx(exact, rel=1e-12)
    # The textbook form sqrt(1 - alpha^2) has lost about half of its digits there.
    assert abs(math.sqrt(1 - path.coefficients(t).alpha.item() ** 2) / exact - 1) > 1e-6
    assert path.coefficients(1.0).dsigma == -math.inf
    assert math.isfinite(path.coefficients(path.t_end).dsigma)


def test_only_vp_has_a_target_without_bound_and_says_where_to_stop():
    """With diffusion time u = 1 - t, dsigma is -sqrt(beta_min / u) / 2 next to the data for VP, and
    -beta_min at the data for sub-VP."""
    remaining = torch.tensor([1e-6, 1e-8], dtype=torch.float64)
    found = VPPath().coefficients(1 - remaining).dsigma
    torch.testing.assert_close(found, -0.5 * (0.1 / remaining).sqrt(), rtol=5e-4, atol=0)
    assert VPPath.t_end == 1 - 1e-5
    _, _, _, dsigma = SubVPPath().coefficients(SubVPPath.t_end)
    assert dsigma.item() == pytest.approx(-0.1, rel=1e-12)


def test_vp_inverts_its_schedule():
    path = VPPath()
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma, _, _ = path.coefficients(t)
    torch.testing.assert_close(path.time_of_noise_ratio(sigma / alpha), t, rtol=0, atol=1e-14)
    assert path.time_of_noise_ratio(0.0) == 1
    assert VPPath(2.0, 2.0).time_of_noise_ratio(math.sqrt(math.expm1(1.0))).item() == pytest.approx(
        0.5, abs=1e-14
    )


def test_a_custom_path_takes_constants_derivatives_and_any_shape():
    path = CustomPath(alpha=lambda t: t**3, sigma=lambda _: 0.25, dalpha=lambda t: 3 * t**2)
    t = torch.rand(4, 5)
    alpha, sigma, dalpha, dsigma = path.coefficients(t)
    torch.testing.assert_close(alpha, (t.double() ** 3).float(), rtol=0, atol=0)
    torch.testing.assert_close(dalpha, 3 * t**2)
    assert torch.equal(sigma, torch.full_like(t, 0.25))
    assert torch.equal(dsigma, torch.zeros_like(t))
    assert path.coefficients(0.5).alpha == 0.125


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_derivatives_work_without_gradients(mode):
    path = CustomPath(alpha=torch.sin, sigma=torch.cos)
    with mode():
        t = torch.rand(7)
        _, _, dalpha, dsigma = path.coefficients(t)
    torch.testing.assert_close(dalpha, torch.cos(t))
    torch.testing.assert_close(dsigma, -torch.sin(t))


def test_get_path_by_name_and_object():
    assert get_path("straight") == get_path("linear") == LinearPath()
    assert get_path("spherical") == TrigonometricPath()
    assert get_path("vp") == VPPath()
    assert get_path("sub-vp").name == "sub-vp"
    own = VPPath(0.2, 3.0)
    assert get_path(own) is own


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"path: must be one of linear, .*; got 'bezier'"):
        get_path("bezier")
    with pytest.raises(TypeError, match="got LinearPath"):
        get_path(LinearPath)
    with pytest.raises(TypeError, match="got int"):
        get_path(3)
    with pytest.raises(TypeError, match="t must be floating point"):
        LinearPath().coefficients(torch.arange(3))
    with pytest.raises(ValueError, match="beta_min <= beta_max; got 3"):
        VPPath(3.0, 1.0)
    with pytest.raises(TypeError, match="alpha must be a function"):
        CustomPath(alpha=1.0, sigma=lambda t: 1 - t)
    with pytest.raises(ValueError, match="sigma must return a tensor of the shape of its times"):
        CustomPath(alpha=lambda t: t, sigma=lambda t: t[:1]).coefficients(torch.rand(3))


def test_coefficients_match_numpy():
    t = np.linspace(0, 1, 33)
    alpha, sigma, dalpha, dsigma = TrigonometricPath().coefficients(torch.from_numpy(t))
    np.testing.assert_allclose(alpha, np.sin(np.pi * t / 2), atol=1e-15)
    np.testing.assert_allclose(sigma, np.cos(np.pi * t / 2), atol=1e-15)
    np.testing.assert_allclose(dalpha, np.pi / 2 * np.cos(np.pi * t / 2), atol=1e-15)
    np.testing.assert_allclose(dsigma, -np.pi / 2 * np.sin(np.pi * t / 2), atol=1e-15)
