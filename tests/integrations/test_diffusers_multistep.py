"""Multistep and two-stage schedulers: diffusers' UniPC and DPM-Solver++, orders of convergence, configs and round trips."""

from __future__ import annotations

import functools
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from schedulers_cases import RULES, made

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.integrations import diffusers as rfd
from rfkernels.sampling import multistep as rules

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def run(scheduler, field, x):
    """(state, calls) at the end of a run; field(x, sigma) is d x / d sigma."""
    calls = 0
    for t in scheduler.timesteps:
        calls += 1
        x = scheduler.step(field(x, t.double() / 1000), t, x, return_dict=False)[0]
    return x, calls


def rotation(x, sigma):
    """x' = x cos(3 sigma): x(sigma) = x(1) exp((sin 3 sigma - sin 3) / 3)."""
    return x * torch.cos(3 * sigma)


# UniPC and DPM-Solver++ of diffusers


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2", "midpoint", "heun"])
def test_they_are_diffusers(kind, order, shift):
    other = UniPCMultistepScheduler if kind.startswith("bh") else DPMSolverMultistepScheduler
    theirs = other(**FLOW, flow_shift=shift, solver_order=order, solver_type=kind)
    ours = rfd.RFMultistepScheduler.from_config(theirs.config, integer_timesteps=True)
    generator = torch.Generator().manual_seed(order)
    x = torch.randn(2, 4, 6, 6, generator=generator)
    noise = [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(21)]
    for n in (1, 2, 3, 6, 20):
        states = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(n)
            y, kept = x, []
            for t, z in zip(
                scheduler.timesteps, noise, strict=False
            ):  # not smooth: every coefficient counts
                y = scheduler.step(rotation(y, t / 1000) + z, t, y).prev_sample
                kept.append(y)
            states.append(kept)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        if (
            kind == "bh1"
        ):  # diffusers' last step, to sigma = 0, is NaN: infinity times no difference at all
            assert torch.isnan(states[0].pop()).all()
            assert torch.isfinite(states[1].pop()).all()
        for found, expected in zip(*states[::-1], strict=True):
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_options_of_the_multistep_solvers():
    x = torch.ones(1, 2)
    for options in (
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 2]},
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.02},
        {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0},
    ):
        theirs = UniPCMultistepScheduler(**FLOW, flow_shift=2.0, **options)
        ours = rfd.RFMultistepScheduler.from_config(theirs.config, integer_timesteps=True)
        ends = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(6, mu=0.9)
            # from the start to the last step but one, since diffusers' last is NaN where sigma stays and the order is 2
            y = x
            for t in scheduler.timesteps[:-1]:
                y = scheduler.step(rotation(y, t / 1000), t, y).prev_sample
            ends.append(y)
            end = scheduler.step(y, scheduler.timesteps[-1], y).prev_sample
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert (ends[0] - ends[1]).abs().max() < 1e-5
        assert torch.isfinite(end).all()
    for options in (
        {"euler_at_final": True},
        {"lower_order_final": False},
        {"use_dynamic_shifting": True},
    ):
        theirs = DPMSolverMultistepScheduler(**FLOW, flow_shift=2.0, solver_order=3, **options)
        ours = rfd.RFMultistepScheduler.from_config(theirs.config, integer_timesteps=True)
        ends = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(6, **({"mu": 0.9} if "use_dynamic_shifting" in options else {}))
            ends.append(run(scheduler, rotation, x)[0])
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert (ends[0] - ends[1]).abs().max() < 1e-5


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("of_state", DTYPES)
@pytest.mark.parametrize("of_output", DTYPES)
def test_dtypes_are_theirs(of_state, of_output):
    """UniPC's states keep the first one's dtype, DPM-Solver++'s have the wider of the two, as each does in diffusers."""
    for other in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        theirs, dtypes = other(**FLOW), []
        for scheduler in (theirs, rfd.RFMultistepScheduler.from_config(theirs.config)):
            scheduler.set_timesteps(3)
            x = torch.ones(1, 2, 3, 3, dtype=of_state)
            for t in scheduler.timesteps:
                x = scheduler.step(x.to(of_output), t, x).prev_sample
                dtypes.append(x.dtype)
        assert dtypes[:3] == dtypes[3:]


