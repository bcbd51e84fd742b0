"""AdamP and SGDP steps in Triton: many parameters a launch, deterministic, without a host synchronisation.

Parameters of one kind (dtypes, tile shape, alignment, projected or not) share launches through a table of pointers on the
device. ``moments_kernel`` moves the moments and leaves, per row and tile of C columns, the sums of g w, g^2, w^2 and u w;
``decide_kernel`` adds tiles to rows and rows to the summary, one program a parameter, and decides; ``weights_kernel`` makes
u once more and moves the weights: 24 + 16 bytes an element in float32. Parameters that are never projected take the first
kernel alone. Powers of beta come from torch: Triton has no pow.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.backends.reference.projected_update import rate_of
from rfkernels.backends.triton.launch import double_words, launch
from rfkernels.backends.triton.tiles import rounded, scalar

TILE = 2048  # elements of a program
FIELDS = 10  # of a parameter in the table
_TRITON = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
KEPT = 64  # tables on the device: of the same tensors in the next step nothing is copied
_tables: OrderedDict[tuple, tuple[torch.Tensor, ...]] = OrderedDict()
_captured: list[tuple[torch.Tensor, ...]] = []  # what captured graphs read at every replay


@triton.jit
def _parameter(table, starts, count, FIELDS: tl.constexpr, P: tl.constexpr):
    """(its line in the table, the program's number in it)."""
    program = tl.program_id(0)
    index = tl.arange(0, P)
    first = tl.load(starts + index, index < count, other=2147483647)
    found = tl.sum((first <= program).to(tl.int32), axis=0) - 1
    return table + found * FIELDS, program - tl.load(starts + found)


@triton.jit
def _pointer(line, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer of the table."""
    pointer = tl.load(line + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(line, local, R: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """(offsets (R, C), mask, row numbers (R,), tile of the row, tiles of a row) of the program's elements."""
    rows = tl.load(line + 5)
    cols = tl.load(line + 6)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    tiles = tl.cdiv(cols, C)
    tile = local % tiles
    row = local // tiles * R + tl.arange(0, R)
    col = tile * C + tl.arange(0, C)
    at = (row * cols)[:, None] + col[None, :]
    return at, (row < rows)[:, None] & (col < cols)[None, :], row, tile, tiles


@triton.jit
def _update(g, m, v, correction, scalars, ADAM: tl.constexpr, NESTEROV: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """The update of elements from their moments."""
    b1 = scalar(scalars[0], 0, COMPUTE)
    if ADAM:
        top = m
        if NESTEROV:
            top = b1 * m + scalar(scalars[1], 0, COMPUTE) * g
        eps = scalar(scalars[4], 0, COMPUTE)
        if v.dtype == tl.float64:
            return top / (tl.sqrt(v) * correction + eps)
        else:
            return tl.div_rn(top, tl.sqrt_rn(v) * correction + eps)
    elif NESTEROV:
        return g + b1 * m
    else:
        return m


@triton.jit
def _move(line, at, mask, w, left, keep, step, scalars,
          WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """w = w keep - step left, and the average after it."""
    moved = rounded(w * keep - step * left, WEIGHT)
    tl.store(_pointer(line, 0, WEIGHT, ALIGNED) + at, moved, mask)
    if AVERAGE is not None:
        place = _pointer(line, 4, AVERAGE, ALIGNED) + at
        mean = tl.load(place, mask, other=0.0).to(COMPUTE)
        mean = mean + scalar(scalars[6], 0, COMPUTE) * (moved.to(COMPUTE) - mean)
        tl.store(place, rounded(mean, AVERAGE), mask)


@triton.jit
def moments_kernel(
    table, starts, count, numbers, scalars, sums,
    ADAM: tl.constexpr, NESTEROV: tl.constexpr, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, AVERAGE: tl.constexpr,
    PROJECTED: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Moments and row sums; without PROJECTED the weights too."""
    line, local = _parameter(table, starts, count, FIELDS, P)
    at, mask, row, tile, tiles = _place(line, local, R, C, ALIGNED)
    own = numbers + tl.load(line + 9) * 4
    correction = tl.load(own).to(COMPUTE)
    g = tl.load(_pointer(line, 1, WEIGHT, ALIGNED) + at, mask, other=0.0).to(COMPUTE)
    w = tl.load(_pointer(line, 0, WEIGHT, ALIGNED) + at, mask, other=0.0).to(COMPUTE)
    first = _pointer(line, 2, COMPUTE, ALIGNED) + at
    m = scalar(scalars[0], 0, COMPUTE) * tl.load(first, mask, other=0.0)
    m = m + scalar(scalars[1], 0, COMPUTE) * g
    tl.store(first, m, mask)
    v = m
    if ADAM:
        second = _pointer(line, 3, COMPUTE, ALIGNED) + at
        v = scalar(scalars[2], 0, COMPUTE) * tl.load(second, mask, other=0.0)
        v = v + (scalar(scalars[3], 0, COMPUTE) * g) * g
        tl.store(second, v, mask)
    u = _update(g, m, v, correction, scalars, ADAM, NESTEROV, COMPUTE)
    if PROJECTED:
        rows = tl.load(line + 5)
        place = sums + tl.load(line + 8) + (row * tiles + tile) * 4
        u = tl.where(mask, u, 0.0)
        tl.store(place, tl.sum(g * w, 1).to(tl.float64), row < rows)
        tl.store(place + 1, tl.sum(g * g, 1).to(tl.float64), row < rows)
        tl.store(place + 2, tl.sum(w * w, 1).to(tl.float64), row < rows)
        tl.store(place + 3, tl.sum(u * w, 1).to(tl.float64), row < rows)
    else:
        keep = tl.load(own + 2).to(COMPUTE)
        step = tl.load(own + 1).to(COMPUTE)
        _move(line, at, mask, w, u, keep, step, scalars, WEIGHT, COMPUTE, AVERAGE, ALIGNED)


@triton.jit
def _cosine(gw, gg, ww, eps):
    """|g . w| / (max(|g|, eps) max(|w|, eps))."""
    g = tl.sqrt(gg)
    w = tl.sqrt(ww)
    return tl.abs(gw / (tl.where(g < eps, eps, g) * tl.where(w < eps, eps, w)))


@triton.jit
def _row_sums(place, row, tile, rows, tiles, R: tl.constexpr, T: tl.constexpr):
    """(R,) one of the four sums of so many rows, over all of their tiles."""
    total = tl.zeros((R,), tl.float64)
    for start in range(0, tiles, T):
        at = row[:, None] * tiles + start + tile[None, :]
        inside = (row < rows)[:, None] & (start + tile < tiles)[None, :]
        total += tl.sum(tl.load(place + at * 4, inside, other=0.0), 1)
    return total


@triton.jit
def decide_kernel(
    table, numbers, scalars, sums, summary, decision,
    GATHER: tl.constexpr, DECIDE: tl.constexpr, FIELDS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One parameter: its summary from the sums, its decision from the summary. R rows and T tiles at a time."""
    line = table + tl.program_id(0) * FIELDS
    index = tl.load(line + 9)
    rows = tl.load(line + 5)
    cols = tl.load(line + 6)
    eps = scalar(scalars[4], 0, tl.float64)
    here = summary + index * 5
    if GATHER:
        tiles = tl.cdiv(cols, C)
        tile = tl.arange(0, T)
        place = sums + tl.load(line + 8)
        worst = tl.zeros((R,), tl.float64)
        gw = worst
        gg = worst
        ww = worst
        uw = worst
        for start in range(0, rows, R):
            row = start + tl.arange(0, R)
            a = _row_sums(place, row, tile, rows, tiles, R, T)
            b = _row_sums(place + 1, row, tile, rows, tiles, R, T)
            c = _row_sums(place + 2, row, tile, rows, tiles, R, T)
            d = _row_sums(place + 3, row, tile, rows, tiles, R, T)
            if T > 1:  # the row's totals, for weights_kernel
                tl.debug_barrier()
                tl.store(place + row * tiles * 4 + 2, c, row < rows)
                tl.store(place + row * tiles * 4 + 3, d, row < rows)
            cosine = _cosine(a, b, c, eps)
            cosine = tl.where(cosine == cosine, cosine, float("inf"))
            worst = tl.maximum(worst, cosine)
            gw += a
            gg += b
            ww += c
            uw += d
        tl.store(here, tl.max(worst, 0))
        tl.store(here + 1, tl.sum(gw, 0))
        tl.store(here + 2, tl.sum(gg, 0))
        tl.store(here + 3, tl.sum(ww, 0))
        tl.store(here + 4, tl.sum(uw, 0))
        tl.debug_barrier()
    if DECIDE:
        delta = scalar(scalars[5], 0, tl.float64)
        ww = tl.load(here + 3)
        layer = _cosine(tl.load(here + 1), tl.load(here + 2), ww, eps)
        channel = tl.load(here) < delta / tl.sqrt(cols.to(tl.float64))
        whole = layer < delta / tl.sqrt(tl.load(line + 7).to(tl.float64))
        norm = tl.sqrt(ww) + eps
        view = tl.where(channel, 1.0, tl.where(whole, 2.0, 0.0))
        own = numbers + index * 4
        tl.store(decision + index * 3, view)
        tl.store(decision + index * 3 + 1, tl.where(view > 0.0, tl.load(own + 3), tl.load(own + 2)))
        tl.store(decision + index * 3 + 2, tl.load(here + 4) / (norm * norm))


@triton.jit
def weights_kernel(
    table, starts, count, numbers, scalars, sums, decision,
    ADAM: tl.constexpr, NESTEROV: tl.constexpr, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, AVERAGE: tl.constexpr,
    PROJECTED: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The weights of projected parameters after the decision."""
    line, local = _parameter(table, starts, count, FIELDS, P)
    at, mask, row, _, tiles = _place(line, local, R, C, ALIGNED)
    index = tl.load(line + 9)
    correction = tl.load(numbers + index * 4).to(COMPUTE)
    step = tl.load(numbers + index * 4 + 1).to(COMPUTE)
    view = tl.load(decision + index * 3)
    keep = tl.load(decision + index * 3 + 1).to(COMPUTE)
    rows = tl.load(line + 5)
    place = sums + tl.load(line + 8) + row * tiles * 4
    norm = tl.sqrt(tl.load(place + 2, row < rows, other=0.0)) + scalar(scalars[4], 0, tl.float64)
    factor = tl.load(place + 3, row < rows, other=0.0) / (norm * norm)
    factor = tl.where(view == 1.0, factor, tl.load(decision + index * 3 + 2)).to(COMPUTE)

    w = tl.load(_pointer(line, 0, WEIGHT, ALIGNED) + at, mask, other=0.0).to(COMPUTE)
    first = _pointer(line, 2, COMPUTE, ALIGNED) + at
    m = tl.load(first, mask, other=0.0)
    g = m
    if NESTEROV:
        g = tl.load(_pointer(line, 1, WEIGHT, ALIGNED) + at, mask, other=0.0).to(COMPUTE)
    v = m
    if ADAM:
        v = tl.load(_pointer(line, 3, COMPUTE, ALIGNED) + at, mask, other=0.0)
    u = _update(g, m, v, correction, scalars, ADAM, NESTEROV, COMPUTE)
    left = tl.where(view > 0.0, u - factor[:, None] * w, u)
    if not ADAM and not NESTEROV:
        tl.store(first, left, mask)
    _move(line, at, mask, w, left, keep, step, scalars, WEIGHT, COMPUTE, AVERAGE, ALIGNED)


class Kind(NamedTuple):
    """What parameters of one launch have in common."""

    weight: torch.dtype
    average: torch.dtype | None
    projected: bool
    aligned: bool
    tile_rows: int
    tile_cols: int
    tiles_at_once: int  # of a row in decide_kernel


def _kind(tensors: list[torch.Tensor], average, columns: int, projected: bool) -> Kind:
    width = min(max(triton.next_power_of_2(columns), 16), TILE)
    tiles = -(-columns // width)
    pointers = [*tensors, *([] if average is None else [average])]
    return Kind(
        tensors[0].dtype,
        None if average is None else average.dtype,
        projected,
        columns % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in pointers),
        TILE // width,
        width,
        1 if tiles <= 1 else 32 if tiles <= 32 else 1024,
    )


def _on_device(values: list[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Host numbers on the device, by a copy that nobody waits for, or from an earlier call."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    key = (device, dtype, torch.cuda.current_stream(device).cuda_stream, tuple(values))
    if key not in _tables:
        host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
        _tables[key] = host.to(device, non_blocking=True), host
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(_tables[key])
    return _tables[key][0]


def _numbers(steps, count: int, o, device: torch.device) -> torch.Tensor:
    """(count, 4) float64: correction of the second moment, step size, weight factor, the same where projected."""
    lr = rate_of(o, device)
    table = torch.ones(count, 4, dtype=torch.float64, device=device)
    if o.rule == "adamp":
        t = torch.stack(steps).double() + 1.0
        table[:, 0] = 1.0 / (1.0 - o.beta2**t).sqrt()
        table[:, 1] = lr / (1.0 - o.beta1**t)
    else:
        table[:, 1] = lr
    if o.weight_decay:
        more = 1.0 if o.rule == "adamp" else 1.0 - o.beta1
        table[:, 2] = 1.0 - lr * o.weight_decay / more
        table[:, 3] = 1.0 - lr * o.weight_decay * o.wd_ratio / more
    return table


def projected_update(
    weights, grads, first, second, steps, averages, projected, totals, options, reduce
) -> None:
    """See ``rfkernels.ops.projected_update.projected_update``."""
    o, device, count = options, weights[0].device, len(weights)
    kinds: dict[Kind, list[list[int]]] = {}
    entries = 0
    for k, w in enumerate(weights):
        if w.numel() == 0:
            continue
        rows = w.shape[0] if projected[k] else 1
        columns = w.numel() // rows
        tensors = [w, grads[k], first[k], *((second[k],) if second else ())]
        average = averages[k] if averages else None
        kind = _kind(tensors, average, columns, projected[k])
        line = [t.data_ptr() for t in tensors] + ([] if second else [0])
        line += [0 if average is None else average.data_ptr(), rows, columns]
        line += [totals[k] or w.numel(), entries, k]
        kinds.setdefault(kind, []).append(line)
        if projected[k]:
            entries += rows * -(-columns // kind.tile_cols) * 4
    numbers = _numbers(steps, count, o, device)
    sums = torch.empty(max(entries, 1), dtype=torch.float64, device=device)
    summary = torch.zeros(count, 5, dtype=torch.float64, device=device)
    decision = torch.empty(count, 3, dtype=torch.float64, device=device)
    c1 = 1.0 - (o.beta1 if o.rule == "adamp" else o.beta2)
    scalars = (o.beta1, c1, o.beta2, 1.0 - o.beta2, o.eps, o.delta, 1.0 - o.average_decay)
    words = tuple(map(double_words, scalars))

    launches = []
    for kind, lines in kinds.items():
        starts = [0]
        for line in lines:
            tiles = -(-line[6] // kind.tile_cols)
            starts.append(starts[-1] + -(-line[5] // kind.tile_rows) * tiles)
        packed = _on_device([x for line in lines for x in line], device, torch.int64)
        begins = _on_device(starts[:-1], device, torch.int32)
        constants = {
            "ADAM": o.rule == "adamp", "NESTEROV": o.nesterov, "WEIGHT": _TRITON[kind.weight],
            "COMPUTE": _TRITON[compute_dtype(weights[lines[0][9]])],
            "AVERAGE": None if kind.average is None else _TRITON[kind.average],
            "PROJECTED": kind.projected, "ALIGNED": kind.aligned, "FIELDS": FIELDS,
            "P": triton.next_power_of_2(len(lines)), "R": kind.tile_rows, "C": kind.tile_cols,
        }  # fmt: skip
        launches.append((kind, packed, begins, len(lines), starts[-1], constants))

    def decide(gather: bool, choose: bool) -> None:
        for kind, packed, _, lines, _, _ in launches:
            if kind.projected:
                launch(
                    "projected_update", decide_kernel, lines, device, packed, numbers, words, sums, summary, decision,
                    GATHER=gather, DECIDE=choose, FIELDS=FIELDS, C=kind.tile_cols,
                    R=max(1024 // kind.tiles_at_once, 1), T=kind.tiles_at_once,
                )  # fmt: skip

    for _, packed, begins, lines, programs, constants in launches:
        launch(
            "projected_update", moments_kernel, programs, device, packed, begins, lines, numbers, words, sums,
            **constants,
        )  # fmt: skip
    decide(True, reduce is None)
    if reduce is not None:
        reduce(summary)
        decide(False, True)
    for kind, packed, begins, lines, programs, constants in launches:
        if kind.projected:
            launch(
                "projected_update", weights_kernel, programs, device, packed, begins, lines, numbers, words, sums,
                decision, **constants,
            )  # fmt: skip
    if steps:
        torch._foreach_add_(steps, 1.0)
