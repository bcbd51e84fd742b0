"""quantize: codes and scales bit for bit against a plain re-implementation in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells import same_bits
from tensors import normal
from tolerances import BF16, F16, F32

from rfkernels.backends.attention_schemes import SCHEMES, SIGN_WORDS, padded_dim, sign_vector
from rfkernels.backends.reference.quantize import quantize_kv, quantize_q, rotate, valid_keys
from rfkernels.backends.reference.random import philox4x32

ROTATED = [name for name, scheme in SCHEMES.items() if scheme.rotated]

# The plain re-implementation: one number after the other, numpy float32 ------------------------------------------

F = np.float32
E4M3 = sorted(
    {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
    | {m / 8 * 2.0**-6 for m in range(8)}
)


def e4m3(value: np.float32) -> float:
    """Round to nearest, ties to the even code."""
    size = abs(float(value))
    distances = [abs(size - x) for x in E4M3]
    least = min(distances)
    best = [i for i, d in enumerate(distances) if d == least]
    index = next(i for i in best if len(best) == 1 or i % 2 == 0)
    return float(np.copysign(E4M3[index], value))


def rounded(value: np.float32, kind: str) -> float:
    return float(np.rint(value)) if kind == "int8" else e4m3(value)


def row_rotated(row: list[np.float32], signs: tuple[float, ...]) -> list[np.float32]:
    y = [F(x * F(s)) for x, s in zip(row, signs, strict=True)]
    y += [F(0)] * (padded_dim(len(row)) - len(row))
    span = 1
    while span < len(y):
        for start in range(0, len(y), 2 * span):
            for i in range(start, start + span):
                y[i], y[i + span] = F(y[i] + y[i + span]), F(y[i] - y[i + span])
        span *= 2
    return y


def group_codes(rows: list[list[np.float32]], kind: str) -> tuple[list[list[float]], np.float32]:
    """Codes and scale of rows that share one."""
    largest = F(448) if kind == "e4m3" else F(127)
    a = max((abs(x) for row in rows for x in row), default=F(0))
    if a < F(2.0**-100):
        return [[0.0] * len(row) for row in rows], F(0)
    inverse = F(largest / a)
    return [[rounded(F(x * inverse), kind) for x in row] for row in rows], F(a / largest)


def plain_q(q: np.ndarray, kind: str):
    signs = sign_vector(q.shape[1])
    found = [group_codes([row_rotated(list(row), signs)], kind) for row in q]
    return [codes[0] for codes, _ in found], [scale for _, scale in found]


def plain_k(k: np.ndarray, valid: np.ndarray, kind: str):
    keys, dim = k.shape
    total = [0.0] * dim
    for first in range(0, keys, 64):
        for d in range(dim):
            block = F(0)
            for j in range(first, min(first + 64, keys)):
                if valid[j]:
                    block = F(block + k[j, d])
            total[d] += float(block)
    mean = [F(t / valid.sum()) if valid.any() else F(0) for t in total]
    codes, scales = [[0.0] * padded_dim(dim) for _ in range(keys)], []
    for first in range(0, keys, 64):
        chosen = [j for j in range(first, min(first + 64, keys)) if valid[j]]
        rows = [
            row_rotated([F(x - m) for x, m in zip(k[j], mean, strict=True)], sign_vector(dim))
            for j in chosen
        ]
        found, scale = group_codes(rows, kind)
        scales.append(scale)
        for j, row in zip(chosen, found, strict=True):
            codes[j] = row
    return codes, scales, mean


def plain_v(v: np.ndarray, valid: np.ndarray, pv: str):
    keys, channels = v.shape
    c = [
        max((abs(v[j, d]) for j in range(keys) if valid[j]), default=F(0)) for d in range(channels)
    ]
    tiny = F(2.0**-100)
    codes, key_scales = [[0.0] * channels for _ in range(keys)], [F(1)] * keys
    for j in range(keys):
        if not valid[j]:
            continue
        if pv == "e4m3":
            codes[j] = [
                e4m3(F(x * F(F(448) / m))) if m >= tiny else 0.0
                for x, m in zip(v[j], c, strict=True)
            ]
            continue
        w = [F(x * F(F(1) / m)) if m >= tiny else F(0) for x, m in zip(v[j], c, strict=True)]
        s = max(max(abs(x) for x in w), F(2.0**-40))
        codes[j], key_scales[j] = [float(np.rint(F(x * F(F(127) / s)))) for x in w], s
    return codes, key_scales, [F(x / F(448 if pv == "e4m3" else 127)) for x in c]


def equal(found: torch.Tensor, expected: object) -> None:
    np.testing.assert_array_equal(found.double().numpy(), np.asarray(expected, dtype=np.float64))


CASES = {
    "ordinary": (70, 16, 8, lambda x: x),
    "odd sizes": (65, 5, 3, lambda x: x),
    "one key": (1, 1, 1, lambda x: x),
    "large and small": (40, 9, 4, lambda x: x * torch.exp2(30 * torch.sin(torch.arange(x.shape[0])))[:, None]),
    "denormal": (20, 4, 4, lambda x: x * 1e-40),
    "zeros": (67, 8, 4, lambda x: x * 0),
    "ties": (66, 4, 4, lambda x: (x * 4).round() / 4),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "some keys"])
@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_of_the_loops(case, masked, dtype):
    keys, dim, channels, change = CASES[case]
    q, k, v = (change(normal(keys, n, key=i)).to(dtype) for i, n in enumerate((dim, dim, channels)))
    if dtype == F16 and case == "large and small":
        q, k, v = (t.clamp(-6e4, 6e4) for t in (q, k, v))
    valid = torch.rand(keys, generator=torch.Generator().manual_seed(5)) < 0.6 if masked else None
    open_ = np.ones(keys, dtype=bool) if valid is None else valid.numpy()
    for scheme in ("int8_u8", "fp8"):
        kind = SCHEMES[scheme]
        codes, scale, finite = quantize_q(q[None, None], scheme)
        expected_codes, expected_scale = plain_q(q.float().numpy(), kind.qk)
        equal(codes[0, 0], expected_codes)
        equal(scale[0, 0], expected_scale)
        assert finite.all()
        kv = quantize_kv(
            k[None, None], v[None, None], scheme, None if valid is None else valid[None, None]
        )
        expected_codes, expected_scale, mean = plain_k(k.float().numpy(), open_, kind.qk)
        equal(kv.k_codes[0, 0], expected_codes)
        equal(kv.k_scale[0, 0], expected_scale)
        equal(kv.k_mean[0, 0], mean)
        expected_codes, key_scale, channel_scale = plain_v(v.float().numpy(), open_, kind.pv)
        if kind.pv == "e4m3":
            assert kv.v_codes.shape[-1] == -(-keys // 128) * 128
            assert not kv.v_codes[0, 0, :, keys:].float().any()
            equal(kv.v_codes[0, 0, :, :keys].T, expected_codes)
            assert kv.v_key_scale is None
        else:
            equal(kv.v_codes[0, 0], expected_codes)
            equal(kv.v_key_scale[0, 0], key_scale)
        equal(kv.v_scale[0, 0], channel_scale)
        assert kv.finite.all()


def test_the_schemes_share_their_parts():
    q, k, v = (normal(1, 2, 70, 24, key=i) for i in range(3))
    parts = {name: quantize_kv(k, v, name, None) for name in SCHEMES}
    for name in ("int8_bf16", "int8_fp8"):
        same_bits(parts[name].k_codes.int(), parts["int8_u8"].k_codes.int())
        same_bits(quantize_q(q, name)[0].int(), quantize_q(q, "int8_u8")[0].int())
    same_bits(parts["int8_fp8"].v_codes.float(), parts["fp8"].v_codes.float())
    same_bits(parts["int8_bf16"].v_codes, v.bfloat16())
    same_bits(parts["bf16"].k_codes, k.bfloat16())
    codes, scale, _ = quantize_q(q, "bf16")
    same_bits(codes, q.bfloat16())
    assert scale is None
    assert parts["bf16"].k_scale is parts["bf16"].k_mean is None


def test_the_signs_are_philox_words():
    key = (torch.zeros(1, dtype=torch.int64),) * 2
    words = []
    for block in (0, 1):
        counter = (torch.full((1,), block), *[torch.zeros(1, dtype=torch.int64)] * 3)
        words += [int(w) & 0xFFFFFFFF for w in philox4x32(counter, key)]
    assert tuple(words) == SIGN_WORDS
    bits = [SIGN_WORDS[d // 32] >> (d % 32) & 1 for d in range(256)]
    assert sign_vector(256) == tuple(1.0 - 2.0 * b for b in bits)
    assert sign_vector(5) == sign_vector(256)[:5]


@pytest.mark.parametrize("dim", [1, 2, 3, 40, 64, 200, 256])
def test_the_rotation_keeps_products(dim):
    a, b = normal(6, dim, key=1), normal(5, dim, key=2)
    products = rotate(a).double() @ rotate(b).double().T / padded_dim(dim)
    torch.testing.assert_close(products, a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
    assert rotate(a).shape == (6, padded_dim(dim))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_is_flagged_by_head(scheme):
    for bad in (torch.nan, torch.inf, -torch.inf):
        q, k, v = (normal(2, 3, 20, 8, key=i) for i in range(3))
        q[0, 1, 3, 2] = k[1, 0, 19, 7] = v[1, 2, 0, 0] = bad
        assert (~quantize_q(q, scheme)[2]).nonzero().tolist() == [[0, 1]]
        flags = ~quantize_kv(k, v, scheme, None).finite
        assert flags.nonzero().tolist() == [[1, 0], [1, 2]]
        hidden = torch.ones(2, 3, 20, dtype=torch.bool)
        hidden[1, 0, 19] = hidden[1, 2, 0] = False
        assert torch.equal(~quantize_kv(k, v, scheme, hidden).finite, flags), (
            "masked keys count too"
        )


def test_valid_keys_are_those_that_some_query_of_the_group_may_attend():
    generator = torch.Generator().manual_seed(3)
    for heads, kv_heads, queries, keys in ((4, 2, 5, 7), (2, 2, 7, 5), (3, 1, 1, 6)):
        for shape in (
            (2, heads, queries, keys), (1, 1, queries, keys), (2, 1, 1, keys), (1, heads, 1, keys), (2, 1, queries, 1),
        ):  # fmt: skip
            mask = torch.rand(shape, generator=generator) < 0.3
            full = mask.expand(2, heads, queries, keys)
            for causal in (False, True):
                open_ = (
                    full & torch.ones(queries, keys, dtype=torch.bool).tril() if causal else full
                )
                expected = open_.unflatten(1, (kv_heads, -1)).any(2).any(2)
                found = valid_keys(full, causal, kv_heads, queries, keys)
                assert torch.equal(found, expected), (shape, causal)
                additive = torch.where(full, 0.5, -1e30)
                found = valid_keys(additive, causal, kv_heads, queries, keys)
                assert torch.equal(found, expected)
    assert valid_keys(None, False, 2, 3, 4) is None
    assert valid_keys(None, True, 2, 4, 4) is None
    assert torch.equal(valid_keys(None, True, 2, 3, 5)[0, 0], torch.arange(5) < 3)
