"""Gradients through whole runs against torchdiffeq's, and what compile='cudagraph' says without CUDA."""

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.sampling import Taylor, forget_graphs, invert, sample

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


@pytest.mark.parametrize("direction", [sample, invert])
def test_a_captured_loop_needs_cuda(direction):
    with pytest.raises(
        ValueError, match="compile='cudagraph' needs samples on a CUDA device; got cpu"
    ):
        direction(lambda x, t: -x, torch.zeros(2, 3), steps=2, compile="cudagraph")
    forget_graphs()


@GPU
@pytest.mark.parametrize("solver", ["euler", "heun", "fireflow", "unipc", "sde"])
def test_a_captured_loop_repeats_with_other_values(solver):
    layers = network().float().cuda()
    calls = []

    class Velocity:
        def __call__(self, x, t, label):
            calls.append(1)
            return layers(torch.cat([x, t[:, None]], 1)) + label[:, None]

    velocity = Velocity()
    for seed in (1, 2, 3):
        x0 = rf.randn(5, 3, seed=seed, device="cuda")
        options = {
            "steps": 4,
            "solver": solver,
            "guidance_scale": torch.full((5,), float(seed), device="cuda"),
            "condition": {"label": torch.full((5,), float(seed), device="cuda")},
            "uncondition": {"label": torch.zeros(5, device="cuda")},
            **({"seed": seed} if solver == "sde" else {}),
        }
        expected = sample(velocity, x0, **options)
        before = len(calls)
        found = sample(velocity, x0, compile="cudagraph", return_info=True, **options)
        torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-5)
        assert (len(calls) == before) == (seed > 1)  # captured once
    forget_graphs(velocity)
    with pytest.raises(ValueError, match="needs a solver of fixed steps; got 'dopri5'"):
        sample(velocity, x0, solver="dopri5", compile="cudagraph", condition=options["condition"])


class Replay:
    """A stand-in for a CUDA graph: does the captured work again on the captured memory."""

    def __init__(self, solver, static, build, solution):
        self.again = lambda: solver.integrate(*build(static))
        self.solution = solution

    def replay(self):
        again = self.again()
        self.solution.x.copy_(again.x)
        if again.trajectory is not None:
            self.solution.trajectory.copy_(again.trajectory)


@pytest.mark.parametrize("solver", ["heun", "unipc", "sde"])
def test_what_a_captured_loop_takes_from_each_call(solver, monkeypatch):
    """Everything but the capture itself, on the CPU: values are copied in, other shapes are captured anew."""
    from rfkernels.sampling import cuda_graph

    captured = []

    def capture(solver, inputs, build):
        static = [tensor.clone() for tensor in inputs]
        solution = solver.integrate(*build(static))
        captured.append(static)
        return cuda_graph._Captured(Replay(solver, static, build, solution), static, solution)

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "_refuse", lambda *_: None)

    def velocity(x, t, label, gain):
        return label[:, None] - gain * x

    def options(value, count=5, steps=4):
        given = {
            "steps": steps,
            "solver": solver,
            "guidance_scale": torch.full((count,), float(value)),
            "condition": {"label": torch.full((count,), float(value)), "gain": 2.0},
            "uncondition": {"label": torch.zeros(count), "gain": 1.0},
        }
        return {**given, "seed": value} if solver == "sde" else given

    results = []
    for value in (1, 2, 3):
        x0 = rf.randn(5, 3, seed=value)
        expected = sample(velocity, x0, return_info=True, **options(value))
        found = sample(velocity, x0, compile="cudagraph", return_info=True, **options(value))
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.trajectory, expected.trajectory)
        assert found.nfe == expected.nfe
        results.append(found.x)
    assert len(captured) == 1
    assert not torch.equal(results[0], results[1])  # the first result is not the graph's memory
    for changed in (options(1, count=2), options(1, steps=3)):
        x0 = rf.randn(len(changed["guidance_scale"]), 3, seed=1)
        expected = sample(velocity, x0, **changed)
        assert torch.equal(sample(velocity, x0, compile="cudagraph", **changed), expected)
    stronger = options(1)
    stronger["condition"]["gain"] = 3.0  # a number is part of the graph
    expected = sample(velocity, rf.randn(5, 3, seed=1), **stronger)
    found = sample(velocity, rf.randn(5, 3, seed=1), compile="cudagraph", **stronger)
    assert torch.equal(found, expected)
    assert len(captured) == 4
    forget_graphs(velocity)
    sample(velocity, rf.randn(5, 3, seed=1), compile="cudagraph", **stronger)
    assert len(captured) == 5
    stronger["condition"]["gain"] = [3.0]
    with pytest.raises(TypeError, match="needs tensors and hashable values; got list"):
        sample(velocity, rf.randn(5, 3, seed=1), compile="cudagraph", **stronger)


def test_what_cannot_be_captured():
    from rfkernels.sampling import Dopri5, Euler, Run, cuda_graph

    x0 = torch.empty(2, 3, device="meta")

    class Elsewhere:
        device = torch.device("cuda")

    def run(callback=None):
        return Run((0.0, 1.0), False, callback, lambda fraction: None)

    for solver, x, given, message in (
        (Euler(), x0, run(), "samples on a CUDA device; got meta"),
        (Dopri5(), Elsewhere(), run(), "a solver of fixed steps; got 'dopri5'"),
        (Euler(), Elsewhere(), run(print), "no callback"),
        (Euler(), Elsewhere(), run(), "no gradients"),
    ):
        with pytest.raises(ValueError, match=f"sample: compile='cudagraph' needs {message}"):
            cuda_graph._refuse("sample", solver, x, given)
    with torch.no_grad():
        cuda_graph._refuse("sample", Euler(), Elsewhere(), run())
