"""Attention of packed sequences: each is a call of its own."""

from __future__ import annotations

import pytest
import torch
from attention_cells import every_cell
from attention_inputs import decibels, exact
from cells import same_bits
from tensors import normal

import rfkernels as rf

pytestmark = pytest.mark.usefixtures("no_small_handover")


def packed(rows, keys):
    """Four heads of queries, two of keys and values, and the offsets."""
    q = normal(sum(rows), 4, 24)
    k, v = normal(sum(keys), 2, 24, key=1), normal(sum(keys), 2, 16, key=2)
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (rows, keys)]
    return q, k, v, *offsets


@every_cell
@pytest.mark.parametrize(
    ("rows", "keys"),
    [((5, 0, 70, 1), (9, 4, 0, 130)), ((30, 30, 30), (40, 40, 40)), ((7,), (9,)), ((0, 0), (0, 3))],
    ids=["ragged", "equal", "one", "no rows"],
)
def test_packed_sequences_are_separate_calls(cell, rows, keys):
    q, k, v, cu_q, cu_k = packed(rows, keys)
    on = [t.to(cell.device) for t in (q, k, v, cu_q.int(), cu_k)]
    for causal in (False, True):
        options = {"is_causal": causal, "enable_gqa": True, "return_lse": True}
        out, lse = cell.run(
            lambda options=options: rf.attention_varlen(*on, precision=cell.scheme, **options)
        )
        assert out.shape == (sum(rows), 4, 16)
        assert lse.shape == (sum(rows), 4)
        for i in range(len(rows)):
            a, b = (slice(int(c[i]), int(c[i + 1])) for c in (cu_q, cu_k))
            one = (q[a].transpose(0, 1)[None], *(t[b].transpose(0, 1)[None] for t in (k, v)))
            expected, sums = cell.attention(*one, **options)
            same_bits(out[a].cpu(), expected[0].transpose(0, 1))
            same_bits(lse[a].cpu(), sums[0].transpose(0, 1))


def test_gradients_of_packed_sequences():
    q, k, v, cu_q, cu_k = packed((5, 0, 70, 1), (9, 4, 8, 130))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    grad = normal(76, 4, 16, key=3)
    rf.attention_varlen(*leaves, cu_q, cu_k, enable_gqa=True, precision="int8").backward(grad)
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    parts = []
    for i in range(4):
        a, b = (slice(int(c[i]), int(c[i + 1])) for c in (cu_q, cu_k))
        one = (
            doubles[0][a].transpose(0, 1)[None],
            *(t[b].transpose(0, 1)[None] for t in doubles[1:]),
        )
        parts.append(exact(*one)[0].transpose(0, 1))
    torch.cat(parts).backward(grad.double())
    for found, truth in zip(leaves, doubles, strict=True):
        assert float(decibels(found.grad[None], truth.grad[None])) > 110.0
