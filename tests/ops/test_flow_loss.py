"""Losses and gradients on every backend and level, against the written formulas in float64 and autograd through them."""

# ruff: noqa: B023  (the closures run before the loop goes on)
from __future__ import annotations

import math

import pytest
import torch
from cells import FAST_CELLS, INTERPRETER, NATIVE, NATIVE_CPU, Cell, reference, same_bits
from hypothesis import given
from hypothesis import strategies as st
from tensors import LAYOUTS, laid_out, normal, operands, shapes
from tolerances import BF16, DTYPES, F16, F32, F64, UNIT, compute, loss_sum, smallest, within

import rfkernels as rf

KINDS = ("mse", "pseudo_huber", "pseudo_huber_elementwise")
SOURCES = ("target", "x0 and x1", "drawn", "drawn per sample")


def default_c(kind: str, elements: int) -> float:
    return 1e-3 if kind == "pseudo_huber_elementwise" else 0.00054 * elements


def formula(kind: str, p, target, c: float, weight=None) -> torch.Tensor:
    """(B,) losses by the definition in the docstring."""
    r = (p - target).reshape(p.shape[0], -1)
    d = r.shape[1]
    if kind == "mse":
        losses = r.square().sum(1) / d
    elif kind == "pseudo_huber":
        losses = (torch.sqrt(r.square().sum(1) + c * c) - c) / d
    else:
        losses = (torch.sqrt(r.square() + c * c) - c).sum(1) / d
    return losses if weight is None else losses * weight


def magnitude(kind: str, p, parts, c: float) -> torch.Tensor:
    """(B,) the formula on sums of absolute values: what rounding errors are relative to."""
    total = (p.abs() + sum(t.abs() for t in parts)).reshape(p.shape[0], -1)
    d = total.shape[1]
    if kind == "mse":
        return total.square().sum(1) / d
    if kind == "pseudo_huber":
        return (torch.sqrt(total.square().sum(1) + c * c) + c) / d
    return (total + 2 * c).sum(1) / d


def make(source: str, shape, dtype, device="cpu", layout="contiguous"):
    """(prediction, keyword arguments, the target in float64, the tensors it is made of in float64)."""
    p, x1, x0 = (laid_out(normal(*shape, dtype=dtype, key=k), layout).to(device) for k in range(3))
    if source == "target":
        return p, {"target": x1}, x1.double(), [x1.double()]
    if source == "x0 and x1":
        return p, {"x0": x0, "x1": x1}, x1.double() - x0.double(), [x1.double(), x0.double()]
    seed = 2**62 + 9 if source == "drawn" else torch.arange(shape[0], device=device) * 2**40
    z = rf.randn(*shape, seed=seed, offset=3, device=device).double()
    return p, {"x1": x1, "seed": seed, "offset": 3}, x1.double() - z, [x1.double(), z]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", INTERPRETER)
def test_values_and_gradients_in_the_interpreter(cell: Cell, kind):
    near_the_truth(cell, kind, F32, [(3, 701)], SOURCES[2:])


