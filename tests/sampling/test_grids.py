"""Time grids: ends, order, the shift, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfkernels.sampling import CustomGrid, ShiftedGrid, UniformGrid, get_grid, sample


def still(x, t):
    return torch.zeros_like(x)


def times_of(**arguments):
    return sample(
        still, torch.zeros(1, 1, dtype=torch.float64), return_info=True, **arguments
    ).times


@given(
    steps=st.integers(1, 300),
    shift=st.floats(0.01, 100),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda e: e[1] - e[0] > 1e-3),
)
def test_grids_ascend_and_keep_their_ends(steps, shift, ends):
    for grid in (UniformGrid(), ShiftedGrid(shift)):
        times = list(grid.times(steps, *ends))
        assert len(times) == steps + 1
        assert (times[0], times[-1]) == ends
        assert all(np.diff(times) > 0)


def test_uniform_is_linspace():
    expected = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
    torch.testing.assert_close(times_of(steps=7, t_start=0.2, t_end=0.9), expected)
    assert torch.equal(times_of(steps=7, grid="uniform"), times_of(steps=7))


def test_the_shift_is_that_of_sd3_in_noise_levels():
    """sigma' = a sigma / (1 + (a - 1) sigma), sigma from 1 to 0 in even steps."""
    sigma = np.linspace(1, 0, 11)
    expected = 1 - 3.0 * sigma / (1 + 2.0 * sigma)
    for grid in (3.0, 3, "shifted", ShiftedGrid(), torch.tensor(3.0), np.float64(3.0)):
        np.testing.assert_allclose(times_of(steps=10, grid=grid).numpy(), expected, atol=1e-15)


def test_shift_one_is_uniform_and_more_shift_means_more_noisy_steps():
    torch.testing.assert_close(times_of(steps=9, grid=1.0), times_of(steps=9))
    assert (times_of(steps=10, grid=4.0) < 0.5).sum() > (times_of(steps=10) < 0.5).sum()


def test_a_part_of_a_shifted_grid_keeps_the_density_of_the_whole():
    whole = times_of(steps=10, grid=3.0)
    part = times_of(steps=6, grid=3.0, t_start=float(whole[4]))
    torch.testing.assert_close(part, whole[4:])


@pytest.mark.parametrize(
    "grid",
    [
        [0, 0.25, 1],
        (0.0, 0.25, 1.0),
        np.array([0, 0.25, 1]),
        torch.tensor([0, 0.25, 1]),
        list(np.array([0, 0.25, 1], np.float32)),
        list(torch.tensor([0, 0.25, 1])),
        CustomGrid((0, 0.25, 1)),
    ],
    ids=lambda g: type(g).__name__,
)
def test_custom_times(grid):
    for arguments in ({}, {"steps": 2}, {"t_start": 0.0, "t_end": 1.0}):
        times = times_of(grid=grid, **arguments)
        assert torch.equal(times, torch.tensor([0, 0.25, 1], dtype=torch.float64))


def test_custom_times_choose_the_ends():
    x = sample(lambda x, t: torch.ones_like(x), torch.zeros(2, 3), grid=[0.25, 0.5, 0.875])
    assert torch.equal(x, torch.full((2, 3), 0.625))


def test_an_object_with_times_is_a_grid():
    class Quadratic:
        def times(self, steps, t_start, t_end):
            return [(i / steps) ** 2 for i in range(steps + 1)]

    torch.testing.assert_close(times_of(steps=4, grid=Quadratic()), times_of(steps=4) ** 2)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ([1.0, 0.5, 0.0], ValueError, "ascend strictly"),
        ([0.0, 0.5, 0.5, 1.0], ValueError, "ascend strictly"),
        ([0.0, 1.5], ValueError, r"lie in \[0, 1\]"),
        ([0.0, float("nan"), 1.0], ValueError, r"lie in \[0, 1\]"),
        ([0.5], ValueError, "at least two"),
        ([], ValueError, "at least two"),
        ("linear", ValueError, "uniform, shifted"),
        (0.0, ValueError, "positive"),
        (-2.0, ValueError, "positive"),
        (float("nan"), ValueError, "positive"),
        ([[0.0, 1.0]], TypeError, "1-D sequence"),
        (torch.zeros(2, 2), TypeError, "1-D sequence"),
        (["0", "1"], TypeError, "1-D sequence"),
        (list(torch.zeros(2, 2)), TypeError, "1-D sequence"),
        (True, TypeError, "time shift"),
        (object(), TypeError, "time shift"),
        (ShiftedGrid, TypeError, "time shift"),
    ],
)
def test_refused_grids(grid, error, message):
    with pytest.raises(error, match=message):
        get_grid(grid)


def test_the_times_of_a_foreign_grid_are_checked():
    class Backwards:
        def times(self, steps, t_start, t_end):
            return [1.0, 0.0]

    with pytest.raises(ValueError, match="ascend strictly"):
        times_of(steps=1, grid=Backwards())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": [0, 0.5, 1], "steps": 3}, "number of intervals, 2; got 3"),
        ({"grid": [0, 0.5, 1], "t_end": 0.9}, "ends of the grid"),
        ({"grid": 3.0}, "steps must be given"),
        ({}, "steps must be given"),
        ({"grid": 3.0, "solver": "dopri5"}, "steps must be given"),
    ],
)
def test_contradictions_and_gaps(arguments, message):
    with pytest.raises(ValueError, match=message):
        times_of(**arguments)
