"""attention: what it computes, in every scheme, backend and instruction set level, against PyTorch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cells import AttentionCell, available, every_cell
from attention_inputs import decibels, exact
from cells import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import INPUT_LAYOUTS, LAYOUTS, laid_out, normal
from tolerances import BF16, F16, F32

import rfkernels as rf
from rfkernels.backends.attention_schemes import SCHEMES

LENGTHS = (1, 7, 63, 64, 65, 127, 129, 257, 1000)
HEAD_DIMS = (1, 8, 40, 64, 72, 80, 96, 128, 160, 192, 256)


def qkv(
    batch: int, heads: int, queries: int, keys: int, dim: int, channels: int, *,
    group: int = 1, dtype: torch.dtype = F32, key: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return (
        normal(batch, heads, queries, dim, dtype=dtype, key=key),
        normal(batch, heads // group, keys, dim, dtype=dtype, key=key + 1),
        normal(batch, heads // group, keys, channels, dtype=dtype, key=key + 2),
    )


def close(cell: AttentionCell, found: torch.Tensor, truth: torch.Tensor, what: object = "") -> None:
    """The whole tensor within the scheme's SQNR; 8 dB less for few numbers, whose ratio spreads."""
    assert found.shape == truth.shape, what
    if truth.numel() == 0:
        return
    assert found.isfinite().all(), what
    if not truth.any():
        assert not found.any(), what
        return
    measured = float(decibels(found[None], truth[None]))
    least = cell.least - 8.0 * (truth.numel() < 1000)
    assert measured >= least, f"{cell} {what}: {measured:.1f} dB, at least {least}"


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes_masks_and_layouts(data):
    group = data.draw(st.sampled_from((1, 2, 4)))
    heads = group * data.draw(st.integers(1, 4 // group))
    queries, keys = (data.draw(st.sampled_from(LENGTHS[:-1])) for _ in range(2))
    dim, channels = (data.draw(st.sampled_from(HEAD_DIMS)) for _ in range(2))
    dtype = data.draw(st.sampled_from((F32, BF16, F16)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    tensors = qkv(2, heads, queries, keys, dim, channels, group=group, dtype=dtype)
    q, k, v = (laid_out(t, layout) for t, layout in zip(tensors, layouts, strict=True))
    shape = (2, heads, queries, keys)
    shape = tuple(n if data.draw(st.booleans()) else 1 for n in shape)[
        data.draw(st.integers(0, 2)) :
    ]
    kind = data.draw(st.sampled_from(("none", "bool", "float")))
    mask = None
    if kind != "none":
        mask = normal(*shape, key=9) < 1.0
        if kind == "float":
            mask = torch.where(mask, normal(*shape, key=8), -torch.inf)
    causal = data.draw(st.booleans())
    scale = data.draw(st.sampled_from((None, 0.3, -0.1, 0.0)))
    before = [t.clone() for t in (q, k, v)]
    truth = exact(q, k, v, mask, causal, scale)
    expected, open_ = exact_lse(q, k, mask, causal, scale)
    sigma = 1 / math.sqrt(dim) if scale is None else abs(scale)
    for cell in available():
        out, lse = cell.attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1, return_lse=True
        )  # fmt: skip
        what = (
            cell,
            group,
            queries,
            keys,
            dim,
            channels,
            dtype,
            layouts,
            kind,
            shape,
            causal,
            scale,
        )
        assert out.dtype == dtype, what
        assert out.shape == (2, heads, queries, channels), what
        close(cell, out, truth, what)
        assert torch.equal(lse == -torch.inf, ~open_), what
        # A score of unit normals has deviation scale sqrt(dim) times the relative rounding of Q and K; the sum over keys
        # averages it. Six deviations of one score, and the kernels' exponential.
        step = {"int8": 2.0**-6, "e4m3": 2.0**-3, "bf16": 2.0**-7}[SCHEMES[cell.scheme].qk]
        error = (lse - expected)[open_].abs().max() if open_.any() else torch.zeros(())
        assert error <= 6 * step * sigma * math.sqrt(dim) + exponential(cell), what
        for a, b in zip((q, k, v), before, strict=True):
            same_bits(a, b)


def exponential(cell: AttentionCell) -> float:
    """Relative error of the kernels' 2^x: a polynomial of low order for 8-bit P."""
    return 2e-3 if SCHEMES[cell.scheme].pv == "u8" else 2e-4


def exact_lse(q, k, mask, causal, scale):
    """(lse, rows with an open key) in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double().masked_fill(mask <= -1e30, -torch.inf)
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~below, -torch.inf)
    return scores.logsumexp(-1), (scores > -torch.inf).any(-1)


@every_cell
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_sizes(cell, dim):
    q, k, v = qkv(1, 2, 33, 70, dim, dim)
    close(cell, cell.attention(q, k, v), exact(q, k, v), dim)


@every_cell
def test_lengths(cell):
    for queries, keys in [(n, n) for n in LENGTHS] + [(1, 1000), (300, 1), (65, 130)]:
        q, k, v = qkv(1, 1, queries, keys, 24, 16)
        for causal in (False, True):
            found = cell.attention(q, k, v, is_causal=causal)
            close(cell, found, exact(q, k, v, is_causal=causal), (queries, keys, causal))


@every_cell
def test_the_reference_defines_the_scheme(cell):
    q, k, v = qkv(2, 4, 150, 390, 64, 48, group=2)
    mask = torch.where(normal(2, 1, 150, 390) < 1.0, normal(150, 390), -torch.inf)
    options = {"attn_mask": mask, "enable_gqa": True, "return_lse": True}
    found = cell.attention(q, k, v, **options)
    with rf.use_backend("reference"):
        expected = rf.attention(q, k, v, precision=cell.scheme, **options)
    # The u8 kernels' exponential errs by 1e-3, so 1 of 200 P rounds to its other neighbour of 255: 49 dB, 13 above the
    # error of the scheme.
    assert float(decibels(found[0][None], expected[0][None])) >= 46.0
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=exponential(cell))


@every_cell
def test_layouts(cell):
    q, k, v = qkv(2, 4, 37, 70, 16, 24, group=2)
    expected, sums = cell.attention(q, k, v, enable_gqa=True, return_lse=True)
    seconds = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    found, other = cell.attention(*seconds, enable_gqa=True, layout="bshd", return_lse=True)
    same_bits(found, expected.transpose(1, 2))
    same_bits(other, sums)
    assert found.is_contiguous(), "heads inside the length, as q"
    assert expected.is_contiguous(), "heads outside the length, as q"
    views = [t.transpose(1, 2) for t in seconds]
    found = cell.attention(*views, enable_gqa=True)
    same_bits(found, expected)
    assert found.transpose(1, 2).is_contiguous()
    for layout in INPUT_LAYOUTS:
        tensors = [laid_out(t, layout) for t in (q, k, v)]
        copies = [t.contiguous() for t in tensors]
        same_bits(
            cell.attention(*tensors, enable_gqa=True),
            cell.attention(*copies, enable_gqa=True),
            layout,
        )


@every_cell
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0), (0, 0, 0, 0), (1, 1, 0, 0)],
    ids=str,
)
def test_empty(cell, shape):
    batch, heads, queries, keys = shape
    q, k, v = qkv(batch, heads, queries, keys, 8, 6)
    for mask in (None, torch.ones(queries, keys, dtype=torch.bool), torch.zeros(queries, keys)):
        for causal in (False, True):
            out, lse = cell.attention(q, k, v, attn_mask=mask, is_causal=causal, return_lse=True)
            assert out.shape == (batch, heads, queries, 6)
            assert lse.shape == (batch, heads, queries)
            assert lse.dtype == F32
            assert not out.any()
            assert (lse == -torch.inf).all()


# Masks -----------------------------------------------------------------------------------------------------------


@every_cell
def test_masks_of_every_kind_mean_the_same(cell):
    q, k, v = qkv(2, 2, 40, 300, 16, 8)
    open_ = torch.rand(2, 1, 40, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    open_[:, :, 3] = False  # a row without keys
    open_[:, :, :, 17:90] = False  # keys without rows, more than a block of them
    found, lse = cell.attention(q, k, v, attn_mask=open_, return_lse=True)
    close(cell, found, exact(q, k, v, open_))
    assert not found[:, :, 3].any()
    assert (lse[:, :, 3] == -torch.inf).all()
    for low in (-torch.inf, -1e30, -3e38):
        mask = torch.where(open_, 0.0, low)
        same_bits(cell.attention(q, k, v, attn_mask=mask), found, low)
        same_bits(cell.attention(q, k, v, attn_mask=mask.double()), found, low)
        if low > -1e35:
            same_bits(cell.attention(q, k, v, attn_mask=mask.to(BF16).expand(2, 2, 40, 300)), found)
    below = torch.ones(40, 300, dtype=torch.bool).tril()
    both = cell.attention(q, k, v, attn_mask=open_, is_causal=True)
    same_bits(both, cell.attention(q, k, v, attn_mask=open_ & below))
    same_bits(cell.attention(q, k, v, is_causal=True), cell.attention(q, k, v, attn_mask=below))


@every_cell
def test_masked_keys_count_in_nothing(cell):
    q, k, v = qkv(1, 2, 9, 200, 16, 8)
    open_ = torch.rand(1, 1, 1, 200, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = cell.attention(q, k, v, attn_mask=open_)
    k[:, :, ~open_[0, 0, 0]] = 1e5
    v[:, :, ~open_[0, 0, 0]] = -1e5
    same_bits(cell.attention(q, k, v, attn_mask=open_), expected)


@every_cell
def test_causal_rows_see_no_later_key(cell):
    q, k, v = qkv(1, 1, 20, 40, 8, 8)
    out = cell.attention(q, k, v, is_causal=True)
    k[:, :, 20:] = 1e5  # no query may attend them
    v[:, :, 20:] = 1e5
    same_bits(cell.attention(q, k, v, is_causal=True), out)
    first = v[:, :, :1].expand(-1, -1, 1, -1)
    close(cell, out[:, :, :1], first)


@every_cell
def test_a_mask_drops_out_of_no_row(cell):
    # Float masks in natural-log units, not base 2: a bias of log 3 makes a key count three times.
    q, k, v = qkv(1, 2, 12, 90, 16, 8)
    bias = torch.zeros(90)
    bias[40] = math.log(3.0)
    thrice = torch.cat((torch.arange(90), torch.tensor([40, 40])))
    found = cell.attention(q, k, v, attn_mask=bias[None])
    close(cell, found, exact(q, k[:, :, thrice], v[:, :, thrice]))
    plain = exact(q, k, v)
    assert float(decibels(found, plain)) < cell.least, "the mask changes nothing"


# Properties ------------------------------------------------------------------------------------------------------


@every_cell
def test_the_order_of_the_keys_does_not_matter(cell):
    q, k, v = qkv(1, 2, 20, 400, 32, 16)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    truth = exact(q, k, v)
    close(cell, cell.attention(q, k[:, :, order], v[:, :, order]), truth)


@every_cell
def test_a_constant_added_to_all_keys_changes_only_the_lse(cell):
    if not SCHEMES[cell.scheme].rotated:
        pytest.skip("bf16 does not smooth K")
    q, k, v = qkv(1, 2, 20, 300, 32, 16)
    shift = 8 * normal(1, 2, 1, 32, key=5)
    found, lse = cell.attention(q, k + shift, v, return_lse=True)
    close(cell, found, exact(q, k, v))
    before, sums = cell.attention(q, k, v, return_lse=True)
    assert float(decibels(found, before)) >= cell.least
    moved = (q.double() @ shift.double().mT)[..., 0] / math.sqrt(32)
    torch.testing.assert_close(lse.double(), sums + moved, rtol=0, atol=0.05)


@every_cell
def test_a_zero_channel_of_v_gives_zeros(cell):
    q, k, v = qkv(1, 2, 20, 130, 16, 8)
    v[..., 3] = 0.0
    found = cell.attention(q, k, v)
    assert not found[..., 3].any()
    close(cell, found, exact(q, k, v))
    assert not cell.attention(q, k, torch.zeros_like(v)).any()


@every_cell
def test_equal_keys_give_the_mean_of_v(cell):
    q, k, v = qkv(1, 2, 20, 200, 16, 8)
    for keys in (k[:, :, :1].expand(-1, -1, 200, -1), torch.zeros_like(k)):
        found, lse = cell.attention(q, keys, v, return_lse=True)
        mean = v.double().mean(2, keepdim=True).expand(-1, -1, 20, -1)
        # The error of one V code, averaged: relative to V, not to its small mean.
        assert (found - mean).abs().max() < {"u8": 0.02, "e4m3": 0.2, "bf16": 0.02}[
            SCHEMES[cell.scheme].pv
        ]
        expected, _ = exact_lse(q, keys, None, False, None)
        torch.testing.assert_close(lse.double(), expected, rtol=0, atol=0.05)


@every_cell
def test_zero_queries(cell):
    q, k, v = qkv(1, 2, 20, 200, 16, 8)
    q[:, :, 5] = 0.0
    found = cell.attention(q, k, v)
    close(cell, found, exact(q, k, v))


@every_cell
def test_scales_of_the_inputs(cell):
    for size in (1e-28, 1e-10, 1e10):
        q, k, v = qkv(1, 1, 20, 70, 16, 8)
        close(cell, cell.attention(q, k, v * size), exact(q, k, v * size), size)
        close(cell, cell.attention(q * size, k, v, scale=0.25 / size), exact(q, k, v), size)


# NaN and infinity ------------------------------------------------------------------------------------------------


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """Rows with a NaN or an infinity."""
    return ~tensor.isfinite().all(-1)


@every_cell
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_exactly_the_rows_that_torch_spoils_are_spoiled(cell, where, bad):
    q, k, v = qkv(2, 4, 50, 70, 16, 16, group=2)
    {"q": q, "k": k, "v": v}[where][1, 1, 30, 5] = bad
    repeated = [k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)]
    for causal in (False, True):
        rf.attention_stats(reset=True)
        with cell.active():
            args = [t.to(cell.device) for t in (q, k, v)]
            out = rf.attention(
                *args, is_causal=causal, enable_gqa=True, precision=cell.scheme
            ).cpu()
        stats = rf.attention_stats(reset=True)
        truth = torch.nn.functional.scaled_dot_product_attention(q, *repeated, is_causal=causal)
        assert torch.equal(spoiled(out), spoiled(truth)), (where, causal)
        fine = ~spoiled(truth)
        close(cell, out[fine], truth[fine].double())
        heads = 1 if where == "q" else 2
        if cell.device == "cpu":
            assert stats.exact_heads == {(cell.scheme, cell.scheme, cell.backend): heads}


@every_cell
def test_masks_that_are_not_finite(cell):
    q, k, v = qkv(1, 3, 20, 70, 16, 8)
    mask = torch.zeros(1, 3, 20, 70)
    mask[0, 1, 4, 6] = math.nan
    mask[0, 2, 7, 8] = math.inf
    out, lse = cell.attention(q, k, v, attn_mask=mask, return_lse=True)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(spoiled(out), spoiled(truth))
    assert spoiled(out).sum() == 2
    assert lse[0, 1, 4].isnan()


@every_cell
def test_scores_beyond_float32_take_the_exact_path(cell):
    q, k, v = qkv(1, 2, 20, 70, 16, 8)
    q[:, 1] *= 1e17
    k[:, 1] *= 1e17
    out = cell.attention(q, k, v)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out[:, 1], truth[:, 1])
    close(cell, out[:, :1], exact(q, k, v)[:, :1])


# Repetition ------------------------------------------------------------------------------------------------------


@every_cell
def test_runs_and_threads_give_the_same_bits(cell, threads):
    q, k, v = qkv(2, 3, 70, 300, 40, 24)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(cell.attention(q, k, v, is_causal=True, return_lse=True))
    for out, lse in results[1:]:
        same_bits(out, results[0][0])
        same_bits(lse, results[0][1])


@every_cell
def test_a_head_does_not_depend_on_its_neighbours(cell):
    q, k, v = qkv(3, 4, 40, 100, 16, 8)
    together = cell.attention(q, k, v)
    alone = cell.attention(q[1:2, 2:3], k[1:2, 2:3], v[1:2, 2:3])
    same_bits(together[1:2, 2:3], alone)
