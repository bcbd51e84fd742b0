"""attention inside torch: gradients, transforms, torch.compile, autocast, modes; straight through where it quantizes."""

from __future__ import annotations

import pytest
import torch
from attention_cells import every_cell
from attention_inputs import decibels, exact
from cells import same_bits
from tensors import normal
from tolerances import BF16, F16, F32, F64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rfkernels as rf

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, in dynamo
    pytest.mark.usefixtures("no_small_handover"),
]

MASKED_ROW = 3


def inputs(dtype: torch.dtype = F32, *, mask: str = "float"):
    """q, k, v, mask: grouped heads, a row without keys, keys without rows."""
    q, k, v = (
        normal(2, heads, length, dim, dtype=dtype, key=key)
        for key, (heads, length, dim) in enumerate(((4, 30, 24), (2, 50, 24), (2, 50, 16)))
    )
    if mask == "none":
        return q, k, v, None
    open_ = normal(2, 1, 30, 50, key=7) < 1.0
    open_[:, :, MASKED_ROW] = False
    open_[:, :, :, 11:14] = False
    if mask == "bool":
        return q, k, v, open_
    return q, k, v, torch.where(open_, normal(2, 1, 30, 50, key=8), -torch.inf).to(dtype)


def exact_gradients(q, k, v, mask, causal, grad):
    """Gradients of float64 attention for (q, k, v, mask) from autograd."""
    leaves = [t.double().requires_grad_(t.is_floating_point()) for t in (q, k, v)]
    if mask is not None:
        leaves.append(mask.double().requires_grad_() if mask.is_floating_point() else mask)
    out = exact(*leaves, is_causal=causal)
    wanted = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(out, wanted, grad.double())


def near(found, truth, least: float) -> None:
    assert found.isfinite().all()
    measured = float(decibels(found.detach()[None], truth.detach()[None]))
    assert measured >= least, measured


# Gradients -------------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_exact_attention(cell, mask, causal):
    if cell.device != "cpu":
        pytest.skip("one device is enough: the backward is PyTorch's")
    tensors = inputs(mask=mask)
    leaves = [
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    grad = normal(2, 4, 30, 16, key=5)
    out = cell.attention(*leaves[:3], attn_mask=leaves[3], is_causal=causal, enable_gqa=True)
    plain = cell.attention(*tensors[:3], attn_mask=tensors[3], is_causal=causal, enable_gqa=True)
    same_bits(out, plain)
    out.backward(grad)
    truth = exact_gradients(*tensors, causal, grad)
    # float32 against float64: 24 bits, a few lost in sums. Were the codes differentiated, it would be 30 dB.
    for leaf, expected in zip(
        [t for t in leaves if t is not None and t.requires_grad], truth, strict=True
    ):
        near(leaf.grad, expected, 110.0)
    if mask != "none":
        assert not leaves[0].grad[:, :, MASKED_ROW].any()


def test_gradients_in_the_dtype_of_the_inputs_and_only_where_asked():
    for dtype, least in ((BF16, 38.0), (F16, 55.0)):
        q, k, v, _ = inputs(dtype, mask="none")
        k.requires_grad_()
        grad = normal(2, 4, 30, 16, key=5, dtype=dtype)
        rf.attention(q, k, v, enable_gqa=True).backward(grad)
        assert k.grad.dtype == dtype
        near(k.grad, exact_gradients(q, k.detach(), v, None, False, grad)[1], least)
        assert q.grad is None
    with torch.no_grad():
        assert not rf.attention(q, k, v, enable_gqa=True).requires_grad
    layouts = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k.detach(), v)]
    rf.attention(*layouts, enable_gqa=True, layout="bshd").transpose(1, 2).backward(grad)
    same_bits(layouts[1].grad.transpose(1, 2), k.grad)


