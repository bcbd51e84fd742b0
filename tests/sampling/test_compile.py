"""torch.compile of a function that samples: the whole loop in one graph."""

import pytest
import torch

import rfkernels as rf
from rfkernels.sampling import CFGZero, UniPC, invert, sample


def velocity(x, t, shift=0.0):
    return (shift - x.sin()) * (1 + t[:, None])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("direction", "solver", "guidance"),
    [
        (sample, "euler", None),
        (invert, "heun", 2.0),
        (sample, "unipc", CFGZero(2.0, zero_steps=1)),
        (sample, UniPC(3), None),
        (sample, "fireflow", None),
        (sample, "sde", None),
        (sample, "rf++", None),
    ],
)
def test_one_graph(direction, solver, guidance):
    options = {"steps": 4, "solver": solver, "guidance_scale": guidance}
    if guidance is not None:
        options |= {"condition": {"shift": 1.0}, "uncondition": {}}
    if solver == "sde":
        options["seed"] = 7

    def run(x):
        return direction(velocity, x, **options) * 2

    x = rf.randn(3, 2, seed=0)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), run(x))


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_may_change_from_call_to_call(dynamic):
    """torch.compile makes symbols of floats that do, or of all of them."""

    def run(x, scale, shift, start):
        given = {"guidance_scale": scale, "condition": {"shift": 1.0}, "uncondition": {}}
        x = sample(velocity, x, steps=3, grid=shift, t_start=start, **given)
        return sample(velocity, x, grid=[start, 0.9], **given)

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)
    for count, numbers in ((3, (2.0, 3.0, 0.1)), (4, (4.0, 1.5, 0.0)), (5, (0.5, 2.0, 0.2))):
        x = rf.randn(count, 2, seed=0)
        torch.testing.assert_close(compiled(x, *numbers), run(x, *numbers))


def test_gradients_through_a_graph():
    x = rf.randn(3, 2, seed=0).requires_grad_()

    def run(x):
        return sample(velocity, x, steps=2, solver="heun").square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(x), x)
    (theirs,) = torch.autograd.grad(run(x), x)
    torch.testing.assert_close(ours, theirs)
