"""Samplers of k-diffusion's kind: orders, calls, NumPy transcriptions, and the diffusers schedulers on the same levels."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rfkernels.integrations import k_diffusion as kd

SAMPLERS = {name.removeprefix("sample_rf_"): getattr(kd, name) for name in kd.__all__}


class Model:
    """x' = x cos(3 sigma), as a denoiser: x - sigma x'."""

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma, gain=1.0):
        assert sigma.shape == (x.shape[0],)
        self.sigmas.append(sigma[0].item())
        slope = gain * torch.cos(3 * sigma).to(x.dtype)
        return x - (sigma * slope).view(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x


def levels(n, dtype=torch.float64):
    return torch.linspace(1, 0, n + 1, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "order", "calls"),
    [
        ("euler", 1, lambda n: n),
        ("heun", 2, lambda n: 2 * n - 1),
        ("midpoint", 2, lambda n: 2 * n),
        ("fireflow", 2, lambda n: n + 1),
        ("ab2", 2, lambda n: n),
        ("dpmpp_2m", 2, lambda n: n),
        ("unipc", 2, lambda n: n),
    ],
)
def test_orders_and_calls(name, order, calls):
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    truth = x * np.exp(-np.sin(3.0) / 3)
    errors = []
    for n in (16, 256):
        model = Model()
        errors.append(
            float((SAMPLERS[name](model, x, levels(n), disable=True) - truth).abs().max())
        )
        assert len(model.sigmas) == calls(n)
        assert min(model.sigmas) > 0
    # Over four doublings, because the error of the last two changes its sign on the way.
    assert np.log2(errors[0] / errors[1]) / 4 > order - 0.2
    assert errors[1] < {1: 0.02, 2: 2e-5}[order]


def test_midpoint_in_numpy():
    """x_mid = x + (h/2) d, then x + h d(x_mid), d = (x - denoised) / sigma."""
    x = np.array([[1.0, -2.0]])
    y = x.copy()
    for s, e in zip(np.linspace(1, 0, 9)[:-1], np.linspace(1, 0, 9)[1:], strict=True):
        middle = y + (e - s) / 2 * y * np.cos(3 * s)
        y = y + (e - s) * middle * np.cos(3 * (s + e) / 2)
    found = kd.sample_rf_midpoint(Model(), torch.from_numpy(x), levels(8), disable=True)
    np.testing.assert_allclose(found.numpy(), y, rtol=1e-13)


@pytest.mark.parametrize("name", SAMPLERS)
def test_they_are_the_schedulers(name):
    pytest.importorskip("diffusers", minversion="0.42")
    from rfkernels.integrations import diffusers as rfd

    scheduler = {
        "euler": rfd.RFEulerScheduler,
        "heun": rfd.RFHeunScheduler,
        "midpoint": rfd.RFMidpointScheduler,
        "fireflow": rfd.RFFireFlowScheduler,
        "ab2": lambda: rfd.RFMultistepScheduler(algorithm="ab2"),
        "dpmpp_2m": lambda: rfd.RFMultistepScheduler(algorithm="dpm++"),
        "unipc": lambda: rfd.RFMultistepScheduler(algorithm="unipc"),
    }[name]()
    scheduler.set_timesteps(sigmas=levels(8)[:-1].numpy())
    x = y = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        y = scheduler.step(y * torch.cos(3 * t.double() / 1000), t, y).prev_sample
    found = SAMPLERS[name](Model(), x, levels(8), disable=True)
    assert (found - y).abs().max() < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_convention(name, capsys):
    seen = []
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    options = {"extra_args": {"gain": 0.5}, "callback": seen.append}
    quiet = SAMPLERS[name](Model(), x, levels(4, torch.float32), disable=True, **options)
    assert capsys.readouterr().err == ""
    assert [entry["i"] for entry in seen] == [0, 1, 2, 3]
    for entry in seen:
        assert entry.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert entry["sigma"].item() == entry["sigma_hat"].item() == 1 - entry["i"] / 4
    assert all(entry["denoised"].shape == entry["x"].shape == x.shape for entry in seen)
    assert torch.equal(seen[0]["x"], x)
    assert quiet.dtype == x.dtype
    pytest.importorskip("tqdm")
    options["disable"] = False
    assert torch.equal(SAMPLERS[name](Model(), x, levels(4, torch.float32), **options), quiet)
    assert "4/4" in capsys.readouterr().err
    SAMPLERS[name](Model(), x, levels(4, torch.float32))
    assert capsys.readouterr().err == ""  # no terminal
    # a run may end above 0, or be empty
    part = SAMPLERS[name](Model(), x, torch.tensor([1.0, 0.6, 0.3]), disable=True)
    assert torch.isfinite(part).all()
    assert SAMPLERS[name](Model(), x, torch.tensor([1.0]), disable=True) is x
    wrong = (
        [0.5, 1.0],
        [1.0, -0.5],
        [1.0, 0.5, 0.5, 0.0],
        [math.nan, 0.0],
        [1.0, math.nan, 0.0],
        [math.inf, 0.0],
    )
    for bad in (*map(torch.tensor, wrong), torch.ones(2, 2), [1.0, 0.0]):
        with pytest.raises(ValueError, match=f"sample_rf_{name}: sigmas must"):
            SAMPLERS[name](Model(), x, bad, disable=True)


def in_k_diffusion(rule, model, x, sigmas):
    """k-diffusion's loops in NumPy; dpmpp_2m with the flow's lambda = log((1 - sigma) / sigma) and alpha = 1 - sigma."""
    last = None
    for i, (s, after) in enumerate(pairwise(sigmas)):
        denoised = model(x, s)
        d, dt = (x - denoised) / s, after - s
        if rule == "heun" and after > 0:
            ahead = x + d * dt
            x = x + (d + (ahead - model(ahead, after)) / after) / 2 * dt
        elif (
            rule == "midpoint"
        ):  # sample_dpm_2, with the mean of the levels in place of their geometric mean
            middle = (s + after) / 2
            ahead = x + d * (middle - s)
            x = x + (ahead - model(ahead, middle)) / middle * dt
        elif rule == "dpmpp_2m" and last is not None and after > 0:
            lam = [np.log((1 - level) / level) for level in (sigmas[i - 1], s, after)]
            h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
            both = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last
            x = after / s * x - (1 - after) * np.expm1(-h) * both
        else:
            x = x + d * dt
        last = denoised
    return x


@pytest.mark.parametrize("rule", ["euler", "heun", "midpoint", "dpmpp_2m"])
@pytest.mark.parametrize(
    "sigmas", [[0.97, 0.8, 0.79, 0.3, 0.0], [0.6, 0.2, 0.15, 0.01], [0.5, 0.0]]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_against_k_diffusion(rule, sigmas, batch):
    shift = np.random.default_rng(1).standard_normal((2, 5))

    def denoise(x, s):
        return x - s * np.sin(x * (1 + s) + shift)

    def model(x, sigma):
        return torch.from_numpy(denoise(x.numpy(), sigma.numpy()[:, None, None]))

    x = np.random.default_rng(0).standard_normal((batch, 2, 5))
    levels = torch.tensor(sigmas, dtype=torch.float64)
    found = SAMPLERS[rule](model, torch.from_numpy(x), levels, disable=True)
    np.testing.assert_allclose(
        found.numpy(), in_k_diffusion(rule, denoise, x, sigmas), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("dtype", "of_levels"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
)
def test_dtypes_and_gradients(name, dtype, of_levels):
    """A float64 schedule does not widen the model's float32 arithmetic; weights do not make a graph."""
    weight, seen = torch.nn.Parameter(torch.tensor(0.3)), set()

    def model(x, sigma):
        seen.add(sigma.dtype)
        return x - sigma[:, None] * torch.sin(x * weight)

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = SAMPLERS[name](model, x.clone().requires_grad_(), levels(4, of_levels), disable=True)
    assert seen == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (found.dtype, found.requires_grad) == (dtype, False)
    exact = SAMPLERS[name](model, x.double(), levels(4), disable=True)
    size = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (found - exact).abs().max() < size
    assert SAMPLERS[name](model, x[:0], levels(4, of_levels), disable=True).shape == (0, 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_above_one_belong_to_rules_in_slopes(name):
    x, sigmas = torch.ones(1, 2), torch.tensor([14.6, 3.0, 1.0, 0.0])
    if name in ("dpmpp_2m", "unipc"):
        with pytest.raises(ValueError, match="sigmas must be those of a flow, from 1 at noise"):
            SAMPLERS[name](Model(), x, sigmas, disable=True)
    else:
        assert torch.isfinite(SAMPLERS[name](Model(), x, sigmas, disable=True)).all()
    rounded = torch.tensor([1.0000001, 0.5, 0.0])
    assert torch.isfinite(SAMPLERS[name](Model(), x, rounded, disable=True)).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_answers_in_the_same_memory(name):
    """Which k-diffusion's dpmpp_2m takes, and loses the earlier answer by."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    buffer, model = torch.empty_like(x), Model()

    def run(call):
        return SAMPLERS[name](call, x, levels(4, torch.float32), disable=True)

    def static(x, sigma):
        return buffer.copy_(model(x, sigma))

    if name in ("euler", "midpoint", "fireflow"):
        assert torch.equal(run(static), run(model))
    else:
        with pytest.raises(ValueError, match="model must not overwrite what it returned before"):
            run(static)
