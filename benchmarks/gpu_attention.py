"""Checks of quantized attention that need a GPU, run by ``gpu_checks.py``: accuracy, codes, graphs, streams, bandwidth.

Its speed against cuDNN's and flash attention is measured by ``run.py --device cuda --only attention``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import rfkernels as rf
from rfkernels import _dispatch
from rfkernels.backends.attention_schemes import SCHEMES
from rfkernels.backends.reference import quantize as reference_quantize

DEVICE = "cuda"
# Least decibels on standard normals, as in tests/ops.
LEAST_DB = {"int8_bf16": 34.0, "int8_fp8": 24.0, "fp8": 20.0, "bf16": 42.0}
SHAPES = ((1, 2, 1024, 1024, 64), (2, 3, 257, 1000, 128), (1, 1, 1, 77, 40), (1, 2, 333, 129, 256))
BANDWIDTH_TOKENS = (4096, 65536)
ACCURACY_SECONDS = 75.0  # every cell compiles kernels of its own, which takes seconds


def schemes() -> Iterator[str]:
    """Those that this device has instructions for."""
    for name in LEAST_DB:
        if "fp8" not in name or torch.cuda.get_device_capability() >= (8, 9):
            yield name


def quantizers() -> dict[str, Callable]:
    """What quantizes K and V on this device, by backend; attention takes the first."""
    return {
        name: _dispatch.load_backend(name, "quantize").quantize_kv
        for name in ("native", "triton")
        if _dispatch.unavailable_reason(name, DEVICE) is None
    }


def tensors(shape: tuple[int, ...], dtype=torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v of (B, H, queries, keys, D)."""
    batch, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn((batch, heads, n, dim), generator=generator) for n in (queries, keys, keys)]
    return [x.to(DEVICE, dtype) for x in made]


def decibels(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Signal to noise ratio."""
    noise = (found.double() - truth).square().sum()
    return float(10 * torch.log10(truth.square().sum() / noise))


def exact(q, k, v, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Attention in float64."""
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE).tril()
    wide = (x.double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask)


