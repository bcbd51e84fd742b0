"""compile='cudagraph': with a CUDA device, and without one all but the capture."""

import contextlib
import threading
import time
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rfkernels as rf
from rfkernels.sampling import Dopri5, Euler, Run, cuda_graph, forget_graphs, invert, sample

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).cuda()
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
        with torch.inference_mode():  # which alone may write to tensors that were made in it
            self.solution.x.copy_(again.x)
            if again.trajectory is not None:
                self.solution.trajectory.copy_(again.trajectory)


@pytest.fixture
def captured(monkeypatch):
    """Everything but the capture itself, on the CPU; a list that grows with each capture."""
    found = []

    def capture(solver, inputs, build):
        static = cuda_graph._static(inputs)
        solution = solver.integrate(*build(static))
        found.append(static)
        return cuda_graph._Captured(Replay(solver, static, build, solution), static, solution)

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "_refuse", lambda *_: None)
    return found


@pytest.mark.parametrize("solver", ["heun", "unipc", "sde"])
def test_what_a_captured_loop_takes_from_each_call(solver, captured):
    """Values are copied in, other shapes are captured anew."""

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
    stronger["condition"]["gain"] = {3.0}
    with pytest.raises(TypeError, match="needs tensors and hashable values; got set"):
        sample(velocity, rf.randn(5, 3, seed=1), compile="cudagraph", **stronger)


def test_tensors_inside_containers_are_copied_in_too(captured):
    def velocity(x, t, extra):
        return extra["text"][0][:, None] - x * extra["gain"]

    for value in (1.0, 2.0, 3.0):
        x0 = rf.randn(5, 3, seed=1)
        extra = {"text": (torch.full((5,), value),), "gain": 2.0}
        expected = sample(velocity, x0, steps=2, condition={"extra": extra})
        found = sample(velocity, x0, steps=2, condition={"extra": extra}, compile="cudagraph")
        assert torch.equal(found, expected)
    assert len(captured) == 1
    forget_graphs(velocity)


def test_tensors_elsewhere_than_the_samples_are_refused(captured):
    """A kernel takes a 0-d tensor of the CPU as a number, which every replay would repeat."""
    options = {"steps": 2, "compile": "cudagraph"}
    elsewhere = {"gain": torch.tensor(2.0, device="meta")}
    for given in ({"condition": elsewhere}, {"uncondition": elsewhere, "guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="the device of x0, cpu; got one on meta"):
            sample(lambda x, t, gain=1.0: gain * x, torch.ones(2, 3), **given, **options)
    assert not captured


def test_a_graph_made_in_inference_mode_serves_outside_of_it(captured):
    def velocity(x, t):
        return -x

    with torch.inference_mode():
        first = sample(velocity, rf.randn(5, 3, seed=1), steps=2, compile="cudagraph")
    x0 = rf.randn(5, 3, seed=2)
    second = sample(velocity, x0, steps=2, compile="cudagraph")
    assert torch.equal(second, sample(velocity, x0, steps=2))
    assert torch.equal(first, sample(velocity, rf.randn(5, 3, seed=1), steps=2))
    assert len(captured) == 1
    forget_graphs(velocity)


def test_what_changes_the_work_is_captured_anew(captured):
    layers = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    forward = layers.forward
    layers.forward = lambda x, t, flag=1: forward(x) * (2 if flag is True else 1)
    x0 = rf.randn(5, 3, seed=1)

    def run(**options):
        return sample(layers.eval(), x0, steps=2, compile="cudagraph", **options)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run()
    assert 0 < (plain - low).abs().max() < 0.1
    assert torch.equal(run(), plain)
    assert len(captured) == 2
    sample(layers.train(), x0, steps=2, compile="cudagraph")
    assert len(captured) == 3
    doubled = run(condition={"flag": True})
    assert torch.equal(doubled, sample(layers, x0, steps=2, condition={"flag": True}))
    assert torch.equal(run(condition={"flag": 1}), plain)
    assert len(captured) == 5
    forget_graphs(layers)


def test_threads_take_turns_at_a_graphs_memory(captured):
    def velocity(x, t):
        time.sleep(1e-3)  # lets another thread in, in the middle of a replay
        return -x

    found = {}

    def work(seed):
        x0 = rf.randn(5, 3, seed=seed)
        found[seed] = [sample(velocity, x0, steps=2, compile="cudagraph") for _ in range(10)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in found.items():
        expected = sample(velocity, rf.randn(5, 3, seed=seed), steps=2)
        assert all(torch.equal(result, expected) for result in results)
    assert sorted(found) == [0, 1, 2, 3]
    assert len(captured) == 1
    forget_graphs(velocity)


class Casts(TorchDispatchMode):
    """Counts the copies of a weight in another precision."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0] is self.weight:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_capture_under_autocast_casts_the_weights_itself(monkeypatch):
    """The copies that autocast keeps are gone when it ends, while the graph goes on reading them."""
    layer = nn.Linear(3, 3)
    casts = Casts(layer.weight)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _, stream: casts)
    monkeypatch.setattr(cuda_graph, "_refuse", lambda *_: None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sample(lambda x, t: layer(x), rf.randn(5, 3, seed=1), steps=2, compile="cudagraph")
        assert casts.count == 1
        with casts:
            layer(torch.ones(3))
        assert casts.count == 2  # not a copy in the graph's memory


def test_a_graph_is_captured_on_a_stream_of_its_device(monkeypatch):
    """On torch's own, which stays on the device of the first capture, a second device's work went by uncaptured."""
    made, taken = [], []
    for name in ("CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(mock.MagicMock()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    graph = lambda _, stream=None: contextlib.nullcontext(taken.append(stream))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graph, "_refuse", lambda *_: None)
    for _ in range(2):
        sample(lambda x, t: -x, rf.randn(5, 3, seed=1), steps=2, compile="cudagraph")
    assert len(made) == 2
    assert taken == made


def test_a_graph_is_made_on_the_device_of_the_samples(monkeypatch, captured):
    entered = []
    around = mock.MagicMock(side_effect=lambda x: contextlib.nullcontext(entered.append(x.device)))
    monkeypatch.setattr(torch.cuda, "device_of", around)
    sample(lambda x, t: -x, rf.randn(5, 3, seed=1), steps=2, compile="cudagraph")
    assert entered == [torch.device("cpu")]
    assert len(captured) == 1


def test_what_cannot_be_captured():
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
