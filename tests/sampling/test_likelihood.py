"""Log-likelihood against the closed-form densities of Gaussians and mixtures."""

import math

import pytest
import torch

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import Interval, Rescaled, log_likelihood, sample

RING = GaussianMixtureFlow.ring()


@pytest.fixture
def x1():
    return RING.sample(40, seed=3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"solver": "rk4", "steps": 100}, 1e-6),
        ({"solver": "fireflow", "steps": 200}, 2e-3),
        ({"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}, 1e-6),
    ],
    ids=str,
)
def test_the_exact_trace_gives_the_density_of_a_mixture(options, tolerance, x1):
    found = log_likelihood(RING, x1, trace="exact", **options)
    torch.testing.assert_close(
        found.log_likelihood, RING.log_density(x1, 1.0), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(found.bits_per_dim, -found.log_likelihood / (2 * math.log(2)))
    noise = rf.invert(RING, x1, **options)
    # An adaptive solver takes other steps for the error of the integral.
    torch.testing.assert_close(found.x0, noise, rtol=0, atol=1e-6)
    nfe = torch.as_tensor(found.nfe)
    assert nfe.shape == ((40,) if options["solver"] == "dopri5" else ())


def linear_flow(scale, mean):
    """x_t = x0 (1 + t (c - 1)) + t m, coordinate by coordinate: N(0, 1) to N(m, c^2)."""

    def velocity(x, t):
        gain, centre = scale.to(x) - 1, mean.to(x)
        factor = 1 + t.reshape(-1, *[1] * (x.ndim - 1)) * gain
        return gain * (x - t.reshape(-1, *[1] * (x.ndim - 1)) * centre) / factor + centre

    return velocity


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(probe):
    """Of images under a diagonal flow plus a mixing of pixels, which probes see and the trace does not."""
    scale = torch.linspace(0.5, 2.0, 12).reshape(3, 2, 2).double()
    straight = linear_flow(scale, torch.ones_like(scale))
    turn = rf.randn(12, 12, seed=1, dtype=torch.float64)
    turn = turn - turn.diag().diag()

    def velocity(x, t):
        return straight(x, t) + 0.1 * (x.flatten(1) @ turn).reshape(x.shape)

    x1 = 1 + scale * rf.randn(16, 3, 2, 2, seed=2, dtype=torch.float64)
    options = {"solver": "rk4", "steps": 20}
    exact = log_likelihood(velocity, x1, trace="exact", **options)
    estimates = torch.stack(
        [
            log_likelihood(velocity, x1, probes=8, probe=probe, seed=s, **options).log_likelihood
            for s in range(12)
        ]
    )
    error = estimates - exact.log_likelihood
    spread = error.std().item()
    assert spread > 1e-3
    assert abs(error.mean().item()) < 5 * spread / math.sqrt(error.numel())
    single = log_likelihood(velocity, x1, probes=1, probe=probe, seed=1, **options).log_likelihood
    assert (single - exact.log_likelihood).std() > 1.5 * spread


def test_rademacher_probes_are_exact_where_the_jacobian_is_diagonal():
    scale = torch.tensor([0.5, 1.5, 3.0, 1.0])
    mean = torch.tensor([1.0, -2.0, 0.0, 4.0])
    x1 = (mean + scale * rf.randn(10, 4, seed=1)).double()
    expected = torch.distributions.Normal(mean.double(), scale.double()).log_prob(x1).sum(1)
    for solver in ({"solver": "dopri5"}, {"solver": "rk4", "steps": 50}):
        found = log_likelihood(linear_flow(scale, mean), x1, seed=1, **solver)
        torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=1e-4)


def test_samples_do_not_depend_on_their_batch_and_seeds_are_reproducible(x1):
    options = {"solver": "dopri5", "seed": 4, "probes": 2}
    whole = log_likelihood(RING, x1, **options).log_likelihood
    part = log_likelihood(RING, x1[:5], **options).log_likelihood
    torch.testing.assert_close(part, whole[:5], rtol=0, atol=1e-12)
    other = log_likelihood(RING, x1, **{**options, "seed": 5}).log_likelihood
    assert (other - whole).abs().max() > 1e-3


