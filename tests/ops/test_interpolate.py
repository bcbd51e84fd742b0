"""Interpolation on every backend and level: bits of the reference, closed forms, gradients, drawn sources, memory."""

# ruff: noqa: E731  (the closures run before the loop goes on)
from __future__ import annotations

import math

import pytest
import torch
from cells import (
    FAST_CELLS,
    INTERPRETER,
    NATIVE,
    NATIVE_CPU,
    Cell,
    reference,
    results,
    same_bits,
    same_results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import (
    LAYOUTS,
    laid_out,
    normal,
    operands,
    partner_dtypes,
    scalar,
    scalars,
    seeds,
    shapes,
)
from tolerances import BF16, DTYPES, F16, F32, F64, combination, within

import rfkernels as rf
from rfkernels.flow import paths

PATHS = ("linear", "trigonometric", "vp", "sub-vp")
PARITY_SHAPES = [(3, 701), (2, 3, 17, 24), (70, 3), (2501,)]


class Cubic:
    """A path that has no name."""

    def coefficients(self, t):
        return t**3, (1 - t) ** 2, 3 * t**2, -2 * (1 - t)


def compare(cell: Cell, actual, expected, dtype, path, what=""):
    """Bits; float64 named paths go through two maths libraries: a few units of the largest term."""
    if (
        path not in ("linear",)
        and isinstance(path, str)
        and (dtype == F64 or not cell.exact or cell.interpreted)
    ):
        for a, e in zip(results(actual), results(expected), strict=True):
            unit = {F64: 2.0**-50, F32: 2.0**-21, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
            torch.testing.assert_close(a.cpu(), e.cpu(), rtol=unit, atol=unit * 32, equal_nan=True)
    else:
        same_results(cell, actual, expected, (path, what))


@pytest.mark.parametrize("cell", INTERPRETER)
@pytest.mark.parametrize("path", ["linear", "sub-vp"])
def test_bits_of_the_reference_in_the_interpreter(cell: Cell, path):
    bits_of_the_reference(cell, F32, path, PARITY_SHAPES[:1])


@pytest.mark.parametrize("cell", FAST_CELLS)
@pytest.mark.parametrize("path", [*PATHS, Cubic()], ids=[*PATHS, "custom"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cell_gives_the_bits_of_the_reference(cell: Cell, dtype, path):
    bits_of_the_reference(cell, dtype, path, PARITY_SHAPES)


def bits_of_the_reference(cell: Cell, dtype, path, shapes_) -> None:
    for shape in shapes_:
        layout = LAYOUTS[(len(shape) + shape[0]) % len(LAYOUTS)]
        x1, x0 = (
            laid_out(normal(*shape, dtype=dtype, key=k), layout).to(cell.device) for k in range(2)
        )
        for kind in ("float", "per sample, strided"):
            t = (
                scalar(kind, 0.45, shape[0])
                if kind == "float"
                else scalar(kind, 0.45, shape[0]).clamp(0, 0.95)
            )
            t = t if isinstance(t, float) else t.to(cell.device)
            for source in ({"x0": x0}, {"seed": 2**62 + 5, "offset": 2**40 + 7}):
                call = lambda t=t, x1=x1, source=source: rf.interpolate(
                    x1, t, path=path, return_x0=True, **source
                )
                compare(
                    cell,
                    cell.run("interpolate", call),
                    reference(call),
                    dtype,
                    path,
                    (kind, shape, list(source)),
                )


@settings(max_examples=60)
@given(st.data())
def test_any_input(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    special = data.draw(st.booleans())
    path = data.draw(st.sampled_from((*PATHS, Cubic())))
    x1 = data.draw(operands(shape, dtype, special=special))
    t = data.draw(scalars(shape[0]))
    options = {"path": path, "return_x0": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["x0"] = data.draw(
            operands(shape, data.draw(st.sampled_from(partner_dtypes(dtype))), special=special)
        )
    else:
        options |= {"seed": data.draw(seeds(shape[0])), "offset": data.draw(seeds(shape[0]))}
    if isinstance(path, str) and path != "linear":
        t = t.clamp(0, 1) if isinstance(t, torch.Tensor) else min(max(t, 0.0), 1.0)
        if dtype == F64 and special:
            return  # two maths libraries and infinities: nothing exact to say
    call = lambda: rf.interpolate(x1, t, **options)
    expected = reference(call)
    for cell in NATIVE_CPU:
        compare(cell, cell.run("interpolate", call, launches=x1.numel() > 0), expected, dtype, path)


@pytest.mark.parametrize("cell", NATIVE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_near_the_float64_truth(cell: Cell, dtype, path):
    x1, x0 = (normal(5, 411, dtype=dtype, key=k, device=cell.device) for k in range(2))
    t = torch.linspace(0, 0.95, 5, device=cell.device)
    xt, target, _ = cell.run("interpolate", lambda: rf.interpolate(x1, t, x0=x0, path=path))
    alpha, sigma, dalpha, dsigma = (
        c[:, None] for c in paths.get_path(path).coefficients(t.double())
    )
    a, b = x1.double(), x0.double()
    for actual, c1, c0 in ((xt, alpha, sigma), (target, dalpha, dsigma)):
        truth, size = c1 * a + c0 * b, (c1 * a).abs() + (c0 * b).abs()
        within(actual, truth, combination(dtype, truth, size, 2), path)


def test_named_paths_in_float64_against_their_formulas():
    t = torch.linspace(0, 0.99, 100, dtype=F64)
    one, zero = torch.ones(100, 1, dtype=F64), torch.zeros(100, 1, dtype=F64)
    r = 1 - t
    a = torch.exp(-0.25 * 19.9 * r**2 - 0.05 * r)
    da = a * (0.5 * 19.9 * r + 0.05)
    half_pi = math.pi / 2
    formulas = {
        "linear": (t, r, torch.ones(100), -torch.ones(100)),
        "trigonometric": (
            torch.sin(half_pi * t), torch.cos(half_pi * t),
            half_pi * torch.cos(half_pi * t), -half_pi * torch.sin(half_pi * t),
        ),
        "vp": (a, torch.sqrt(1 - a**2), da, -a * da / torch.sqrt(1 - a**2)),
        "sub-vp": (a, 1 - a**2, da, -2 * a * da),
    }  # fmt: skip
    for cell in NATIVE_CPU:
        for name, (alpha, sigma, dalpha, dsigma) in formulas.items():
            with cell.active():
                of_data, of_noise = (
                    rf.interpolate(one, t, x0=zero, path=name),
                    rf.interpolate(zero, t, x0=one, path=name),
                )
            for actual, truth in zip(
                (*of_data[:2], *of_noise[:2]), (alpha, dalpha, sigma, dsigma), strict=True
            ):
                torch.testing.assert_close(actual[:, 0], truth.double(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_ends_of_the_path(path):
    x1, x0 = normal(3, 100, dtype=F64), normal(3, 100, dtype=F64, key=1)
    start, end = (
        rf.interpolate(x1, 0.0, x0=x0, path=path),
        rf.interpolate(x1, 1.0, x0=x0, path=path),
    )
    torch.testing.assert_close(end.xt, x1, rtol=0, atol=1e-15)
    remaining = math.exp(-0.25 * 19.9 - 0.05)  # VP keeps this much of the data at t = 0
    atol = 1e-15 if path in ("linear", "trigonometric") else 4 * remaining
    torch.testing.assert_close(start.xt, x0, rtol=0, atol=atol)
    if path == "linear":
        same_bits(start.xt, x0)
        same_bits(end.xt, x1)
        same_bits(start.target, x1 - x0)
    if path == "vp":
        assert end.target.isinf().all()


@pytest.mark.parametrize("path", PATHS)
def test_target_is_the_derivative_of_the_point(path):
    x1, x0, t, h = (
        normal(4, 9, dtype=F64),
        normal(4, 9, dtype=F64, key=1),
        torch.linspace(0.1, 0.9, 4, dtype=F64),
        1e-6,
    )
    after, before = (
        rf.interpolate(x1, t + h, x0=x0, path=path).xt,
        rf.interpolate(x1, t - h, x0=x0, path=path).xt,
    )
    target = rf.interpolate(x1, t, x0=x0, path=path).target
    torch.testing.assert_close((after - before) / (2 * h), target, rtol=1e-7, atol=1e-8)


def test_paths_by_object_alias_and_name_agree():
    x1, t = normal(3, 700), torch.tensor([0.1, 0.5, 0.9])
    pairs = [
        ("linear", "straight"), ("trigonometric", "spherical"), ("sub-vp", "subvp"), ("linear", paths.LinearPath()),
        ("trigonometric", paths.TrigonometricPath()), ("vp", paths.VPPath()), ("sub-vp", paths.SubVPPath()),
    ]  # fmt: skip
    for name, other in pairs:
        for a, b in zip(
            rf.interpolate(x1, t, seed=1, path=name)[:2],
            rf.interpolate(x1, t, seed=1, path=other)[:2],
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_drawn_sources_are_randn_in_the_compute_type():
    for dtype in DTYPES:
        x1 = normal(3, 700, dtype=dtype)
        z = rf.randn(3, 700, seed=5, offset=2**33)
        for cell in NATIVE_CPU:
            with cell.active():
                drawn = rf.interpolate(x1, 0.3, seed=5, offset=2**33, return_x0=True)
                given = rf.interpolate(x1, 0.3, x0=z if dtype != F64 else z.double())
            same_bits(drawn.x0, z.to(dtype))
            same_bits(drawn.xt, given.xt)
            same_bits(drawn.target, given.target)


def test_seeds_per_sample_draw_what_each_would_draw_alone():
    x1, s, o = normal(4, 5, 77), torch.tensor([3, 2**40, 5, 9]), torch.tensor([0, 1, 2**35, 2])
    for cell in NATIVE_CPU:
        with cell.active():
            together = rf.interpolate(x1, 0.5, seed=s, offset=o)
            for b in range(4):
                alone = rf.interpolate(x1[b], 0.5, seed=int(s[b]), offset=int(o[b]))
                same_bits(together.xt[b], alone.xt)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_the_data_or_the_source(layout):
    for cell in NATIVE_CPU:
        for swap in (False, True):
            x1, x0 = laid_out(normal(3, 40, 33), layout), laid_out(normal(3, 40, 33, key=1), layout)
            t = torch.tensor([0.2, 0.5, 0.9])
            expected = reference(lambda x1=x1, x0=x0, t=t: rf.interpolate(x1, t, x0=x0))
            out = (x1, x0) if swap else (x0, x1)
            found = cell.run(
                "interpolate", lambda x1=x1, x0=x0, t=t, o=out: rf.interpolate(x1, t, x0=x0, out=o)
            )
            assert found.xt is out[0]
            assert found.target is out[1]
            same_bits(out[0], expected.xt)
            same_bits(out[1], expected.target)


def test_out_that_holds_the_returned_source_or_overlaps():
    x1, x0 = normal(3, 500), normal(3, 500, key=1)
    expected = reference(lambda: rf.interpolate(x1, 0.3, x0=x0, return_x0=True))
    memory = torch.zeros(3, 501)
    found = rf.interpolate(
        x1, 0.3, x0=x0, return_x0=True, out=(memory[:, :-1], torch.empty(3, 500))
    )
    for a, b in zip(found, expected, strict=True):
        same_bits(a, b)
    source = x0.clone()
    found = rf.interpolate(x1, 0.3, x0=source, return_x0=True, out=(torch.empty(3, 500), source))
    same_bits(found.target, expected.target)
    same_bits(
        found.x0, expected.x0, "x0 must be what was given, though its memory now holds the target"
    )
    data = torch.cat((x1.flatten(), torch.zeros(7)))
    rf.interpolate(
        data[:1500].view(3, 500), 0.3, x0=x0, out=(data[7:].view(3, 500), torch.empty(3, 500))
    )
    same_bits(data[7:].view(3, 500), expected.xt)


def test_times_and_seeds_inside_the_output_are_read_before_it_is_written():
    x1, seeds_ = normal(3, 2000), torch.tensor([5, 6, 2**40])
    expected = reference(lambda: rf.interpolate(x1, x1[:, 1999], seed=seeds_))
    storage = torch.zeros(3 * 2000 * 4, dtype=torch.uint8)
    inside = storage.view(torch.int64)[4:7]
    inside.copy_(seeds_)
    out = storage.view(F32).view(3, 2000), x1
    found = rf.interpolate(x1, x1[:, 1999], seed=inside, out=out)
    same_bits(found.xt, expected.xt)
    same_bits(found.target, expected.target)


@pytest.mark.parametrize("path", [*PATHS, Cubic()], ids=[*PATHS, "custom"])
def test_gradients(path):
    x1, x0 = (normal(3, 5, dtype=F64, key=k).requires_grad_() for k in range(2))
    t = torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    for time in (t, t[1], 0.3):
        call = lambda a, b, time=time: rf.interpolate(a, time, x0=b, path=path)[:2]
        torch.autograd.gradcheck(call, (x1, x0))
        torch.autograd.gradgradcheck(call, (x1, x0))
    torch.autograd.gradcheck(lambda a: rf.interpolate(a, t, seed=3, path=path)[:2], (x1,))
    torch.autograd.gradcheck(
        lambda s: rf.interpolate(x1, s, x0=x0, path=path)[:2], (t.requires_grad_(),)
    )


def test_gradients_arrive_in_the_dtype_of_the_tensor():
    x1, x0 = normal(3, 50, dtype=F32).requires_grad_(), normal(3, 50, dtype=BF16).requires_grad_()
    point = rf.interpolate(x1, 0.25, x0=x0)
    (point.xt.sum() + 2 * point.target.sum()).backward()
    assert x1.grad.dtype == F32
    assert x0.grad.dtype == BF16
    same_bits(x1.grad, torch.full_like(x1, 2.25))
    same_bits(x0.grad, torch.full_like(x0, 0.75 - 2.0))


def test_permuting_the_batch_permutes_the_result():
    x1, x0, t = normal(5, 900), normal(5, 900, key=1), torch.rand(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for cell in NATIVE_CPU:
        with cell.active():
            a, b = rf.interpolate(x1, t, x0=x0), rf.interpolate(x1[order], t[order], x0=x0[order])
        same_bits(a.xt[order], b.xt)
        same_bits(a.target[order], b.target)


def test_nan_stays_in_its_sample():
    x1, t = normal(3, 300), torch.tensor([0.1, math.nan, 0.5])
    for cell in NATIVE_CPU:
        with cell.active():
            xt = rf.interpolate(x1, t, seed=1).xt
        assert xt.isnan().any(1).tolist() == [False, True, False]


def test_threads_do_not_change_a_bit(threads):
    x1, t = normal(3, 41, 1000), torch.tensor([0.1, 0.4, 0.9])
    for cell in NATIVE_CPU:
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(cell.run("interpolate", lambda: rf.interpolate(x1, t, seed=4)))
        for other in found[1:]:
            same_bits(other.xt, found[0].xt)
            same_bits(other.target, found[0].target)
