"""Diffusion networks as velocity fields: against the closed form of a Gaussian mixture, written in
NumPy, in every parameterization; finite ends; gradients; names."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels import models, training
from rfkernels.flow import GaussianMixtureFlow, VPPath

MEANS = 4 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1)
FLOW = GaussianMixtureFlow.ring()
G = 0.5
LEVELS = (0.02, 0.3, 0.7, 0.98)


def denoiser(y, sigma):
    """E[x1 | x1 + sigma n = y] of eight Gaussians of width 0.5 on a circle of radius 4."""
    variance = 0.25 + sigma[:, None] ** 2
    difference = y[:, None, :] - MEANS
    logits = -0.5 * (difference**2).sum(2) / variance
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    centres = MEANS + 0.25 / variance[:, :, None] * difference
    return (weights[:, :, None] * centres).sum(1)


class Wrapped(nn.Module):
    """What a network of one convention would return if it were perfect."""

    def __init__(self, convention):
        super().__init__()
        self.convention = convention
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, label):
        x, label = x.numpy(), label.numpy()
        if self.convention == "denoiser":
            return self.weight * torch.from_numpy(denoiser(x, label))
        if self.convention == "edm":
            sigma = np.exp(4 * label)[:, None]
            total = np.sqrt(sigma**2 + G**2)
            y = x * total
            c_skip, c_out = G**2 / total**2, sigma * G / total
            out = (denoiser(y, sigma[:, 0]) - c_skip * y) / c_out
        elif self.convention == "ve":
            sigma = 2 * np.exp(label)
            out = (denoiser(x, sigma) - x) / sigma[:, None]
        else:
            u = label[:, None] / 999
            alpha = np.exp(-(20 - 0.1) / 4 * u**2 - 0.1 / 2 * u)
            noise = np.sqrt(-np.expm1(2 * np.log(alpha)))
            estimate = denoiser(x / alpha, (noise / alpha)[:, 0])
            out = (x - alpha * estimate) / noise
        return self.weight * torch.from_numpy(out)


CONVENTIONS = {
    "edm": models.EDMVelocity,
    "ve": models.VEVelocity,
    "vp": models.VPVelocity,
    "denoiser": models.DenoiserVelocity,
}


def wrapped(convention):
    return CONVENTIONS[convention](Wrapped(convention))


def states(level, count=40):
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 2)))
    data = FLOW.sample(count, seed=1, dtype=torch.float64)
    return (1 - level) * data + level * noise


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_network_is_the_exact_flow(convention, level):
    x = states(level)
    t = torch.full((len(x),), 1 - level, dtype=torch.float64)
    velocity = wrapped(convention)(x, t)
    # Where the network predicts the noise, data is its difference to the state: digits go as 1 / t.
    tolerance = {"edm": 1e-12, "denoiser": 1e-12, "ve": 1e-11, "vp": 1e-11}[convention]
    torch.testing.assert_close(velocity, FLOW(x, t), rtol=0, atol=tolerance)
    other = wrapped(convention)(x, t - 0.01)
    assert (other - FLOW(x, t)).abs().max() > 1e-3


def test_the_coefficients_of_edm():
    """v = -(A x + B F) with the A and B of the 2-rectified flow++ wrapper, on s = 1 - t."""
    values = {}

    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, label):
            values["input"], values["label"] = x, label
            return torch.full_like(x, self.value)

    levels = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x = torch.ones(3, 1, dtype=torch.float64)
    none = models.EDMVelocity(Constant(0.0))(x, 1 - levels)
    one = models.EDMVelocity(Constant(1.0))(0 * x, 1 - levels)
    torch.testing.assert_close(
        none[:, 0], -torch.tensor([-1, 1.2, 1.0]).double(), atol=1e-6, rtol=0
    )
    expected = -torch.tensor([-1.0, -0.894427, -0.5]).double()
    torch.testing.assert_close(one[:, 0], expected, atol=1e-6, rtol=0)
    models.EDMVelocity(Constant(0.0))(x, 1 - levels)
    q = np.sqrt(levels.numpy() ** 2 + 0.25 * (1 - levels.numpy()) ** 2)
    np.testing.assert_allclose(values["input"][:, 0], 1 / q, rtol=1e-14)
    np.testing.assert_allclose(
        values["label"], np.log([0.002, 1.0, 80.0]) / 4, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_are_finite(convention, dtype):
    t = 1 - torch.tensor([0.0, 1e-6, 1e-5, 1 - 1e-5, 1 - 1e-6, 1.0], dtype=dtype)

    class Bounded(nn.Module):
        def forward(self, x, label):
            assert torch.isfinite(x).all()
            assert torch.isfinite(label).all()
            return torch.tanh(x) + label.reshape(-1, 1).cos()

    x = torch.linspace(-2, 2, 12, dtype=dtype).reshape(6, 2)
    velocity = CONVENTIONS[convention](Bounded())(x, t)
    assert torch.isfinite(velocity).all()
    assert velocity.dtype == dtype


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_sampling_with_the_wrapper_follows_the_exact_flow(convention):
    z = torch.from_numpy(np.random.default_rng(3).standard_normal((200, 2)))
    ours = rf.sample(wrapped(convention), z, steps=60, solver="midpoint")
    exact = rf.sample(FLOW, z, steps=60, solver="midpoint")
    # Only the held part near the noise end differs, at most the first 1/81 of the way.
    assert (ours - exact).square().sum(1).mean().sqrt() < 0.05


def test_vp_labels_and_states_are_those_of_the_diffusion():
    seen = {}

    class Record(nn.Module):
        def forward(self, x, label):
            seen.update(x=x, label=label)
            return torch.zeros_like(x)

    path = VPPath()
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma, _, _ = path.coefficients(1 - u)
    t = alpha / (alpha + sigma)
    x = torch.ones(3, 2, dtype=torch.float64)
    models.VPVelocity(Record(), label_scale=1000.0)(x, t)
    torch.testing.assert_close(seen["label"], 1000 * u, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen["x"], (alpha + sigma)[:, None].expand(3, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradients_reach_weights_states_and_times(convention):
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x, label):
            return torch.tanh(self.layer(torch.cat([x, label[:, None]], 1)))

    torch.manual_seed(0)
    network = Smooth()
    model = CONVENTIONS[convention](network)
    assert [n for n, _ in model.named_parameters()] == [
        "network.layer.weight",
        "network.layer.bias",
    ]
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x, t))
    model(x, t).sum().backward()
    assert network.layer.weight.grad.abs().min() > 0
    x, t, step = x.detach(), t.detach(), 1e-6
    tangents = (torch.ones_like(x), torch.ones_like(t))
    _, change = torch.func.jvp(model, (x, t), tangents)
    difference = (model(x + step, t + step) - model(x - step, t - step)) / (2 * step)
    torch.testing.assert_close(change, difference.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_compiled_without_a_graph_break(convention):
    model = CONVENTIONS[convention](lambda x, label: torch.tanh(x) * label.cos()[:, None])
    x, t = rf.randn(4, 3, seed=0), torch.tensor([0.0, 0.3, 0.8, 1.0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t), model(x, t))


def test_a_wrapped_network_is_trained_reflowed_and_loaded(tmp_path):
    """A wrapper of a reference network is described by name, so that its run is loaded alone."""
    inner = models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1, num_classes=3)
    model = models.EDMVelocity(inner, sigma_data=0.7)
    assert model.null_label == 3
    assert model.sample_shape == (2,)
    before = copy.deepcopy(inner.state_dict())
    x, y = FLOW.sample(60, seed=0), torch.arange(60) % 3
    config = training.TrainConfig(steps=4, batch_size=8, warmup_steps=0, label_dropout=0.5)
    result = training.train_flow(model, (x, y), config, run=tmp_path / "run")
    assert not torch.equal(before["enter.weight"], inner.enter.weight)
    loaded = rf.load(tmp_path / "run").model
    assert type(loaded) is models.EDMVelocity
    assert loaded.sigma_data == 0.7
    z, t = rf.randn(5, 2, seed=0), torch.full((5,), 0.3)
    assert torch.equal(loaded(z, t, y=y[:5]), result.ema(z, t, y=y[:5]))
    small = training.TrainConfig(steps=2, batch_size=8, warmup_steps=0)
    second = training.reflow(
        loaded, training.ReflowConfig(pairs=20, pair_batch=20, pair_steps=2, train=small)
    )
    assert type(second.ema) is models.EDMVelocity


def test_time_scaled_networks():
    class Line(nn.Module):
        def forward(self, x, time, y=0.0):
            return x + time[:, None] + y

    x, t = torch.zeros(2, 1), torch.tensor([0.25, 1.0])
    assert models.TimeScaled(Line())(x, t)[:, 0].tolist() == [249.75, 999.0]
    flipped = models.TimeScaled(Line(), scale=-1000.0, offset=1000.0)
    assert flipped(x, t, y=1.0)[:, 0].tolist() == [751.0, 1.0]
    inner = models.build("mlp", seed=0, sample_shape=(2,), width=16)
    described = models.describe(models.TimeScaled(inner, scale=2.0))
    assert described["options"]["network"]["name"] == "mlp"
    rebuilt = models.build(described["name"], **described["options"])
    assert rebuilt.scale == 2.0
    assert type(rebuilt.network) is models.MLPVelocity
    assert models.describe(models.TimeScaled(Line())) is None


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: models.EDMVelocity(3),
            TypeError,
            "network: must be a module or a callable; got int",
        ),
        (lambda: models.EDMVelocity(abs, 0.0), ValueError, "sigma_data: must be positive"),
        (
            lambda: models.VEVelocity(abs, 2.0, 1.0),
            ValueError,
            "sigma_min: noise levels must satisfy",
        ),
        (lambda: models.DenoiserVelocity(abs, sigma_max=math.inf), ValueError, "got 0.002, inf"),
        (lambda: models.VPVelocity(abs, beta_min=0.0), ValueError, "betas must satisfy"),
        (
            lambda: models.TimeScaled(abs, scale=math.nan),
            ValueError,
            "scale: must be finite; got nan",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
