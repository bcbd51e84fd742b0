"""Compile the Triton kernels ahead of time, without a GPU, and print what came out as JSON lines.

Run as a program, in a process of its own (the interpreter and the compiler do not share one):
``python triton_aot.py ARCH [all]``. The package's launchers run unchanged; Triton is told that a GPU of that architecture is
present and ``JITFunction.run`` stops before the launch. Each line: case, kernel, registers, stack, local, the distinct
global accesses of the PTX, whether it holds an fma, flushes subnormals or approximates, and the number of machine
instructions by name.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rfkernels.backends.triton import flow_loss, interpolate, ode_step, projected_update, random
from rfkernels.ops.projected_update import Options

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
compiled: list[tuple[str, triton.compiler.CompiledKernel]] = []


class NoDevice:
    """What Triton asks of its driver up to the launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_only(original):
    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    return run


def inspect(kernel) -> dict[str, object]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run(
                [TOOLS / command[0], *command[1:], file.name], capture_output=True, text=True
            ).stdout

        usage, listing = tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    )
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", listing, re.M)
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "accesses": sorted(set(re.findall(r"(?:ld|st)\.(?:global|shared)[\w.]*", ptx))),
        "fma": "fma.rn" in ptx,
        "flushes": ".ftz" in ptx or ".approx" in ptx,
        "instructions": collections.Counter(names),
    }


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
B = 8


def new(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape or (B, 4096), dtype=dtype)