def check_attention_accuracy(_rows) -> dict:
    """Every scheme, shape, dtype and kind of mask against float64, in decibels, as far as the time goes."""
    low: dict[str, float | str] = {}
    compared, left_out, end = 0, 0, time.monotonic() + ACCURACY_SECONDS
    # bfloat16 of every shape first: what is left out is then the rarest
    for dtype, kind, shape in itertools.product(
        (torch.bfloat16, torch.float32, torch.float16), ("", "causal", "mask"), SHAPES
    ):
        q, k, v = tensors(shape, dtype)
        options: dict[str, object] = {}
        if kind == "causal":
            options["is_causal"] = True
        elif kind == "mask":
            options["attn_mask"] = torch.rand(shape[2:4], device=DEVICE) < 0.7
            options["attn_mask"][:, 0] = True
        truth = exact(q, k, v, options.get("attn_mask"), kind == "causal")
        for scheme in schemes():
            if scheme == "bf16" and dtype == torch.float16:
                continue  # handed over by rule
            if time.monotonic() > end:
                left_out += 1
                continue
            name = f"{scheme} {dtype} {shape} {kind}"
            try:
                with rf.use_backend("triton"):
                    found = decibels(rf.attention(q, k, v, precision=scheme, **options), truth)
            except Exception as error:  # one that cannot be compiled must not hide the others
                low[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            compared += 1
            # few rows spread more than the median of many
            if not found >= LEAST_DB[scheme] - (3.0 if shape[2] < 64 else 0.0):
                low[name] = round(found, 1)
    return {
        "ok": not low and compared > 0,
        "too_low_db": low,
        "compared": compared,
        "left_out": left_out,
    }


def check_attention_codes(_rows) -> dict:
    """Codes and scales of K and V: every backend that quantizes here against the reference, bit for bit."""
    differing: dict[str, int] = {}
    compared = []
    for backend, quantize_kv in quantizers().items():
        for shape in SHAPES:
            _, k, v = tensors(shape)
            for scheme in schemes():
                ours = quantize_kv(k, v, scheme, None)
                theirs = reference_quantize.quantize_kv(k, v, scheme, None)
                compared.append(f"{backend} {scheme}")
                for name in ("k_codes", "k_scale", "k_mean", "v_codes", "v_scale"):
                    a, b = getattr(ours, name), getattr(theirs, name)
                    if a is None or b is None:
                        continue
                    wrong = int((a.float() != b.float()).sum()) if a.shape == b.shape else -1
                    if wrong:
                        differing[f"{backend} {scheme} {shape} {name}"] = wrong
    return {"ok": not differing and bool(compared), "differences": differing,
            "compared": sorted(set(compared))}  # fmt: skip


def check_attention_graph(_rows) -> dict:
    """A captured call replays on new inputs as the eager call computes them, for every scheme."""
    wrong = []
    for scheme in schemes():
        q, k, v = tensors((1, 4, 1000, 1000, 64))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # the first calls compile and choose, which a capture may not do
                rf.attention(q, k, v, precision=scheme)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rf.attention(q, k, v, precision=scheme)
        for seed in (1, 2):
            for held, new in zip(
                (q, k, v), tensors((1, 4, 1000, 1000, 64), seed=seed), strict=True
            ):
                held.copy_(new)
            graph.replay()
            if not torch.equal(out, rf.attention(q, k, v, precision=scheme)):
                wrong.append([scheme, seed])
    return {"ok": not wrong, "mismatches": wrong}


def check_attention_side_stream(_rows) -> dict:
    """A call on a side stream waits for that stream's earlier work."""
    wrong = {}
    for scheme in schemes():
        q, k, v = tensors((2, 8, 1024, 1024, 64))
        expected = rf.attention(q * 2, k, v, precision=scheme)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        count = 0
        for _ in range(10):
            with torch.cuda.stream(side):
                late = torch.zeros_like(q)
                torch.cuda._sleep(
                    2_000_000
                )  # about a millisecond: an unordered launch would read the zeros
                late.copy_(q).mul_(2)
                got = rf.attention(late, k, v, precision=scheme)
            side.synchronize()
            count += not torch.equal(got, expected)
        if count:
            wrong[scheme] = count
    return {"ok": not wrong, "wrong_of_10": wrong}


def microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of one call over groups of launches."""
    for _ in range(3):
        call()
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / repeats)
    return statistics.median(times)


def check_quantize_bandwidth(rows) -> dict:
    """Bytes a second of quantizing K and V (each read once, the codes written once) beside a copy; shown, no goal."""
    seen = []
    for tokens in BANDWIDTH_TOKENS:
        for dim in (64, 128):
            _, k, v = tensors((1, 2048 // dim, 1, tokens, dim))
            target = torch.empty_like(k)
            copied = 2 * k.numel() * 2 / microseconds(partial(target.copy_, k))
            for backend, quantize_kv in quantizers().items():
                for scheme in schemes():
                    if scheme == "bf16":
                        continue  # bfloat16 inputs are used as they are
                    us = microseconds(partial(quantize_kv, k, v, scheme, None))
                    value_bytes = 2 if SCHEMES[scheme].pv == "bf16" else 1
                    moved = k.numel() * (2 + 1) + v.numel() * (2 + value_bytes)
                    name = f"quantize K and V {scheme} D {dim} ({backend})"
                    rows.append({
                        "check": name, "elements": k.numel(), "us": round(us, 2), "bytes": moved,
                        "gb_s": round(moved / us / 1000, 1), "copy_gb_s": round(copied / 1000, 1),
                        "pct_copy": round(100 * moved / us / copied, 1),
                    })  # fmt: skip
                    seen.append(name)
    return {"ok": bool(seen)}


CHECKS = (
    check_attention_codes, check_attention_graph, check_attention_side_stream, check_attention_accuracy,
    check_quantize_bandwidth,
)  # fmt: skip
