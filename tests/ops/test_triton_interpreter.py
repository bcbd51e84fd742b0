"""The Triton kernels against the reference: in Triton's interpreter on the CPU, on the device where there is one.

Elementwise results are compared bit for bit. The interpreter truncates to bfloat16 instead of rounding, so there one unit in
the last place is allowed. Losses are sums in another order.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rfkernels as rf
from rfkernels.backends import triton as package
from rfkernels.backends.reference import flow_loss as reference_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = package.unavailable_reason(DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]


def draw(*shape: int, dtype: torch.dtype = F32, key: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * key + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(DEVICE, dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == BF16 and package.interpreted():
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0.0, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


def both(call, op: str, launches: int = 1):
    """Results of the Triton backend and of the reference; the launches are counted in Triton's own launcher."""
    before = package.launches[op]
    with rf.use_backend("triton"):
        actual = call()
    assert package.launches[op] == before + launches
    with rf.use_backend("reference"):
        expected = call()
    assert package.launches[op] == before + launches
    wrap = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    return [pair for pair in zip(wrap(actual), wrap(expected), strict=True) if pair != (None, None)]


def check(call, op: str, launches: int = 1) -> None:
    for actual, expected in both(call, op, launches):
        same(actual, expected)


def scalars(batch: int):
    """dt as every caller may give it: float, 0-d, per sample, per sample with a stride, float64 for a float32 state."""
    table = draw(batch, 3, key=9)
    return [0.1, torch.tensor(-0.3, device=DEVICE), table[:, 1], table[:, 0].contiguous().double()]


WIDE_AND_NARROW = [((3, 701), dtype) for dtype in DTYPES] + [
    ((2, 3, 16, 24), F32),
    ((70, 2), BF16),
    ((5,), F64),
]


@pytest.mark.parametrize(("shape", "dtype"), WIDE_AND_NARROW)
def test_steps(shape, dtype):
    x, v, u = (draw(*shape, dtype=dtype, key=k) for k in range(3))
    low = v.to(BF16)
    for dt in scalars(shape[0]):
        check(lambda dt=dt: rf.euler_step(x, low, dt), "ode_step")
        check(lambda dt=dt: rf.taylor_step(x, (v, u, low), dt), "ode_step")
        check(lambda dt=dt: rf.linear_step(x, (v, u), (dt, 0.7), x_coefficient=dt), "ode_step")
    g = scalars(shape[0])[2]
    check(lambda: rf.euler_step(x, v, 0.1, v_uncond=u, guidance_scale=g), "ode_step")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_orders(order):
    x, *d = (draw(2, 40, key=k) for k in range(4))
    check(lambda: rf.taylor_step(x, d[:order], 1.0 / 7.0), "ode_step")


@pytest.mark.parametrize("count", [0, 1, 8])
def test_linear_terms(count):
    x, tensors = draw(2, 40), [draw(2, 40, key=k + 1) for k in range(count)]
    check(
        lambda: rf.linear_step(
            x, tensors, [0.1 * k - 0.3 for k in range(count)], x_coefficient=0.5
        ),
        "ode_step",
    )


def test_a_full_row_and_a_ragged_tail():
    x, v = draw(2500), draw(2500, key=1)
    check(lambda: rf.euler_step(x, v, 0.25), "ode_step")
    check(lambda: rf.linear_step(x, (v,), (0.5,), noise_scale=0.1, seed=3), "ode_step")


@pytest.mark.parametrize("cast", [F32, F16, F64])
def test_cast_copies_the_stored_state(cast):
    x, v = draw(3, 50, dtype=F16), draw(3, 50, dtype=F16, key=1)
    check(lambda: rf.euler_step(x, v, 0.1, cast=cast), "ode_step")
    with rf.use_backend("triton"):
        state, copy = rf.euler_step(x, v, 0.1, cast=cast)
    assert torch.equal(copy, state.to(cast))


