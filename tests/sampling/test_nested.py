"""Conditions that are containers of tensors, as pipelines pass them."""

from collections import namedtuple

import pytest
import torch
from sampling_cases import ALL

import rfkernels as rf
from rfkernels.sampling import Dopri5, sample
from rfkernels.sampling.nested import leaves, map_leaves

Pair = namedtuple("Pair", "first second")


def test_containers_keep_their_kinds():
    value = {"a": [1, (2, Pair(3, [4]))], "b": {"c": "five"}, "d": {6}}
    assert list(leaves(value)) == [1, 2, 3, 4, "five", {6}]
    assert map_leaves(lambda v: v, value) == value
    doubled = map_leaves(lambda v: v * 2 if isinstance(v, int) else v, value)
    assert doubled["a"] == [2, (4, Pair(6, [8]))]
    assert type(doubled["a"][1][1]) is Pair


WRAPPERS = [
    lambda a: {"extra": {"rate": a}},
    lambda a: {"extra": [a]},
    lambda a: {"extra": ({"deep": [a, "text"]}, 3.0)},
]


def velocity(x, t, extra):
    rate = next(v for v in leaves(extra) if isinstance(v, torch.Tensor))
    return -rate[:, None] * x


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_samples_that_finish_leave_containers_too(wrapped):
    rate = torch.tensor([0.1, 1.0, 30.0, 60.0], dtype=torch.float64)
    x0 = rf.randn(4, 2, seed=1, dtype=torch.float64)
    options = {"condition": wrapped(rate), "return_info": True}
    together = sample(velocity, x0, solver="dopri5", **options)
    kept = sample(velocity, x0, solver=Dopri5(finished="keep"), **options)
    assert together.nfe.max() > together.nfe.min()  # the batch did shrink
    assert torch.equal(together.x, kept.x)
    assert torch.equal(together.nfe, kept.nfe)


@pytest.mark.parametrize("wrapped", WRAPPERS)
@pytest.mark.parametrize("solver", ALL, ids=str)
def test_gradients_reach_tensors_in_containers(solver, wrapped):
    x0 = rf.randn(3, 2, seed=1, dtype=torch.float64)

    def gradient(condition):
        rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        result = sample(velocity, x0, steps=3, solver=solver, condition=condition(rate))
        return torch.autograd.grad(result.square().sum(), rate)[0]

    plain = gradient(lambda a: {"extra": a})
    assert plain.abs().min() > 1e-3
    torch.testing.assert_close(gradient(wrapped), plain, rtol=0, atol=0)
