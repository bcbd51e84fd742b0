"""What sample and invert take and what they refuse, before the velocity is called."""

import math

import numpy as np
import pytest
import torch
from sampling_cases import Counting

from rfkernels.sampling import (
    AB2,
    RK4,
    Dopri5,
    Euler,
    Heun,
    Midpoint,
    Taylor,
    get_solver,
    invert,
    sample,
)

REFUSED = [
    ({"steps": 0}, ValueError, "sample: steps must be at least 1; got 0"),
    ({"steps": -3}, ValueError, "at least 1; got -3"),
    ({"steps": 2.0}, TypeError, "steps must be an integer; got float"),
    ({"steps": True}, TypeError, "steps must be an integer; got bool"),
    ({"steps": np.arange(2)}, TypeError, "steps must be an integer; got ndarray"),
    ({"steps": torch.tensor(2.0)}, TypeError, "steps must be an integer; got Tensor"),
    ({"seed": np.arange(5), "solver": "sde"}, TypeError, "an int64 tensor; got ndarray"),
    ({"steps": None}, ValueError, "steps must be given with solver 'euler'"),
    (
        {"solver": "eulr"},
        ValueError,
        "euler, midpoint, heun, rk4, ab2, taylor, dopri5, .*; got 'eulr'",
    ),
    ({"solver": Heun}, TypeError, r"such as Heun\(\)"),
    ({"solver": 3}, TypeError, "integrate; got int"),
    ({"rtol": 1e-3}, ValueError, "'euler' takes fixed steps; got rtol=0.001"),
    ({"seed": 3}, ValueError, "solver 'euler' draws no noise; got 3"),
    ({"seed": 0, "solver": "dopri5"}, ValueError, "draws no noise; got 0"),
    ({"t_start": 0.5, "t_end": 0.5}, ValueError, "0 <= t_start < t_end <= 1"),
    ({"t_start": -0.1}, ValueError, "0 <= t_start"),
    ({"t_end": 1.1}, ValueError, "t_end <= 1"),
    ({"t_end": math.nan}, ValueError, "t_end <= 1"),
    ({"t_end": "1"}, TypeError, "t_end must be a number"),
    ({"t_start": torch.zeros(5)}, TypeError, "t_start must be a number; got Tensor"),
    ({"guidance_scale": np.ones(5), "uncondition": {}}, TypeError, "be a number; got ndarray"),
    ({"guidance_scale": 2.0}, ValueError, "uncondition must be given with guidance_scale"),
    ({"guidance_scale": True, "uncondition": {}}, TypeError, "guidance_scale must be a number"),
    ({"guidance_scale": "7", "uncondition": {}}, TypeError, "guidance_scale must be a number"),
    ({"guidance_scale": math.inf, "uncondition": {}}, ValueError, "must be finite"),
    ({"guidance_scale": torch.ones(4), "uncondition": {}}, ValueError, r"\(5,\) tensor; got shape"),
    ({"condition": [1]}, TypeError, "condition must be a dict"),
    ({"uncondition": 3}, TypeError, "uncondition must be a dict"),
    ({"callback": 3}, TypeError, "callback must be callable"),
    ({"compile": "fast"}, ValueError, "compile must be None, True or one of default"),
    ({"stepz": 3}, TypeError, "unexpected keyword argument 'stepz'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused_arguments(arguments, error, message, x0):
    velocity = Counting()
    with pytest.raises(error, match=message):
        sample(velocity, x0, **{"steps": 2, **arguments})
    assert velocity.calls == 0


def test_errors_name_the_function_that_was_called(x0):
    with pytest.raises(ValueError, match="invert: steps must be at least 1"):
        invert(Counting(), x0, steps=0)
    with pytest.raises(TypeError, match="invert: x1 must be a tensor"):
        invert(Counting(), None, steps=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x0 must be a tensor; got list"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "x0 must be float32.*int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "x0 must be float32.*complex64"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "strided tensor; got layout torch.sparse_coo"),
        (torch.zeros(()), ValueError, "batch dimension"),
    ],
)
def test_refused_sources(x, error, message):
    with pytest.raises(error, match=message):
        sample(Counting(), x, steps=1)


def test_something_else_than_a_velocity(x0):
    with pytest.raises(TypeError, match=r"sample: velocity must be callable as velocity\(x, t"):
        sample(x0, x0, steps=1)


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"order": 4}, {"derivative": "exact"}], ids=lambda o: str(o)
)
def test_refused_taylor(options):
    with pytest.raises(ValueError, match="Taylor: "):
        Taylor(**options)


def test_solvers_by_name_and_object(x0):
    pairs = {
        "euler": Euler(), "midpoint": Midpoint(), "heun": Heun(), "rk4": RK4(), "ab2": AB2(),
        "taylor": Taylor(), "dopri5": Dopri5(),
    }  # fmt: skip
    for name, solver in pairs.items():
        assert get_solver(name) == solver
        assert get_solver(solver) is solver
        by_name = sample(Counting(), x0, steps=3, solver=name)
        assert torch.equal(by_name, sample(Counting(), x0, steps=3, solver=solver))
