"""Samplers of k-diffusion's kind: orders, calls, NumPy transcriptions, and the diffusers schedulers on the same levels."""

from __future__ import annotations

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
    assert all(entry["sigma"] == entry["sigma_hat"] == 1 - entry["i"] / 4 for entry in seen)
    assert all(entry["denoised"].shape == entry["x"].shape == x.shape for entry in seen)
    assert torch.equal(seen[0]["x"], x)
    assert quiet.dtype == x.dtype
    pytest.importorskip("tqdm")
    assert torch.equal(SAMPLERS[name](Model(), x, levels(4, torch.float32), **options), quiet)
    assert "4/4" in capsys.readouterr().err
    # a run may end above 0, or be empty
    part = SAMPLERS[name](Model(), x, torch.tensor([1.0, 0.6, 0.3]), disable=True)
    assert torch.isfinite(part).all()
    assert SAMPLERS[name](Model(), x, torch.tensor([1.0]), disable=True) is x
    for bad in (torch.tensor([0.5, 1.0]), torch.tensor([1.0, -0.5]), torch.ones(2, 2), [1.0, 0.0]):
        with pytest.raises(ValueError, match=f"sample_rf_{name}: sigmas must"):
            SAMPLERS[name](Model(), x, bad, disable=True)
