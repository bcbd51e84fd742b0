"""Loss objects: values and gradients against the formulas written out in torch, names, errors."""

import pytest
import torch

from rfkernels.flow.losses import FlowLoss, get_loss


def by_hand(kind, residual, c):
    flat = residual.flatten(1)
    count = flat.shape[1]
    if kind == "mse":
        return flat.square().mean(1)
    if kind == "pseudo_huber":
        return ((flat.square().sum(1) + c**2).sqrt() - c) / count
    return ((flat.square() + c**2).sqrt() - c).mean(1)


@pytest.mark.parametrize("kind", ["mse", "pseudo_huber", "pseudo_huber_elementwise"])
def test_values_and_gradients(kind):
    prediction = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 5, dtype=torch.float64)
    c = None if kind == "mse" else 0.3
    loss = FlowLoss(kind, c)(prediction, target)
    expected = by_hand(kind, prediction - target, c).mean()
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, prediction)
    (theirs,) = torch.autograd.grad(expected, prediction)
    torch.testing.assert_close(ours, theirs)


def test_default_constants():
    prediction, target = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    for kind, c in (("pseudo_huber", 0.00054 * 192), ("pseudo_huber_elementwise", 1e-3)):
        loss = FlowLoss(kind)(prediction, target, reduction="none")
        torch.testing.assert_close(loss, by_hand(kind, prediction - target, c))


def test_options_reach_the_kernel():
    prediction, x0, x1 = torch.randn(3, 4, 6)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    losses = FlowLoss()(prediction, x0=x0, x1=x1, weight=weight, reduction="none")
    torch.testing.assert_close(losses, weight * (prediction - (x1 - x0)).square().mean(1))


def test_names_callables_and_errors():
    assert get_loss("l2") == get_loss("mse") == FlowLoss("mse")
    assert get_loss("pseudo-huber") == FlowLoss("pseudo_huber")
    assert get_loss(torch.dist) is torch.dist
    with pytest.raises(ValueError, match=r"loss: must be one of mse, .*; got 'lpips'"):
        get_loss("lpips")
    with pytest.raises(TypeError, match="got int"):
        get_loss(1)
    with pytest.raises(ValueError, match="got 'l1'"):
        FlowLoss("l1")
    with pytest.raises(ValueError, match="huber_c is for the Huber kinds"):
        FlowLoss("mse", 0.1)
    with pytest.raises(ValueError, match="huber_c must be positive"):
        FlowLoss("pseudo_huber", 0.0)