def test_given_sigmas_with_the_grid_of_unipc():
    theirs = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    ours = rfd.RFEulerScheduler.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.array([1.0, 0.7, 0.2]))
    assert torch.equal(ours.sigmas, theirs.sigmas)
    with pytest.raises(ValueError, match="timesteps need grid='flow-match'"):
        ours.set_timesteps(timesteps=[999])
    for grid in ("unipc", "dpm++"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # not ours, whatever is let pass of diffusers'
            made("Euler", grid=grid).set_timesteps(sigmas=torch.tensor([1.0, 0.7, 0.2]))


def exact_data(sigma, power):
    """m for which x_t = (sigma_t / sigma_s) x + sigma_t * integral of e^lambda m has a closed form: lambda^power."""
    lam = np.log((1 - sigma) / sigma)
    return lam**power


@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "heun"), (3, "heun")])
def test_dpm_integrates_polynomials_in_the_log_ratio(order, kind):
    """x_t / sigma_t = x / sigma + integral of e^lambda m, for m a polynomial in lambda.

    Order 3 is exact to degree 1 only: the authors' weight of the second difference, which diffusers and this package keep,
    is half of what degree 2 would need.
    """
    sigmas = [0.35, 0.5, 0.62, 0.8]
    for power in range(min(order, 2)):
        lam = np.linspace(*(np.log((1 - s) / s) for s in (sigmas[1], sigmas[0])), 20001)
        integral = np.trapezoid(np.exp(lam) * lam**power, lam)
        expected = sigmas[0] * (1.3 / sigmas[1] + integral)
        c_x, *weights = rules.dpm(sigmas, order, kind)
        found = c_x * 1.3 + sum(
            w * exact_data(s, power) for w, s in zip(weights, sigmas[1:], strict=False)
        )
        assert found == pytest.approx(expected, rel=1e-8)


# Orders


MIXTURE = GaussianMixtureFlow([[1.0, 0.5], [-0.5, -1.0]], [0.6, 0.8])
COUNTS = [16, 32, 64, 128]


def mixing(x, sigma):
    return -MIXTURE(x, 1 - sigma)


def noises():
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def mixed():
    """(the end of the exact flow from these noises, Euler's errors there)."""
    reference = made("Midpoint")
    reference.set_timesteps(sigmas=np.linspace(1, 1 / 2048, 2048))
    truth, _ = run(reference, mixing, noises())
    return truth, slopes("Euler", mixing, noises(), truth, COUNTS)[1]


def slopes(name, field, x, truth, counts, **config):
    errors, calls = [], []
    for n in counts:
        scheduler = made(name, **config)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
        end, called = run(scheduler, field, x)
        errors.append(float((end - truth).abs().max()))
        calls.append(called)
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors, calls


@pytest.mark.parametrize(
    ("name", "order", "extra"),
    [
        ("Euler", 1, 0),
        ("Heun", 2, None),
        ("Midpoint", 2, None),
        ("FireFlow", 2, 1),
        ("ab2", 2, 0),
        ("dpm++", 2, 0),
        ("unipc", 2, 0),
    ],
)
def test_order_of_convergence(name, order, extra):
    """Noise to data along the exact flow to a Gaussian mixture, in float64; every solver, NFE counted."""
    truth, euler = mixed()
    rates, errors, calls = slopes(name, mixing, noises(), truth, COUNTS)
    # In lambda the last steps never become small, and DPM-Solver++ loses a logarithm of the steps there.
    assert rates[-2:].min() > order - (0.5 if name == "dpm++" else 0.25)
    assert rates[-1] < order + 0.6 or name == "unipc"
    if extra is not None:
        assert calls == [n + extra for n in COUNTS]
    else:
        assert calls == [2 * n - (name == "Heun") for n in COUNTS]
    if order == 2:
        assert errors[0] < euler[2]  # 16 steps are better than 64 of Euler


