"""Diffusion networks as velocity fields: exact for an exact denoiser, finite at both ends."""

import copy

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.flow import GaussianMixtureFlow, LinearBetas, ScaledLinearBetas, get_schedule
from rfkernels.models import MLPVelocity, NoisePrediction

FLOW = GaussianMixtureFlow([[3.0, 0.0], [-1.0, 2.0]], [0.5, 0.2], [0.3, 0.7])
SCHEDULES = ("linear", "scaled-linear", "cosine", "vp", "sub-vp")
PREDICTIONS = ("epsilon", "v", "x1")


class ExactNetwork(nn.Module):
    """The mixture's posterior means at states alpha x1 + sigma x0, written for that form: component
    j of x_k is N(alpha m_j, alpha^2 c_j^2 + sigma^2)."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction, self.indices = schedule, prediction, []
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, k):
        self.indices.append(k)
        dtype, x = x.dtype, x.double()
        alpha, sigma = (c[:, None] for c in self.schedule.coefficients(k.double()))
        means, stds = FLOW.means, FLOW.stds
        variance = alpha**2 * stds**2 + sigma**2
        apart = x[:, None, :] - alpha[:, :, None] * means
        logits = FLOW.weights.log() - apart.square().sum(2) / 2 / variance - variance.log()
        share = logits.softmax(1)[:, :, None]
        x1 = (share * (means + (alpha * stds**2 / variance)[:, :, None] * apart)).sum(1)
        x0 = (x - alpha * x1) / sigma
        answer = {"epsilon": x0, "x1": x1, "v": alpha * x0 - sigma * x1}[self.prediction]
        return answer.to(dtype)


def states(t):
    x0 = rf.randn(len(t), 2, seed=1, dtype=torch.float64)
    x1 = FLOW.sample(len(t), seed=2, dtype=torch.float64)
    return (1 - t[:, None]) * x0 + t[:, None] * x1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_exact_denoiser_gives_the_exact_velocity(name, prediction):
    """At the times of indices and between them, to the conditioning of the answer's own algebra."""
    schedule = get_schedule(name)
    table = schedule.linear_times
    between = torch.lerp(table[-1], table[0], torch.linspace(0, 1, 77, dtype=torch.float64))
    t = torch.cat([table[::13], between])
    network = ExactNetwork(schedule, prediction)
    model, x = NoisePrediction(network, schedule, prediction), states(t)
    torch.testing.assert_close(model(x, t), FLOW(x, t), rtol=0, atol=1e-10)
    whole = network.indices[0][: len(table[::13])]
    assert torch.equal(whole, torch.arange(0, 1000, 13).double())
    # float32 times mean the same indices.
    model(x.float(), t.float())
    most = (network.indices[1][: len(whole)].double() - whole).abs().max()
    assert most == 0 if name != "sub-vp" else most < 3e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_and_mean_what_they_say(prediction, dtype):
    schedule = ScaledLinearBetas()
    model = NoisePrediction(ExactNetwork(schedule, prediction), schedule, prediction)
    x = rf.randn(4, 2, seed=3, dtype=dtype)
    t = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0], dtype=dtype)
    out = model(x, t)
    assert out.dtype == dtype
    assert out.isfinite().all()
    # From noise, one step reaches the data estimate of the last index for a unit noise state.
    last, first = torch.full((4,), 999), torch.zeros(4, dtype=torch.int64)
    end, _ = model.estimates(x, last, model.predict(x, last))
    torch.testing.assert_close((x + out)[:1], end[:1], rtol=2e-5, atol=1e-5)
    # At the data, the velocity is the state without its noise estimate at the first index.
    _, noise = model.estimates(x, first, model.predict(x, first))
    torch.testing.assert_close(out[3:], (x - noise)[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_continuous_at_the_ends_of_the_table(name, prediction):
    schedule = get_schedule(name)
    model = NoisePrediction(ExactNetwork(schedule, prediction), schedule, prediction)
    for end in schedule.linear_times[[0, -1]]:
        t = end * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64)
        below, above = model(states(t)[:1].expand(2, -1), t)
        torch.testing.assert_close(below, above, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "sub-vp"])
