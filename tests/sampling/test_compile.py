"""torch.compile of a function that samples: the whole loop in one graph."""

import pytest
import torch

import rfkernels as rf
from rfkernels.sampling import (
    CFGZero,
    Interval,
    KarrasGrid,
    OptimisedGrid,
    Rescaled,
    ShiftedGrid,
    UniPC,
    invert,
    sample,
)


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
    rows = ((2.0, 3.0, 0.1), (4.0, 1.5, 0.0), (0.5, 2.0, 0.2), (2, 3, 0), (3, 2, 0))
    for count, numbers in enumerate(rows, 3):
        x = rf.randn(count, 2, seed=0)
        torch.testing.assert_close(compiled(x, *numbers), run(x, *numbers))


OF_NUMBERS = [
    (lambda k: KarrasGrid(k), None),
    (lambda k: ShiftedGrid(k), None),
    (lambda k: OptimisedGrid((0.0, 0.1 * k, 1.0), (1.0, 1.0 + k)), None),
    (None, lambda k: Rescaled(k, phi=k / 9)),
    (None, lambda k: Interval(k, k / 9, 0.9)),
]


@pytest.mark.parametrize(("grid", "guidance"), OF_NUMBERS)
def test_numbers_of_objects_may_change_too(grid, guidance):
    """Whether the objects are made outside of the function or in it."""

    def run(x, k, grid_outside, guidance_outside):
        given = {"steps": 3, "condition": {"shift": 1.0}, "uncondition": {}}
        x = sample(velocity, x, grid=grid_outside, guidance_scale=guidance_outside, **given)
        grid_inside, guidance_inside = grid and grid(k), guidance and guidance(k)
        return sample(velocity, x, grid=grid_inside, guidance_scale=guidance_inside, **given)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for k in (2.0, 3.0):
        x = rf.randn(3, 2, seed=0)
        outside = grid and grid(k), guidance and guidance(k)
        torch.testing.assert_close(compiled(x, k, *outside), run(x, k, *outside))


def test_gradients_through_a_graph():
    x = rf.randn(3, 2, seed=0).requires_grad_()

    def run(x):
        return sample(velocity, x, steps=2, solver="heun").square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(x), x)
    (theirs,) = torch.autograd.grad(run(x), x)
    torch.testing.assert_close(ours, theirs)
