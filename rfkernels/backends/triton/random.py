"""Counter-based normals and uniforms in Triton: one launch, one write per element, one Philox call per four elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rfkernels.backends.triton.geometry import GLOBAL, PER_SAMPLE, plan
from rfkernels.backends.triton.launch import any_varies, counter, launch
from rfkernels.backends.triton.philox import normals, uniforms
from rfkernels.backends.triton.tiles import columns, locate, quads, write


@triton.jit
def _draw(
    out, key, row, first, rows, cols, sizes, strides,
    BITS: tl.constexpr, NOISE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    col, mask = columns(row, first, rows, cols, C, SHIFT)
    quad = quads(row, first, cols, C, NOISE)
    sample = tl.minimum(row, rows - 1)
    if BITS == 0:
        value = normals(key, quad, sample, R, C)
    else:
        value = uniforms(key, quad, sample, R, C, BITS)
    write(out, value, row, col, mask, sizes, strides[0], V, MASKED)


@triton.jit
def random_kernel(
    out, key, rows, cols, tiles, sizes, strides,
    BITS: tl.constexpr, NOISE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
    WIDE: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """BITS = 0: normals, else uniforms of that many bits."""
    row, first = locate(tl.program_id(0), rows, tiles, R, C, WIDE)
    if RAGGED:
        if first + C <= cols:
            _draw(
                out, key, row, first, rows, cols, sizes, strides, BITS, NOISE, R, C, V, SHIFT, False
            )
        else:
            _draw(
                out, key, row, first, rows, cols, sizes, strides, BITS, NOISE, R, C, V, SHIFT, True
            )
    else:
        _draw(out, key, row, first, rows, cols, sizes, strides, BITS, NOISE, R, C, V, SHIFT, True)


def random(out: torch.Tensor, seed, offset, distribution: str) -> None:
    """Fill ``out``; see ``rfkernels.ops.random``."""
    if out.numel() == 0:
        return
    per_sample = any_varies((seed, offset))
    noise = PER_SAMPLE if per_sample else GLOBAL
    table = plan((out,), 0, by_sample=per_sample, noise=noise)
    bits = (
        0 if distribution == "normal" else {torch.bfloat16: 8, torch.float16: 11}.get(out.dtype, 24)
    )
    key = (counter(seed), counter(offset))
    launch(
        "random", random_kernel, table.programs, out.device, out, key, *table.arguments,
        BITS=bits, NOISE=noise, **table.constants,
    )  # fmt: skip
