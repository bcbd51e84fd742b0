"""Grids by noise level against diffusers, SciPy and their formulas; the grid optimised for a model."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.flow.times import inverse_time_shift
from rfkernels.sampling import (
    BetaGrid,
    CustomGrid,
    ExponentialGrid,
    KarrasGrid,
    OptimisedGrid,
    ResolutionShiftedGrid,
    ShiftedGrid,
    StretchedGrid,
    UniformGrid,
    UniPC,
    get_grid,
    invert,
    optimise_grid,
    resolution_shift,
    sample,
)

RING = GaussianMixtureFlow.ring()
GRIDS = [
    KarrasGrid(),
    KarrasGrid(rho=2.0, smallest=0.01),
    ExponentialGrid(),
    BetaGrid(),
    BetaGrid(2.0, 0.7),
    ResolutionShiftedGrid(1024),
    StretchedGrid(3.0, 0.2),
    OptimisedGrid((0.0, 0.2, 1.0), (3.0, 1.0)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.25, 0.75), (0.1, 1.0)])
def test_ends_number_and_order(grid, steps, ends):
    if isinstance(grid, StretchedGrid) and steps > 1 and ends == (0.25, 0.75):
        with pytest.raises(ValueError, match=r"noise levels 0\.25 and 0.75"):
            grid.times(steps, *ends)
        return
    times = list(grid.times(steps, *ends))
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == ends
    assert all(a < b for a, b in pairwise(times))


# Closer to 1 than that, levels are 1 - t with few digits left.
ENDS = st.tuples(
    st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9]), st.just(1.0) | st.floats(0.05, 0.999)
).filter(lambda ends: ends[1] - ends[0] > 1e-3)
WHOLE = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def checked(grid, steps, ends):
    """The noise levels of the grid's times, whose number, ends and order are right."""
    times = np.array(list(grid.times(steps, *ends)))
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == ends
    assert (np.diff(times) > 0).all()
    assert ((times >= 0) & (times <= 1)).all()
    return 1 - times


def even(values, rel=1e-6):
    """Whether the values' differences are equal."""
    if len(values) > 2:
        steps = np.diff(values)
        np.testing.assert_allclose(steps, steps.mean(), rtol=rel, atol=1e-9)


@WHOLE
@given(steps=st.integers(1, 200), rho=st.floats(0.1, 20), ends=ENDS)
def test_roots_of_karras_levels_are_even(steps, rho, ends):
    levels = checked(KarrasGrid(rho), steps, ends)
    # Where the run ends at the data, the last step is the rest.
    inner = levels if ends[1] < 1 else levels[:-1]
    even(inner ** (1 / rho), 1e-3 if rho < 0.5 else 1e-6)
    if ends[1] == 1 and steps > 1:
        assert inner[-1] == pytest.approx(1e-3, rel=1e-9)


@WHOLE
@given(steps=st.integers(1, 200), smallest=st.floats(1e-6, 0.04), ends=ENDS)
def test_logarithms_of_exponential_levels_are_even(steps, smallest, ends):
    levels = checked(ExponentialGrid(smallest), steps, ends)
    even(np.log(levels if ends[1] < 1 else levels[:-1]))


@WHOLE
@given(steps=st.integers(1, 60), alpha=st.floats(0.4, 3), beta=st.floats(0.4, 3), ends=ENDS)
def test_quantiles_of_beta_times_are_even(steps, alpha, beta, ends):
    from scipy import stats

    levels = checked(BetaGrid(alpha, beta), steps, ends)
    share = np.clip((1 - levels - ends[0]) / (ends[1] - ends[0]), 0, 1)
    even(stats.beta.cdf(share, alpha, beta), 1e-3)


@WHOLE
@given(steps=st.integers(1, 200), shift=st.floats(0.02, 50), ends=ENDS)
def test_shifting_back_is_even(steps, shift, ends):
    times = 1 - checked(ShiftedGrid(shift), steps, ends)
    even(np.array([inverse_time_shift(t, shift) for t in times]))
    again = CustomGrid(tuple(times)).times(None, 0.0, 1.0)
    np.testing.assert_array_equal(again, times)  # a grid as a list is the same grid


