"""The Triton kernels of quantized attention against the reference: in Triton's interpreter, or on a device if there is one.

Codes and scales are compared bit for bit. Attention is compared in dB: the same scheme in float32 and in float64 agrees to
85 dB and more, to 60 with e4m3, where one rounding may fall on the other side; bfloat16 outputs, which the interpreter
truncates, to 45.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rfkernels as rf
from rfkernels.backends import triton as package
from rfkernels.backends.attention_schemes import SCHEMES
from rfkernels.backends.reference import attention as reference_attention
from rfkernels.backends.reference import quantize as reference_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = package.unavailable_reason(DEVICE)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # the interpreter's maximum
]
if REASON is None:
    from rfkernels.backends.triton import attention, quantize

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OLD = DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9)
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(OLD and "fp8" in name, reason="no e4m3 before 8.9"))
    for name in ("int8_bf16", "int8_fp8", "fp8", "bf16")
]
ROTATED = NAMES[:3]
# On a device weights next to a rounding boundary may fall on the other side, and fp8 sums keep 13 bits.
LEAST = {"int8_bf16": 80.0, "bf16": 80.0, "int8_fp8": 60.0, "fp8": 60.0}
LEAST_ON_DEVICE = {"int8_bf16": 60.0, "bf16": 60.0, "int8_fp8": 45.0, "fp8": 40.0}


def draw(*shape: int, dtype: torch.dtype = F32, key: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * key + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(batch, heads, kv_heads, queries, keys, dim, v_dim=None, dtype=F32):
    """Q, K with channel biases, and V with a channel of zeros."""
    q = draw(batch, heads, queries, dim, dtype=dtype)
    k = draw(batch, kv_heads, keys, dim, dtype=dtype, key=1) + 2 * draw(dim, dtype=dtype, key=2)
    v = draw(batch, kv_heads, keys, v_dim or dim, dtype=dtype, key=3)
    v[..., 0] = 0
    return q, k, v


def decibel(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    noise = (actual.double() - expected).square().sum()
    return math.inf if noise == 0 else 10 * torch.log10(expected.square().sum() / noise).item()


def run(module, q, k, v, scheme, mask=None, causal=False, scale=None, kv=None):
    """(out, lse) of one backend module."""
    value = v if kv is None else kv.v_codes
    channels = value.shape[2] if kv is not None and kv.v_scale is not None else value.shape[3]
    out = torch.full((*q.shape[:3], channels), 7.0, dtype=q.dtype, device=DEVICE)
    lse = torch.full(q.shape[:3], 7.0, device=DEVICE)
    k, v = (k, v) if kv is None else (None, None)
    module.attention(
        q, k, v, kv, mask, causal, scale or q.shape[3] ** -0.5, scheme, out, lse
    )  # fmt: skip
    return out, lse


def check(q, k, v, scheme, mask=None, causal=False, scale=None) -> torch.Tensor:
    """Both backends agree on values, on logsumexp and on the rows that are not finite."""
    with np.errstate(all="ignore"):
        out, lse = run(attention, q, k, v, scheme, mask, causal, scale)
    expected, sums = run(reference_attention, q, k, v, scheme, mask, causal, scale)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse == -torch.inf, sums == -torch.inf)
    assert torch.equal(lse.isnan(), sums.isnan())
    fine = sums.isfinite()
    torch.testing.assert_close(lse[fine], sums[fine], rtol=2e-6, atol=2e-5)
    least = (LEAST if DEVICE == "cpu" else LEAST_ON_DEVICE)[scheme]
    if q.dtype == BF16:
        least = min(least, 45.0)
    elif q.dtype == F16:
        least = min(least, 70.0)
    found = decibel(out.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert found >= least, f"{found:.1f} dB"
    return out


def same_bits(actual, expected, name: str) -> None:
    if expected is None:
        assert actual is None, name
        return
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    if expected.dtype != torch.bool:
        actual, expected = actual.contiguous().view(words), expected.contiguous().view(words)
    assert torch.equal(actual, expected), f"{name}: {(actual != expected).sum()} differ"


# (schemes, dtype, head size, value size, queries, keys, every second key valid)
CODES = [
    (NAMES, F32, 64, 64, 5, 130, False),
    (NAMES[:2], BF16, 40, 72, 5, 65, True),
    (NAMES[2:3], F16, 128, 8, 3, 64, False),
    (NAMES[1:2], F32, 256, 160, 2, 66, True),
    (NAMES[:1], BF16, 1, 1, 3, 3, False),
    (ROTATED, F32, 5, 3, 131, 129, True),
]


def code_cases():
    """One case per scheme of every line of CODES."""
    for schemes, *case in CODES:
        for scheme in schemes:
            yield pytest.param(scheme.values[0], *case, marks=scheme.marks)


@pytest.mark.parametrize(
    ("scheme", "dtype", "dim", "v_dim", "queries", "keys", "holes"), list(code_cases())
)
def test_codes_are_the_reference_s(scheme, dtype, dim, v_dim, queries, keys, holes):
    q, k, v = inputs(1, 2, 2, queries, keys, dim, v_dim, dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.mT.contiguous().mT
    valid = (torch.arange(keys, device=DEVICE) % 2 == 0).expand(1, 2, keys) if holes else None
    for name, actual, expected in zip(
        ("codes", "scale", "finite"),
        quantize.quantize_q(q, scheme), reference_quantize.quantize_q(q, scheme), strict=True,
    ):  # fmt: skip
        same_bits(actual, expected, name)
    before = package.launches["quantize"]
    found = quantize.quantize_kv(k, v, scheme, valid)
    assert package.launches["quantize"] == before + (3 if SCHEMES[scheme].rotated else 0)
    expected = reference_quantize.quantize_kv(k, v, scheme, valid)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        same_bits(a, b, name)
    assert found.v_codes.data_ptr() != v.data_ptr()


@pytest.mark.parametrize("scheme", ROTATED)
def test_tiny_and_equal_inputs_have_zero_codes(scheme):
    k = torch.full((1, 1, 70, 16), 3.0, device=DEVICE)  # the mean takes everything off
    v = draw(1, 1, 70, 16) * 2.0**-120
    q = draw(1, 1, 3, 16)
    q[0, 0, 1] *= 2.0**-120
    codes, scale, finite = quantize.quantize_q(q, scheme)
    assert scale[0, 0, 1] == 0
    assert not codes[0, 0, 1].float().any()
    assert finite.all()
    kv = quantize.quantize_kv(k, v, scheme, None)
    assert not kv.k_codes.float().any()
    if kv.v_scale is not None:
        assert not kv.v_codes.float().any()
    check(q, k, v * 2.0**110, scheme)


@pytest.mark.parametrize("scheme", NAMES)
def test_grouped_heads_odd_sizes_and_batches(scheme):
    q, k, v = inputs(2, 2, 1, 3, 141, 24, 40)
    check(q, k, v, scheme)


@pytest.mark.parametrize("scheme", NAMES)
def test_causal_over_several_tiles(scheme):
    check(*inputs(1, 1, 1, 140, 257, 16), scheme, causal=True)


@pytest.mark.parametrize("scheme", NAMES)
def test_whole_blocks_of_keys(scheme):
    check(*inputs(1, 1, 1, 7, 256, 32), scheme)


@pytest.mark.parametrize(("dim", "v_dim"), [(1, 1), (72, 128), (160, 256)])
@pytest.mark.parametrize("scheme", ["int8_bf16", pytest.param("int8_fp8", marks=NAMES[1].marks)])
def test_head_sizes(dim, v_dim, scheme):
    check(*inputs(1, 1, 1, 3, 70, dim, v_dim), scheme)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("scheme", ["int8_bf16", "bf16"])
def test_half_precision_inputs(dtype, scheme):
    check(*inputs(1, 1, 1, 5, 66, 32, dtype=dtype), scheme)


def masks(heads: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
    holes = draw(1, heads, queries, keys, key=5) > -0.5
    holes[:, :, 1] = False
    bias = draw(1, 1, queries, keys, key=6)
    bias[..., 2, :] = -torch.inf
    bias[..., 3] = -1e30
    padding = torch.arange(keys, device=DEVICE) < keys - 9
    return {
        "bool": holes,
        "key padding": padding.expand(1, 1, 1, keys),
        "float": bias,
        "float16, one row": bias[..., :1, :].half().clamp(min=-6e4),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "key padding", "float", "float16, one row"])
def test_masks(kind, causal):
    q, k, v = inputs(1, 2, 1, 5, 135, 16)
    k[:, :, -9:] = 40.0  # would set the scale of their block
    mask = masks(2, 5, 135)[kind].expand(1, 2, 5, 135)
    out = check(q, k, v, "int8_bf16", mask, causal)
    rows = {"bool": 1, "float": 2}
    if kind in rows:
        assert not out[:, :, rows[kind]].any(), "a row without keys is zero"


@pytest.mark.parametrize("scheme", NAMES[1:])
def test_a_mask_in_every_scheme(scheme):
    q, k, v = inputs(1, 1, 1, 5, 133, 16)
    check(q, k, v, scheme, masks(1, 5, 133)["float"])


def test_valid_keys_are_the_reference_s():
    k = draw(2, 2, 135, 8)
    cases = [(None, True, 20)]
    cases += [(mask, causal, 35) for mask in masks(4, 35, 135).values() for causal in (0, 1)]
    cases += [(draw(2, 1, 1, 135) > 0, False, 35), (draw(2, 4, 35, 135, key=8) > 1.8, True, 35)]
    for mask, causal, queries in cases:
        mask = None if mask is None else mask.expand(2, 4, queries, 135)
        found = attention.valid_keys(mask, bool(causal), k, queries)
        expected = reference_quantize.valid_keys(mask, bool(causal), 2, queries, 135)
        assert torch.equal(found, expected.to(DEVICE).expand(2, 2, 135))
    assert attention.valid_keys(None, True, k, 135) is None


def test_negative_scale_and_one_key():
    check(*inputs(1, 1, 1, 5, 3, 8), "int8_bf16", scale=-0.7)
    check(*inputs(1, 1, 1, 3, 70, 8), "bf16", scale=-0.7, causal=True)
    check(*inputs(1, 1, 1, 2, 1, 8, 4), "int8_bf16")


@pytest.mark.parametrize("scheme", NAMES)
def test_a_sink_in_the_first_block_leaves_the_others_their_precision(scheme):
    q, k, v = inputs(1, 1, 1, 4, 300, 32)
    k[:, :, 0] = 6.0 * q[:, :, :1].mean(2)
    v[:, :, 0] = 0.0
    check(q, k, v, scheme)


SPOILED = {
    "NaN in a query": lambda q, k, v: q[0, 1, 2].fill_(math.nan),
    "infinity in a query": lambda q, k, v: q[0, 1, 2, 3].fill_(math.inf),
    "infinity in a key": lambda q, k, v: k[0, 0, 5, 1].fill_(math.inf),
    "NaN in a key": lambda q, k, v: k[0, 0, 5, 1].fill_(math.nan),
    "NaN in a value": lambda q, k, v: v[0, 0, 66, 3].fill_(math.nan),
    "infinity in a value": lambda q, k, v: v[0, 0, 66, 3].fill_(math.inf),
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, "int8_bf16") for name in SPOILED]
    + [("infinity in a value", "bf16")]
    + [pytest.param("NaN in a value", "int8_fp8", marks=NAMES[1].marks)],
)
def test_nan_and_infinity_spoil_what_they_spoil_in_torch(name, scheme):
    q, k, v = inputs(1, 4, 2, 6, 70, 16)
    SPOILED[name](q, k, v)
    with np.errstate(all="ignore"):
        out, lse = run(attention, q, k, v, scheme)
    expected, _ = run(reference_attention, q, k, v, scheme)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert not exact.isfinite().all()
    assert (out == torch.inf).equal(exact == torch.inf)
    assert lse[0, 2:].isfinite().all()
    hurt = ~exact.isfinite().flatten(2).all(-1)  # the tiles that took the exact path
    fine = exact.isfinite() & hurt[..., None, None]
    if fine.any():
        torch.testing.assert_close(out[fine], exact[fine], rtol=2e-5, atol=2e-6)
    sound = ~hurt
    assert decibel(out[sound], expected[sound]) >= 40.0
    if "value" not in name:
        return
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * q.shape[3] ** -0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=3e-2)


def test_exact_path_under_a_mask_causal_and_grouped():
    q, k, v = inputs(1, 2, 1, 11, 75, 12, 5)
    q[0, 0, 4] = math.nan
    k[0, 0, 3, 0] = math.inf
    mask = (draw(1, 2, 11, 75, key=5) > -0.5).clone()
    mask[..., 3] = False
    mask[0, 1, 6] = False
    with np.errstate(all="ignore"):
        out, lse = run(attention, q, k, v, "int8_bf16", mask, True)
    open_ = mask & torch.ones(11, 75, dtype=torch.bool, device=DEVICE).tril()
    k[0, 0, 3, 0] = 0.0  # closed for every query
    both = k.expand(1, 2, 75, 12).double()
    scores = (q.double() @ both.mT) * 12**-0.5
    scores = scores.masked_fill(~open_, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v.expand(1, 2, 75, 5).double()
    expected[0, 0, 4] = math.nan
    sums = scores.logsumexp(-1).float()
    # The infinity counts nowhere, since its key is closed; the NaN sends the first head's tile to the exact path.
    for head, tolerance in ((0, 1e-6), (1, 3e-2)):
        torch.testing.assert_close(
            out[0, head].double(), expected[0, head], rtol=1e-5, atol=tolerance, equal_nan=True
        )
        torch.testing.assert_close(
            lse[0, head], sums[0, head], rtol=1e-5, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_that_is_not_finite(value):
    q, k, v = inputs(1, 1, 1, 4, 70, 16)
    mask = torch.zeros(1, 1, 4, 70, device=DEVICE)
    mask[..., 2, 66] = value
    with np.errstate(all="ignore"):
        out, _ = run(attention, q, k, v, "int8_bf16", mask)
    assert out.isnan().flatten(2).any(-1).all()
    assert out.isnan().all(-1).flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("scheme", NAMES)
def test_quantized_keys_give_the_bits_of_the_whole_call(scheme):
    q, k, v = inputs(1, 2, 1, 5, 70, 24, 40)
    kv = quantize.quantize_kv(k, v, scheme, None)
    for actual, expected in zip(
        run(attention, q, None, None, scheme, kv=kv), run(attention, q, k, v, scheme), strict=True
    ):
        assert torch.equal(actual, expected)


def test_public_call_counts_its_launches_and_keeps_its_inputs():
    q, k, v = inputs(1, 2, 1, 5, 70, 24)
    copies = [t.clone() for t in (q, k, v)]
    package.launches.update(quantize=0, attention=0)
    with rf.use_backend("triton"):
        out = rf.attention(q, k, v, enable_gqa=True, precision="int8_bf16")
    assert package.launches["quantize"] == 4  # Q; sums, means and codes of K
    assert package.launches["attention"] == 2  # the second returns at once
    for tensor, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(tensor, copy)
    expected, _ = run(reference_attention, q, k, v, "int8_bf16")
    assert decibel(out, expected) >= 60.0


def test_strided_outputs_and_nothing_beside_them():
    q, k, v = inputs(2, 1, 1, 5, 66, 8)
    memory = torch.full((2, 9, 3, 10), 7.0, device=DEVICE)
    sums = torch.full((2, 5, 4), 7.0, device=DEVICE)
    out, lse = memory[:, 2:7, 1:2, 1:9].transpose(1, 2), sums[..., 1:2].mT
    attention.attention(q, k, v, None, None, False, 0.35, "int8_bf16", out, lse)
    expected, expected_sums = run(attention, q, k, v, "int8_bf16", scale=0.35)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_sums)
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (memory == 7.0).all()
    assert (sums == 7.0).all()


def test_widely_spread_keys(monkeypatch):
    q, k, v = inputs(1, 1, 1, 3, 66, 8)
    k = k.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT
    expected, _ = run(attention, q, k, v, "bf16")
    monkeypatch.setattr(attention, "FARTHEST", 1)  # the copy that strides of 2^22 elements take
    assert torch.equal(run(attention, q, k, v, "bf16")[0], expected)


@pytest.mark.parametrize("scheme", ["int8_bf16", "bf16"])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (1, 0, 4), (1, 3, 0)])
def test_empty_tensors(scheme, batch, queries, keys):
    q, k, v = draw(batch, 1, queries, 8), draw(batch, 1, keys, 8), draw(batch, 1, keys, 4)
    out, lse = run(attention, q, k, v, scheme)
    assert not out.any()
    assert (lse == -torch.inf).all()
