"""Gradients through whole runs, against torchdiffeq's and finite differences."""

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.sampling import Taylor, sample


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "rk4"])
def test_the_gradients_of_torchdiffeq(method):
    odeint = pytest.importorskip("torchdiffeq").odeint
    layers = network()

    def velocity(x, t):
        return layers(torch.cat([x, t[:, None]], 1))

    x0 = rf.randn(5, 3, seed=1, dtype=torch.float64).requires_grad_()
    times = [0.0, 0.2, 0.5, 1.0]
    name = {"heun2": "heun"}.get(method, method)
    if method == "rk4":  # theirs is the 3/8 rule: equal to the order, not to the bit
        times, tolerance = torch.linspace(0, 1, 33).tolist(), 1e-8
    else:
        tolerance = 1e-12
    ours = sample(velocity, x0, grid=times, solver=name)
    theirs = odeint(
        lambda t, x: velocity(x, t.expand(5)),
        x0,
        torch.tensor(times, dtype=torch.float64),
        method=method,
    )[-1]
    weights = rf.randn(5, 3, seed=2, dtype=torch.float64)
    wanted = (x0, *layers.parameters())
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


NEW = [
    "ab3",
    "fireflow",
    "uni-inv",
    "dpm++",
    "unipc",
    "curved-euler",
    Taylor(order=3),
    Taylor(look_ahead=0.1),
]


@pytest.mark.parametrize("solver", NEW, ids=str)
def test_every_solver_is_differentiable(solver):
    x0 = rf.randn(3, 2, seed=1, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def run(x0, scale):
        return sample(
            lambda x, t, bias: x.sin() * t[:, None] + bias, x0, steps=3, solver=solver, t_end=0.8,
            guidance_scale=scale, condition={"bias": 1.0}, uncondition={"bias": -0.5},
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (x0, scale))


def test_weights_get_gradients_when_x0_asks():
    layers = network()

    def velocity(x, t):
        return layers(torch.cat([x, t[:, None]], 1))

    x0 = rf.randn(5, 3, seed=1, dtype=torch.float64)
    assert not sample(velocity, x0, steps=2).requires_grad
    sample(velocity, x0.requires_grad_(), steps=2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layers.parameters())
