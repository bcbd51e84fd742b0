"""Checks that need a GPU: equal bits across backends, one launch per step, graph capture, side streams, bandwidth.

``python benchmarks/gpu_checks.py --out checks.json`` runs every check by itself and records what each found; exit code
1 when one failed. ``gpu.sh`` calls it after building. ``--smoke`` runs one small call of every kernel family
and nothing else: that is what compute-sanitizer is given.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# `python -P` leaves the script's folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_attention
import torch

import rfkernels as rf
from rfkernels import _C

DEVICE = "cuda"
SHAPES = ((1,), (7, 3), (33, 1028), (5, 3, 64, 65), (2, 1_050_623))  # ragged tails, tiny and large samples
BANDWIDTH_GOAL = 0.90  # of the copy measured in the same run, from 64 MB a tensor up


def data(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Normals of that shape, made on the CPU so that they do not depend on what is checked."""
    with rf.use_backend("reference"):
        return rf.randn(*shape, seed=seed).to(device=DEVICE, dtype=dtype)


def cuda_launches() -> int:
    """Kernels launched by the native library so far."""
    return sum(count for (_, where), count in _C.launch_counts().items() if where == "cuda")


def calls(shape) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """One call of every kernel family on tensors of that shape; each returns its outputs."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    batch = shape[0]
    x, v, u = data(shape, seed=1), data(shape, seed=2), data(shape, seed=3)
    per_sample = torch.linspace(-0.5, 1.5, batch, device=DEVICE)
    times = torch.linspace(0.01, 0.97, batch, device=DEVICE)
    seeds = torch.arange(100, 100 + batch, device=DEVICE)
    zero_d = torch.tensor(0.37, device=DEVICE)
    strided = data((*shape, 2), seed=4)[..., 0]
    found = {
        "euler": lambda: (rf.euler_step(x, v, 0.1),),
        "euler 0-d dt": lambda: (rf.euler_step(x, v, zero_d),),
        "euler guided per sample": lambda: (rf.euler_step(x, v, per_sample, v_uncond=u, guidance_scale=3.5),),
        "euler f32 state bf16 velocity": lambda: rf.euler_step(x, v.to(bf16), 0.1, cast=bf16),
        "euler f16": lambda: (rf.euler_step(x.to(f16), v.to(f16), 0.1),),
        "euler bf16": lambda: (rf.euler_step(x.to(bf16), v.to(bf16), per_sample),),
        "euler f64": lambda: rf.euler_step(x.double(), v, 0.1, cast=f32),
        "euler strided": lambda: (rf.euler_step(strided, v, per_sample),),
        "taylor": lambda: (rf.taylor_step(x, (v, u, strided), 0.3),),
        "linear 4 terms": lambda: (
            rf.linear_step(x, (v, u, v, u), (0.1, per_sample, zero_d, -2.0), x_coefficient=0.5),
        ),
        "linear noise": lambda: (rf.linear_step(x, (v,), (0.1,), noise_scale=0.7, seed=5, offset=9),),
        "linear noise per sample": lambda: (rf.linear_step(x, (), (), noise_scale=per_sample, seed=5, offset=seeds),),
        "loss gradient mse": lambda: gradient(x, {"target": v}, "mse"),
        "loss gradient drawn": lambda: gradient(x, {"x1": v, "seed": 11}, "mse"),
        "loss gradient elementwise": lambda: gradient(x, {"x0": u, "x1": v}, "pseudo_huber_elementwise"),
        "randn": lambda: (rf.randn(*shape, seed=3, device=DEVICE), rf.randn(*shape, seed=seeds, dtype=bf16)),
        "rand": lambda: (rf.rand(*shape, seed=3, device=DEVICE), rf.rand(*shape, seed=seeds, dtype=f16)),
    }
    for path in ("linear", "trigonometric", "vp", "sub-vp"):
        found[f"interpolate {path}"] = lambda path=path: rf.interpolate(v, times, x0=u, path=path)[:2]
    found["interpolate drawn"] = lambda: rf.interpolate(v, times, seed=7, offset=seeds, return_x0=True)
    found["interpolate bf16"] = lambda: rf.interpolate(v.to(bf16), times, seed=7)[:2]
    return found


def gradient(prediction, sources, kind) -> tuple[torch.Tensor, ...]:
    """The gradient of the summed loss; the loss itself is only equal within rounding."""
    prediction = prediction.detach().requires_grad_()
    loss = rf.flow_loss(prediction, sources.get("target"), kind=kind, reduction="sum",
                        **{k: s for k, s in sources.items() if k != "target"})  # fmt: skip
    return torch.autograd.grad(loss, prediction)


def check_bits(_rows) -> dict:
    """Every call by native, Triton and reference on the same GPU tensors; counts elements that differ."""
    result: dict[str, object] = {"differences": {}}
    backends = [b for b in ("triton", "reference") if b == "reference" or "triton" in rf.available_backends("ode_step")]
    result["compared"] = backends
    for shape in SHAPES:
        for name, call in calls(shape).items():
            relative = 1e-6 if name.startswith("loss") else 0.0  # its factors may be grouped another way
            outputs = {}
            for backend in ("native", *backends):
                with rf.use_backend(backend):
                    outputs[backend] = call()
            for backend in backends:
                for native, other in zip(outputs["native"], outputs[backend], strict=True):
                    differing = int((~torch.isclose(native, other, rtol=relative, atol=0, equal_nan=True)).sum())
                    if differing:
                        worst = (native.double() - other.double()).abs().max().item()
                        result["differences"][f"{name} {tuple(shape)} vs {backend}"] = [differing, worst]
    result["ok"] = not result["differences"]
    return result


def check_devices_agree(_rows) -> dict:
    """The GPU's numbers against the native CPU kernels', bit for bit (one shape)."""
    shape, differing = (33, 1028), {}
    x, v = data(shape, seed=1), data(shape, seed=2)
    t = torch.linspace(0.01, 0.97, shape[0], device=DEVICE)
    pairs = {
        "euler": [rf.euler_step(a, b, 0.1) for a, b in ((x, v), (x.cpu(), v.cpu()))],
        "randn": [rf.randn(*shape, seed=3, offset=4, device=d) for d in (DEVICE, "cpu")],
        "interpolate vp": [rf.interpolate(b, s, seed=7, path="vp").xt for b, s in ((v, t), (v.cpu(), t.cpu()))],
    }
    for name, (gpu, cpu) in pairs.items():
        if not torch.equal(gpu.cpu(), cpu):
            differing[name] = int((gpu.cpu() != cpu).sum())
    return {"ok": not differing, "differences": differing}


def check_one_launch(_rows) -> dict:
    """A step with out= is one kernel, by the library's counter and by torch's profiler."""
    x, v, u = (data((8, 4, 64, 64), seed=s) for s in (1, 2, 3))
    out, copy = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    steps = {
        "euler": lambda: rf.euler_step(x, v, 0.1, out=out),
        "euler guided cast": lambda: rf.euler_step(x, v, 0.1, v_uncond=u, guidance_scale=2.0, out=out, cast=copy),
        "taylor": lambda: rf.taylor_step(x, (v, u), 0.1, out=out),
        "linear noise": lambda: rf.linear_step(x, (v, u), (0.1, 0.2), noise_scale=0.3, seed=1, out=out),
    }
    counted, profiled = {}, {}
    for name, step in steps.items():
        step()
        before = cuda_launches()
        step()
        counted[name] = cuda_launches() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        profiled[name] = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ok = all(n == 1 for n in counted.values()) and all(len(k) <= 1 for k in profiled.values())
    return {"ok": ok, "counted": counted, "profiled": profiled}


def check_graph(_rows) -> dict:
    """A captured step replays with new inputs, dt and seed read from device tensors."""
    x, v = data((4, 3, 33, 31), seed=1), data((4, 3, 33, 31), seed=2)
    dt, seed = torch.tensor(0.1, device=DEVICE), torch.tensor(5, device=DEVICE)
    out = torch.empty_like(x)

    def step():
        rf.linear_step(x, (v,), (dt,), noise_scale=0.3, seed=seed, out=out)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # the first launch loads the kernel, which a capture may not do
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    mismatches = []
    for new_seed, new_dt in ((5, 0.1), (6, 0.1), (6, -0.4)):
        seed.fill_(new_seed)
        dt.fill_(new_dt)
        graph.replay()
        expected = rf.linear_step(x, (v,), (dt,), noise_scale=0.3, seed=new_seed)
        if not torch.equal(out, expected):
            mismatches.append([new_seed, new_dt])
    return {"ok": not mismatches, "mismatches": mismatches}


def check_side_stream(_rows) -> dict:
    """A step on a side stream waits for that stream's earlier work, not for the default stream's."""
    x, v = data((64, 1024, 64), seed=1), data((64, 1024, 64), seed=2)
    expected = rf.euler_step(x * 3, v, 0.1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    wrong = 0
    for _ in range(20):
        with torch.cuda.stream(side):
            y = torch.zeros_like(x)
            torch.cuda._sleep(2_000_000)  # about a millisecond: an unordered launch would read the zeros
            y.copy_(x).mul_(3)
            got = rf.euler_step(y, v, 0.1)
        side.synchronize()
        wrong += not torch.equal(got, expected)
    return {"ok": wrong == 0, "wrong_of_20": wrong}


def timed_calls(n: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """{name: (bytes an element, call)} on tensors of n elements; the first is the copy that the others are held to."""
    bf16 = torch.bfloat16
    batch = 8
    x, v, u = (torch.randn(batch, n // batch, device=DEVICE) for _ in range(3))
    vb, xb, out, target = v.to(bf16), x.to(bf16), torch.empty_like(x), torch.empty_like(x)
    copy, outb = torch.empty_like(xb), torch.empty_like(xb)
    t = torch.rand(batch, device=DEVICE)
    losses, grad = torch.empty(batch, device=DEVICE), torch.empty_like(x)
    workspace = torch.empty(_C.flow_loss_workspace(batch, n // batch), dtype=torch.float64, device=DEVICE)

    def loss(target_, x1, seed, kind, c):
        _C.flow_loss(x, target_, None, x1, seed, None if seed is None else 0, None, kind, c, 1.0, losses, grad,
                     workspace.data_ptr())  # fmt: skip

    return {
        "copy": (8, lambda: out.copy_(x)),
        "euler f32": (12, lambda: rf.euler_step(x, v, 0.1, out=out)),
        "euler f32 dt per sample": (12, lambda: rf.euler_step(x, v, t, out=out)),
        "euler bf16": (6, lambda: rf.euler_step(xb, vb, 0.1, out=outb)),
        "euler f32 state, bf16 v and copy": (12, lambda: rf.euler_step(x, vb, 0.1, out=out, cast=copy)),
        "euler guided f32": (16, lambda: rf.euler_step(x, v, 0.1, v_uncond=u, guidance_scale=3.0, out=out)),
        "taylor 2 f32": (16, lambda: rf.taylor_step(x, (v, u), 0.1, out=out)),
        "linear 2 terms, noise": (16, lambda: rf.linear_step(x, (v, u), (0.1, 0.2), noise_scale=0.1, seed=1, out=out)),
        "interpolate drawn f32": (12, lambda: rf.interpolate(x, t, seed=1, out=(out, target))),
        "interpolate x0 f32": (16, lambda: rf.interpolate(x, t, x0=v, path="vp", out=(out, target))),
        "interpolate drawn bf16": (6, lambda: rf.interpolate(xb, t, seed=1, out=(copy, outb))),
        "loss mse with gradient": (12, lambda: loss(v, None, None, 0, 0.0)),
        "loss mse with gradient, drawn": (12, lambda: loss(None, v, 1, 0, 0.0)),
        "loss pseudo-Huber with gradient": (20, lambda: loss(v, None, None, 1, 0.1)),
        "randn f32": (4, lambda: _C.random(out, 1, 0, 0)),
    }


def check_bandwidth(rows) -> dict:
    """Bytes a second of every kernel against a copy of tensors of the same size, from 256 KB to 256 MB a tensor."""
    slow = {}
    for mebi in (1 / 16, 1, 16, 64):
        n, copied = int(mebi * 2**20), 0.0
        for name, (size, call) in timed_calls(n).items():
            us = gpu_attention.microseconds(call, 30)
            rate = size * n / us
            copied = copied or rate
            row = {"check": name, "elements": n, "us": round(us, 2), "bytes": size * n, "gb_s": round(rate / 1000, 1)}
            rows.append({**row, "copy_gb_s": round(copied / 1000, 1), "pct_copy": round(100 * rate / copied, 1)})
            if 4 * n >= 64e6 and rate < BANDWIDTH_GOAL * copied and name != "randn f32":  # drawing alone is arithmetic
                slow[f"{name}, {n} elements"] = round(100 * rate / copied, 1)
    return {"ok": not slow, "below_goal_pct_of_copy": slow}


CHECKS = (
    check_bits, check_devices_agree, check_one_launch, check_graph, check_side_stream, check_bandwidth,
    *gpu_attention.CHECKS,
)  # fmt: skip


def main() -> int:
    """Run the checks; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_checks.json"), help="JSON to write; the rows go to .csv")
    parser.add_argument("--smoke", action="store_true", help="one small call of every kernel, for compute-sanitizer")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not _C.has_cuda():
        print("gpu_checks: a CUDA device and a build with CUDA kernels are needed", file=sys.stderr)
        return 2
    if arguments.smoke:
        with rf.use_backend("native"):
            for shape in ((3, 5), (2, 4100), (2, 1028)):
                for call in calls(shape).values():
                    call()
        torch.cuda.synchronize()
        print("smoke: every kernel ran")
        return 0
    rows: list[dict] = []
    report = {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels_built_for": _C.cuda_archs(),
        "backends": rf.available_backends(),
        "checks": {},
    }
    for check in CHECKS:
        name, begin = check.__name__.removeprefix("check_"), time.monotonic()
        try:
            outcome = check(rows)
        except Exception as error:  # the boundary of a check: whatever it was is recorded, and the rest goes on
            traceback.print_exc()
            outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = round(time.monotonic() - begin, 1)
        report["checks"][name] = outcome
        print(f"{'ok  ' if outcome['ok'] else 'FAIL'} {name} ({outcome['seconds']} s)", flush=True)
        arguments.out.write_text(json.dumps({**report, "rows": rows}, indent=1))
    if rows:
        with arguments.out.with_suffix(".csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0 if all(c["ok"] for c in report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