def test_float_times_do_not_stall():
    """At 128 steps the integer times hold UniPC at 1e-3 of the result, exact times do not."""
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = {}
    for integer in (False, True):
        scheduler = rfd.RFMultistepScheduler.from_config(
            UniPCMultistepScheduler(**FLOW).config, integer_timesteps=integer
        )
        scheduler.set_timesteps(128)
        truth = np.exp((0 - np.sin(3 * scheduler.sigmas[0].item())) / 3)
        errors[integer] = abs(run(scheduler, rotation, x)[0].item() - truth)
    assert errors[True] > 5e-4
    assert errors[False] < 2e-5


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("shift", "start"), [(8.0, 0), (8.0, 2), (17.0, 0)])
def test_runs_begin_where_integer_times_coincide(name, shift, start):
    """Of 100 steps two begin at 999 with a shift of 17; with 8 each of the first two has the time of its midpoint. Some
    of Wan's pipelines set no begin index."""
    scheduler, ends = made(name, grid="unipc", shift=shift, integer_timesteps=True), []
    for begin in (None, start):
        scheduler.set_timesteps(100)
        if begin is not None:
            scheduler.set_begin_index(begin)
        x = torch.ones(1, 2)
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(x.sin(), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_midpoint_is_rf_solver():
    """Against the paper's form, x + h v + h^2 / 2 (v(x + h/2 v) - v) / (h/2), written in NumPy."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        scheduler = rfd.RFMidpointScheduler(shift=3.0)
        scheduler.set_timesteps(12)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
        y = x.double().numpy()
        levels, times = (
            scheduler.sigmas.double().numpy(),
            scheduler.timesteps.double().numpy() / 1000,
        )
        for i in range(0, 24, 2):
            h, v = levels[i + 2] - levels[i], y * np.cos(3 * times[i])
            half = float(
                np.float32(levels[i + 1]) - np.float32(levels[i])
            )  # as the scheduler has it
            middle = (y + half * v) * np.cos(3 * times[i + 1])
            y = y + h * v + h * h / 2 * (middle - v) / (h / 2)
        found, calls = run(scheduler, rotation, x)
        assert calls == 24
        assert np.abs(found.double().numpy() - y).max() < bound


def test_fireflow_is_the_published_rule():
    """The two-state form of the paper, in NumPy; a run that begins later starts with its own output."""
    scheduler = rfd.RFFireFlowScheduler(shift=2.0)
    scheduler.set_timesteps(9)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    line = np.linspace(scheduler.sigma_max, scheduler.sigma_min, 9)
    grid = np.append((2 * line / (1 + line)).astype(np.float32), 0).astype(np.float64)
    y, u = x.numpy(), None
    for s, e in pairwise(grid):
        u = y * np.cos(3 * s) if u is None else u
        u = (y + (e - s) / 2 * u) * np.cos(3 * (s + e) / 2)
        y = y + (e - s) * u
    found, calls = run(scheduler, rotation, x)
    assert calls == len(scheduler.timesteps) == 10
    assert np.abs(found.numpy() - y).max() < 1e-6  # times are float32
    scheduler.set_timesteps(64)
    scheduler.set_begin_index(20)
    begun = x
    for t in scheduler.timesteps[20:]:
        begun = scheduler.step(rotation(begun, t.double() / 1000), t, begun).prev_sample
    start = scheduler.sigmas[20].item()
    truth = x * np.exp(-np.sin(3 * start) / 3)
    assert (begun - truth).abs().max() < 2e-4


def test_round_trips():
    """Data to noise (invert_sigmas) and back: second order, first for Euler."""
    flow = GaussianMixtureFlow([[1.0, 0.5]], [0.5])
    data = flow.sample(16, seed=0, dtype=torch.float64)
    for name, order in (("Euler", 1), ("Heun", 2), ("Midpoint", 2), ("FireFlow", 2), ("ab2", 2)):
        errors = []
        for n in (32, 64):
            there, back = made(name, invert_sigmas=True), made(name)
            line = np.linspace(1, 1 / n, n)
            there.set_timesteps(sigmas=line)
            back.set_timesteps(sigmas=line)
            assert there.sigmas[0] == 0
            assert there.sigmas[-1] == 1
            noise, _ = run(there, lambda x, s: -flow(x, 1 - s), data)
            again, _ = run(back, lambda x, s: -flow(x, 1 - s), noise)
            errors.append(float((again - data).abs().max()))
        assert np.log2(errors[0] / errors[1]) > order - 0.3
