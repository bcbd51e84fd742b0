"""Measures the ops against eager torch and torch.compile and writes one CSV row a spelling; see README.md beside this.

python benchmarks/run.py --quick                       under a minute
python benchmarks/run.py --out results/cpu.csv         everything
python benchmarks/run.py --check                       everything, then every target: reached or missed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# `python -P` leaves the script's folder out, and the checkout's root must stay out: it would hide the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rows as files
import targets
import torch
from machine import environment
from measure import Runner, Timing, copy_runner, interleaved, overhead_us
from registry import (
    EAGER_TOLERANCE,
    HOST_SHAPE,
    SIZES,
    TOLERANCE,
    Case,
    Setting,
    Variant,
    all_cases,
    relative_error,
    settings_of,
)

from rfkernels import _dispatch

QUICK_CASES = ("euler", "euler_guided", "interpolate_drawn", "loss_mse")


class WrongResultError(RuntimeError):
    """A spelling whose outputs are further from the float64 truth than its tolerance."""


def arguments_of(command_line: list[str] | None) -> argparse.Namespace:
    """The command's options; see their help."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--out", type=Path, metavar="FILE.csv", help="where the rows go; rewritten after every case"
    )
    add(
        "--quick",
        action="store_true",
        help="the main cases in float32 at 64 Ki and 1 Mi elements, under a minute",
    )
    add(
        "--check",
        action="store_true",
        help="then print which targets are reached; exit code 1 when one is missed",
    )
    add(
        "--only",
        metavar="OP",
        help="ops (ode_step, interpolate, flow_loss, random, attention, projected_update) or cases, separated by commas",
    )
    add("--sizes", metavar="SIZE,...", help=f"of {', '.join(SIZES)} (default: the first three)")
    add(
        "--dtypes",
        metavar="DTYPE,...",
        help="of float32, bfloat16, float32+bfloat16 (default: each case's own)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--backend",
        action="append",
        metavar="NAME",
        help="backend of the package to measure; may be repeated",
    )
    add("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="time a case, dtype and size is measured for (default 3; quick 0.7)",
    )
    add("--limit", type=float, metavar="S", help="begin no further case after so many seconds")
    add(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which needs a compiler and a while",
    )
    add("--json", action="store_true", help="print the rows as JSON on stdout instead of a table")
    options = parser.parse_args(command_line)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: must be at least 1; got {options.threads}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: must be positive; got {options.seconds}")
    options.seconds = options.seconds or (0.7 if options.quick else 3.0)
    sizes = options.sizes or ("64Ki,1Mi" if options.quick else "64Ki,1Mi,16Mi")
    if unknown := [size for size in sizes.split(",") if size not in SIZES]:
        parser.error(f"--sizes: must be of {', '.join(SIZES)}; got {unknown[0]}")
    options.sizes = sizes.split(",")
    options.dtypes = (
        options.dtypes.split(",")
        if options.dtypes
        else (["float32"] if options.quick else list(TOLERANCE))
    )
    if unknown := [dtype for dtype in options.dtypes if dtype not in TOLERANCE]:
        parser.error(f"--dtypes: must be of {', '.join(TOLERANCE)}; got {unknown[0]}")
    for name in options.backend or ():
        if name not in _dispatch.BACKENDS:
            parser.error(f"--backend: must be of {', '.join(_dispatch.BACKENDS)}; got {name}")
        if reason := _dispatch.unavailable_reason(name, options.device):
            parser.error(f"--backend {name}: {reason}")
    try:
        options.cases = [
            case
            for case in all_cases(options.only)
            if options.only or not options.quick or case.name in QUICK_CASES
        ]
    except ValueError as error:
        parser.error(f"--{error}")
    return options


def backends(options: argparse.Namespace) -> list[str | None]:
    """What to force: the package's own choice first; on CUDA Triton beside it where it is there."""
    if options.backend:
        return list(options.backend)
    other = options.device == "cuda" and chosen_backend("ode_step", options.device) != "triton"
    return (
        [None, "triton"]
        if other and _dispatch.unavailable_reason("triton", "cuda") is None
        else [None]
    )


def chosen_backend(op: str, device: str) -> str:
    """The backend that serves an op when none is forced."""
    return _dispatch.backend(op, torch.empty(1, device=device)).__name__.split(".")[-2]