@pytest.mark.parametrize("cell", FAST_CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_of_every_cell_near_the_float64_truth(cell: Cell, kind, dtype):
    shapes_ = [(3, 701), (2, 3, 17, 24), (70, 3), (2, 4097), (1, 9001), (5,)]
    near_the_truth(cell, kind, dtype, shapes_, SOURCES)


def near_the_truth(cell: Cell, kind: str, dtype, shapes_, sources) -> None:
    for n, shape in enumerate(shapes_):
        for source in sources:
            p, keys, target, parts = make(
                source, shape, dtype, cell.device, LAYOUTS[n % len(LAYOUTS)]
            )
            d = math.prod(shape[1:])
            c, weight = default_c(kind, d), torch.linspace(0.25, 2, shape[0], device=cell.device)
            leaf, truth_leaf = p.clone().requires_grad_(), p.double().requires_grad_()
            losses = cell.run(
                "flow_loss",
                lambda: rf.flow_loss(leaf, weight=weight, kind=kind, reduction="none", **keys),
            )
            assert losses.dtype == compute(dtype)
            truth = formula(kind, truth_leaf, target, c, weight.double())
            size = magnitude(kind, p.double(), parts, c) * weight.double()
            within(losses, truth, loss_sum(dtype, d) * size, (kind, shape, source))
            with cell.active():
                (grad,) = torch.autograd.grad(losses.sum(), leaf)
            (truth_grad,) = torch.autograd.grad(truth.sum(), truth_leaf)
            # d loss / d r is at most 2 (|p| + |t|) / d, and 1 / d for the Huber kinds, times the weight.
            whole = (p.double().abs() + sum(t.abs() for t in parts)).abs()
            slope = (
                2 * whole
                if kind == "mse"
                else 1 + whole / c
                if kind == "pseudo_huber_elementwise"
                else 1 + whole
            )
            slope = slope / d * weight.double().reshape(-1, *(1,) * (p.ndim - 1))
            bound = (
                8 * UNIT[compute(dtype)] * slope
                + 2 * UNIT[dtype] * truth_grad.abs()
                + smallest(dtype)
            )
            if kind == "pseudo_huber":
                bound = bound + loss_sum(dtype, d) * slope
            within(grad, truth_grad, bound, (kind, shape, source))


@pytest.mark.parametrize("cell", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_reductions_and_the_gradient_scale(cell: Cell, kind):
    p, target = (
        normal(7, 300, dtype=F64, device=cell.device),
        normal(7, 300, dtype=F64, key=1, device=cell.device),
    )
    weight = torch.linspace(0, 2, 7, dtype=F64, device=cell.device)
    c = default_c(kind, 300)
    for w in (None, weight):
        truth = formula(kind, p, target, c, w)
        for reduction, expected in (
            ("none", truth),
            ("sum", truth.sum()),
            ("mean", truth.sum() / 7),
        ):
            leaf, truth_leaf = p.clone().requires_grad_(), p.clone().requires_grad_()
            with cell.active():
                value = rf.flow_loss(leaf, target, weight=w, kind=kind, reduction=reduction)
            torch.testing.assert_close(value.detach(), expected, rtol=1e-13, atol=0)
            upstream = (
                torch.linspace(-1, 3, 7, dtype=F64, device=cell.device)
                if reduction == "none"
                else None
            )
            scale = 1.0 if reduction == "none" else 2.5
            with cell.active():
                (value * scale).backward(upstream)
            again = formula(kind, truth_leaf, target, c, w)
            again = (
                again if reduction == "none" else again.sum() / (7 if reduction == "mean" else 1)
            )
            (again * scale).backward(upstream)
            torch.testing.assert_close(leaf.grad, truth_leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_respect_to_every_tensor(kind):
    p, a, b = (normal(3, 4, dtype=F64, key=k).requires_grad_() for k in range(3))
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        options = {"kind": kind, "reduction": reduction, "huber_c": None if kind == "mse" else 0.3}
        torch.autograd.gradcheck(
            lambda p, t, w: rf.flow_loss(p, t, weight=w, **options), (p, a, weight)
        )
        torch.autograd.gradcheck(
            lambda p, x0, x1, w: rf.flow_loss(p, x0=x0, x1=x1, weight=w, **options),
            (p, a, b, weight),
        )
        torch.autograd.gradcheck(lambda p, x1: rf.flow_loss(p, x1=x1, seed=5, **options), (p, b))


def test_gradients_arrive_in_the_dtype_of_the_tensor():
    p, x1 = normal(3, 50, dtype=F32).requires_grad_(), normal(3, 50, dtype=BF16).requires_grad_()
    weight = torch.ones(3, dtype=F16).requires_grad_()
    rf.flow_loss(p, x1, weight=weight).backward()
    assert (p.grad.dtype, x1.grad.dtype, weight.grad.dtype) == (F32, BF16, F16)
    same_bits(x1.grad, (-p.grad).to(BF16))


def test_the_gradient_is_not_spoiled_by_a_second_backward():
    p, target = normal(3, 50).requires_grad_(), normal(3, 50, key=1)
    loss = rf.flow_loss(p, target)
    loss.backward(retain_graph=True)
    first = p.grad.clone()
    p.grad.mul_(3.0)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(p.grad, 4 * first, rtol=1e-6, atol=0)
    (third,) = torch.autograd.grad(loss, p)
    same_bits(third, first)


def test_a_second_derivative_is_a_clear_error_and_works_in_the_reference():
    p, target = normal(3, 5, dtype=F64).requires_grad_(), normal(3, 5, dtype=F64, key=1)
    for scale in (1.0, torch.tensor(2.0, dtype=F64, requires_grad=True)):
        loss = rf.flow_loss(p, target)
        (grad,) = torch.autograd.grad(loss * scale, p, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"flow_loss: the gradient comes from the forward pass.*reference"
        ):
            (loss + grad.square().sum()).backward()
    with rf.use_backend("reference"):
        torch.autograd.gradgradcheck(lambda p: rf.flow_loss(p, target, kind="pseudo_huber"), (p,))


def test_the_published_constant():
    # 2-RF++: c = 0.00054 d, 1.65888 for 3 x 32 x 32; the loss of a unit residual by hand.
    p, target = torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    d, c = 3072, 1.65888
    assert abs(0.00054 * d - c) < 1e-12
    expected = (math.sqrt(d + c * c) - c) / d
    for cell in NATIVE_CPU:
        with cell.active():
            loss = rf.flow_loss(p, target, kind="pseudo_huber")
            same_bits(loss, rf.flow_loss(p, target, kind="pseudo_huber", huber_c=c))
        torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)
    half = rf.flow_loss(0.5 * p, target, kind="pseudo_huber_elementwise")
    torch.testing.assert_close(half.item(), math.sqrt(0.25 + 1e-6) - 1e-3, rtol=1e-6, atol=0)


def test_against_torch_losses():
    p, target = normal(6, 500), normal(6, 500, key=1)
    torch.testing.assert_close(
        rf.flow_loss(p, target), torch.nn.functional.mse_loss(p, target), rtol=1e-6, atol=0
    )
    weight = torch.rand(6)
    expected = (torch.nn.functional.mse_loss(p, target, reduction="none").mean(1) * weight).mean()
    torch.testing.assert_close(rf.flow_loss(p, target, weight=weight), expected, rtol=1e-6, atol=0)


def test_tiny_residuals_keep_their_digits_under_a_large_constant():
    # sqrt(S + c^2) - c cancels in float32 when S is small beside c^2; the sum is in double.
    p, target = torch.full((2, 100), 1e-3), torch.zeros(2, 100)
    value = rf.flow_loss(p, target, kind="pseudo_huber", huber_c=1.0)
    s = 100 * float(torch.tensor(1e-3)) ** 2
    torch.testing.assert_close(value.item(), s / (math.sqrt(s + 1) + 1) / 100, rtol=1e-6, atol=0)


@given(st.data())
def test_any_input_agrees_between_levels_to_the_bit_and_with_the_reference(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    special = data.draw(st.booleans())
    kind, reduction = (
        data.draw(st.sampled_from(KINDS)),
        data.draw(st.sampled_from(("mean", "sum", "none"))),
    )
    p, target = (
        data.draw(operands(shape, dtype, special=special)),
        data.draw(operands(shape, dtype, special=special)),
    )
    weight = data.draw(st.sampled_from((None, torch.linspace(0, 2, shape[0]))))
    found = []
    for where in (*NATIVE_CPU, None):
        leaf = p.clone().requires_grad_()

        def call(leaf=leaf):
            loss = rf.flow_loss(leaf, target, weight=weight, kind=kind, reduction=reduction)
            return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

        found.append(
            reference(call)
            if where is None
            else where.run("flow_loss", call, launches=p.numel() > 0)
        )
    *levels, expected = found
    for loss, grad in levels[1:]:
        same_bits(loss, levels[0][0])
        same_bits(grad, levels[0][1])
    if not special:
        rtol = 1e-10 if dtype == F64 else 1e-4
        torch.testing.assert_close(levels[0][0], expected[0], rtol=rtol, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(
            levels[0][1].double(),
            expected[1].double(),
            rtol=16 * UNIT[dtype],
            atol=1e-4,
            equal_nan=True,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_in_their_sample(kind):
    for cell in NATIVE_CPU:
        for value in (math.nan, math.inf):
            p, target = normal(4, 900), normal(4, 900, key=1)
            p[2, 700] = value
            leaf = p.requires_grad_()
            loss = cell.run(
                "flow_loss", lambda: rf.flow_loss(leaf, target, kind=kind, reduction="none")
            )
            assert loss.isfinite().tolist() == [True, True, False, True]
            loss.sum().backward()
            assert leaf.grad.isfinite().all(1)[[0, 1, 3]].all()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(threads, kind):
    # Fewer samples than threads and more: both ways of sharing the work.
    for shape in ((2, 60_001), (9, 15_003)):
        p, target = normal(*shape), normal(*shape, key=1)
        expected = None
        for cell in NATIVE_CPU:
            for count in (1, 2, 3):
                threads(count)
                leaf = p.clone().requires_grad_()
                loss = cell.run(
                    "flow_loss",
                    lambda leaf=leaf: rf.flow_loss(leaf, target, kind=kind, reduction="none"),
                )
                (grad,) = torch.autograd.grad(loss.sum(), leaf)
                expected = expected or (loss.detach(), grad)
                same_bits(loss, expected[0])
                same_bits(grad, expected[1])


def test_drawn_targets_are_those_of_interpolate():
    x1, p = normal(4, 5, 77), normal(4, 5, 77, key=1)
    for seed, offset in ((11, 2**35), (torch.tensor([3, 2**40, 5, 9]), 7)):
        target = rf.interpolate(x1, 0.5, seed=seed, offset=offset).target
        for kind in KINDS:
            same_bits(
                rf.flow_loss(p, x1=x1, seed=seed, offset=offset, kind=kind),
                rf.flow_loss(p, target, kind=kind),
            )


def test_permuting_the_batch_permutes_the_losses():
    p, target, weight = normal(5, 900), normal(5, 900, key=1), torch.rand(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for kind in KINDS:
        a = rf.flow_loss(p, target, weight=weight, kind=kind, reduction="none")
        b = rf.flow_loss(p[order], target[order], weight=weight[order], kind=kind, reduction="none")
        same_bits(a[order], b)


def test_large_gradients_that_bypass_the_cache():
    p, target = normal(3, 400_001), normal(3, 400_001, key=1)
    expected = (p - target) * (torch.tensor(2.0) / 400_001)
    for cell in NATIVE_CPU:
        leaf = p.clone().requires_grad_()
        cell.run(
            "flow_loss", lambda leaf=leaf: rf.flow_loss(leaf, target, reduction="sum").backward()
        )
        same_bits(leaf.grad, expected)


def test_empty_batches_and_samples():
    for cell in NATIVE_CPU:
        with cell.active():
            assert rf.flow_loss(torch.empty(0, 3), torch.empty(0, 3), reduction="none").shape == (
                0,
            )
            assert rf.flow_loss(torch.empty(0, 3), torch.empty(0, 3), reduction="sum") == 0
            assert rf.flow_loss(torch.empty(0, 3), torch.empty(0, 3)).isnan()
            assert (
                rf.flow_loss(torch.empty(2, 0), torch.empty(2, 0), reduction="none").isnan().all()
            )