@WHOLE
@given(
    steps=st.integers(2, 100),
    terminal=st.floats(0.01, 0.4),
    start=st.floats(0.0, 0.5),
    inner=st.sampled_from([None, 3.0, "karras", [0.0, 0.3, 0.7, 1.0]]),
)
def test_stretching_keeps_proportions(steps, terminal, start, inner):
    if isinstance(inner, list):
        steps, start = None, 0.0
    ends = (start, 1.0)
    plain = np.array(list(get_grid(inner).times(steps, *ends)))
    levels = checked(StretchedGrid(inner, terminal), len(plain) - 1, ends)
    assert levels[-2] == pytest.approx(terminal, abs=1e-12)
    share = (1 - levels[:-1] - start) / (1 - terminal - start)
    np.testing.assert_allclose(
        share, (plain[:-1] - start) / (plain[-2] - start), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("grid", "option"),
    [
        (KarrasGrid(), {"use_karras_sigmas": True}),
        (ExponentialGrid(), {"use_exponential_sigmas": True}),
        (StretchedGrid(2.0, 0.1), {"shift_terminal": 0.1, "shift": 2.0}),
    ],
    ids=str,
)
def test_diffusers_has_the_same_levels(grid, option):
    diffusers = pytest.importorskip("diffusers")
    steps = 12
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**option)
    if "shift_terminal" in option:  # their stretch begins from evenly spaced levels given to it
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
        ours = StretchedGrid(2.0, 0.1).times(steps, 0.0, 1.0)
    else:
        scheduler.set_timesteps(steps)
        ours = grid.times(steps, 0.0, 1.0)
    np.testing.assert_allclose(1 - np.array(ours), scheduler.sigmas.numpy(), atol=2e-6)


def test_beta_times_are_scipys_quantiles():
    from scipy import stats

    times = BetaGrid(0.6, 0.6).times(9, 0.0, 1.0)
    np.testing.assert_allclose(times, stats.beta.ppf(np.arange(10) / 9, 0.6, 0.6), atol=1e-12)
    even = BetaGrid(1.0, 1.0).times(4, 0.2, 1.0)
    np.testing.assert_allclose(even, [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-12)


def test_shift_by_resolution():
    """FLUX: mu 0.5 at 256 tokens, 1.15 at 4096, linear; no other number enters."""
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    assert math.log(resolution_shift(2176)) == pytest.approx(0.825)
    grid = ResolutionShiftedGrid(4096)
    assert grid.times(5, 0.0, 1.0) == ShiftedGrid(math.exp(1.15)).times(5, 0.0, 1.0)
    mu, levels = 1.15, np.linspace(1, 0, 6)[1:-1]
    theirs = math.exp(mu) / (math.exp(mu) + 1 / levels - 1)
    np.testing.assert_allclose(1 - np.array(grid.times(5, 0.0, 1.0))[1:-1], theirs, rtol=1e-12)


def test_names():
    assert get_grid("karras") == KarrasGrid()
    assert get_grid("exponential") == ExponentialGrid()
    assert get_grid("beta") == BetaGrid()
    noise = rf.randn(3, 2, seed=0)
    assert sample(RING, noise, steps=6, grid="karras", return_info=True).nfe == 6


def test_the_last_step_of_a_stretched_grid_begins_at_its_level():
    times = StretchedGrid(None, 0.1).times(5, 0.0, 1.0)
    np.testing.assert_allclose(times, [0, 0.225, 0.45, 0.675, 0.9, 1.0])
    assert StretchedGrid(UniformGrid(), 0.1) == StretchedGrid(None, 0.1)


# --- optimised for a model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise():
    return rf.randn(128, 2, seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def truth(noise):
    return sample(RING, noise, steps=400, solver="rk4")


def error(noise, truth, **options):
    return (sample(RING, noise, **options) - truth).square().mean().sqrt().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_it_lowers_the_error_on_noise_it_has_not_seen(solver, order, noise, truth):
    grid = optimise_grid(RING, rf.randn(32, 2, seed=9), order=order)
    for steps in (8, 16):
        ours = error(noise, truth, steps=steps, solver=solver, grid=grid)
        assert ours < 0.92 * error(noise, truth, steps=steps, solver=solver)


def test_local_errors_of_euler_become_equal(noise):
    """The error of a step is what is left between it and the exact flow from the same state."""

    def spread(grid):
        info = sample(RING, noise, steps=400, solver="rk4", grid=None, return_info=True)
        times = grid.times(10, 0.0, 1.0)
        errors = []
        for a, b in pairwise(times):
            start = info.trajectory[round(a * 400)]
            a = round(a * 400) / 400
            step = sample(RING, start, grid=[a, b])
            exact = sample(RING, start, grid=list(np.linspace(a, b, 21)), solver="rk4")
            errors.append((step - exact).square().mean().sqrt().item())
        return max(errors) / min(errors)

    optimised = spread(optimise_grid(RING, noise, least=0.0))
    assert optimised < 1.6
    assert spread(UniformGrid()) > 3 * optimised


def test_it_costs_what_it_says_and_may_be_saved(noise):
    calls = []

    def counting(x, t, shift):
        calls.append(len(x))
        return RING(x, t) + shift

    given = {"condition": {"shift": 1.0}, "uncondition": {"shift": 0.5}, "guidance_scale": 2.0}
    grid = optimise_grid(counting, noise[:16], evaluations=24, **given)
    assert calls == [16] * 48  # guided
    same = OptimisedGrid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert same == grid
    assert same.times(7, 0.1, 0.9) == grid.times(7, 0.1, 0.9)
    back = invert(RING, sample(RING, noise, steps=50, grid=grid), steps=50, grid=grid)
    assert (back - noise).abs().mean() < 0.2


def test_it_is_kept_in_a_file_beside_the_model(noise, tmp_path):
    grid = optimise_grid(RING, noise[:16], evaluations=16)
    file = tmp_path / "grid.json"
    file.write_text("what was there before")
    grid.save(file, made_for={"step": 3})
    assert OptimisedGrid.load(file) == grid
    assert OptimisedGrid.load(str(file)).times(5, 0.0, 1.0) == grid.times(5, 0.0, 1.0)
    assert json.loads(file.read_text()) == {"made_for": {"step": 3}, **grid.to_dict()}
    grid.save(file)
    assert json.loads(file.read_text()) == grid.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
    with pytest.raises(FileNotFoundError):
        OptimisedGrid.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2]", '{"knots": [0, 1]}', '{"knots": [0, 1], "density": 3}', "5", '{"knots": [0, 1'],
)
def test_a_file_without_a_grid_is_refused(text, tmp_path):
    file = tmp_path / "grid.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"grid\.json must hold a saved grid"):
        OptimisedGrid.load(file)