def dense(dtype: torch.dtype, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(new(dtype=dtype) for _ in range(count))


def euler(dtype=F32, v=None, cast=None, dt=0.1):
    x, out = dense(dtype, 2)
    copy = None if cast is None else new(dtype=cast)
    ode_step.euler_step(x, new(dtype=v or dtype), None, dt, None, out, copy)


def guided(dtype):
    x, v, u, out = dense(dtype, 4)
    ode_step.euler_step(x, v, u, new(B), new(1)[0], out, None)


def taylor(dtype):
    x, a, b, c, out = dense(dtype, 5)
    ode_step.taylor_step(x, (a, b, c), new(B), out, None)


def linear(dtype, terms, noise=None):
    x, out, *tensors = dense(dtype, 2 + terms)
    ode_step.linear_step(x, tensors, 1.0, (0.5,) * terms, noise, out, None)


def points(path, dtype, drawn):
    x1, x0, xt, target = dense(dtype, 4)
    interpolate.interpolate(x1, None if drawn else x0, new(B), path, 3, 5, xt, target, None)


def loss(kind, shape, drawn=False, dtype=F32, grad=True):
    prediction, other = new(*shape, dtype=dtype), new(*shape, dtype=dtype)
    losses = new(shape[0], dtype=F64 if dtype == F64 else F32)
    target, x1, seed = (None, other, 7) if drawn else (other, None, None)
    gradient = new(*shape, dtype=dtype) if grad else None
    flow_loss.flow_loss(
        prediction, target, None, x1, seed, 0, new(shape[0]), kind, 0.1, 1.0, losses, gradient
    )


def strided():
    x = new(B, 3, 66, 66)[..., 1:65, 1:65]
    ode_step.euler_step(x, new(B, 3, 64, 64), None, 0.1, None, new(B, 3, 64, 64), None)


def sliced():
    v = new(B, 8, 64, 64)[:, :4]
    ode_step.euler_step(new(B, 4, 64, 64), v, None, 0.1, None, new(B, 4, 64, 64), None)


def ragged():
    ode_step.euler_step(new(B, 1003), new(B, 1003), None, 0.1, None, new(B, 1003), None)


def wide():
    """More than 2^31 elements; nothing is allocated."""
    x, v, out = (torch.empty(3 * 2**30, device="meta") for _ in range(3))
    ode_step.linear_step(x, (v,), 1.0, (0.5,), NOISE, out, None)


def straddling():
    interpolate.interpolate(new(B, 6), None, new(B), "linear", 3, 5, new(B, 6), new(B, 6), None)


def update(*shape, dtype=F32, rule="adamp", nesterov=False, average=None, reduce=None):
    weight, grad = new(*shape, dtype=dtype), new(*shape, dtype=dtype)
    state = F64 if dtype == F64 else F32
    first, adam = new(*shape, dtype=state), rule == "adamp"
    second = [new(*shape, dtype=state)] if adam else []
    averages = [] if average is None else [new(*shape, dtype=average)]
    options = Options(rule, nesterov, 1e-3, 0.9, 0.5, 1e-8, 0.01, 0.1, 0.1, 0.9)
    projected_update.projected_update(
        [weight], [grad], [first], second, [torch.zeros(())] * adam, averages, [len(shape) > 1], [0], options, reduce
    )  # fmt: skip


NOISE = (0.3, 11, 2)
LONG, SHORT = (B, 3 * 4096), (B, 64)
CORE = {
    "euler float32": euler,
    "euler float32 state, bfloat16 velocity and copy": lambda: euler(F32, BF16, BF16),
    "guided bfloat16": lambda: guided(BF16),
    "interpolate linear float32": lambda: points("linear", F32, True),
    "loss mse short float32": lambda: loss("mse", SHORT),
    "loss pseudo_huber long float32": lambda: loss("pseudo_huber", LONG),
    "adamp float32": lambda: update(64, 1152),
}
REST = {
    "normal float32": lambda: random.random(new(), 1, 0, "normal"),
    "interpolate vp float32": lambda: points("vp", F32, True),
    "linear 2 noise float32": lambda: linear(F32, 2, NOISE),
    "euler float64": lambda: euler(F64),
    "guided float16": lambda: guided(F16),
    "taylor 3 float32": lambda: taylor(F32),
    "taylor 3 float64": lambda: taylor(F64),
    "linear 8 bfloat16": lambda: linear(BF16, 8),
    "linear 1 noise float64": lambda: linear(F64, 1, NOISE),
    "interpolate linear given float16": lambda: points("linear", F16, False),
    "interpolate linear bfloat16": lambda: points("linear", BF16, True),
    "interpolate trigonometric float32": lambda: points("trigonometric", F32, True),
    "interpolate sub-vp float64": lambda: points("sub-vp", F64, False),
    "interpolate straddling quads": straddling,
    "loss mse long bfloat16 drawn": lambda: loss("mse", LONG, True, BF16),
    "loss elementwise long float32": lambda: loss("pseudo_huber_elementwise", LONG),
    "loss elementwise short float64": lambda: loss("pseudo_huber_elementwise", SHORT, dtype=F64),
    "loss pseudo_huber short float32 no gradient": lambda: loss("pseudo_huber", SHORT, grad=False),
    "uniform float16": lambda: random.random(new(dtype=F16), 1, 0, "uniform"),
    "normal per sample": lambda: random.random(new(), torch.arange(B), 0, "normal"),
    "strided": strided,
    "sliced": sliced,
    "ragged": ragged,
    "wide noise": wide,
    "adamp bfloat16 with a float32 average": lambda: update(16, 4096, dtype=BF16, average=F32),
    "adamp float64, nesterov": lambda: update(16, 64, dtype=F64, nesterov=True),
    "adamp ragged rows": lambda: update(30, 9),
    "adamp long rows in two phases": lambda: update(2, 70000, reduce=lambda summary: None),
    "sgdp float32": lambda: update(64, 1152, rule="sgdp"),
}


def values_compile_once() -> int:
    """Distinct kernels over step sizes, seeds and offsets of every kind of value."""
    compiled.clear()
    for dt, seed, offset in ((0.1, 1, 0), (0.0, 16, 1), (1.0, 2**40, 2**33), (-1e-9, 0, 2**62)):
        x, v, out = dense(F32, 3)
        ode_step.linear_step(x, (v,), dt, (dt,), (dt, seed, offset), out, None)
    return len({id(kernel) for _, kernel in compiled})


def main() -> None:
    driver.set_active(NoDevice(int(sys.argv[1])))
    triton.JITFunction.run = compile_only(triton.JITFunction.run)
    everything = sys.argv[2:] == ["all"]
    for case, call in (CORE | REST if everything else CORE).items():
        compiled.clear()
        call()
        for kernel, result in list(compiled):
            print(json.dumps({"case": case, "kernel": kernel, **inspect(result)}))
    if everything:
        print(json.dumps({"case": "values", "kernels": values_compile_once()}))


if __name__ == "__main__":
    main()
