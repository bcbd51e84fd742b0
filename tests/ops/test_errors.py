"""Bad input: the exact exception type, and a message that names the argument, the rule and what was received."""

# ruff: noqa: E501  (messages stand on one line)
from __future__ import annotations

import re

import pytest
import torch
from tensors import normal
from tolerances import BF16, F16, F64

import rfkernels as rf

X, V = normal(3, 5), normal(3, 5, key=1)
INTS, COMPLEX = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.complex64)


def euler(*args, **kwargs):
    return lambda: rf.euler_step(*args, **kwargs)


def linear(*args, **kwargs):
    return lambda: rf.linear_step(*args, **kwargs)


def interpolate(*args, **kwargs):
    return lambda: rf.interpolate(*args, **kwargs)


def loss(*args, **kwargs):
    return lambda: rf.flow_loss(*args, **kwargs)


class Short:
    def coefficients(self, t):
        return t, t


STEPS = [
    (euler([1.0], V, 0.1), TypeError, "euler_step: x must be a tensor; got list"),
    (euler(X.numpy(), V, 0.1), TypeError, "euler_step: x must be a tensor; got ndarray"),
    (euler(None, V, 0.1), TypeError, "euler_step: x must be a tensor; got NoneType"),
    (euler(INTS, V, 0.1), TypeError, "euler_step: x must be float32, float64, bfloat16 or float16; got torch.int64"),
    (euler(X, COMPLEX, 0.1), TypeError, "euler_step: v must be float32, float64, bfloat16 or float16; got torch.complex64"),
    (euler(X, V.double(), 0.1), TypeError, "euler_step: v may be float64 only if x is; got x in torch.float32"),
    (euler(X.to_sparse(), V, 0.1), TypeError, "euler_step: x must be a strided tensor; got layout torch.sparse_coo"),
    (euler(X, V[:2], 0.1), ValueError, "euler_step: v must have the shape of x, (3, 5); got (2, 5)"),
    (euler(X, V[0], 0.1), ValueError, "euler_step: v must have the shape of x, (3, 5); got (5,)"),
    (euler(X, V.to("meta"), 0.1), ValueError, "euler_step: v must be on the device of x, cpu; got meta"),
    (euler(X, V, "0.1"), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got str"),
    (euler(X, V, None), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got NoneType"),
    (euler(X, V, True), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got bool"),
    (euler(X, V, 1j), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got complex"),
    (euler(X, V, [0.1] * 3), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got list"),
    (euler(X, V, torch.ones(3).numpy()), TypeError, "euler_step: dt must be a float, a 0-d or a (B,) tensor; got ndarray"),
    (
        euler(X, V, torch.arange(3)), TypeError,
        "euler_step: dt must be a float or a floating point tensor; got a torch.int64 tensor of shape (3,) on cpu",
    ),
    (euler(X, V, torch.ones(4)), ValueError, "euler_step: dt must be a float, 0-d or per sample, (3,); got shape (4,)"),
    (euler(X, V, torch.ones(3, 1)), ValueError, "euler_step: dt must be a float, 0-d or per sample, (3,); got shape (3, 1)"),
    (
        euler(X[0, 0], V[0, 0], torch.ones(1)), ValueError,
        "euler_step: dt must be a float, 0-d or per sample, no batch; got shape (1,)",
    ),
    (euler(X, V, torch.ones(3, device="meta")), ValueError, "euler_step: dt must be on the device of x, cpu; got meta"),
    (euler(X, V, 0.1, v_uncond=V), ValueError, "euler_step: guidance_scale must be given together with v_uncond; got v_uncond alone"),
    (
        euler(X, V, 0.1, guidance_scale=2.0), ValueError,
        "euler_step: v_uncond must be given together with guidance_scale; got guidance_scale alone",
    ),
    (
        euler(X, V, 0.1, v_uncond=V[:1], guidance_scale=2.0), ValueError,
        "euler_step: v_uncond must have the shape of x, (3, 5); got (1, 5)",
    ),
    (euler(X, V, 0.1, out=3), TypeError, "euler_step: out must be a tensor; got int"),
    (
        euler(X, V, 0.1, out=V.bfloat16()), ValueError,
        "euler_step: out must be a torch.float32 tensor of shape (3, 5) on cpu; got a torch.bfloat16 tensor of shape (3, 5) on cpu",
    ),
    (
        euler(X, V, 0.1, out=torch.empty(3, 4)), ValueError,
        "euler_step: out must be a torch.float32 tensor of shape (3, 5) on cpu; got a torch.float32 tensor of shape (3, 4) on cpu",
    ),
    (
        euler(X, V, 0.1, out=torch.empty(3, 1).expand(3, 5)), ValueError,
        "euler_step: out must have memory of its own for every element; got strides (1, 0)",
    ),
    (
        euler(X, V, 0.1, out=torch.empty(99).as_strided((3, 5), (2, 1))), ValueError,
        "euler_step: out must have memory of its own for every element; got strides (2, 1)",
    ),
    (
        euler(X, V, 0.1, out=torch.empty(3, 5, requires_grad=True)), ValueError,
        "euler_step: out must not require grad while gradients are recorded; got a tensor that does",
    ),
    (euler(X, V, 0.1, cast=torch.int8), TypeError, "euler_step: cast must be a floating point dtype or a tensor; got torch.int8"),
    (euler(X, V, 0.1, cast=INTS), TypeError, "euler_step: cast must be float32, float64, bfloat16 or float16; got torch.int64"),
    (
        euler(X, V, 0.1, cast=torch.empty(2, dtype=BF16)), ValueError,
        "euler_step: cast must be a torch.bfloat16 tensor of shape (3, 5) on cpu; got a torch.bfloat16 tensor of shape (2,) on cpu",
    ),
    (lambda: rf.taylor_step(X, V, 0.1), TypeError, "taylor_step: derivatives must be a tuple of tensors; got Tensor"),
    (lambda: rf.taylor_step(X, (), 0.1), ValueError, "taylor_step: derivatives must be 1 to 3 tensors; got 0"),
    (lambda: rf.taylor_step(X, (V,) * 4, 0.1), ValueError, "taylor_step: derivatives must be 1 to 3 tensors; got 4"),
    (
        lambda: rf.taylor_step(X, (V, V[:1]), 0.1), ValueError,
        "taylor_step: derivatives[1] must have the shape of x, (3, 5); got (1, 5)",
    ),
    (linear(X, V, (1.0,)), TypeError, "linear_step: tensors must be a sequence of tensors; got Tensor"),
    (linear(X, (V,), 1.0), TypeError, "linear_step: coefficients must be a sequence of scalars; got float"),
    (linear(X, (V,), torch.ones(1)), TypeError, "linear_step: coefficients must be a sequence of scalars; got Tensor"),
    (
        linear(X, (V,) * 9, (1.0,) * 9), ValueError,
        "linear_step: tensors and coefficients must be equally many, at most 8; got 9 tensors and 9 coefficients",
    ),
    (
        linear(X, (V, V), (1.0,)), ValueError,
        "linear_step: tensors and coefficients must be equally many, at most 8; got 2 tensors and 1 coefficients",
    ),
    (linear(X, (V, 3.0), (1.0, 1.0)), TypeError, "linear_step: tensors[1] must be a tensor; got float"),
    (linear(X, (V,), (None,)), TypeError, "linear_step: coefficients[0] must be a float, a 0-d or a (B,) tensor; got NoneType"),
    (linear(X, (), (), noise_scale=1.0), ValueError, "linear_step: noise_scale and seed must be given together; got one of them"),
    (linear(X, (), (), seed=1), ValueError, "linear_step: noise_scale and seed must be given together; got one of them"),
    (linear(X, (), (), noise_scale=1.0, seed=-1), ValueError, "linear_step: seed must lie in [0, 2^63); got -1"),
    (linear(X, (), (), noise_scale=1.0, seed=2**63), ValueError, f"linear_step: seed must lie in [0, 2^63); got {2**63}"),
    (linear(X, (), (), noise_scale=1.0, seed=1, offset=2**64), ValueError, "linear_step: offset must lie in [0, 2^63)"),
    (linear(X, (), (), noise_scale=1.0, seed=1.5), TypeError, "linear_step: seed must be an int or an int64 tensor; got float"),
    (linear(X, (), (), noise_scale=1.0, seed=True), TypeError, "linear_step: seed must be an int or an int64 tensor; got bool"),
    (
        linear(X, (), (), noise_scale=1.0, seed=torch.zeros(3)), TypeError,
        "linear_step: seed must be an int or an int64 tensor; got torch.float32",
    ),
    (
        linear(X, (), (), noise_scale=1.0, seed=torch.arange(4)), ValueError,
        "linear_step: seed must be an int, 0-d or per sample (3,); got shape (4,)",
    ),
]  # fmt: skip

OTHERS = [
    (interpolate(X, 0.5), ValueError, "interpolate: exactly one of x0 and seed must be given; got neither"),
    (interpolate(X, 0.5, x0=V, seed=1), ValueError, "interpolate: exactly one of x0 and seed must be given; got both"),
    (interpolate(X, 0.5, x0=V[:, :1]), ValueError, "interpolate: x0 must have the shape of x1, (3, 5); got (3, 1)"),
    (interpolate(X, 0.5, x0=V.double()), TypeError, "interpolate: x0 may be float64 only if x1 is; got x1 in torch.float32"),
    (interpolate(X, torch.ones(2), seed=1), ValueError, "interpolate: t must be a float, 0-d or per sample, (3,); got shape (2,)"),
    (
        interpolate(X, 0.5, seed=1, path="straigth"), ValueError,
        "interpolate: path must be one of linear, trigonometric, vp, sub-vp or an object; got 'straigth'",
    ),
    (interpolate(X, 0.5, seed=1, path=3), TypeError, "interpolate: path must be a name or have coefficients(t); got int"),
    (interpolate(X, 0.5, seed=1, path=Short()), ValueError, "interpolate: path.coefficients must return 4 values; got 2"),
    (interpolate(X, 0.5, seed=1, out=V), TypeError, "interpolate: out must be a pair of tensors (xt, target); got Tensor"),
    (interpolate(X, 0.5, seed=1, out=(V,)), TypeError, "interpolate: out must be a pair of tensors (xt, target); got tuple"),
    (
        interpolate(X, 0.5, seed=1, out=(V, V.half())), ValueError,
        "interpolate: out[1] must be a torch.float32 tensor of shape (3, 5) on cpu; got a torch.float16 tensor of shape (3, 5) on cpu",
    ),
    (loss(X), ValueError, "flow_loss: the target must be given as target, as x0 and x1, or as x1 and seed; got none of them"),
    (loss(X, V, x1=V), ValueError, "flow_loss: the target must be given as target, as x0 and x1, or as x1 and seed; got target, x1"),
    (loss(X, x1=V), ValueError, "flow_loss: the target must be given as target, as x0 and x1, or as x1 and seed; got x1"),
    (
        loss(X, x0=V, x1=V, seed=1), ValueError,
        "flow_loss: the target must be given as target, as x0 and x1, or as x1 and seed; got x0, x1, seed",
    ),
    (loss(X[0, 0], V[0, 0]), ValueError, "flow_loss: prediction must have a batch dimension; got a 0-d tensor"),
    (loss(X, V.T), ValueError, "flow_loss: target must have the shape of prediction, (3, 5); got (5, 3)"),
    (loss(X, V, weight=2.0), ValueError, "flow_loss: weight must be a (3,) tensor; got 2.0"),
    (
        loss(X, V, weight=torch.ones(3, 1)), ValueError,
        "flow_loss: weight must be a (3,) tensor; got a torch.float32 tensor of shape (3, 1) on cpu",
    ),
    (
        loss(X, V, weight=torch.ones(3, dtype=torch.int64)), TypeError,
        "flow_loss: weight must be a float or a floating point tensor; got a torch.int64 tensor of shape (3,) on cpu",
    ),
    (loss(X, V, kind="huber"), ValueError, "flow_loss: kind must be one of mse, pseudo_huber, pseudo_huber_elementwise; got 'huber'"),
    (loss(X, V, reduction="max"), ValueError, "flow_loss: reduction must be one of mean, sum, none; got 'max'"),
    (loss(X, V, huber_c=1.0), ValueError, "flow_loss: huber_c must be given with a pseudo-Huber kind only; got 1.0 with mse"),
    (loss(X, V, kind="pseudo_huber", huber_c=0.0), ValueError, "flow_loss: huber_c must be a positive float; got 0.0"),
    (loss(X, V, kind="pseudo_huber", huber_c=float("nan")), ValueError, "flow_loss: huber_c must be a positive float; got nan"),
    (loss(X, V, kind="pseudo_huber", huber_c=True), ValueError, "flow_loss: huber_c must be a positive float; got True"),
    (lambda: rf.randn(3, 2.5, seed=0), TypeError, "randn: shape must be ints; got 2.5"),
    (lambda: rf.randn(3, True, seed=0), TypeError, "randn: shape must be ints; got True"),
    (lambda: rf.randn(3, -1, seed=0), ValueError, "randn: shape must not be negative; got (3, -1)"),
    (lambda: rf.rand(3, seed=-5), ValueError, "rand: seed must lie in [0, 2^63); got -5"),
    (lambda: rf.rand(3, seed="1"), TypeError, "rand: seed must be an int or an int64 tensor; got str"),
    (lambda: rf.rand(3, seed=torch.arange(3).numpy()), TypeError, "rand: seed must be an int or an int64 tensor; got ndarray"),
    (lambda: rf.randn(torch.tensor([3, 2]), seed=0), TypeError, "randn: shape must be ints; got tensor([3, 2])"),
    (lambda: rf.rand(3, seed=0, dtype=torch.int32), TypeError, "rand: dtype must be float32, float64, bfloat16 or float16; got torch.int32"),
    (
        lambda: rf.randn(3, 2, seed=torch.arange(2)), ValueError,
        "randn: seed must be an int, 0-d or of the length of the first dimension; got shape (2,) for (3, 2)",
    ),
    (lambda: rf.randn(3, seed=torch.tensor(1), device="meta"), ValueError, "randn: seed must be on meta; got cpu"),
    (lambda: rf.derive_seed(0, 7), TypeError, "derive_seed: purpose must be a string; got int"),
    (lambda: rf.derive_seed(torch.tensor(0), "a"), TypeError, "derive_seed: seed must be an int; got a tensor"),
    (lambda: rf.derive_seed(-1, "a"), ValueError, "derive_seed: seed must lie in [0, 2^63); got -1"),
    (lambda: rf.available_backends("attention_"), ValueError, "available_backends: op must be one of ode_step"),
]  # fmt: skip


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)


def attention(q=Q, k=K, v=K, **kwargs):
    return lambda: rf.attention(q, k, v, **kwargs)


def varlen(q=Q[0], k=K[0], v=K[0], rows=(0, 4), keys=(0, 4)):
    as_tensors = [torch.tensor(t) if isinstance(t, tuple) else t for t in (rows, keys)]
    return lambda: rf.attention_varlen(q, k, v, *as_tensors)


ATTENTION = [
    (attention(q=None), TypeError, "attention: q must be a tensor; got NoneType"),
    (attention(v=None), TypeError, "attention: v must be a tensor; got NoneType"),
    (attention(q=Q.numpy(), layout="bshd"), TypeError, "attention: q must be a tensor; got ndarray"),
    (attention(q=Q[0]), ValueError, "attention: q must have 4 dimensions (batch, heads, length, channels); got shape (4, 5, 8)"),
    (attention(k=K[0], layout="bshd"), ValueError, "attention: k must have 4 dimensions"),
    (attention(q=Q.long()), TypeError, "attention: q must be float32, float64, bfloat16 or float16; got torch.int64"),
    (attention(q=Q.half()), TypeError, "attention: q must have the dtype of k, torch.float32; got torch.float16"),
    (attention(v=K.half()), TypeError, "attention: v must have the dtype of k, torch.float32; got torch.float16"),
    (attention(q=Q.to("meta")), ValueError, "attention: q must be on the device of k, cpu; got meta"),
    (attention(q=Q[:1]), ValueError, "attention: k must have the batch size of q, 1; got 2"),
    (attention(q=Q[..., :4]), ValueError, "attention: k must have the head size of q, 4; got 8"),
    (attention(v=K[:, :, :3]), ValueError, "attention: v must have the batch, heads and length of k, (2, 4, 7); got (2, 4, 3)"),
    (attention(k=K[..., :0], q=Q[..., :0]), ValueError, "attention: k must have at least one channel; got a torch.float32 tensor of shape (2, 4, 7, 0)"),
    (attention(k=K[:, :2], v=K[:, :2]), ValueError, "attention: k must have the heads of q, 4, unless enable_gqa is True; got 2"),
    (attention(k=K[:, :3], v=K[:, :3], enable_gqa=True), ValueError, "attention: the heads of q must be a multiple of those of k, 3; got 4"),
    (attention(q=Q.to_sparse()), TypeError, "attention: q must be a strided tensor; got layout torch.sparse_coo"),
    (attention(attn_mask=[1]), TypeError, "attention: attn_mask must be a tensor; got list"),
    (attention(attn_mask=torch.ones(5, 7, dtype=torch.int64)), TypeError, "attention: attn_mask must be bool or floating point; got torch.int64"),
    (attention(attn_mask=torch.ones(5, 7).to_sparse()), TypeError, "attention: attn_mask must be a strided tensor; got layout torch.sparse_coo"),
    (attention(attn_mask=torch.ones(7)), ValueError, "attention: attn_mask must have 2 to 4 dimensions that broadcast to (2, 4, 5, 7); got (7,)"),
    (attention(attn_mask=torch.ones(3, 5, 7)), ValueError, "attention: attn_mask must have 2 to 4 dimensions that broadcast to (2, 4, 5, 7); got (3, 5, 7)"),
    (attention(attn_mask=torch.ones(1, 2, 4, 5, 7)), ValueError, "attention: attn_mask must have 2 to 4 dimensions"),
    (attention(attn_mask=torch.ones(5, 7, device="meta")), ValueError, "attention: attn_mask must be on the device of q, cpu; got meta"),
    (attention(scale="1"), TypeError, "attention: scale must be a float; got str"),
    (attention(scale=torch.tensor(1.0)), TypeError, "attention: scale must be a float; got Tensor"),
    (attention(scale=float("nan")), ValueError, "attention: scale must be finite; got nan"),
    (attention(is_causal=1), TypeError, "attention: is_causal must be True or False; got 1"),
    (attention(return_lse=None), TypeError, "attention: return_lse must be True or False; got None"),
    (attention(layout="hnd"), ValueError, "attention: layout must be one of bhsd, bshd; got 'hnd'"),
    (attention(precision="int4"), ValueError, "attention: precision must be one of int8, int8_u8, int8_bf16, int8_fp8, fp8, bf16; got 'int4'"),
    (attention(precision=8), ValueError, "attention: precision must be one of int8"),
    (attention(precision="fp8"), rf.BackendUnavailableError, "attention: precision 'fp8' has no kernel for cpu here"),
    (attention(precision="int8_fp8"), rf.BackendUnavailableError, "attention: precision 'int8_fp8' has no kernel for cpu here"),
    (varlen(q=Q), ValueError, "attention_varlen: q must have 3 dimensions (total, heads, channels); got shape (2, 4, 5, 8)"),
    (varlen(v=None), TypeError, "attention_varlen: v must be a tensor; got NoneType"),
    (varlen(v=K[0, :3]), ValueError, "attention_varlen: v must have the length of k, 4; got 3"),
    (varlen(rows=[0, 4]), TypeError, "attention_varlen: cu_seqlens_q must be an int32 or int64 tensor; got [0, 4]"),
    (varlen(rows=(0.0, 4.0)), TypeError, "attention_varlen: cu_seqlens_q must be an int32 or int64 tensor; got a torch.float32"),
    (varlen(rows=torch.zeros(2, 2, dtype=torch.int64)), ValueError, "attention_varlen: cu_seqlens_q must have shape (sequences + 1,); got (2, 2)"),
    (varlen(rows=(0, 3)), ValueError, "attention_varlen: cu_seqlens_q must rise from 0 to 4; got [0, 3]"),
    (varlen(keys=(0, 5, 4)), ValueError, "attention_varlen: cu_seqlens_k must rise from 0 to 4; got [0, 5, 4]"),
    (varlen(keys=(0, 2, 4)), ValueError, "attention_varlen: cu_seqlens_k must have the length of cu_seqlens_q, 2; got 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [*STEPS, *OTHERS, *ATTENTION],
    ids=lambda v: v[:60] if isinstance(v, str) else "",
)
def test_message(call, kind, text):
    with pytest.raises(kind, match="^" + re.escape(text)) as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.parametrize("case", STEPS, ids=[case[2][:60] for case in STEPS])
def test_a_refused_call_with_out_writes_nothing(case):
    before = X.clone(), V.clone()
    with pytest.raises((TypeError, ValueError)):
        case[0]()
    assert torch.equal(X, before[0])
    assert torch.equal(V, before[1])


@pytest.mark.parametrize(
    "function",
    [
        rf.euler_step,
        rf.taylor_step,
        rf.linear_step,
        rf.interpolate,
        rf.flow_loss,
        rf.randn,
        rf.attention,
        rf.attention_varlen,
        rf.quantize,
    ],
)
def test_unknown_keywords_are_refused(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        function(X, V, 0.1, guidance=3.0) if function is not rf.randn else function(
            3, seed=0, guidance=3.0
        )


def test_use_backend_names_its_choices():
    with (
        pytest.raises(
            ValueError,
            match=r"use_backend: name must be one of native, triton, reference, auto; got 'cuda'",
        ),
        rf.use_backend("cuda"),
    ):
        pass


def test_an_error_leaves_the_forced_backend_behind():
    with pytest.raises(ValueError, match="v must have"), rf.use_backend("reference"):
        rf.euler_step(X, V[:1], 0.1)
    from rfkernels._dispatch import forced_backend

    assert forced_backend() is None


def test_numpy_scalars_and_other_floats_are_numbers():
    import numpy as np

    expected = rf.euler_step(X, V, 0.5)
    for dt in (
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5, dtype=F16),
        torch.tensor(0.5, dtype=F64),
    ):
        assert torch.equal(rf.euler_step(X, V, dt), expected)
    assert torch.equal(rf.randn(5, seed=np.int64(7)), rf.randn(5, seed=7))
    assert torch.equal(rf.randn(np.int64(5), seed=7), rf.randn(5, seed=7))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_freed_scalars_and_seeds_are_no_zeros(shape):
    pytest.importorskip("rfkernels._C", exc_type=ImportError)
    x, freed, seed = torch.ones(3, 2), torch.ones(shape), torch.ones(shape, dtype=torch.int64)
    freed.untyped_storage().resize_(0)
    seed.untyped_storage().resize_(0)
    with rf.use_backend("native"):
        with pytest.raises(ValueError, match="dt has elements but no memory"):
            rf.euler_step(x, x, freed)
        with pytest.raises(ValueError, match="seed has elements but no memory"):
            rf.randn(3, 2, seed=seed)