def test_estimates_invert_the_noising(name, prediction):
    """With the true answer the estimates are the data and the noise themselves."""
    schedule = get_schedule(name)
    model = NoisePrediction(nn.Linear(1, 1), schedule, prediction)
    x1, x0 = (rf.randn(5, 3, seed=s, dtype=torch.float64) for s in (1, 2))
    k = torch.tensor([0, 7, 400, 998, 999])
    alpha, sigma = (c[k, None] for c in (schedule.alpha, schedule.sigma))
    x_k = model.add_noise(x1, x0, k)
    torch.testing.assert_close(x_k, alpha * x1 + sigma * x0, rtol=1e-13, atol=1e-13)
    answer = {"epsilon": x0, "x1": x1, "v": alpha * x0 - sigma * x1}[prediction]
    found = model.estimates(x_k, k, answer)
    torch.testing.assert_close(found, (x1, x0), rtol=1e-10, atol=1e-10)


class IndexMLP(nn.Module):
    """A small network of (x, k, y)."""

    def __init__(self, classes=None):
        super().__init__()
        self.inner = MLPVelocity((2,), width=16, depth=1, num_classes=classes)
        self.null_label, self.sample_shape = classes, (2,)

    def forward(self, x, k, y=None):
        return self.inner(x, k / 1000, y)


def random_network(classes=None):
    network, generator = IndexMLP(classes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return network


def test_gradients_derivatives_conditions_and_copies():
    model = NoisePrediction(random_network(3).double(), "linear")
    assert (model.null_label, model.sample_shape) == (3, (2,))
    x = rf.randn(3, 2, seed=1, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: model(x, t, y=torch.tensor([0, 1, 2])), (x, t))
    tangents = (x.detach(), torch.ones(3, dtype=torch.float64))
    _, change = torch.func.jvp(lambda x, t: model(x, t), (x.detach(), t.detach()), tangents)
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (model(x + s * h * x, t + s * h) for s in (1, -1))
    torch.testing.assert_close(change, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)
    model(x, t).sum().backward()
    assert all(p.grad is not None for p in model.network.inner.blocks.parameters())
    other = copy.deepcopy(model)
    assert other.schedule == model.schedule
    assert torch.equal(other(x, t), model(x, t))
    assert torch.equal(model(x, index=t * 900), model.predict(x, t * 900))


def test_half_precision_keeps_its_schedule():
    """`model.to(bfloat16)` moves weights, not the table."""
    model = NoisePrediction(nn.Identity(), "linear")
    model.network.forward = lambda x, k: 0.0 * x
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    t = torch.tensor([0.3, 0.6])
    found = model.to(torch.bfloat16)(x, t)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (x / t[:, None]).to(torch.bfloat16))


def test_another_schedule_shares_the_weights():
    model = NoisePrediction(random_network(), ScaledLinearBetas(), "v")
    other = model.with_schedule("linear")
    assert other.network is model.network
    assert (other.schedule, other.prediction) == (LinearBetas(), "v")
    assert "LinearBetas" in repr(other)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"network: must be a torch.nn.Module; got function"):
        NoisePrediction(lambda x, k: x)
    with pytest.raises(ValueError, match="prediction: must be one of epsilon, v, x1; got 'eps'"):
        NoisePrediction(nn.Identity(), prediction="eps")
    with pytest.raises(ValueError, match="schedule: must be one of"):
        NoisePrediction(nn.Identity(), "cosin")
    x, t = torch.zeros(2, 2), torch.zeros(2)
    for arguments in ({}, {"t": t, "index": t}):
        with pytest.raises(ValueError, match="give t or index"):
            NoisePrediction(nn.Identity())(x, **arguments)


@pytest.mark.parametrize("schedule", ["cosine", rf.flow.LinearBetas(steps=50)])
def test_a_run_of_it_loads_from_its_folder(tmp_path, schedule):
    inner = rf.models.TimeScaled(
        rf.models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1), scale=1e-3
    )
    model = NoisePrediction(inner, schedule, "v")
    config = rf.training.TrainConfig(steps=2, batch_size=4, tensorboard=False)
    rf.training.train_flow(model, rf.randn(16, 2, seed=1), config, run=tmp_path / "run")
    loaded = rf.training.load(tmp_path / "run", which="model").model
    assert loaded.schedule == model.schedule
    x, t = rf.randn(5, 2, seed=2), torch.linspace(0, 1, 5)
    assert torch.equal(loaded(x, t), model(x, t))


def test_a_schedule_of_the_users_own_is_not_described():
    class Own(rf.flow.LinearBetas):
        pass

    assert (
        rf.models.describe(NoisePrediction(rf.models.build("mlp", sample_shape=(2,)), Own()))
        is None
    )
