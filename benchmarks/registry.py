"""What is measured: cases (one op at one task), each with every spelling of it, its float64 truth, its bytes and flops.

A case is registered by a file in ``ops/``. Its ``build`` makes the inputs for one shape, dtype and device, and returns all
spellings of the same task; they share the inputs, so that they are measured on the same memory. To add an op: write
``ops/<op>.py`` with a list ``CASES`` and name it in ``all_cases``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# fused: this package. naive: as the formula is written. best: the quickest eager spelling known to us.
# compile: torch.compile. manual: the same numbers without autograd, the gradient written out by hand.
# part: the task without the op, so that the rest of the time can be told; nobody's rival.
ROLES = ("fused", "naive", "best", "compile", "manual", "part")
# new: every call allocates its outputs. out: the outputs are given. inplace: the first input is overwritten.
MEMORY = ("new", "out", "inplace")

SHAPES = {  # latents of a 512 px and a 1024 px image; 2^16, 2^20, 2^24 elements
    "latent-4x64x64-b4": (4, 4, 64, 64),
    "latent-16x128x128-b4": (4, 16, 128, 128),
    "latent-16x128x128-b64": (64, 16, 128, 128),
}
TEST_SHAPE = {"tiny-b4": (4, 4, 8, 8)}  # for the test of this code; says nothing about speed
SIZES = dict(zip(("64Ki", "1Mi", "16Mi", "tiny"), (SHAPES | TEST_SHAPE).items(), strict=True))
HOST_SHAPE = ("overhead", (2, 2, 2, 2))  # so small that a call is all overhead

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float32+bfloat16": torch.float32}

# Largest allowed error, relative to the largest true value. Ours round once; eager bfloat16 rounds at every operation.
TOLERANCE = {"float32": 4e-6, "bfloat16": 1.01 * 2**-8, "float32+bfloat16": 1.01 * 2**-8}
EAGER_TOLERANCE = {"float32": 4e-6, "bfloat16": 0.04, "float32+bfloat16": 0.04}

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """Shape, dtype and device of one measurement.

    ``dtype`` is the state's; ``float32+bfloat16`` is a float32 state with bfloat16 velocities, the usual sampler.
    """

    shape_name: str
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def n(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def state(self) -> torch.dtype:
        """Dtype of the state and of images."""
        return _DTYPES[self.dtype]

    @property
    def velocity(self) -> torch.dtype:
        """Dtype of what a network returns."""
        return torch.bfloat16 if self.dtype.endswith("bfloat16") else self.state

    def normal(self, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard normals of the shape, in the state's dtype unless given."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(self.shape, generator=generator, device=self.device)
        return drawn.to(self.state if dtype is None else dtype)

    def empty(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output, its pages touched: zeros of the shape, in the state's dtype unless given."""
        return torch.zeros(
            self.shape, dtype=self.state if dtype is None else dtype, device=self.device
        )


@dataclass(frozen=True)
class Variant:
    """One spelling of a case.

    Attributes:
        name: what the code is, in a few words, unique within the case together with ``memory``.
        role: one of ROLES.
        memory: one of MEMORY.
        call: runs it once and returns its outputs. Its first call must start from the case's inputs; later calls of an
            in-place spelling go on from what it left.
        error: of the outputs, where comparing with the case's expected ones does not do (own random numbers); None says
            that they are right but no number can be given, inf that they are wrong.
        backend: a backend of this package to force; None lets it choose.
        isa: instruction set level that the native kernels are capped at during it; None for no cap.
        decibels: signal to noise ratio of the outputs, for tasks where it says more than the largest error; the spelling
            is wrong below ``least_db``.
    """

    name: str
    role: str
    memory: str
    call: Callable[[], Outputs]
    error: Callable[[Outputs], float | None] | None = None
    backend: str | None = None
    isa: str | None = None
    decibels: Callable[[Outputs], float] | None = None
    least_db: float = 0.0


@dataclass(frozen=True)
class Built:
    """A case made for one setting: its spellings and the float64 outputs expected of each."""

    variants: list[Variant]
    expected: Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one task.

    Attributes:
        op: the op's room in the package: ode_step, interpolate, flow_loss, random, attention or projected_update.
        name: unique.
        build: the spellings for a setting.
        bytes: the fewest that must move, each input read once and each output written once.
        flops: additions and multiplications of the formula; None where counting them tells nothing (random bits).
        moved: bytes that the naive and the best eager spelling move, every operation's reads and writes counted; their
            ratio to ``bytes`` is what fusing can gain at most where memory is the limit.
        dtypes: which settings make sense.
        gradient: run with autograd recording.
        shapes: by device its own shapes by name, where the latents of ``SHAPES`` make no sense; ``--sizes`` does not
            concern it, but ``tiny`` takes the one called so.
    """

    op: str
    name: str
    build: Callable[[Setting], Built]
    bytes: Callable[[Setting], int]
    flops: Callable[[Setting], int] | None = None
    moved: Callable[[Setting], dict[str, int]] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    gradient: bool = False
    shapes: dict[str, dict[str, tuple[int, ...]]] | None = None


def settings_of(case: Case, sizes: list[str], dtype: str, device: str) -> list[Setting]:
    """Where a case is measured.

    Args:
        sizes: names in ``SIZES``; a case with shapes of its own takes all of them, ``tiny`` alone only its tiny one.
    """
    if case.shapes is None:
        return [Setting(*SIZES[size], dtype, device) for size in sizes]
    shapes = case.shapes[device]
    tiny = sizes == ["tiny"]
    return [
        Setting(name, shape, dtype, device)
        for name, shape in shapes.items()
        if (name == "tiny") == tiny
    ]


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """torch.compile as good as it gets here: one static shape, no graph break."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def passes(naive: int, best: int) -> Callable[[Setting], dict[str, int]]:
    """``Case.moved`` where every tensor has the state's dtype: tensors read and written in all."""
    return lambda s: {
        "naive": naive * s.n * s.state.itemsize,
        "best": best * s.n * s.state.itemsize,
    }


def as_tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    """The outputs as a tuple."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def relative_error(outputs: Outputs, expected: tuple[torch.Tensor, ...]) -> float:
    """max |output - expected| / max |expected|, the largest over the outputs; nan where an output has one."""
    worst = 0.0
    for got, true in zip(as_tuple(outputs), expected, strict=True):
        if got.shape != true.shape:
            raise ValueError(
                f"relative_error: outputs must have shape {tuple(true.shape)}; got {tuple(got.shape)}"
            )
        error = ((got.detach().double() - true).abs().max() / true.abs().max()).item()
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def all_cases(only: str | None = None) -> list[Case]:
    """Every registered case, or those of the ops and names in ``only``, separated by commas.

    Raises:
        ValueError: nothing is called that.
    """
    from ops import attention, flow_loss, interpolate, ode_step, projected_update, random

    modules = (ode_step, interpolate, flow_loss, random, attention, projected_update)
    cases = [case for module in modules for case in module.CASES]
    if only is None:
        return cases
    wanted = only.split(",")
    names = sorted({case.op for case in cases}) + [case.name for case in cases]
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"only: must be one of {', '.join(names)}; got {unknown[0]!r}")
    return [case for case in cases if case.op in wanted or case.name in wanted]
