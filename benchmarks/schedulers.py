"""Times our diffusers schedulers beside diffusers' own: a step without the network, noise for a batch, reads by the host.

    python benchmarks/schedulers.py --out benchmarks/results/schedulers_cpu.csv
    python benchmarks/schedulers.py --check            then every target: reached or missed
    python benchmarks/schedulers.py --device cuda      also host_us, until the host has enqueued a step

The columns are those of rows.py; how often a step makes the host wait stands in `variant`, and err_vs_ref is the difference
between the two over a whole run. A row is a run of 50 steps divided by its calls, begun by `set_begin_index(0)` as pipelines
do, on fixed network outputs; laying the schedule out is no part of it. Freed memory stays with the process, where glibc can
be told so: else page faults, which meet now one side and now the other, take up to 5 times as long as the work. On CUDA
us_p50 is the time between events before and after the run: the slower of host and device.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# `python -P` leaves the script's folder out, and the checkout's root must stay out: it would hide the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rows as files
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from machine import environment
from measure import Runner, Timing, copy_runner, interleaved
from torch.utils._python_dispatch import TorchDispatchMode

from rfkernels.integrations import diffusers as rfd

STEPS, BATCH = 50, 16
SHAPES = {"latent-4x64x64": (1, 4, 64, 64), "latent-16x128x128": (1, 16, 128, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PAIRS = {
    "euler": (FlowMatchEulerDiscreteScheduler, lambda: rfd.RFEulerScheduler()),
    "heun": (FlowMatchHeunDiscreteScheduler, lambda: rfd.RFHeunScheduler()),
    "dpm++": (
        lambda: DPMSolverMultistepScheduler(**FLOW),
        lambda: rfd.RFMultistepScheduler(algorithm="dpm++", grid="dpm++", integer_timesteps=True),
    ),
    "unipc": (
        lambda: UniPCMultistepScheduler(**FLOW),
        lambda: rfd.RFMultistepScheduler(algorithm="unipc", grid="unipc", integer_timesteps=True),
    ),
}
# Tensors read and written a step, at the least: Heun's two stages, a multistep rule's history.
TRAFFIC = {"euler": 3, "heun": 3.5, "dpm++": 5, "unipc": 7, "scale_noise": 3}
_HOST_ROUNDS = 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
# On the CPU: case, shape, dtype -> the highest ratio of our time to diffusers'. The large batch of scale_noise has none: it
# moves 3 tensors where diffusers moves 7, and the look-ups that make up the rest of diffusers' time are nothing beside them.
TARGETS = {
    ("euler", "latent-16x128x128", "float32"): 0.6,
    ("euler", "latent-16x128x128", "bfloat16"): 0.3,
    ("euler", "latent-4x64x64", "float32"): 0.4,
    ("euler", "latent-4x64x64", "bfloat16"): 0.3,
    ("scale_noise", "latent-4x64x64-b16", "float32"): 0.25,
}


class HostReads(TorchDispatchMode):
    """Counts the ops that make the host wait for a device: reads of a number, of how many numbers are not zero, copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.count += 1
        elif func is aten._to_copy.default:
            self.count += result.is_cpu and not args[0].is_cpu
        elif func is aten.copy_.default:
            self.count += args[0].is_cpu and not args[1].is_cpu
        return result


