"""Inputs that once gave wrong numbers, one test each."""

from __future__ import annotations

import pytest
import torch

import rfkernels as rf


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["mse", "pseudo_huber", "pseudo_huber_elementwise"])
def test_float16_gradient_survives_until_the_loss_scale(kind, weighted):
    """2 / (B d) of a residual is below float16's range; the loss scale arrives in the backward."""
    generator = torch.Generator().manual_seed(0)
    prediction = (0.05 * torch.randn(32, 3, 32, 32, generator=generator)).half()
    target = torch.zeros(prediction.shape)
    weight = torch.rand(32, generator=generator) if weighted else None
    scale = 2.0**18

    p = prediction.clone().requires_grad_()
    y = target.clone().requires_grad_()
    (rf.flow_loss(p, y, weight=weight, kind=kind) * scale).backward()
    q = prediction.float().requires_grad_()
    (rf.flow_loss(q, target, weight=weight, kind=kind) * scale).backward()

    torch.testing.assert_close(p.grad, q.grad.half(), rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(y.grad, -q.grad, rtol=2e-3, atol=1e-6)


def test_guided_gradient_multiplies_step_and_scale_in_the_compute_type():
    """dt * g of two bfloat16 scalars was rounded to bfloat16 in the backward only."""
    x, u = torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)
    v = torch.zeros(2, 3, requires_grad=True)
    dt = torch.tensor([0.1, 0.3], dtype=torch.bfloat16)
    g = torch.tensor(7.3, dtype=torch.bfloat16)
    rf.euler_step(x, v, dt, v_uncond=u, guidance_scale=g).sum().backward()
    expected = (dt.float() * g.float()).reshape(2, 1).expand(2, 3)
    assert torch.equal(v.grad, expected)
    torch.testing.assert_close(u.grad, dt.float().reshape(2, 1).expand(2, 3) - expected)
