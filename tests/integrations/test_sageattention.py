"""sageattn: SageAttention's layouts, scale and log-sum-exp, and what it must refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from relative_error import relative

import rfkernels as rf
from rfkernels.integrations.sageattention import sageattn, sageattn_varlen


def qkv(kv_heads=4, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(2)
    shapes = [(2, 4, 20, 16), (2, kv_heads, 33, 16), (2, kv_heads, 33, 16)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def test_the_signature_is_sageattentions():
    assert rf.sageattn is sageattn
    assert rf.sageattn_varlen is sageattn_varlen
    parameters = list(inspect.signature(sageattn).parameters)
    assert parameters[:7] == [
        "q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "return_lse",
    ]  # fmt: skip
    assert "attn_mask" in parameters  # ComfyUI looks for it


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_against_torch(kernel, layout, kv_heads, causal):
    q, k, v = qkv(kv_heads)
    exact = F.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), is_causal=causal, scale=0.4, enable_gqa=True
    )
    scores = (q.double() @ k.double().repeat_interleave(4 // kv_heads, 1).mT) * 0.4
    if causal:
        scores = scores.masked_fill(~torch.ones(20, 33).bool().tril(), -torch.inf)
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out, lse = sageattn(q, k, v, layout, causal, 0.4, True)
    assert kernel.calls("int8") == 1
    assert out.dtype == torch.bfloat16
    assert out.shape == q.shape
    assert relative(out if layout == "HND" else out.transpose(1, 2), exact) < 0.04
    assert lse.shape == (2, 4, 20)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=0.05)
    assert torch.equal(sageattn(q, k, v, layout, causal, sm_scale=0.4), out)


def test_masks(kernel):
    q, k, v = qkv(dtype=torch.float32)
    mask = torch.arange(33) < torch.tensor([33, 7]).view(2, 1, 1, 1)
    found = sageattn(q, k, v, attn_mask=mask, smooth_k=False)
    exact = F.scaled_dot_product_attention(q, k, v, mask)
    assert relative(found, exact) < 0.03 < relative(sageattn(q, k, v), exact)
    assert kernel.calls() == 2


def test_what_is_refused():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="pv_accum_dtype"):
        sageattn(q, k, v, pv_accum_dtype="fp32")
    with pytest.raises(ValueError, match="sageattn: tensor_layout must be HND or NHD; got 'BHSD'"):
        sageattn(q, k, v, "BHSD")
    with pytest.raises(TypeError, match="sageattn: smooth_k must be a bool; got int"):
        sageattn(q, k, v, smooth_k=1)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(kernel, causal):
    lengths = [(5, 5), (1, 17), (9, 9)]
    g = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(sum(n[i] for n in lengths), heads, 16, generator=g)
        for i, heads in ((0, 4), (1, 2), (1, 2))
    )
    rows, keys = (torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() for i in (0, 1))
    found = sageattn_varlen(q, k, v, rows, keys, 9, 17, causal, 0.4)
    assert kernel.calls("int8") == 3
    for i in range(3):
        one = [
            t[None, a[i] : a[i + 1]].transpose(1, 2) for t, a in ((q, rows), (k, keys), (v, keys))
        ]
        exact = F.scaled_dot_product_attention(*one, is_causal=causal, scale=0.4, enable_gqa=True)
        assert relative(found[rows[i] : rows[i + 1]], exact[0].transpose(0, 1)) < 0.05
    with pytest.raises(
        TypeError, match="sageattn_varlen: max_seqlen_k must be an integer; got float"
    ):
        sageattn_varlen(q, k, v, rows, keys, 9, 17.0)
    with pytest.raises(TypeError, match="window_size"):
        sageattn_varlen(q, k, v, rows, keys, 9, 17, window_size=3)