@every_cell
def test_the_gradient_of_the_lse(cell):
    if cell.device != "cpu":
        pytest.skip("one device is enough: the backward is PyTorch's")
    q, k, v, mask = inputs()
    leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
    out, lse = cell.attention(*leaves[:3], attn_mask=leaves[3], enable_gqa=True, return_lse=True)
    weights = normal(2, 4, 30, key=6)
    weights[:, :, MASKED_ROW] = 0.0
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    ((out * 0.5).sum() + (finite * weights).sum()).backward()
    doubles = [t.double().requires_grad_() for t in (q, k, v, mask)]
    scores = doubles[0] @ doubles[1].repeat_interleave(2, 1).mT / 24**0.5 + doubles[3]
    safe = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    loss = exact(*doubles).sum() * 0.5 + (safe.logsumexp(-1) * weights).sum()
    for leaf, expected in zip(leaves, torch.autograd.grad(loss, doubles), strict=True):
        near(leaf.grad, expected, 100.0)


def test_a_second_derivative_is_refused():
    q, k, v, _ = inputs(mask="none")
    q.requires_grad_()
    (grad,) = torch.autograd.grad(
        rf.attention(q, k, v, enable_gqa=True).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="attention: the gradient of quantized attention has no"):
        grad.sum().backward()


def test_float64_is_differentiable_as_often_as_torch():
    q, k, v, mask = inputs(F64)
    rf.attention_stats(reset=True)
    q, k, v = (t[:1, :2, :4, :3].clone().requires_grad_() for t in (q, k, v))
    mask = torch.zeros(4, 4, dtype=F64)
    torch.autograd.gradcheck(lambda *a: rf.attention(*a, attn_mask=mask), (q, k, v))
    out = rf.attention(q, k, v)
    same_bits(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    stats = rf.attention_stats(reset=True)
    assert not stats.calls
    ((precision, reason),) = stats.handovers
    assert (precision, reason[:7]) == ("int8", "float64")


# Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_forward_mode(mask):
    q, k, v, m = inputs(mask=mask)

    def call(q, k, v, m):
        return rf.attention(q, k, v, attn_mask=m, is_causal=True, enable_gqa=True, return_lse=True)

    learned = mask == "float"
    points = (q, k, v, m) if learned else (q, k, v)
    steps = tuple(normal(*t.shape, key=20 + i) for i, t in enumerate(points))
    rest = () if learned else (m,)
    (out, lse), (out_t, lse_t) = torch.func.jvp(lambda *a: call(*a, *rest), points, steps)
    same_bits(out, call(q, k, v, m)[0])
    same_bits(lse, call(q, k, v, m)[1])
    h = 1e-6

    def moved(sign: float):
        args = [p.double() + sign * h * s.double() for p, s in zip(points, steps, strict=True)]
        return exact(*args, *rest, is_causal=True)

    near(out_t, (moved(1.0) - moved(-1.0)) / (2 * h), 80.0)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, s) for p, s in zip(points, steps, strict=True)]
        result = call(*duals, *rest)
        same_bits(forward_ad.unpack_dual(result[0]).tangent, out_t)
        same_bits(forward_ad.unpack_dual(result[1]).tangent, lse_t)
    _, only_out = torch.func.jvp(
        lambda q: rf.attention(q, k, v, attn_mask=m, is_causal=True, enable_gqa=True),
        (q,),
        steps[:1],
    )
    assert only_out.isfinite().all()


