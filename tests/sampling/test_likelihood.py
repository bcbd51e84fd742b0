"""Log-likelihood against the closed-form densities of Gaussians and mixtures."""

import math
from types import MappingProxyType

import pytest
import torch

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import Interval, Rescaled, Taylor, log_likelihood, sample

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


class Anisotropic:
    """The flow to N(m, C) with a full C: x_t is N(t m, (1 - t)^2 I + t^2 C), and with S_t its covariance
    the velocity is m + (t C - (1 - t) I) S_t^-1 (x - t m)."""

    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    covariance = torch.tensor(
        [[2.0, 0.7, 0.1], [0.7, 1.0, -0.3], [0.1, -0.3, 0.5]], dtype=torch.float64
    )

    def at(self, t):
        covariance = (1 - t) ** 2 * torch.eye(3, dtype=torch.float64) + t**2 * self.covariance
        return torch.distributions.MultivariateNormal(t * self.mean, covariance)

    def __call__(self, x, t):
        t = t.reshape(-1, 1, 1)
        one = torch.eye(3, dtype=torch.float64)
        covariance = (1 - t) ** 2 * one + t**2 * self.covariance
        gain = (t * self.covariance - (1 - t) * one) @ torch.linalg.inv(covariance)
        return self.mean + (gain @ (x - t[:, 0] * self.mean)[..., None])[..., 0]


FULL = Anisotropic()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8}, 1e-7),
        ({"solver": "rk4", "steps": 60}, 1e-7),
        ({"solver": "unipc", "steps": 100}, 1e-2),
        ({"solver": Taylor(order=3), "steps": 60}, 1e-5),
        ({"solver": Taylor(derivative="jvp"), "steps": 60}, 3e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.2, 0.6)])
def test_a_gaussian_with_correlations(ends, options, tolerance):
    start, end = ends
    x = FULL.at(end).mean + rf.randn(6, 3, seed=1, dtype=torch.float64)
    found = log_likelihood(
        FULL, x, trace="exact", t_start=start, t_end=end, log_density=FULL.at(start).log_prob,
        **options,
    )  # fmt: skip
    expected = FULL.at(end).log_prob(x)
    torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", [{"solver": "rk4", "steps": 10}, {"solver": "dopri5"}], ids=str)
def test_the_estimate_of_a_gaussian_with_correlations(solver):
    x = rf.randn(6, 3, seed=1, dtype=torch.float64)
    errors = torch.stack(
        [
            log_likelihood(FULL, x, seed=seed, probes=16, **solver).log_likelihood
            - FULL.at(1.0).log_prob(x)
            for seed in range(8)
        ]
    )
    spread = errors.std().item()
    assert 0.01 < spread < 1
    assert abs(errors.mean().item()) < 5 * spread / math.sqrt(errors.numel())


@pytest.mark.parametrize("trace", [{"trace": "exact"}, {"seed": 3}], ids=["exact", "estimate"])
def test_modes_without_gradients_do_not_matter(trace, x1):
    """In inference mode nothing can be differentiated: the divergence must not become 0."""
    options = {
        "solver": "rk4",
        "steps": 10,
        "condition": {"extra": [torch.ones(2).double()]},
        **trace,
    }

    def velocity(x, t, extra):
        return RING(x, t) * extra[0]

    expected = log_likelihood(velocity, x1, **options)
    with torch.no_grad():
        unrecorded = log_likelihood(velocity, x1, **options)
    with torch.inference_mode():
        made_there = {**options, "condition": {"extra": [torch.ones(2).double()]}}
        inference = log_likelihood(velocity, x1 * 1, **made_there)
    for found in (unrecorded, inference):
        torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
        assert torch.equal(found.x0, expected.x0)


def test_a_velocity_without_gradients_is_refused(x1):
    frozen = torch.no_grad()(lambda x, t: RING(x, t))
    for trace in ({"trace": "exact"}, {"seed": 1}):
        with pytest.raises(ValueError, match="velocity must be differentiable in x"):
            log_likelihood(frozen, x1, solver="heun", steps=3, **trace)


def test_answers_of_the_wrong_shape_or_precision_are_refused(x1):
    """(40, 2) and (2, 40) have as many numbers."""
    with pytest.raises(ValueError, match=r"shape of x, \(40, 2\); got \(2, 40\)"):
        log_likelihood(lambda x, t: x.T, x1, seed=1, solver="euler", steps=1)
    with pytest.raises(TypeError, match="float64 only if x is float64"):
        log_likelihood(lambda x, t: x.double(), x1.float(), trace="exact", solver="euler", steps=1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_no_samples_no_numbers_and_one_number_a_sample(shape):
    x = rf.randn(*shape, seed=1)
    for trace in ({"trace": "exact"}, {"seed": 1}):
        found = log_likelihood(lambda x, t: 0.5 * x, x, solver="heun", steps=50, **trace)
        assert found.x0.shape == shape
        # x0 = x e^-1/2, and the divergence is half the dimension.
        size = math.prod(shape[1:])
        squares = (x * math.exp(-0.5)).square().reshape(len(x), size).sum(1)
        expected = -0.5 * squares - 0.5 * size * (math.log(2 * math.pi) + 1)
        torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trace", [{"trace": "exact"}, {"seed": 3}], ids=["exact", "estimate"])
def test_torch_func_differentiates_the_likelihood(trace, x1):
    x, options = x1[:4], {"solver": "rk4", "steps": 6, **trace}

    def run(x):
        return log_likelihood(RING, x, **options).log_likelihood

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).sum(), leaf)
    reverse = torch.func.grad(lambda x: run(x).sum())(x)
    torch.testing.assert_close(reverse, expected)
    _, forward = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(forward, expected.sum(1))


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
    # A condition alone is enough, as in sample, and a guidance scale.
    alone = log_likelihood(
        velocity, x1[:6], trace="exact", solver="rk4", steps=60,
        condition=MappingProxyType({"shift": shift}),
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(alone.log_likelihood.sum(), shift)[0], gs)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    guided = log_likelihood(
        lambda x, t, gain=0.0: gain * x, x1[:6], trace="exact", solver="rk4", steps=20,
        guidance_scale=scale, condition={"gain": 0.5}, uncondition={}, log_density=lambda x: 0 * x[:, 0],
    )  # fmt: skip
    # dx/dt = g x / 2 in two dimensions: log p falls by g
    gradient = torch.autograd.grad(guided.log_likelihood.sum(), scale)[0]
    torch.testing.assert_close(gradient, torch.tensor(-6.0, dtype=torch.float64))
    with torch.no_grad():
        still = log_likelihood(
            velocity, x1, seed=1, steps=2, solver="heun", condition={"shift": shift}
        )
    assert not still.log_likelihood.requires_grad
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
        ({"seed": 1, "condition": [1]}, TypeError, "log_likelihood: condition must be a dict"),
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