def test_conditions_and_guidance(x1):
    """The guided field's own density: the same from the mixed field."""
    labels = torch.arange(40) % 8

    def mixed(x, t, label):
        u = RING(x, t)
        return u + 1.5 * (RING(x, t, label) - u)

    def optional(x, t, label=None):
        return RING(x, t, label)

    options = {"trace": "exact", "solver": "rk4", "steps": 20, "t_start": 0.1}
    expected = log_likelihood(mixed, x1, condition={"label": labels}, **options)
    guided = {"condition": {"label": labels}, "uncondition": {}, **options}
    for scale in (1.5, Interval(1.5, 0.0, 1.0)):
        found = log_likelihood(optional, x1, guidance_scale=scale, **guided)
        torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    adaptive = {**guided, "solver": "dopri5", "steps": None, "rtol": 1e-8, "atol": 1e-8}
    found = log_likelihood(optional, x1, guidance_scale=1.5, **adaptive)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="must be a scale or an Interval of one; got Rescaled"):
        log_likelihood(optional, x1, guidance_scale=Rescaled(2.0), **guided)


def test_gradients_reach_the_data_and_the_parameters(x1):
    """The gradient in x1 is the score of the data; that of a shift of the flow moves the mean."""
    x, shift = (
        x1[:6].clone().requires_grad_(),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    )

    def velocity(x, t, shift):
        return RING(x - t[:, None] * shift, t) + shift

    found = log_likelihood(
        velocity, x, trace="exact", solver="rk4", steps=60, condition={"shift": shift}
    )
    gx, gs = torch.autograd.grad(found.log_likelihood.sum(), (x, shift))
    exact = x1[:6].clone().requires_grad_()
    (score,) = torch.autograd.grad(RING.log_density(exact, 1.0).sum(), exact)
    torch.testing.assert_close(gx, score, rtol=0, atol=1e-4)
    torch.testing.assert_close(gs, -score.sum(0), rtol=0, atol=1e-3)
    assert not log_likelihood(RING, x1, seed=1, steps=2, solver="heun").log_likelihood.requires_grad


def test_another_source_and_a_still_flow():
    x1 = rf.randn(5, 3, seed=1)
    laplace = torch.distributions.Laplace(0.0, 1.0)

    def log_density(x):
        return laplace.log_prob(x).sum(1)

    for velocity in (lambda x, t: torch.zeros_like(x), lambda x, t: 0 * x):
        found = log_likelihood(
            velocity, x1, trace="exact", solver="euler", steps=2, log_density=log_density
        )
        torch.testing.assert_close(found.log_likelihood, log_density(x1))
    moved = sample(lambda x, t: x, x1, solver="dopri5")
    found = log_likelihood(lambda x, t: x, moved, seed=1, log_density=log_density)
    torch.testing.assert_close(found.log_likelihood, log_density(x1) - 3, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "seed must be given with trace='hutchinson'"),
        ({"trace": "exact", "seed": 1}, ValueError, "left out with 'exact'; got 1"),
        ({"trace": "hutch", "seed": 1}, ValueError, "'exact' or 'hutchinson'; got 'hutch'"),
        ({"probes": 0, "seed": 1}, ValueError, "probes must be at least 1; got 0"),
        ({"probe": "sphere", "seed": 1}, ValueError, "'rademacher' or 'gaussian'; got 'sphere'"),
        ({"seed": 1, "solver": "sde", "steps": 2}, ValueError, "solver must be deterministic"),
        (
            {"seed": 1, "log_density": lambda x: x},
            ValueError,
            r"log_density must return shape \(40,\)",
        ),
    ],
)
def test_refused(options, error, message, x1):
    with pytest.raises(error, match=message):
        log_likelihood(RING, x1, **options)


def test_refused_data():
    with pytest.raises(TypeError, match=r"x1 must be float32 or float64; got torch\.bfloat16"):
        log_likelihood(RING, torch.zeros(2, 2, dtype=torch.bfloat16), seed=1)
