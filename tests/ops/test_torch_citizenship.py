"""The ops inside torch: opcheck, transforms, modes, subclasses, views, version counters."""

# ruff: noqa: E731  (the closures run before the loop goes on)
from __future__ import annotations

import pytest
import torch
from cells import reference, results, same_bits
from tensors import normal
from tolerances import BF16, DTYPES, F16, F32, F64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rfkernels as rf

OPS = torch.ops.rfkernels


def samples(dtype: torch.dtype, requires_grad: bool) -> dict[str, tuple]:
    """Arguments of every registered op."""

    def tensor(key: int) -> torch.Tensor:
        return normal(3, 5, dtype=dtype, key=key).requires_grad_(requires_grad)

    each, seeds = torch.rand(3), torch.arange(3)
    return {
        "euler_step": (tensor(0), tensor(1), tensor(2), 0.1, None, 0.0, each),
        "linear_step": (
            tensor(0), [tensor(1), tensor(2)], 1.0, None, [0.5, 0.0], [None, each], 0.2, None, 7, None, 0, seeds, True,
        ),
        "interpolate": (tensor(0), tensor(1), 0.0, each, "vp", [], 0, None, 0, None),
        "flow_loss": (
            tensor(0), tensor(1), None, None, 0, None, 0, None, each, "pseudo_huber", 0.3, "mean", requires_grad,
        ),
        "random": ([3, 5], 0, seeds, 7, None, "normal", dtype, torch.device("cpu")),
    }  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["euler_step", "linear_step", "interpolate", "flow_loss", "random"])
def test_opcheck(op, dtype, requires_grad):
    torch.library.opcheck(getattr(OPS, op).default, samples(dtype, requires_grad)[op])


def test_opcheck_of_drawn_sources():
    x = normal(3, 5)
    torch.library.opcheck(
        OPS.interpolate.default, (x, None, 0.5, None, "linear", [], 5, None, 2**40, None)
    )
    torch.library.opcheck(
        OPS.interpolate.default,
        (x, None, 0.0, None, "custom", [torch.rand(3)] * 4, 5, None, 0, None),
    )
    drawn = (x, None, None, x, 5, None, 0, None, None, "mse", 1.0, "none", False)
    torch.library.opcheck(OPS.flow_loss.default, drawn)
    torch.library.opcheck(OPS.euler_step.default, (x, x, None, 0.1, None, 0.0, None))


# gradients -------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_steps():
    x, v, u = (normal(3, 4, dtype=F64, key=k).requires_grad_() for k in range(3))
    dt, g = torch.tensor([0.1, 0.2, 0.3], dtype=F64), torch.tensor(2.0, dtype=F64)
    calls = [
        lambda x, v, u, dt=dt, g=g: rf.euler_step(x, v, dt, v_uncond=u, guidance_scale=g),
        lambda x, v, u: rf.taylor_step(x, (v, u), 0.3),
        lambda x, v, u, dt=dt: rf.linear_step(
            x, (v, u), (dt, 0.5), x_coefficient=dt, noise_scale=0.3, seed=1
        ),
        lambda x, v, u: rf.euler_step(x, v, 0.3, cast=F64)[1] * u,
    ]
    for call in calls:
        torch.autograd.gradcheck(call, (x, v, u))
        torch.autograd.gradgradcheck(call, (x, v, u))
    scalar = dt.clone().requires_grad_()
    torch.autograd.gradcheck(lambda s, x, v: rf.euler_step(x, v, s), (scalar, x, v))
    torch.autograd.gradcheck(lambda s, x, v: rf.taylor_step(x, (v, v, v), s), (scalar, x, v))
    torch.autograd.gradcheck(
        lambda s, x: rf.linear_step(x, (), (), noise_scale=s, seed=torch.arange(3)), (scalar, x)
    )


def test_gradients_of_mixed_dtypes_and_only_where_asked():
    x, v, u = (
        normal(3, 4),
        normal(3, 4, dtype=BF16).requires_grad_(),
        normal(3, 4, dtype=F16).requires_grad_(),
    )
    rf.euler_step(x, v, 0.5, v_uncond=u, guidance_scale=4.0).sum().backward()
    same_bits(v.grad, torch.full_like(v, 2.0))
    same_bits(u.grad, torch.full_like(u, -1.5))
    assert x.grad is None
    with torch.no_grad():
        assert not rf.euler_step(x, v, 0.5).requires_grad


