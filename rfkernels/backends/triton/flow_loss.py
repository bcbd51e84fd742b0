"""Per-sample losses and their gradient in Triton, deterministic: fixed blocks, a fixed order, no atomics.

A sample of up to 4096 elements is held by one program, which writes its loss and gradient in one launch. Longer samples are
cut into at most 1024 chunks whose sums go to a workspace; a second launch adds a sample's sums (mse, elementwise), or, for
the gradient of the pseudo-Huber norm, which needs the whole sum first, adds them in every program and reads the data again.
Sums are float32 inside a chunk (float64 for float64 predictions) and float64 across chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.backends.triton.geometry import GLOBAL, NONE, PER_SAMPLE, plan
from rfkernels.backends.triton.launch import any_varies, counter, double_words, launch, number
from rfkernels.backends.triton.philox import normals
from rfkernels.backends.triton.tiles import columns, locate, quads, read, scalar, write

KINDS = {"mse": 0, "pseudo_huber": 1, "pseudo_huber_elementwise": 2}
WHOLE = 4096  # columns up to which one program holds a sample
TILE = 2048  # elements of a tile of a longer sample
CHUNKS = 1024  # the most chunks of a sample


@triton.jit
def _residual(
    inputs, key, row, first, sample, rows, cols, sizes, strides,
    NOISE: tl.constexpr, COMPUTE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(prediction - target, columns, mask) of a tile; 0 where the mask hides it."""
    col, mask = columns(row, first, rows, cols, C, SHIFT)
    r = read(inputs[0], row, col, mask, sizes, strides[0], COMPUTE, V, True)
    other = read(inputs[1], row, col, mask, sizes, strides[1 % len(strides)], COMPUTE, V, True)
    if NOISE:
        other = other - normals(key, quads(row, first, cols, C, NOISE), sample, R, C).to(COMPUTE)
    elif len(inputs) == 3:
        other = other - read(
            inputs[2], row, col, mask, sizes, strides[2 % len(strides)], COMPUTE, V, True
        )
    return tl.where(mask, r - other, 0.0), col, mask


@triton.jit
def _root(r, c, COMPUTE: tl.constexpr):
    """sqrt(r^2 + c^2) in the compute type, correctly rounded."""
    square = r * r + (c * c).to(COMPUTE)
    if square.dtype == tl.float64:
        return tl.sqrt(square)
    else:
        return tl.sqrt_rn(square)


