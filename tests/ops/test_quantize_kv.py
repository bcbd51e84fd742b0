"""A QuantizedKV: attention on keys and values that were quantized before, in every backend."""

# ruff: noqa: E501  (messages stand on one line)
from __future__ import annotations

import re

import pytest
import torch
from attention_cells import every_cell
from cells import same_bits
from tensors import INPUT_LAYOUTS, laid_out, normal
from tolerances import F64

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason
from rfkernels.backends.attention_schemes import SCHEMES


def inputs(**sizes):
    batch, heads, kv_heads, queries, keys, dim, channels = {
        "batch": 2, "heads": 4, "kv_heads": 2, "queries": 9, "keys": 150, "dim": 24, "channels": 16, **sizes,
    }.values()  # fmt: skip
    return (
        normal(batch, heads, queries, dim),
        normal(batch, kv_heads, keys, dim, key=1) + 1,
        normal(batch, kv_heads, keys, channels, key=2),
    )


@every_cell
def test_attention_on_quantized_keys_is_attention_on_the_keys(cell):
    q, k, v = inputs()
    queries, keys, values = (t.to(cell.device, copy=True) for t in (q, k, v))

    def both():
        kv = rf.quantize(keys, values, precision=cell.scheme)
        return rf.attention(queries, kv, enable_gqa=True, return_lse=True), kv

    (out, lse), kv = cell.run(both)
    expected = cell.attention(q, k, v, enable_gqa=True, return_lse=True)
    same_bits(out, expected[0])
    same_bits(lse, expected[1])
    same_bits(keys, k)
    same_bits(values, v)
    assert (kv.scheme, kv.backend, kv.shape, kv.value_dim) == (
        cell.scheme,
        cell.backend,
        tuple(k.shape),
        16,
    )
    assert cell.scheme in repr(kv)
    assert len(repr(kv)) < 300
    if SCHEMES[cell.scheme].rotated:
        torch.testing.assert_close(kv.k_mean.cpu(), k.mean(2), rtol=1e-5, atol=1e-6)
    else:
        assert kv.k_mean is None


