"""The Gaussian-mixture flow: velocity against Monte Carlo, transport of the marginals, draws."""

import math

import pytest
import torch
from scipy import stats

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow


def integrate(flow, x, steps=200, **condition):
    """Classical Runge-Kutta from t = 0 to 1."""
    h = 1 / steps
    for i in range(steps):
        t = i * h
        k1 = flow(x, t, **condition)
        k2 = flow(x + h / 2 * k1, t + h / 2, **condition)
        k3 = flow(x + h / 2 * k2, t + h / 2, **condition)
        k4 = flow(x + h * k3, min(t + h, 1.0), **condition)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_the_velocity_is_the_conditional_mean():
    """E[x1 - x0 | x_t in a small box] by counting, in one dimension with unequal components."""
    flow = GaussianMixtureFlow([[-1.0], [2.0]], [0.3, 0.8], [0.25, 0.75])
    n = 2_000_000
    x1 = flow.sample(n, seed=0)[:, 0]
    x0 = rf.randn(n, seed=1)
    for t in (0.2, 0.6, 0.9):
        xt = (1 - t) * x0 + t * x1
        for centre in (-0.8, 0.1, 0.7, 1.5):
            inside = (xt - centre).abs() < 0.02
            target = (x1 - x0)[inside].double()
            exact = flow(torch.tensor([[centre]]), t).item()
            error = target.std().item() / math.sqrt(len(target))
            assert abs(target.mean().item() - exact) < 5 * error + 2e-3


def test_the_flow_carries_noise_to_the_data():
    flow = GaussianMixtureFlow([[-1.0], [2.0]], [0.3, 0.8], [0.25, 0.75])
    # Quantiles of the noise: the flow is increasing, so they go to quantiles of the data.
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    end = integrate(flow, torch.special.ndtri(levels)[:, None])[:, 0]

    def cdf(x):
        return 0.25 * stats.norm(-1, 0.3).cdf(x) + 0.75 * stats.norm(2, 0.8).cdf(x)

    torch.testing.assert_close(torch.from_numpy(cdf(end.numpy())), levels, rtol=0, atol=1e-6)


def test_the_log_density_is_normalised_and_that_of_scipy():
    flow = GaussianMixtureFlow.ring()
    x = torch.randn(50, 2, dtype=torch.float64) * 3
    for t in (0.0, 0.4, 1.0):
        variance = (1 - t) ** 2 + (0.5 * t) ** 2
        density = sum(
            stats.multivariate_normal(t * mean.numpy(), variance).pdf(x.numpy()) / 8
            for mean in flow.means
        )
        torch.testing.assert_close(flow.log_density(x, t).exp(), torch.from_numpy(density))


def test_a_label_gives_the_flow_of_one_component():
    flow = GaussianMixtureFlow.ring()
    x = torch.randn(24, 2, dtype=torch.float64)
    t = torch.rand(24, dtype=torch.float64)
    label = torch.arange(24) % 8
    alone = torch.cat(
        [
            GaussianMixtureFlow(flow.means[k : k + 1], 0.5)(x[i : i + 1], t[i : i + 1])
            for i, k in enumerate(label.tolist())
        ]
    )
    torch.testing.assert_close(flow(x, t, label=label), alone)
    end = integrate(flow, x, label=label)
    torch.testing.assert_close(end, flow.means[label] + 0.5 * x, rtol=0, atol=1e-6)


def test_points_without_width_follow_the_empirical_formula():
    points = torch.randn(5, 3, dtype=torch.float64)
    flow = GaussianMixtureFlow(points, 0.0)
    x = torch.randn(7, 3, dtype=torch.float64)
    t = torch.linspace(0.0, 0.999, 7, dtype=torch.float64)
    logits = -(x[:, None] - t[:, None, None] * points).square().sum(2) / (2 * (1 - t[:, None]) ** 2)
    expected = (torch.softmax(logits, 1) @ points - x) / (1 - t[:, None])
    torch.testing.assert_close(flow(x, t), expected)
    assert torch.isnan(flow(x, 1.0)).all()


def test_draws_have_the_moments_and_repeat():
    flow = GaussianMixtureFlow.ring()
    x = flow.sample(100_000, seed=3, dtype=torch.float64)
    assert torch.equal(x[:10], flow.sample(100_000, seed=3, dtype=torch.float64)[:10])
    assert not torch.equal(x[:10], flow.sample(10, seed=4, dtype=torch.float64))
    covariance = x.T.cov()
    assert (covariance - 8.25 * torch.eye(2)).abs().max() < 5 * 8.25 * math.sqrt(2 / 100_000)
    labels = GaussianMixtureFlow([[0.0], [9.0]], 1.0, [3.0, 1.0]).sample_labels(40_000, seed=1)
    assert labels.double().mean().item() == pytest.approx(0.25, abs=0.011)
    chosen = flow.sample(8, seed=0, labels=torch.arange(8))
    assert torch.equal(torch.cdist(chosen.double(), flow.means).argmin(1), torch.arange(8))


def test_shapes_dtypes_and_devices():
    flow = GaussianMixtureFlow(torch.randn(3, 12), [0.1, 0.2, 0.3])
    x = torch.randn(5, 3, 2, 2)
    assert flow(x, 0.5).shape == x.shape
    assert flow(x.bfloat16(), torch.rand(5)).dtype == torch.bfloat16
    torch.testing.assert_close(flow.to("cpu")(x, 0.5), flow.velocity(x, 0.5))
    assert flow(x[:0], 0.5).shape == (0, 3, 2, 2)
    wide = flow(x.double(), 0.3)
    torch.testing.assert_close(flow(x, 0.3).double(), wide, rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument():
    for arguments, message in (
        (([1.0, 2.0], 1.0), r"means must have shape \(K, D\)"),
        (([[1.0]], -1.0), "stds must be >= 0"),
        (([[1.0]], [1.0, 2.0]), "stds must be one number or 1 numbers"),
        (([[1.0]], 1.0, [0.0]), "weights must be positive"),
        (([[math.nan]], 1.0), "means must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMixtureFlow(*arguments)
    flow = GaussianMixtureFlow.ring()
    with pytest.raises(ValueError, match=r"x must be .* with 2 numbers per sample"):
        flow(torch.randn(4, 3), 0.5)
    with pytest.raises(ValueError, match="t must be a number or have shape"):
        flow(torch.randn(4, 2), torch.rand(3))
    with pytest.raises(TypeError, match="x must be floating point"):
        flow(torch.zeros(4, 2, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="label must have shape"):
        flow(torch.randn(4, 2), 0.5, label=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="modes must be at least 1"):
        GaussianMixtureFlow.ring(0)