def test_the_tangent_of_the_lse():
    q, k, v, _ = inputs(mask="none")
    step = normal(*q.shape, key=20)
    _, (_, found) = torch.func.jvp(
        lambda q: rf.attention(q, k, v, enable_gqa=True, return_lse=True), (q,), (step,)
    )
    keys = k.double().repeat_interleave(2, 1)
    weights = (q.double() @ keys.mT / 24**0.5).softmax(-1)
    near(found, (weights * (step.double() @ keys.mT / 24**0.5)).sum(-1), 110.0)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_vmap(mask):
    q, k, v, m = inputs(mask=mask)
    many = torch.stack([q, q.flip(2), 2 * q], 1)
    call = lambda q, m: rf.attention(q, k, v, attn_mask=m, enable_gqa=True, return_lse=True)  # noqa: E731
    out, lse = torch.vmap(lambda q: call(q, m), in_dims=1)(many)
    for i in range(3):
        expected = call(many[:, i], m)
        same_bits(out[i], expected[0])
        same_bits(lse[i], expected[1])
    if m is not None:
        masks = torch.stack([m[0, 0], m[1, 0]], -1)  # mapped masks of 2 dimensions
        out, _ = torch.vmap(lambda m: call(q, m), in_dims=2)(masks)
        same_bits(out[1], call(q, m[1, 0])[0])
    nested = torch.vmap(torch.vmap(lambda q, k, v: rf.attention(q[None], k[None], v[None])[0]))
    q2, k2, v2 = (normal(2, 3, 2, 9, 8, key=i) for i in range(3))
    same_bits(nested(q2, k2, v2)[1, 2], rf.attention(q2[1, 2:], k2[1, 2:], v2[1, 2:])[0])


def test_function_transforms_agree_with_backward():
    q, k, v, m = inputs()
    leaves = [t.clone().requires_grad_() for t in (q, k, v, m)]

    def loss(q, k, v, m):
        out, lse = rf.attention(q, k, v, attn_mask=m, enable_gqa=True, return_lse=True)
        return out.sin().sum() + torch.where(lse == -torch.inf, 0.0, lse).sum()

    loss(*leaves).backward()
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, m)
    for a, b in zip(found, leaves, strict=True):
        near(a, b.grad.double(), 100.0)
    each = torch.vmap(
        torch.func.grad(
            lambda q, k, v: rf.attention(q[None], k[None], v[None], enable_gqa=True).sum()
        )
    )
    leaf = q.clone().requires_grad_()
    rf.attention(leaf, k, v, enable_gqa=True).sum().backward()
    near(each(q, k, v), leaf.grad.double(), 100.0)


# torch.compile, fake tensors, modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_opcheck(dtype):
    q, k, v, m = inputs(dtype)
    op = torch.ops.rfkernels.attention.default
    torch.library.opcheck(op, (q, k, v, m, True, 0.3, "int8", "int8_u8", True))
    torch.library.opcheck(op, (q, k, v, None, False, 0.3, "int8", "int8_u8", False))
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.library.opcheck(op, (*bshd, None, False, 0.3, "bf16", "bf16", True))


@pytest.mark.slow
def test_opcheck_with_gradients():
    tensors = [t.requires_grad_() for t in inputs()]
    op = torch.ops.rfkernels.attention.default
    torch.library.opcheck(op, (*tensors, True, 0.3, "int8", "int8_u8", False))