@every_cell
@pytest.mark.parametrize("by_head", [False, True])
def test_a_key_mask_is_kept_and_joined_with_the_mask(cell, by_head):
    q, k, v = inputs()
    open_ = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(1)) < 0.5
    open_ = open_ if by_head else open_[:, 0]
    full = (
        (open_ if by_head else open_[:, None]).expand(2, 2, 150).repeat_interleave(2, 1)[:, :, None]
    )
    k[~full[:, ::2, 0]] = 1e6  # must not be seen
    extra = torch.rand(9, 150, generator=torch.Generator().manual_seed(2)) < 0.9
    added = torch.where(extra, normal(9, 150), -torch.inf)
    there = [t.to(cell.device) for t in (q, k, v, open_, extra, added)]

    def call():
        q, k, v, open_, extra, added = there
        kv = rf.quantize(k, v, key_mask=open_, precision=cell.scheme)
        options = {"enable_gqa": True}
        return [
            rf.attention(q, kv, **options),
            rf.attention(q, kv, attn_mask=extra, **options),
            rf.attention(q, kv, attn_mask=added, **options),
            rf.attention(q.transpose(1, 2), kv, layout="bshd", **options).transpose(1, 2),
        ]

    plain, with_bool, with_float, other_layout = (t.cpu() for t in cell.run(call))
    expected = cell.attention(q, k, v, attn_mask=full, enable_gqa=True)
    same_bits(plain, expected)
    same_bits(other_layout, expected)
    for found, mask in (
        (with_bool, full & extra),
        (with_float, added.masked_fill(~full, -torch.inf)),
    ):
        expected = cell.attention(q, k, v, attn_mask=mask, enable_gqa=True)
        # The extra mask closes no key to all queries, so mean and scales are the same.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_quantized_keys_that_are_not_finite_give_nan():
    q, k, v = inputs()
    k[0, 1, 3, 2] = torch.nan
    with rf.use_backend("reference"):
        out, lse = rf.attention(q, rf.quantize(k, v), enable_gqa=True, return_lse=True)
        assert out[0, 2:].isnan().all()
        assert lse[0, 2:].isnan().all()
        assert out[0, :2].isfinite().all()
        assert out[1].isfinite().all()
        q[1, 0, 4, 1] = torch.inf
        out = rf.attention(q, rf.quantize(k, v), enable_gqa=True)
        assert out[1, 0, 4].isnan().all()
        assert out[1].isnan().any(-1).sum() == 1


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_memory_orders_do_not_matter(layout):
    k, v = normal(2, 3, 70, 8), normal(2, 3, 70, 6, key=1)
    with rf.use_backend("reference"):
        strided = [laid_out(t, layout) for t in (k, v)]
        found = rf.quantize(*strided)
        expected = rf.quantize(*(t.contiguous() for t in strided))
        other = rf.quantize(*(t.transpose(1, 2) for t in strided), layout="bshd")
    for a, b, c in zip(found.tensors, expected.tensors, other.tensors, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def refused(call, kind, text):
    with pytest.raises(kind, match="^" + re.escape(text)) as caught:
        call()
    assert type(caught.value) is kind


def test_messages():
    q, k, v = inputs()
    with rf.use_backend("reference"):
        kv = rf.quantize(k, v)
        cases = [
            (lambda: rf.quantize(None, v), TypeError, "quantize: k must be a tensor; got NoneType"),
            (lambda: rf.quantize(k[0], v), ValueError, "quantize: k must have 4 dimensions"),
            (lambda: rf.quantize(k.double(), v.double()), TypeError, "quantize: k must be float32, bfloat16 or float16; got torch.float64"),
            (lambda: rf.quantize(k, v.half()), TypeError, "quantize: v must have the dtype of k, torch.float32; got torch.float16"),
            (lambda: rf.quantize(k, v[:, :, 1:]), ValueError, "quantize: v must have the batch, heads and length of k, (2, 2, 150); got (2, 2, 149)"),
            (lambda: rf.quantize(k.requires_grad_(), v), ValueError, "quantize: k and v must not require a gradient"),
            (lambda: rf.quantize(k.detach(), v, precision="int4"), ValueError, "quantize: precision must be one of int8, int8_u8"),
            (lambda: rf.quantize(k.detach(), v, layout="sbhd"), ValueError, "quantize: layout must be one of bhsd, bshd; got 'sbhd'"),
            (lambda: rf.quantize(k.detach(), v, key_mask=torch.ones(2, 150)), TypeError, "quantize: key_mask must be a bool tensor; got a torch.float32 tensor"),
            (lambda: rf.quantize(k.detach(), v, key_mask=torch.ones(150, dtype=torch.bool)), ValueError, "quantize: key_mask must have shape (2, 150) or (2, 2, 150); got (150,)"),
            (lambda: rf.quantize(torch.zeros(1, 1, 3, 257), torch.zeros(1, 1, 3, 8)), ValueError, "quantize: k must have at most 256 channels; got 257"),
            (lambda: rf.attention(q, kv, v), TypeError, "attention: v must be left out with a QuantizedKV; got a torch.float32 tensor"),
            (lambda: rf.attention(q, kv), ValueError, "attention: k must have the heads of q, 4, unless enable_gqa is True; got 2"),
            (lambda: rf.attention(q.half(), kv, enable_gqa=True), TypeError, "attention: q must have the dtype of the QuantizedKV, torch.float32; got torch.float16"),
            (lambda: rf.attention(q[:1], kv, enable_gqa=True), ValueError, "attention: q must have the batch and head size of the QuantizedKV, 2 and 24; got 1 and 24"),
            (lambda: rf.attention(q, kv, enable_gqa=True, precision="bf16"), ValueError, "attention: precision must be that of the QuantizedKV, 'int8'; got 'bf16'"),
            (lambda: rf.attention(q.clone().requires_grad_(), kv, enable_gqa=True), ValueError, "attention: derivatives and vmap need the original k and v; got a QuantizedKV"),
            (lambda: rf.attention(q, kv, enable_gqa=True, attn_mask=torch.ones(9, 149)), ValueError, "attention: attn_mask must have 2 to 4 dimensions that broadcast to (2, 4, 9, 150); got (9, 149)"),
        ]  # fmt: skip
        for case in cases:
            refused(*case)
    with pytest.raises(TypeError, match="unexpected keyword argument 'smooth_k'"):
        rf.quantize(k, v, smooth_k=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_function_reads_quantized_keys():
    torch._dynamo.reset()
    q, k, v = inputs()
    with rf.use_backend("reference"):
        kv = rf.quantize(k, v)

        def call(q, kv):
            return rf.attention(q, kv, enable_gqa=True) * 2

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        same_bits(compiled(q, kv), call(q, kv))
        arguments = (
            q, list(kv.tensors), None, True, 0.3, "int8", kv.scheme, kv.backend, 150, 16, True,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.rfkernels.attention_kv.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheme", ["int8_u8", "bf16"])
def test_a_graph_may_quantize(scheme):
    torch._dynamo.reset()
    q, k, v = (t.bfloat16() for t in inputs())
    open_ = torch.rand(2, 150) < 0.5

    def call(q, k, v):
        kv = rf.quantize(k, v, key_mask=open_, precision=scheme)
        return rf.attention(q, kv, enable_gqa=True) * 2

    if unavailable_reason("native", "cpu", "quantize") is None:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        same_bits(compiled(q, k, v), call(q, k, v))
        torch.library.opcheck(
            torch.ops.rfkernels.quantize.default,
            (k, v, None, scheme, "native"),
            test_utils=(
                "test_schema",
                "test_faketensor",
            ),  # its padding is not written, so not comparable
        )
    for name in (scheme, "fp8"):
        torch.library.opcheck(
            torch.ops.rfkernels.quantize.default,
            (k, v, None, name, "reference"),
            test_utils=(
                "test_schema",
                "test_faketensor",
            ),  # its loops take minutes with dynamic shapes
        )


@pytest.mark.parametrize("scheme", ["int8_bf16", "bf16"])
def test_quantized_values_do_not_share_memory_with_the_caller(scheme):
    q, k, v = (t.bfloat16() for t in inputs())
    with rf.use_backend("reference"):
        kv = rf.quantize(k, v, precision=scheme)
        expected = rf.attention(q, kv, enable_gqa=True)
        k.fill_(7.0)
        v.fill_(7.0)
        same_bits(rf.attention(q, kv, enable_gqa=True), expected)


def test_vmap_over_keys_is_refused():
    _, k, v = inputs()
    with pytest.raises(
        ValueError, match="quantize: k and v must not require a gradient or be mapped"
    ):
        torch.vmap(lambda k, v: rf.quantize(k[None], v[None]).k_mean)(k, v)


def test_float64_rows_reach_no_kernel():
    q, k, v = (t.to(F64) for t in inputs())
    with pytest.raises(TypeError, match="k must be float32, bfloat16 or float16"):
        rf.quantize(k, v)
    assert rf.attention(q, k, v, enable_gqa=True).dtype == F64