def test_recorded_and_plain_calls_have_the_same_bits():
    x, v, u, dt = normal(3, 700), normal(3, 700, key=1), normal(3, 700, key=2), torch.rand(3)
    for call in (
        lambda x: rf.euler_step(x, v, dt, v_uncond=u, guidance_scale=3.0),
        lambda x: rf.taylor_step(x, (v, u, v), dt),
        lambda x: rf.linear_step(x, (v, u), (dt, 0.3), noise_scale=dt, seed=5),
        lambda x: rf.interpolate(x, dt, seed=5, path="trigonometric"),
        lambda x: rf.flow_loss(x, v, weight=dt, kind="pseudo_huber"),
    ):
        for a, b in zip(results(call(x.clone().requires_grad_())), results(call(x)), strict=True):
            same_bits(a, b)


# transforms ------------------------------------------------------------------------------------------------------

TRANSFORMED = {
    "euler": lambda x, v: rf.euler_step(x, v, 0.3),
    "guided": lambda x, v: rf.euler_step(x, v, 0.3, v_uncond=2 * v, guidance_scale=1.5),
    "taylor": lambda x, v: rf.taylor_step(x, (v, x), 0.3),
    "linear": lambda x, v: rf.linear_step(x, (v,), (0.3,), noise_scale=0.5, seed=3),
    "interpolate": lambda x, v: rf.interpolate(x, 0.4, x0=v, path="vp").xt,
    "target": lambda x, v: rf.interpolate(x, 0.4, x0=v).target,
    "drawn": lambda x, v: rf.interpolate(x, 0.4, seed=9).xt * v,
    "loss": lambda x, v: rf.flow_loss(x, v, kind="pseudo_huber", reduction="none"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap_jvp_grad(name):
    function = TRANSFORMED[name]
    x, v = normal(4, 3, 6), normal(4, 3, 6, key=1)
    one_by_one = torch.stack([function(a, b) for a, b in zip(x, v, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(x, v), one_by_one, rtol=1e-6, atol=1e-7)

    x64, v64, tangent = x[0].double(), v[0].double(), normal(3, 6, dtype=F64, key=2)
    _, derivative = torch.func.jvp(lambda a: function(a, v64), (x64,), (tangent,))
    h = 1e-6
    finite = (function(x64 + h * tangent, v64) - function(x64 - h * tangent, v64)) / (2 * h)
    torch.testing.assert_close(derivative, finite, rtol=1e-6, atol=1e-8)

    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x64, tangent), v64)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)

    by_func = torch.func.grad(lambda a: function(a, v64).sin().sum())(x64)
    leaf = x64.clone().requires_grad_()
    function(leaf, v64).sin().sum().backward()
    torch.testing.assert_close(by_func, leaf.grad)

    per_sample = torch.vmap(torch.func.grad(lambda a, b: function(a, b).sin().sum()))(
        x.double(), v.double()
    )
    torch.testing.assert_close(
        per_sample[0],
        torch.func.grad(lambda a: function(a, v.double()[0]).sin().sum())(x.double()[0]),
    )


def test_a_tangent_on_a_scalar_or_the_second_tensor_is_followed():
    x, v = normal(3, 6, dtype=F64), normal(3, 6, dtype=F64, key=1)
    one = torch.ones((), dtype=F64)
    _, derivative = torch.func.jvp(lambda dt: rf.euler_step(x, v, dt), (0.3 * one,), (one,))
    torch.testing.assert_close(derivative, v)
    _, derivative = torch.func.jvp(lambda t: rf.interpolate(x, t, x0=v).xt, (0.3 * one,), (one,))
    torch.testing.assert_close(derivative, x - v)
    _, derivative = torch.func.jvp(
        lambda a: rf.flow_loss(x, a, reduction="sum"), (v,), (torch.ones_like(v),)
    )
    torch.testing.assert_close(derivative, (-2 * (x - v) / 6).sum())


# fake, meta, modes, subclasses, views ----------------------------------------------------------------------------


def every_public_call(x, v, **on):
    return [
        rf.euler_step(x, v, 0.1, v_uncond=v, guidance_scale=2.0),
        *rf.taylor_step(x, (v, v), 0.1, cast=BF16),
        rf.linear_step(x, (v,), (0.1,), noise_scale=0.1, seed=3),
        *rf.interpolate(x, 0.3, seed=3, return_x0=True),
        *rf.interpolate(x, 0.3, x0=v, path="vp")[:2],
        rf.flow_loss(x, v),
        rf.flow_loss(x, x1=v, seed=3, reduction="none"),
        rf.randn(2, 5, seed=3, **on),
        rf.rand(2, 5, seed=3, dtype=F16, **on),
    ]


def test_fake_tensors_carry_shapes_and_dtypes():
    expected = every_public_call(normal(3, 5), normal(3, 5, key=1))
    with FakeTensorMode() as mode:
        fake = every_public_call(mode.from_tensor(normal(3, 5)), mode.from_tensor(normal(3, 5)))
    for f, e in zip(fake, expected, strict=True):
        assert (f.shape, f.dtype, f.device) == (e.shape, e.dtype, e.device)


def test_meta_tensors_carry_shapes_and_dtypes():
    expected = every_public_call(normal(3, 5), normal(3, 5, key=1))
    meta = every_public_call(normal(3, 5).to("meta"), normal(3, 5).to("meta"), device="meta")
    for m, e in zip(meta, expected, strict=True):
        assert (m.shape, m.dtype, m.is_meta) == (e.shape, e.dtype, True)
    out = torch.empty(3, 5, device="meta")
    assert rf.euler_step(out, out, 0.1, out=out) is out


def test_dispatch_modes_see_the_ops():
    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, v = normal(3, 5), normal(3, 5, key=1)
    expected = every_public_call(x, v)
    with Log() as log:
        found = every_public_call(x, v)
        out = torch.empty_like(x)
        rf.euler_step(x, v, 0.1, out=out)
    for a, e in zip(found, expected, strict=True):
        same_bits(a, e)
    same_bits(out, rf.euler_step(x, v, 0.1))
    for op in ("euler_step", "linear_step", "interpolate", "flow_loss", "random"):
        assert f"rfkernels.{op}.default" in log.seen
    assert any("copy_" in name for name in log.seen), "the write to out= is hidden from the mode"


def test_function_modes_and_function_subclasses():
    class Named(torch.Tensor):
        """Keeps its class through torch functions."""

    x, v = normal(3, 5), normal(3, 5, key=1)
    expected = rf.euler_step(x, v, 0.1)
    found = rf.euler_step(x.as_subclass(Named), v.as_subclass(Named), 0.1)
    assert type(found) is Named
    same_bits(found.as_subclass(torch.Tensor), expected)
    with torch.overrides.BaseTorchFunctionMode():
        same_bits(rf.euler_step(x, v, 0.1), expected)
    with torch.device("meta"):  # a function mode: where no device is named, tensors are made there
        same_bits(rf.euler_step(x, v, 0.1), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_the_native_short_way_is_left_where_something_watches():
    _C = pytest.importorskip("rfkernels._C", exc_type=ImportError)
    x = normal(3, 5)

    class Silent(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def taken() -> bool:
        step = _C.fast_step(1, x, (x,), (0.1,), 1.0, None, None) is not None
        out = torch.empty_like(x), torch.empty_like(x)
        assert _C.fast_interpolate(x, None, 0.5, 0, 1, 0, *out) == step
        return step

    assert taken()
    watchers = (
        Silent(), torch.overrides.BaseTorchFunctionMode(), forward_ad.dual_level(),
        rf.use_backend("reference"), rf.use_backend("triton"),
    )  # fmt: skip
    for watcher in watchers:
        with watcher:
            assert not taken(), watcher
    inside = []
    torch.func.vmap(lambda row: (inside.append(taken()), row)[1])(x)
    torch.jit.trace(lambda row: (inside.append(taken()), row + 1)[1], x, check_trace=False)
    assert not any(inside)
    assert len(inside) == 2
    with rf.use_backend("native"):
        assert taken()
    with torch.no_grad():
        assert taken()


class Logged(torch.Tensor):
    """A wrapper subclass that records every op on it."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        unwrap = lambda t: t.inner if isinstance(t, cls) else t
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return torch.utils._pytree.tree_map(
            lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out
        )


def test_dispatch_subclasses():
    Logged.seen.clear()
    x, v, dt = normal(3, 5), normal(3, 5, key=1), torch.rand(3)
    for call in (
        lambda x, v, dt: rf.euler_step(x, v, dt),
        lambda x, v, dt: rf.taylor_step(x, (v, v), dt),
        lambda x, v, dt: rf.linear_step(x, (v,), (dt,), noise_scale=0.1, seed=3),
        lambda x, v, dt: rf.interpolate(x, dt, x0=v, path="sub-vp").xt,
        lambda x, v, dt: rf.flow_loss(x, v, weight=dt),
    ):
        found = call(Logged(x), Logged(v), Logged(dt))
        assert type(found) is Logged
        same_bits(found.inner, call(x, v, dt))
        mixed = call(x, Logged(v), dt)
        same_bits(mixed.inner, call(x, v, dt))
    assert "rfkernels.euler_step.default" in Logged.seen


def test_negated_views_of_complex_tensors():
    z = torch.complex(normal(3, 5), normal(3, 5, key=1))
    view, plain = z.conj().imag, -normal(3, 5, key=1)
    assert view.is_neg()
    x, dt = normal(3, 5, key=2), torch.complex(torch.rand(3), torch.rand(3)).conj().imag
    same_bits(rf.euler_step(x, view, 0.5), rf.euler_step(x, plain, 0.5))
    same_bits(rf.euler_step(view, x, 0.5), rf.euler_step(plain, x, 0.5))
    same_bits(rf.euler_step(x, x, dt), rf.euler_step(x, x, dt.clone()))
    same_bits(rf.linear_step(x, (x,), (dt,)), rf.linear_step(x, (x,), (dt.resolve_neg(),)))
    same_bits(rf.taylor_step(x, (x, x), dt), rf.taylor_step(x, (x, x), dt.resolve_neg()))
    same_bits(rf.linear_step(x, (view,), (0.5,)), rf.linear_step(x, (plain,), (0.5,)))
    same_bits(rf.interpolate(view, 0.3, seed=1).xt, rf.interpolate(plain, 0.3, seed=1).xt)
    same_bits(rf.flow_loss(x, view), rf.flow_loss(x, plain))
    same_bits(rf.euler_step(x, z.real, 0.5), rf.euler_step(x, z.real.clone(), 0.5))
    rf.euler_step(x, x, 0.5, out=view)
    same_bits(z.imag, -(x + 0.5 * x))


def test_inference_mode():
    x, v = normal(3, 5), normal(3, 5, key=1)
    expected = every_public_call(x, v)
    with torch.inference_mode():
        for a, e in zip(every_public_call(x, v), expected, strict=True):
            same_bits(a, e)
        y = x.clone()
        rf.euler_step(y, v, 0.1, out=y)
    same_bits(y, rf.euler_step(x, v, 0.1))


def test_parameters():
    x, v = torch.nn.Parameter(normal(3, 5)), normal(3, 5, key=1)
    expected = rf.euler_step(x.detach(), v, 0.1)
    with torch.no_grad():
        found = rf.euler_step(x, v, 0.1)
        assert type(found) is torch.Tensor
        same_bits(found, expected)
        assert rf.euler_step(x, v, 0.1, out=x) is x
    same_bits(x.detach(), expected)
    assert rf.euler_step(x, v, 0.1).requires_grad


def test_version_counters_see_the_writes():
    for options in ({"out": 0}, {"cast": 0}, {"out": 0, "cast": 1}):
        tensors = [normal(3, 5), normal(3, 5, key=4)]
        before = [t._version for t in tensors]
        rf.euler_step(
            normal(3, 5, key=1),
            normal(3, 5, key=2),
            0.1,
            **{k: tensors[i] for k, i in options.items()},
        )
        for i in options.values():
            assert tensors[i]._version > before[i], options
    out = normal(3, 5), normal(3, 5)
    rf.interpolate(normal(3, 5), 0.5, seed=1, out=out)
    assert all(o._version > 0 for o in out)


def test_overwriting_a_saved_tensor_through_out_is_an_error():
    w = torch.ones(3, 5, requires_grad=True)
    for overwrite in (
        lambda x: rf.euler_step(normal(3, 5), normal(3, 5), 0.1, out=x),
        lambda x: rf.euler_step(x, normal(3, 5).to(BF16), torch.rand(3), out=x),
        lambda x: rf.linear_step(x, (), (), out=x),
        lambda x: rf.interpolate(normal(3, 5), 0.1, seed=1, out=(x, torch.empty(3, 5))),
    ):
        x = normal(3, 5)
        loss = (w * x).sum()
        with torch.no_grad():
            overwrite(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_recorded_call_may_write_into_out():
    x, v, out = normal(3, 5).requires_grad_(), normal(3, 5, key=1), torch.zeros(3, 5)
    result = rf.euler_step(x, v, 0.5, out=out)
    assert result is out
    result.sum().backward()
    same_bits(x.grad, torch.ones(3, 5))


def test_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    x, v = normal(3, 40_000), normal(3, 40_000, key=1)
    expected = reference(lambda: rf.euler_step(x, v, 0.1))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: rf.euler_step(x, v, 0.1), range(24)):
            same_bits(found, expected)


def test_float64_and_float32_do_not_mix_silently():
    assert rf.euler_step(normal(3, 5, dtype=F64), normal(3, 5, dtype=F32), 0.1).dtype == F64
    with pytest.raises(TypeError, match="v may be float64 only if x is"):
        rf.euler_step(normal(3, 5), normal(3, 5, dtype=F64), 0.1)