@triton.jit
def _terms(r, c, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    """What is summed over a sample."""
    if KIND == 2:
        return tl.where(r == 0.0, 0.0, _root(r, c, COMPUTE) - c.to(COMPUTE))
    else:
        return r * r


@triton.jit
def _loss(total, d, c, KIND: tl.constexpr):
    """A sample's loss from the float64 sum of its terms."""
    if KIND == 1:
        return (tl.sqrt(total + c * c) - c) / d
    else:
        return total / d


@triton.jit
def _norm_factor(total, d, c):
    """d loss / d residual over the residual, of the pseudo-Huber norm."""
    return 1.0 / (d * tl.sqrt(total + c * c))


@triton.jit
def _gradient(
    r,
    factor,
    d,
    c,
    scale,
    weight,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The gradient of scale * weight * loss."""
    if KIND == 0:
        gradient = r * (2.0 / d).to(COMPUTE)
    elif KIND == 1:
        gradient = r * factor.to(COMPUTE)
    elif r.dtype == tl.float64:
        gradient = (r / _root(r, c, COMPUTE)) / d
    else:
        gradient = tl.div_rn(
            tl.div_rn(r, _root(r, c, COMPUTE)), tl.broadcast_to(d.to(COMPUTE), r.shape)
        )
    gradient = gradient * scale.to(COMPUTE)
    if WEIGHTED:
        gradient = gradient * weight
    return gradient


@triton.jit
def whole_kernel(
    inputs, grad, losses, weight, numbers, key, rows, cols, tiles, sizes, strides,
    KIND: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """R samples: losses and, where asked, gradients. numbers = (d, c, grad_scale)."""
    row, first = locate(tl.program_id(0), rows, tiles, R, C, WIDE)
    sample = tl.minimum(row, rows - 1)
    d = scalar(numbers[0], 0, tl.float64)
    c = scalar(numbers[1], 0, tl.float64)
    r, col, mask = _residual(
        inputs, key, row, first, sample, rows, cols, sizes, strides, NOISE, COMPUTE, R, C, V, SHIFT
    )
    total = tl.sum(_terms(r, c, KIND, COMPUTE), axis=1, keep_dims=True).to(tl.float64)
    tl.store(
        losses + row, _loss(total, d, c, KIND).to(COMPUTE), row < rows
    )  # a sample of no elements: 0 / 0
    if GRADIENT:
        w = scalar(weight, sample, COMPUTE) if WEIGHTED else 1.0
        scale = scalar(numbers[2], 0, tl.float64)
        factor = _norm_factor(total, d, c) if KIND == 1 else d
        gradient = _gradient(r, factor, d, c, scale, w, KIND, COMPUTE, WEIGHTED)
        write(grad, gradient, row, col, mask, sizes, strides[len(inputs) % len(strides)], V, True)


@triton.jit
def chunk_kernel(
    inputs, grad, losses, sums, weight, numbers, key, rows, cols, tiles, sizes, strides, chunks, steps,
    KIND: tl.constexpr, NOISE: tl.constexpr, COMPUTE: tl.constexpr, WEIGHTED: tl.constexpr,
    SUM: tl.constexpr, GRADIENT: tl.constexpr, CHUNKS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One chunk, ``steps`` tiles, of one sample. SUM: its sum goes to ``sums`` (rows, chunks). GRADIENT without SUM: the
    sums are there, and the program adds its sample's before it writes the gradient (and, as chunk 0, the loss)."""
    row, chunk = locate(tl.program_id(0), rows, chunks, R, 1, WIDE)
    d = scalar(numbers[0], 0, tl.float64)
    c = scalar(numbers[1], 0, tl.float64)
    scale = scalar(numbers[2], 0, tl.float64)
    w = scalar(weight, row, COMPUTE) if WEIGHTED else 1.0
    factor = d
    if not SUM:
        index = tl.arange(0, CHUNKS)[None, :]
        parts = tl.load(sums + row * chunks + index, index < chunks, other=0.0).to(tl.float64)
        total = tl.sum(parts, axis=1, keep_dims=True)
        factor = _norm_factor(total, d, c)
        if chunk == 0:
            tl.store(losses + row, _loss(total, d, c, KIND).to(COMPUTE))
    partial = tl.zeros((1, C), COMPUTE)
    for step in range(steps):
        first = (chunk * steps + step) * C
        r, col, mask = _residual(
            inputs, key, row, first, row, rows, cols, sizes, strides, NOISE, COMPUTE, R, C, V, SHIFT
        )
        if SUM:
            partial += _terms(r, c, KIND, COMPUTE)
        if GRADIENT:
            gradient = _gradient(r, factor, d, c, scale, w, KIND, COMPUTE, WEIGHTED)
            write(
                grad, gradient, row, col, mask, sizes, strides[len(inputs) % len(strides)], V, True
            )
    if SUM:
        tl.store(sums + row * chunks + chunk, tl.sum(partial, axis=1, keep_dims=True))


@triton.jit
def finish_kernel(
    sums, losses, numbers, chunks, KIND: tl.constexpr, COMPUTE: tl.constexpr, CHUNKS: tl.constexpr
):
    """The loss of one sample from the sums of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    parts = tl.load(sums + row * chunks + index, index < chunks, other=0.0).to(tl.float64)
    total = tl.sum(parts, axis=0)
    loss = _loss(total, scalar(numbers[0], 0, tl.float64), scalar(numbers[1], 0, tl.float64), KIND)
    tl.store(losses + row, loss.to(COMPUTE))


def flow_loss(
    prediction, target, x0, x1, seed, offset, weight, kind, huber_c, grad_scale, losses, grad
) -> None:
    """See ``rfkernels.ops.flow_loss.flow_loss``; writes ``losses`` (B,) unweighted and, where given, ``grad``, the
    gradient of sum_b weight_b loss_b grad_scale."""
    samples = prediction.shape[0]
    if samples == 0:
        return
    compute = compute_dtype(prediction)
    drawn, key = NONE, None
    if target is not None:
        inputs = (prediction, target)
    elif x0 is not None:
        inputs = (prediction, x1, x0)
    else:
        inputs = (prediction, x1)
        key = (counter(seed), counter(offset))
        drawn = PER_SAMPLE if any_varies((seed, offset)) else GLOBAL
    tensors = inputs if grad is None else (*inputs, grad)
    elements = prediction.numel() // samples
    whole = (
        elements + 3 if elements % 4 else elements
    ) <= WHOLE  # quads of noise may straddle samples
    table = plan(
        tensors, len(tensors) - 1, by_sample=True, noise=drawn,
        block=1024 if whole else TILE, widest=WHOLE if whole else TILE,
    )  # fmt: skip
    numbers = tuple(map(double_words, (float(elements), float(huber_c), float(grad_scale))))
    weights = None if weight is None else number(weight, compute)
    constants = table.constants
    del constants["RAGGED"]
    constants |= {
        "KIND": KINDS[kind], "NOISE": drawn, "COMPUTE": tl.float64 if compute is torch.float64 else tl.float32,
        "WEIGHTED": weight is not None,
    }  # fmt: skip
    device = prediction.device
    if whole:
        launch(
            "flow_loss", whole_kernel, table.programs, device, inputs, grad, losses, weights, numbers, key,
            *table.arguments, GRADIENT=grad is not None, num_warps=8 if table.tile_cols > 2048 else 4, **constants,
        )  # fmt: skip
        return
    steps = -(-table.tiles // CHUNKS)
    chunks = -(-table.tiles // steps)
    sums = torch.empty((samples, chunks), dtype=compute, device=device)
    padded = triton.next_power_of_2(chunks)
    arguments = (inputs, grad, losses, sums, weights, numbers, key, *table.arguments, chunks, steps)
    constants |= {"CHUNKS": padded, "num_warps": 8}
    programs = samples * chunks
    if kind == "pseudo_huber" and grad is not None:
        launch(
            "flow_loss",
            chunk_kernel,
            programs,
            device,
            *arguments,
            SUM=True,
            GRADIENT=False,
            **constants,
        )
        launch(
            "flow_loss",
            chunk_kernel,
            programs,
            device,
            *arguments,
            SUM=False,
            GRADIENT=True,
            **constants,
        )
        return
    launch(
        "flow_loss",
        chunk_kernel,
        programs,
        device,
        *arguments,
        SUM=True,
        GRADIENT=grad is not None,
        **constants,
    )
    launch(
        "flow_loss", finish_kernel, samples, device, sums, losses, numbers, chunks,
        KIND=KINDS[kind], COMPUTE=constants["COMPUTE"], CHUNKS=padded,
    )  # fmt: skip