def keep_freed_memory() -> None:
    """No memory is given back to the kernel, nor mapped for one tensor alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """The same numbers for both sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run_of(make: Callable[[], object], shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """(a call of a whole run, its steps)."""
    scheduler = make()
    scheduler.set_timesteps(STEPS, device=device)
    times = list(scheduler.timesteps)
    x = normal(0, shape, dtype, device)
    outputs = [
        normal(i + 1, shape, dtype, device) for i in range(4)
    ]  # distinct, as a network's are

    def run() -> torch.Tensor:
        fresh = copy.copy(scheduler)
        fresh.set_begin_index(0)
        state = x
        for i, t in enumerate(times):
            state = fresh.step(outputs[i % 4], t, state, return_dict=False)[0]
        return state

    return run, len(times)


def noise_of(make: Callable[[], object], shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """(a call that mixes noise into a batch of per-sample times, 1)."""
    scheduler = make()
    places = torch.randint(0, 1000, (BATCH,), generator=torch.Generator().manual_seed(3))
    times = scheduler.timesteps[places].to(device)
    x, noise = (normal(i, (BATCH, *shape[1:]), dtype, device) for i in range(2))
    return lambda: scheduler.scale_noise(x, times, noise), 1


def reads_in(call: Callable[[], object], steps: int) -> float:
    """Reads by the host in one step."""
    with HostReads() as counted:
        call()
    return counted.count / steps


def host_times(built: dict[str, tuple]) -> dict[str, str]:
    """Median microseconds until the host has enqueued a step on CUDA; the queue is empty when a run begins."""
    found = {role: [] for role in built}
    for _ in range(_HOST_ROUNDS):
        for role, (call, steps) in built.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            found[role].append((time.perf_counter() - begin) * 1e6 / steps)
    return {role: f"{statistics.median(values):.3f}" for role, values in found.items()}


def measured(
    case: str, name: str, dtype: str, device: str, seconds: float, common: files.Row
) -> list[files.Row]:
    """Two rows: ours and diffusers', timed in turns."""
    shape = SHAPES[name]
    make = noise_of if case == "scale_noise" else run_of
    theirs, ours = PAIRS["euler" if case == "scale_noise" else case]
    built = {
        role: make(scheduler, shape, DTYPES[dtype], device)
        for role, scheduler in (("best", theirs), ("fused", ours))
    }
    results = {role: call() for role, (call, _) in built.items()}
    error = relative(results["fused"], results["best"])
    if case == "scale_noise":
        name, shape = f"{name}-b{BATCH}", (BATCH, *shape[1:])
    elements = 1
    for length in shape:
        elements *= length
    traffic = round(TRAFFIC[case] * elements * DTYPES[dtype].itemsize)
    runners = {role: Runner(call, warm=True) for role, (call, _) in built.items()}
    timings = interleaved({**runners, "copy": copy_runner(traffic, device)}, device, seconds, 5)
    host = host_times(built) if device == "cuda" else dict.fromkeys(built, "")
    rows = []
    for role, (call, steps) in built.items():
        rows.append(
            {
                **common,
                "op": "ode_step",
                "case": f"scheduler_{case}",
                "backend": "native" if role == "fused" else "eager",
                "role": role,
                "variant": f"{'rfkernels' if role == 'fused' else 'diffusers'}, "
                f"{reads_in(call, steps):.2f} host reads",
                "memory": "new",
                "dtype": dtype,
                "shape_name": name,
                "shape": "x".join(map(str, shape)),
                **times(timings[role], steps),
                "host_us": host[role],
                "bytes": str(traffic),
                "copy_gb_s": f"{traffic / timings['copy'].p50 / 1000:.2f}",
                "err_vs_ref": f"{error:.2e}",  # from each other, over the whole run
                "speedup_vs_torch": f"{ratio(timings, built):.2f}" if role == "fused" else "",
            }
        )
    return rows


def times(timing: Timing, steps: int) -> files.Row:
    """The columns of a timing, a step."""
    return {
        "n_iter": str(timing.calls * steps),
        **{f"us_{p}": f"{getattr(timing, p) / steps:.3f}" for p in ("p50", "p20", "p80")},
    }


def ratio(timings: dict[str, Timing], built: dict[str, tuple]) -> float:
    """How many times quicker than diffusers a step is."""
    return (timings["best"].p50 / built["best"][1]) / (timings["fused"].p50 / built["fused"][1])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def main(command_line: list[str] | None = None) -> int:
    """Measures, prints, writes; 1 when --check finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="where the rows go")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair (default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="torch's thread count")
    parser.add_argument(
        "--check", action="store_true", help="then print the targets; 1 if one is missed"
    )
    options = parser.parse_args(command_line)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    keep_freed_memory()
    common, rows, missed = environment(device), [], 0
    for case in (*PAIRS, "scale_noise"):
        for name in SHAPES:
            for dtype in DTYPES:
                theirs, ours = measured(case, name, dtype, device, options.seconds, common)
                rows += [ours, theirs]
                share = float(ours["us_p50"]) / float(theirs["us_p50"])
                limit = TARGETS.get((case, ours["shape_name"], dtype)) if device == "cpu" else None
                verdict = ""
                if limit is not None:
                    missed += share > limit
                    verdict = f"{'reached' if share <= limit else 'MISSED'} (<= {limit})"
                print(
                    f"{case:12s} {ours['shape_name']:22s} {dtype:9s} "
                    f"{ours['us_p50']:>10s} us against {theirs['us_p50']:>10s}, {share:.3f} of it; "
                    f"{ours['variant'].split(', ')[1]} against {theirs['variant'].split(', ')[1]}  {verdict}",
                    flush=True,
                )
                if options.out:
                    files.write(options.out, rows)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