def test_in_place_with_out_and_cast_tensors():
    x, v = draw(3, 700), draw(3, 700, key=1)
    expected = x + 0.1 * v
    copy = torch.empty(3, 700, dtype=F16, device=DEVICE)
    with rf.use_backend("triton"):
        state, given = rf.euler_step(x, v, 0.1, out=x, cast=copy)
    assert state is x
    assert given is copy
    assert torch.equal(x, expected)
    assert torch.equal(copy, expected.half())


STRIDES = {
    "transposed": lambda t: t.transpose(1, 3),
    "every second": lambda t: t[..., ::2],
    "slice of channels": lambda t: t[:, 1:3],
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:, :1].expand_as(t),
    "offset": lambda t: t.flatten()[5:-7].unflatten(0, (2, -1)),
    "six dimensions": lambda t: (
        t[..., ::2].unflatten(2, (2, 3)).unflatten(-1, (2, 2)).transpose(1, 4)
    ),
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("partner", ["the same", "contiguous"])
def test_strides(name, partner):
    view = STRIDES[name]
    x, v = view(draw(2, 4, 6, 8)), view(draw(2, 4, 6, 8, key=1))
    if partner == "contiguous":
        v = v.contiguous()
    dt = draw(2, key=2)
    check(lambda: rf.euler_step(x, v, 0.3), "ode_step")
    check(lambda: rf.euler_step(x, v, dt), "ode_step")
    check(lambda: rf.linear_step(x, (v,), (0.3,), noise_scale=dt, seed=8), "ode_step")
    check(
        lambda: rf.linear_step(
            x, (v,), (0.3,), noise_scale=0.1, seed=torch.tensor([8, 9], device=DEVICE)
        ),
        "ode_step",
    )
    check(lambda: rf.interpolate(x, dt.abs(), x0=v), "interpolate")
    out = torch.full((x.numel() * 2,), 7.0, device=DEVICE)
    target = out[::2].view(x.shape)
    with rf.use_backend("triton"):
        rf.euler_step(x, v, 0.3, out=target)
    assert torch.equal(target, x + 0.3 * v)
    assert (out[1::2] == 7.0).all(), "memory between the elements was written"


def test_64_bit_offsets(monkeypatch):
    from rfkernels.backends.triton import geometry

    monkeypatch.setattr(geometry, "_INT32", 0)  # the path of tensors that need them
    x, v = draw(2, 5, 302), draw(2, 302, 5, key=1).transpose(1, 2)
    check(lambda: rf.euler_step(x, v, 0.1), "ode_step")
    check(lambda: rf.interpolate(x, draw(2, key=3).abs(), seed=4), "interpolate")
    check(lambda: rf.randn(3001, seed=4, device=DEVICE), "random")
    for actual, expected in both(
        lambda: rf.flow_loss(x.flatten(), v.flatten(), reduction="none"), "flow_loss"
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)
    p = draw(2, 5003)
    for actual, expected in both(
        lambda: rf.flow_loss(p, x1=-p, seed=3, reduction="none"), "flow_loss", 2
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0.0)


def test_nothing_is_written_outside_the_output():
    for size in (1, 3, 1023, 1025):
        memory = torch.full((size + 64,), 7.0, device=DEVICE)
        out = memory[32 : 32 + size]
        with rf.use_backend("triton"):
            rf.euler_step(draw(size), draw(size, key=1), 0.1, out=out)
        assert (memory[:32] == 7.0).all()
        assert (memory[32 + size :] == 7.0).all()


PATHS = ["linear", "trigonometric", "vp", "sub-vp"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_interpolate(path, dtype):
    for shape, kinds in (((3, 701), "per sample"), ((33, 6), "per sample, 0-d, float")):
        x1, x0 = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, key=1)
        t = torch.linspace(0.0, 0.96, shape[0], device=DEVICE)
        for time in (t, t[1], 0.3)[: kinds.count(",") + 1]:
            for keys in ({"x0": x0}, {"seed": 5, "offset": 2**33 + 1}):
                pairs = both(
                    lambda x1=x1, keys=keys, time=time: rf.interpolate(
                        x1, time, path=path, return_x0=True, **keys
                    ),
                    "interpolate",
                )
                for actual, expected in pairs:
                    if dtype == F64 and path != "linear":  # another float64 sine and exponential
                        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
                    elif DEVICE == "cuda" and path != "linear":
                        torch.testing.assert_close(
                            actual, expected, rtol=1.3e-6 if dtype == F32 else 8e-3, atol=1e-6
                        )
                    else:
                        same(actual, expected)