def with_backends(variants: list[Variant], forced: list[str | None]) -> Iterator[Variant]:
    """Our spellings once a backend where they do not name one, the others as they are."""
    for variant in variants:
        if variant.role == "fused" and variant.backend is None:
            yield from (replace(variant, backend=backend) for backend in forced)
        else:
            yield variant


def key(variant: Variant) -> str:
    """A name unique within the case."""
    return "/".join((variant.role, variant.name, variant.memory, variant.backend or ""))


def say(text: str) -> None:
    """Progress, on stderr so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Proof:
    """How far a spelling's first call was from the truth; None where it was right but has no number."""

    error: float | None
    decibels: float | None = None


def prove(variant: Variant, setting: Setting, expected: tuple[torch.Tensor, ...]) -> Proof:
    """The error of the variant's first call.

    Raises:
        WrongResultError: it is above the tolerance.
    """
    with runner_of(variant).forced():
        outputs = variant.call()
    error = variant.error(outputs) if variant.error else relative_error(outputs, expected)
    if variant.decibels is not None:
        decibels = variant.decibels(outputs)
        if not decibels >= variant.least_db:
            raise WrongResultError(f"{decibels:.1f} dB, below {variant.least_db:g}")
        return Proof(error, decibels)
    limit = (TOLERANCE if variant.role == "fused" else EAGER_TOLERANCE)[setting.dtype]
    if error is not None and not error <= limit:
        raise WrongResultError(f"error {error:.2e} above {limit:.2e}")
    return Proof(error)


def runner_of(variant: Variant) -> Runner:
    """The variant as what is timed."""
    return Runner(variant.call, variant.backend, variant.isa)


def measure_case(case: Case, setting: Setting, options: argparse.Namespace, host: dict[str, float]):
    """Rows (without the environment's columns) of one case in one setting, and how many of our own spellings failed."""
    torch._dynamo.reset()  # code compiled for the last setting counts against the recompilation limit
    built = case.build(setting)
    expected = built.expected()
    proofs: dict[str, Proof] = {}
    variants: dict[str, Variant] = {}
    failed = 0
    for variant in with_backends(built.variants, backends(options)):
        if options.no_compile and (variant.role == "compile" or "compile" in variant.name):
            continue
        try:
            proofs[key(variant)] = prove(variant, setting, expected)
        # The boundary of a spelling: torch.compile without a compiler, a backend that cannot serve, a kernel that Triton
        # cannot compile (no RuntimeError). The other spellings go on.
        except Exception as error:
            failed += variant.role == "fused"
            say(
                f"  no row for {case.name} {setting.dtype} {setting.shape_name} {key(variant)}: {first_line(error)}"
            )
            continue
        variants[key(variant)] = variant
    del expected
    runners = {name: runner_of(variant) for name, variant in variants.items()}
    runners["copy"] = copy_runner(case.bytes(setting), setting.device)
    timings = interleaved(
        runners, setting.device, options.seconds, min_rounds=5 if options.quick else 7
    )
    copied = timings.pop("copy")
    eager = [variants[name].role for name in timings]
    yardstick = "naive" if "naive" in eager else "best"
    naive = min(
        (t.p50 for name, t in timings.items() if variants[name].role == yardstick), default=None
    )
    found = [
        row_of(case, setting, variants[name], timing, proofs[name], copied, naive, host.get(name))
        for name, timing in timings.items()
    ]
    return found, failed


