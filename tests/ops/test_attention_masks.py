"""Masks with closed blocks: what no query of a tile may attend is skipped, and skipping changes no bit.

The oracle is the same mask as a floating one, 0 and -inf for each query, which the native kernels never skip by.
"""

from __future__ import annotations

import pytest
import torch
from attention_cells import every_cell
from cells import same_bits
from tensors import normal
from tolerances import F32

QUERIES, KEYS = 150, 1100


def _positions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None]


def _segments(count: int) -> torch.Tensor:
    i, j = _positions()
    return i * count // QUERIES == j * count // KEYS


def _hole() -> torch.Tensor:
    """Closed in the middle of a softmax block, and the last block closed but for one key of one query."""
    i, j = _positions()
    return ((j < 70) | ((j >= 200) & (j < 256)) | ((j >= 300) & (j < 700))) | (
        (i == 140) & (j == 1050)
    )


MASKS = {
    "padded end": lambda: (_positions()[1] < 333).expand(QUERIES, KEYS),
    "padded start": lambda: (_positions()[1] >= 517).expand(QUERIES, KEYS),
    "two segments": lambda: _segments(2),
    "nine segments": lambda: _segments(9),
    "window": lambda: (_positions()[0] * 7 - _positions()[1]).abs() < 90,
    "hole": _hole,
    "one key": lambda: (_positions()[1] == 1099).expand(QUERIES, KEYS),
    "a tile without keys": lambda: (_positions()[0] >= 40) & (_positions()[1] < 400),
    "every key": lambda: torch.ones(QUERIES, KEYS, dtype=torch.bool),
    "no key": lambda: torch.zeros(QUERIES, KEYS, dtype=torch.bool),
}


def _only_native(cell) -> None:
    if cell.backend != "native":
        pytest.skip("the other backends skip nothing")


def _inputs(dim: int = 48) -> tuple[torch.Tensor, ...]:
    q = normal(1, 4, QUERIES, dim)
    k, v = (normal(1, 2, KEYS, dim, key=i) for i in (1, 2))
    return q, k + normal(dim, key=3), v


@every_cell
@pytest.mark.parametrize("name", MASKS)
def test_skipped_blocks_change_no_bit(cell, name):
    _only_native(cell)
    q, k, v = _inputs()
    mask = MASKS[name]()
    options = {"enable_gqa": True, "return_lse": True}
    for causal in (False, True):
        dense = torch.where(mask, 0.0, -torch.inf).expand(1, 4, QUERIES, KEYS).contiguous()
        expected = cell.attention(q, k, v, attn_mask=dense, is_causal=causal, **options)
        spellings = [mask.contiguous(), mask.t().contiguous().t()]
        if mask.stride(0) == 0:
            spellings.append(mask[:1].view(1, 1, 1, KEYS))  # folded into the keys
        for spelled in spellings:
            found = cell.attention(q, k, v, attn_mask=spelled, is_causal=causal, **options)
            for a, b in zip(found, expected, strict=True):
                same_bits(a, b)


@every_cell
def test_closed_keys_are_as_good_as_absent(cell):
    _only_native(cell)
    q, k, v = _inputs()
    open_keys = torch.ones(KEYS, dtype=torch.bool)
    open_keys[256:768] = False  # whole softmax blocks, so that the others stay as they are
    without = [t[:, :, open_keys] for t in (k, v)]
    row = torch.zeros(1, 1, 1, int(open_keys.sum()), dtype=torch.bool).logical_not()
    expected = cell.attention(q, *without, attn_mask=row, enable_gqa=True)
    k[:, :, 300], v[:, :, 301] = 1e4, 1e4
    for mask in (open_keys.view(1, 1, 1, KEYS), open_keys.expand(QUERIES, KEYS).contiguous()):
        same_bits(cell.attention(q, k, v, attn_mask=mask, enable_gqa=True), expected)


@every_cell
def test_masks_of_single_heads_and_samples(cell):
    _only_native(cell)
    q, k, v = (normal(2, 4, n, 16, key=i) for i, n in enumerate((40, 600, 600)))
    lengths = torch.tensor([[70, 600, 1, 300], [0, 256, 257, 599]])
    mask = (torch.arange(600) < lengths[..., None, None]).expand(2, 4, 40, 600).contiguous()
    found, lse = cell.attention(q, k, v, attn_mask=mask, return_lse=True)
    for b in range(2):
        for h in range(4):
            one = [t[b : b + 1, h : h + 1] for t in (q, k, v)]
            single = mask[b : b + 1, h : h + 1, :1]
            out, sums = cell.attention(*one, attn_mask=single, return_lse=True)
            same_bits(found[b, h], out[0, 0])
            same_bits(lse[b, h], sums[0, 0])
    assert lse.dtype == F32
    assert not found[1, 0].any()