def test_a_default_device_does_not_matter():
    """The coefficients at a number are found on the CPU; CUDA as the default made them wait, and fail in a capture."""
    x1 = draw(2, 8)
    with torch.device("meta"):
        pairs = both(lambda: rf.interpolate(x1, 0.25, seed=1, path="vp"), "interpolate")
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1.3e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 1.0, -0.25, 2.75])
def test_trigonometric_ends_and_beyond(t):
    x1, x0, time = (
        draw(2, 8, dtype=F64),
        draw(2, 8, dtype=F64, key=1),
        torch.full((2,), t, dtype=F64, device=DEVICE),
    )
    for actual, expected in both(
        lambda: rf.interpolate(x1, time, x0=x0, path="trigonometric"), "interpolate"
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


def test_custom_path_with_coefficients_per_sample():
    class Cubic:
        def coefficients(self, t):
            return t**3, (1 - t) ** 2, 3 * t**2, -2 * (1 - t)

    x1, t = draw(3, 50), torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    check(lambda: rf.interpolate(x1, t, seed=3, path=Cubic()), "interpolate")
    check(lambda: rf.interpolate(x1, 0.25, seed=3, path=Cubic()), "interpolate")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", [rf.randn, rf.rand])
def test_random(distribution, dtype):
    words = torch.tensor([3, 2**62 + 5, 2**40], device=DEVICE)
    keys = [
        (5, 0), (2**63 - 1, 2**63 - 1), (2**31, 2**32 + 2**24), (words[1], words[2]), (words, 9), (7, words), (words, words),
    ]  # fmt: skip
    for shape in ((3, 5), (3, 701)):
        for seed, offset in keys if dtype == F32 else keys[1::3]:
            check(
                lambda s=shape, a=seed, b=offset: distribution(
                    s, seed=a, offset=b, device=DEVICE, dtype=dtype
                ),
                "random",
            )


def test_seeds_per_sample_draw_what_each_would_draw_alone():
    seeds = torch.tensor([4, 2**45], device=DEVICE)
    with rf.use_backend("triton"):
        together = rf.randn(2, 7, 11, seed=seeds, offset=3)
        alone = [rf.randn(7, 11, seed=int(seed), offset=3, device=DEVICE) for seed in seeds]
    assert torch.equal(together, torch.stack(alone))


KINDS = ["mse", "pseudo_huber", "pseudo_huber_elementwise"]
# Sums of n terms in float32 in another order: about sqrt(n) 2^-24; a root and a quotient add a few units.
LOSS_TOLERANCE = {F32: 2e-6, F64: 1e-13, BF16: 2e-6, F16: 2e-6}
GRADIENT_TOLERANCE = {F32: 1e-6, F64: 1e-13, BF16: 2**-7, F16: 2**-10}


LOSS_CASES = [((3, 301), dtype) for dtype in DTYPES] + [
    ((33, 6), F16),
    ((2, 4097), F32),
    ((1, 4096), F32),
    ((5,), F64),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), LOSS_CASES)