def test_straight_and_partial_runs(noise):
    straight = optimise_grid(lambda x, t: torch.ones_like(x), noise.float())
    np.testing.assert_allclose(straight.times(4, 0.0, 1.0), [0, 0.25, 0.5, 0.75, 1], atol=1e-12)
    part = optimise_grid(RING, noise, t_start=0.2, t_end=0.8)
    assert part.times(3, 0.2, 0.8)[0] == 0.2
    with pytest.raises(ValueError, match=r"within the grid's \[0.2, 0.8\]; got 0.0 and 1.0"):
        part.times(3, 0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KarrasGrid(rho=0.0), "rho must be positive"),
        (lambda: ExponentialGrid(smallest=0.0), r"smallest must be in \(0, 1\)"),
        (lambda: KarrasGrid(smallest=0.5).times(4, 0.6, 1.0), "below the first noise level, 0.4"),
        (lambda: KarrasGrid().times(None, 0.0, 1.0), "KarrasGrid: steps must be given"),
        (lambda: BetaGrid(-1.0), "alpha must be positive"),
        (lambda: StretchedGrid(None, 1.0), r"terminal must be in \(0, 1\)"),
        (lambda: resolution_shift(0), "tokens must be positive; got 0"),
        (lambda: resolution_shift(9, base_tokens=5, max_tokens=5), "must differ; got 5 twice"),
        (lambda: OptimisedGrid((0, 1), (1, 2)), "one number less than knots; got 2 and 2"),
        (lambda: OptimisedGrid((0, 1), (0,)), "density must be positive"),
        (lambda: OptimisedGrid((0, 0), (1,)), "knots must ascend"),
        (lambda: OptimisedGrid.from_dict({"knots": []}), "must have the keys knots and density"),
        (lambda: optimise_grid(RING, torch.zeros(2, 2), order=4), "order must be 1, 2 or 3; got 4"),
        (lambda: optimise_grid(RING, torch.zeros(2, 2), order=2.0), "1, 2 or 3; got 2.0"),
        (lambda: UniPC(2.0), "UniPC: order must be 1, 2 or 3; got 2.0"),
        (lambda: optimise_grid(RING, torch.zeros(0, 2)), r"x0 must have samples; got shape \(0, 2"),
        (lambda: optimise_grid(RING, torch.zeros(2, 2), evaluations=3), "at least 8; got 3"),
        (lambda: optimise_grid(RING, torch.zeros(2, 2), least=2.0), r"least must be in \[0, 1\]"),
        (
            lambda: optimise_grid(lambda x, t: x / 0, torch.zeros(2, 2)),
            "velocity must be finite",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