CALLS = {
    "plain": lambda q, k, v, m: rf.attention(q, k, v, enable_gqa=True),
    "mask and lse": lambda q, k, v, m: rf.attention(
        q, k, v, attn_mask=m, is_causal=True, enable_gqa=True, return_lse=True
    ),
    "bshd": lambda q, k, v, m: rf.attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True, layout="bshd"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole_graph(name):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    function = CALLS[name]
    compiled = torch.compile(
        lambda *a: torch.utils._pytree.tree_map(torch.sin, function(*a)),
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for length in (30, 11, 23):
        q, k, v, m = inputs()
        args = q[:, :, :length], k, v, m[:, :, :length]
        rf.attention_stats(reset=True)
        found = torch.utils._pytree.tree_leaves(compiled(*args))
        assert sum(rf.attention_stats(reset=True).calls.values()) == 1
        for a, b in zip(found, torch.utils._pytree.tree_leaves(function(*args)), strict=True):
            same_bits(a, b.sin())
            assert a.stride() == b.stride()
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "rfkernels.attention.default" in targets
    assert len(graphs) <= 2


def test_compile_records_gradients():
    torch._dynamo.reset()
    tensors = inputs()
    grads = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        function = wrap(
            lambda q, k, v, m: rf.attention(q, k, v, attn_mask=m, enable_gqa=True).sin()
        )
        function(*leaves).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        near(a, b.double(), 120.0)


def test_a_hand_over_inside_a_graph_is_counted_when_it_runs():
    torch._dynamo.reset()
    q, k, v, _ = inputs(F64, mask="none")
    compiled = torch.compile(
        lambda q: rf.attention(q, k, v, enable_gqa=True), fullgraph=True, backend="aot_eager"
    )
    for _ in range(3):
        rf.attention_stats(reset=True)
        same_bits(compiled(q), rf.attention(q, k, v, enable_gqa=True))
        assert sum(rf.attention_stats(reset=True).handovers.values()) == 2


def test_fake_and_meta_tensors_carry_shapes_dtypes_and_strides():
    for dtype in (F32, BF16):
        tensors = inputs(dtype)
        second = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]
        for args in (tensors[:3], second):
            expected = rf.attention(*args, enable_gqa=True, return_lse=True)
            with FakeTensorMode() as mode:
                fake = rf.attention(
                    *(mode.from_tensor(t) for t in args), enable_gqa=True, return_lse=True
                )
            meta = rf.attention(*(t.to("meta") for t in args), enable_gqa=True, return_lse=True)
            for f, m, e in zip(fake, meta, expected, strict=True):
                assert (f.shape, f.dtype, f.device, f.stride()) == (
                    e.shape,
                    e.dtype,
                    e.device,
                    e.stride(),
                )
                assert (m.shape, m.dtype, m.is_meta) == (e.shape, e.dtype, True)


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_op():
    q, k, v, m = inputs()
    expected = rf.attention(q, k, v, attn_mask=m, enable_gqa=True)
    with Log() as log:
        found = rf.attention(q, k, v, attn_mask=m, enable_gqa=True)
        leaf = q.clone().requires_grad_()
        rf.attention(leaf, k, v, enable_gqa=True).sum().backward()
    same_bits(found, expected)
    assert log.seen.count("rfkernels.attention.default") == 2
    with torch.overrides.BaseTorchFunctionMode():
        same_bits(rf.attention(q, k, v, attn_mask=m, enable_gqa=True), expected)


def test_subclasses_negated_views_parameters_inference():
    class Named(torch.Tensor):
        """Keeps its class through torch functions."""

    q, k, v, _ = inputs(mask="none")
    expected = rf.attention(q, k, v, enable_gqa=True)
    found = rf.attention(*(t.as_subclass(Named) for t in (q, k, v)), enable_gqa=True)
    same_bits(found.as_subclass(torch.Tensor), expected)
    view = torch.complex(q, -q).conj().imag
    assert view.is_neg()
    same_bits(rf.attention(view, k, v, enable_gqa=True), expected)
    with torch.inference_mode():
        same_bits(rf.attention(q, k, v, enable_gqa=True), expected)
    parameter = torch.nn.Parameter(q)
    with torch.no_grad():
        same_bits(rf.attention(parameter, k, v, enable_gqa=True), expected)
    assert rf.attention(parameter, k, v, enable_gqa=True).requires_grad


def test_autocast_casts_as_torchs_attention():
    q, k, v, m = inputs()
    mixed = q, k.to(BF16), v
    with torch.autocast("cpu", BF16):
        for args in ((q, k, v), mixed):
            found = rf.attention(*args, attn_mask=m, enable_gqa=True)
            truth = torch.nn.functional.scaled_dot_product_attention(
                *args, attn_mask=m, enable_gqa=True
            )
            assert found.dtype == truth.dtype == BF16
        kv = rf.quantize(k.to(BF16), v.to(BF16))
        same_bits(
            rf.attention(q, kv, enable_gqa=True), rf.attention(q.to(BF16), kv, enable_gqa=True)
        )
    expected = rf.attention(
        q.to(BF16), k.to(BF16), v.to(BF16), attn_mask=m.to(BF16), enable_gqa=True
    )
    same_bits(found, expected)
    with pytest.raises(TypeError, match="attention: v must have the dtype of k"):
        rf.attention(*mixed, enable_gqa=True)