def test_flow_loss(shape, kind, dtype):
    p, x1, x0 = (draw(*shape, dtype=dtype, key=k) for k in range(3))
    weight = draw(*shape[:1], key=5).abs()
    elements = p[0].numel()
    launches = 2 if elements > 4096 else 1
    sources = [
        {"target": x1}, {"x1": x1, "x0": x0}, {"x1": x1, "seed": 7},
        {"x1": x1, "seed": torch.arange(shape[0], device=DEVICE)},
    ]  # fmt: skip
    for keys in sources:
        leaf = p.clone().requires_grad_()
        with rf.use_backend("triton"):
            before = package.launches["flow_loss"]
            loss = rf.flow_loss(leaf, weight=weight, kind=kind, reduction="none", **keys)
            assert package.launches["flow_loss"] == before + launches
        arguments = [keys.get(k) for k in ("target", "x0", "x1", "seed")]
        c = 1e-3 if kind.endswith("elementwise") else 0.00054 * elements
        losses = torch.empty(shape[0], dtype=loss.dtype, device=DEVICE)
        expected = torch.empty_like(p)
        reference_loss.flow_loss(p, *arguments, 0, weight, kind, c, 1.0, losses, expected)
        torch.testing.assert_close(
            loss.detach(), losses * weight.to(losses.dtype), rtol=LOSS_TOLERANCE[dtype], atol=1e-12
        )
        (actual,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(
            actual, expected, rtol=GRADIENT_TOLERANCE[dtype], atol=1e-7 if dtype == F16 else 1e-12
        )


def test_mse_gradient_is_bit_equal():
    p, target = draw(3, 301), draw(3, 301, key=1)
    gradients = []
    for name in ("triton", "reference"):
        leaf = p.clone().requires_grad_()
        with rf.use_backend(name):
            gradients += torch.autograd.grad(rf.flow_loss(leaf, target), leaf)
    # The reference's autograd multiplies in another order.
    torch.testing.assert_close(*gradients, rtol=1.2e-7, atol=0.0)


def test_long_samples_in_several_tiles_a_chunk(monkeypatch):
    from rfkernels.backends.triton import flow_loss as kernels

    monkeypatch.setattr(kernels, "CHUNKS", 2)  # five tiles in two chunks of three
    p, target = draw(2, 4 * 2048 + 77), draw(2, 4 * 2048 + 77, key=1)
    for kind in KINDS:
        for actual, expected in both(
            lambda kind=kind: rf.flow_loss(p, target, kind=kind, reduction="none"), "flow_loss", 2
        ):
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0.0)
        leaf = p.clone().requires_grad_()
        with rf.use_backend("triton"):
            (actual,) = torch.autograd.grad(rf.flow_loss(leaf, target, kind=kind), leaf)
        c = 1e-3 if kind.endswith("elementwise") else 0.00054 * p.shape[1]
        expected, losses = torch.empty_like(p), torch.empty(2, device=DEVICE)
        reference_loss.flow_loss(
            p, target, None, None, None, 0, None, kind, c, 0.5, losses, expected
        )
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


def test_loss_of_strided_predictions_and_a_nan_in_one_sample():
    p, target = draw(3, 8, 6).transpose(1, 2), draw(3, 6, 8, key=1)
    for actual, expected in both(lambda: rf.flow_loss(p, target, reduction="none"), "flow_loss"):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)
    p[1, 2, 3] = float("nan")
    with rf.use_backend("triton"):
        assert rf.flow_loss(p, target, reduction="none").isnan().tolist() == [False, True, False]


def test_infinities_and_nans_pass_as_in_the_reference():
    x = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38], device=DEVICE
    )
    with np.errstate(all="ignore"):  # the interpreter computes in numpy
        check(lambda: rf.euler_step(x, x.flip(0), 2.0), "ode_step")
        check(lambda: rf.euler_step(x, x, float("nan")), "ode_step")
        check(lambda: rf.euler_step(x.double(), x.double(), float("inf")), "ode_step")


def test_empty_tensors_launch_nothing():
    for shape in ((0,), (0, 4), (3, 0)):
        x = torch.empty(shape, device=DEVICE)
        check(lambda x=x: rf.euler_step(x, x, 0.1), "ode_step", 0)
        check(lambda x=x: rf.interpolate(x, 0.5, seed=1), "interpolate", 0)
        check(lambda s=shape: rf.randn(s, seed=1, device=DEVICE), "random", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_samples_without_elements_is_that_of_the_reference(kind):
    empty = torch.empty(3, 0, device=DEVICE)
    with np.errstate(all="ignore"):
        check(lambda: rf.flow_loss(empty, empty, kind=kind, reduction="none"), "flow_loss")


def test_zero_dimensions():
    x, v = draw(1)[0], draw(1, key=1)[0]
    check(lambda: rf.euler_step(x, v, 0.1), "ode_step")
    check(lambda: rf.interpolate(x, 0.5, seed=1), "interpolate")
