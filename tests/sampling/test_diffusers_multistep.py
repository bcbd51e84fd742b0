"""dpm++ and unipc take the steps of diffusers' DPMSolverMultistepScheduler and UniPCMultistepScheduler
with flow sigmas, given the exact times that those round for their networks."""

import numpy as np
import pytest
import torch

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import DPMSolver, UniPC, sample

diffusers = pytest.importorskip("diffusers")
RING = GaussianMixtureFlow.ring()


def theirs(scheduler, noise, steps, end=0.0):
    """(final state, times) of their loop in float64; sigma is 1 - t and their velocity -v."""
    scheduler.set_timesteps(steps)
    scheduler.sigmas[-1] = end
    x = noise
    for index, timestep in enumerate(scheduler.timesteps):
        level = float(scheduler.sigmas[index])
        x = scheduler.step(-RING(x, 1 - level), timestep, x).prev_sample
    return x, [1 - float(s) for s in scheduler.sigmas]


def common(order, lower):
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "solver_order": order,
        "lower_order_final": lower,
        "final_sigmas_type": "zero",
    }


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(np.random.default_rng(1).standard_normal((32, 2)))


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    ("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
)
def test_dpm_solver(order, kind, lower, steps, noise):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_type=kind, **common(order, lower)
    )
    x, times = theirs(scheduler, noise, steps)
    ours = sample(RING, noise, grid=times, solver=DPMSolver(order, kind, lower))
    # Their sigmas and lambdas are float32.
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)
    single = sample(RING, noise.float(), grid=times, solver=DPMSolver(order, kind, lower))
    torch.testing.assert_close(single.double(), x, rtol=0, atol=4e-5)
    if order > 1:
        other = sample(RING, noise, grid=times, solver=DPMSolver(order - 1, kind, lower))
        assert (other - x).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, kind, lower, steps, noise):
    scheduler = diffusers.UniPCMultistepScheduler(solver_type=kind, **common(order, lower))
    # Theirs makes NaN of a last step to 0 with bh1, or with an order above 1.
    x, times = theirs(scheduler, noise, steps, 0.0 if kind == "bh2" and lower else 0.02)
    ours = sample(RING, noise, grid=times, solver=UniPC(order, kind, lower))
    scale = x.abs().max().item()
    torch.testing.assert_close(ours, x, rtol=0, atol=3e-5 * max(1.0, scale))
    other = sample(RING, noise, grid=times, solver=DPMSolver(order))
    assert (other - x).abs().max() > 1e-3
