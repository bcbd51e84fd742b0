"""Inputs that once gave wrong numbers, one test each."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

import rfkernels as rf
from rfkernels.backends.reference import interpolate, ode_step


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_tensors_beside_a_float16_state_are_not_rounded_to_float16(dtype):
    """A gradient of 2^-28 is nothing in float16, and the tensor that it is for holds it."""
    x, v = torch.zeros(2, 3).half(), torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    small = torch.full((2, 3), 2.0**-14).half()
    for state in (
        rf.euler_step(x, v, 2.0**-14),
        rf.taylor_step(x, (v,), 2.0**-14),
        rf.interpolate(x, 1 - 2.0**-14, x0=v).xt,
    ):
        (grad,) = torch.autograd.grad(state, v, small)
        assert torch.equal(grad, torch.full_like(v, 2.0**-28))
    prediction = torch.ones(2, 2**15).half()
    target = torch.zeros(prediction.shape, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(rf.flow_loss(prediction, target) * 2.0**-13, target)
    assert torch.equal(grad, torch.full_like(target, -(2.0**-28)))


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


@pytest.mark.parametrize("place", ["x", "out", "before out"])
def test_step_sizes_in_the_memory_of_the_output(place):
    """The values of dt were read after the step had written over them."""
    n = 3000
    memory = torch.ones(1 + 4 * n)
    x, v, out = torch.ones(4, n), torch.ones(4, n), memory[1:].view(4, n)
    dt = out[:, 5] if place == "out" else torch.as_strided(memory, (4,), (n,))
    if place == "x":
        out, dt = x, x[:, 5]
    expected = x + dt.clone()[:, None] * v
    assert torch.equal(rf.euler_step(x, v, dt, out=out), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks compare shapes
@pytest.mark.parametrize(
    "function",
    [
        lambda x: rf.euler_step(x, x, 0.5),
        lambda x: rf.interpolate(x, 0.5, seed=1).xt,
        lambda x: rf.flow_loss(x, x * 0),
        lambda x: x + rf.randn(2, 3, seed=1),
    ],
    ids=["euler_step", "interpolate", "flow_loss", "randn"],
)
def test_jit_trace_records_the_kernels(function):
    """A traced graph held memory that no kernel of it wrote."""
    traced = torch.jit.trace(function, (torch.zeros(2, 3),))
    x = torch.full((2, 3), 10.0)
    assert torch.equal(traced(x), function(x))


def test_new_python_thread_takes_torchs_thread_count(threads):
    """OpenMP keeps a count per thread; a new one had that of the machine until torch ran in parallel there."""
    native = pytest.importorskip("rfkernels._C")
    if not native.has_openmp():
        pytest.skip("built without OpenMP")
    threads(1)
    seen = []

    def work():
        rf.euler_step(torch.ones(2), torch.ones(2), 1.0)
        seen.append(native.max_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]


def test_vp_gradient_at_the_data_end_when_only_xt_is_used():
    """The unused target sent zeros, and its infinite slope made them NaN."""
    x1, x0 = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    rf.interpolate(x1, 1.0, x0=x0, path="vp").xt.sum().backward()
    assert torch.equal(x0.grad, torch.zeros(2, 3))
    assert torch.equal(x1.grad, torch.ones(2, 3))


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_float16_subnormals_where_float_subnormals_are_flushed(level):
    """Elements past the last vector of eight, and all of them without F16C, came out as zero."""
    native = pytest.importorskip("rfkernels._C")
    x = (torch.arange(1, 28) * 2.0**-24).half()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormals")
    try:
        native.cap_isa(level)
        scaled = rf.linear_step(x, (), (), x_coefficient=2.0**14)
    finally:
        native.cap_isa("amx")
        torch.set_flush_denormal(False)
    assert torch.equal(scaled, (torch.arange(1, 28) * 2.0**-10).half())


class Copies(TorchFunctionMode):
    """Counts tensors that are made of numbers in the host's memory."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.tensor, torch.as_tensor)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ode_step.euler(x, x, x, 0.1, 2.0),
        lambda x: ode_step.taylor(x, (x, x, x), 0.1),
        lambda x: ode_step.linear(x, (x,), 1.0, (0.1,), (0.5, 3, 2**40)),
        lambda x: interpolate.point_and_target(x, x, 0.5, "vp"),
        lambda x: torch.func.jvp(lambda a: rf.linear_step(a, (a,), (0.5,)), (x,), (x,)),
    ],
    ids=["guided", "taylor", "noise", "interpolate", "jvp"],
)
def test_numbers_are_filled_in_on_the_device(call):
    """They were copied to it: the host waited for every one, and no CUDA graph could be captured."""
    with Copies() as copies:
        call(torch.ones(3, 4))
    assert copies.count == 0


def test_interpolate_refuses_one_tensor_for_both_outputs():
    """The target overwrote x_t without a word."""
    x1, out = torch.randn(2, 3), torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"interpolate: out must be two tensors"):
        rf.interpolate(x1, 0.5, seed=0, out=(out, out))


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_many_gradients_at_once(how):
    """One backward for several incoming gradients, as vectorized Jacobians take it, found no batching rule."""
    x, v = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2).requires_grad_()
    dt = torch.rand(3)
    for value in (
        rf.euler_step(x, v, dt),
        rf.interpolate(x, dt, x0=v, path="vp").target,
        rf.flow_loss(x, v),
        rf.flow_loss(x.half(), v, weight=dt, reduction="none"),
    ):

        def back(grad, value=value, **options):
            return torch.autograd.grad(value, (x, v), grad, retain_graph=True, **options)

        many = torch.randn(4, *value.shape)
        found = torch.vmap(back)(many) if how == "vmap" else back(many, is_grads_batched=True)
        for together, *alone in zip(found, *map(back, many), strict=True):
            torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("dt", [1e300, -1e39, 2**70])
def test_numbers_that_float32_does_not_hold(dt):
    """They are infinite or rounded in the kernels; the reference and vmap refused them."""
    x = torch.ones(2, 3)
    expected = x + torch.tensor(float(dt), dtype=torch.float64).float() * x
    assert torch.equal(rf.euler_step(x, x, dt), expected)
    assert torch.equal(torch.vmap(lambda x: rf.euler_step(x, x, dt))(x), expected)
    with rf.use_backend("reference"):
        assert torch.equal(rf.linear_step(x, (x,), (dt,)), expected)