def first_line(error: Exception) -> str:
    """The error's first line; those of torch.compile are pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def row_of(
    case: Case,
    setting: Setting,
    variant: Variant,
    timing: Timing,
    proof: Proof,
    copied: Timing,
    naive: float | None,
    host: float | None,
) -> files.Row:
    """The columns that belong to one spelling."""
    moved = case.bytes(setting)
    rate, copy_rate = (moved / t / 1000 for t in (timing.p50, copied.p50))
    eager = None if case.moved is None else case.moved(setting).get(variant.role)
    if variant.role == "fused":
        backend = variant.backend or chosen_backend(case.op, setting.device)
    else:
        backend = "inductor" if "compile" in variant.name else "eager"
    return {
        "op": case.op,
        "case": case.name,
        "backend": backend,
        "role": variant.role,
        "variant": variant.name,
        "memory": variant.memory,
        **({} if variant.isa is None else {"isa": variant.isa}),
        "dtype": setting.dtype,
        "shape_name": setting.shape_name,
        "shape": "x".join(map(str, setting.shape)),
        "n_iter": str(timing.calls),
        **{name: f"{getattr(timing, name[3:]):.3f}" for name in ("us_p50", "us_p20", "us_p80")},
        "host_us": "" if host is None else f"{host:.3f}",
        "bytes": str(moved),
        "byte_limit": "" if eager is None else f"{eager / moved:.3f}",
        "gb_s": f"{rate:.2f}",
        "copy_gb_s": f"{copy_rate:.2f}",
        "pct_copy_peak": f"{100 * rate / copy_rate:.1f}",
        "gflop_s": "" if case.flops is None else f"{case.flops(setting) / timing.p50 / 1000:.2f}",
        "err_vs_ref": "" if proof.error is None else f"{proof.error:.2e}",
        "sqnr_db": "" if proof.decibels is None else f"{proof.decibels:.2f}",
        "speedup_vs_torch": "" if naive is None else f"{naive / timing.p50:.2f}",
    }


def overheads(case: Case, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    """Host microseconds by variant on 16 elements; compiled spellings in a full float32 run only: each compiles anew."""
    torch._dynamo.reset()
    runners = {}
    compile_too = not (options.quick or options.no_compile) and dtype == "float32"
    for variant in with_backends(
        case.build(Setting(*HOST_SHAPE, dtype, options.device)).variants, backends(options)
    ):
        if "compile" in variant.name and not compile_too:
            continue
        runner = runner_of(variant)
        try:
            with runner.forced():
                variant.call()
        except Exception as error:
            say(f"  no overhead of {case.name} {dtype} {key(variant)}: {first_line(error)}")
            continue
        runners[key(variant)] = runner
    return overhead_us(runners, turns=7 if options.quick else 21)


def show(found: list[files.Row]) -> None:
    """The rows of one case and setting as lines, quickest first."""
    first = found[0]
    print(
        f"\n{first['case']}  {first['dtype']}  {first['shape_name']} ({first['shape']}), copy {first['copy_gb_s']} GB/s"
    )
    print(f"  {'us':>10s} {'% copy':>7s} {'x naive':>8s} {'host us':>8s} {'error':>9s}")
    for row in sorted(found, key=lambda row: float(row["us_p50"])):
        name = f"{row['role']:8s} {row['memory']:8s} {row['variant']} ({row['backend']})"
        print(
            f"  {float(row['us_p50']):10.1f} {row['pct_copy_peak']:>7s} {row['speedup_vs_torch']:>8s} "
            f"{row['host_us']:>8s} {row['err_vs_ref']:>9s}  {name}"
            + (f"  {row['sqnr_db']} dB" if row["sqnr_db"] else "")
        )
    sys.stdout.flush()


def main(command_line: list[str] | None = None) -> int:
    """Measures what the options say; 0, or 1 when one of our own spellings was wrong or a target is missed."""
    options = arguments_of(command_line)
    if options.threads:
        torch.set_num_threads(options.threads)
    common, collected, failed, begin = environment(options.device), [], 0, time.monotonic()
    # float32 of every case first, so that a run cut short by --limit has seen all of them.
    for case, dtype in [(c, d) for d in options.dtypes for c in options.cases if d in c.dtypes]:
        if options.limit is not None and time.monotonic() - begin > options.limit:
            say(f"  left out, no time: {case.name} {dtype}")
            continue
        with contextlib.nullcontext() if case.gradient else torch.no_grad():
            host = {} if case.shapes else overheads(case, dtype, options)
            for setting in settings_of(case, options.sizes, dtype, options.device):
                try:
                    found, wrong = measure_case(case, setting, options, host)
                except Exception as error:  # its inputs could not be made, say for want of memory
                    place = f"{case.name} {dtype} {setting.shape_name}"
                    say(f"  no row for {place}: {first_line(error)}")
                    failed += 1
                    continue
                failed += wrong
                found = [{**common, **row} for row in found]
                collected += found
                if found and not options.json:
                    show(found)
                if options.out:
                    files.write(options.out, collected)
    if options.json:
        print(json.dumps(collected, indent=1))
    say(
        f"\n{len(collected)} rows in {time.monotonic() - begin:.0f} s"
        + (f", in {options.out}" if options.out else "")
    )
    if failed:
        say(f"{failed} of our own spellings were wrong or could not run: see above")
    missed = 0
    if options.check:
        outcomes = targets.check(collected)
        print(targets.report(outcomes), file=sys.stderr if options.json else sys.stdout)
        missed = sum(outcome.state == "missed" for outcome in outcomes)
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
