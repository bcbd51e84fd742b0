"""Quantized attention against PyTorch's: quantization included, and with K and V quantized before; causal, masked and
small calls; and a whole transformer around it.

A shape is (B, H, queries, keys, D). Outputs are compared with float64 on at most 256 query rows, in decibels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from registry import Built, Case, Setting, Variant
from torch.nn.attention import SDPBackend, sdpa_kernel

import rfkernels as rf
from rfkernels import models

sdpa = torch.nn.functional.scaled_dot_product_attention

# Least decibels on standard normals, so that a row can be trusted; tests/ops holds the kernels to more.
LEAST_DB = {
    "int8": 24.0, "int8_u8": 31.0, "int8_bf16": 34.0, "int8_fp8": 24.0, "fp8": 20.0, "bf16": 42.0,
}  # fmt: skip
SDPA_LEAST_DB = {"float32": 90.0, "bfloat16": 40.0}
OPEN_SHARE = 0.7  # of the pairs under the mask
DIT_DEPTH = {"DiT-B2-S1024": 12, "tiny": 3}
DIT_SHAPES = {"DiT-B2-S1024": (1, 12, 1024, 1024, 64), "tiny": (1, 2, 64, 64, 32)}


def _square(lengths: dict[int, int], dims: tuple[int, ...] = (64, 128)) -> dict[str, tuple]:
    """Shapes by name; heads by length."""
    return {
        f"S{length}-H{heads}-D{dim}": (1, heads, length, length, dim)
        for length, heads in lengths.items()
        for dim in dims
    }


TINY = {"tiny": (1, 2, 70, 70, 64)}
LARGE = {
    **_square({256: 8, 512: 8, 1024: 8}), **_square({1024: 24}), **_square({2048: 8, 4096: 8, 8192: 4, 16384: 2}),
}  # fmt: skip
FEW = _square({1024: 8, 4096: 8, 16384: 2})
MASKED = _square({1024: 8, 4096: 8})  # PyTorch widens the mask: a gigabyte at 16384
SMALL = {
    f"{queries}x{keys}-H{heads}-D{dim}": (1, heads, queries, keys, dim)
    for queries, keys, heads in (
        *((1, 1, 8), (8, 8, 8), (16, 16, 8), (32, 32, 8), (64, 64, 8), (128, 128, 8), (256, 256, 8)),
        *((64, 64, 1), (196, 196, 6), (1, 1024, 8), (256, 77, 8), (1024, 77, 8), (77, 1024, 8)),
    )
    for dim in (64, 128)
}  # fmt: skip
# 16 Ki tokens and 2048 features in all, as the papers of the fp8 kernels have it.
CUDA = {
    f"S{length}-D{dim}": (max(16384 // length, 1), 2048 // dim, length, length, dim)
    for length in (1024, 2048, 4096, 8192, 16384, 32768)
    for dim in (64, 128)
}


def _inputs(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, standard normals."""
    batch, heads, queries, keys, dim = setting.shape
    generator = torch.Generator(setting.device).manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        made = torch.randn((batch, heads, length, dim), generator=generator, device=setting.device)
        return made.to(setting.state)

    return drawn(queries), drawn(keys), drawn(keys)


class _Truth:
    """Exact attention in float64 on evenly spaced query rows, and how far outputs are from it."""

    def __init__(self, q, k, v, mask: torch.Tensor | None, is_causal: bool) -> None:
        queries = q.shape[2]
        self.rows = (
            torch.linspace(0, queries - 1, min(queries, 256), device=q.device).round().long()
        )
        if is_causal:
            mask = torch.arange(k.shape[2], device=q.device) <= self.rows[:, None]
        elif mask is not None:
            mask = mask[:, :, self.rows]
        q = q[:, :, self.rows]
        # head by head: float64 scores of all heads at once can be gigabytes
        self.values = torch.cat(
            [
                sdpa(*(x[:, h : h + 1].double() for x in (q, k, v)), attn_mask=mask)
                for h in range(q.shape[1])
            ],
            1,
        )

    def error(self, out: torch.Tensor) -> float:
        """Largest error relative to the largest true value."""
        wrong = (out[:, :, self.rows].double() - self.values).abs().max()
        return float(wrong / self.values.abs().max())

    def decibels(self, out: torch.Tensor) -> float:
        """Signal to noise ratio."""
        noise = (out[:, :, self.rows].double() - self.values).square().sum()
        return float(10 * torch.log10(self.values.square().sum() / noise.clamp(min=1e-300)))


def _rivals(setting: Setting, call: Callable[[], torch.Tensor]) -> dict[str, Callable]:
    """PyTorch's attention: as it chooses itself, and on CUDA by each of its kernels that could serve."""
    rivals = {"SDPA": call}
    if setting.device == "cuda" and setting.dtype == "bfloat16":
        for name, kernel in (
            ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ):

            def forced(kernel=kernel):
                with sdpa_kernel(kernel):
                    return call()

            rivals[name] = forced
    return rivals


def _reached(isa: str) -> bool:
    """The machine, or RFK_MAX_ISA, has the level."""
    try:
        from rfkernels import _C
    except ImportError:
        return False
    levels = ("baseline", "avx2", "avx512", "amx")
    return levels.index(isa) <= levels.index(_C.isa_used())


def _attention(
    setting: Setting, precisions: dict[str, tuple[str, ...]], isas: tuple[str, ...] = (),
    is_causal: bool = False, masked: bool = False,
) -> Built:  # fmt: skip
    """Every precision with quantization included, int8 also with K and V quantized before, and PyTorch's.

    Args:
        precisions: by device.
        isas: caps under which int8 is measured as well.
    """
    q, k, v = _inputs(setting)
    mask = None
    if masked:
        generator = torch.Generator(setting.device).manual_seed(1)
        mask = torch.rand((1, 1, *setting.shape[2:4]), generator=generator, device=setting.device)
        mask = mask < OPEN_SHARE
        mask[..., 0] = True
    options = {"attn_mask": mask, "is_causal": is_causal}
    truth = _Truth(q, k, v, mask, is_causal)
    backend = "native" if setting.device == "cpu" else "triton"

    def ours(name: str, precision: str, call, isa: str | None = None) -> Variant:
        return Variant(
            name, "fused", "new", call, truth.error, backend, isa, truth.decibels, LEAST_DB[precision]
        )  # fmt: skip

    variants = []
    for precision in precisions[setting.device]:
        if "fp8" in precision and torch.cuda.get_device_capability() < (8, 9):
            continue
        call = partial(rf.attention, q, k, v, precision=precision, **options)
        variants.append(ours(precision, precision, call))
        if precision == "int8":
            variants += [
                ours(f"int8 ({isa})", precision, call, isa) for isa in isas if _reached(isa)
            ]
    if not masked:
        with rf.use_backend(backend):
            kv = rf.quantize(k, v, precision="int8")
        variants.append(
            ours("int8, K and V quantized before", "int8", partial(rf.attention, q, kv, **options))
        )
    for name, call in _rivals(setting, partial(sdpa, q, k, v, **options)).items():
        variants.append(
            Variant(
                name, "best", "new", call, truth.error, decibels=truth.decibels,
                least_db=SDPA_LEAST_DB[setting.dtype],
            )
        )  # fmt: skip
    return Built(variants, tuple)


def _small(setting: Setting) -> Built:
    """The package's own choice, hand-over included, against PyTorch's."""
    q, k, v = _inputs(setting)
    truth = _Truth(q, k, v, None, False)
    return Built(
        [
            Variant(
                "int8 or handed over", "fused", "new", partial(rf.attention, q, k, v), truth.error,
                decibels=truth.decibels, least_db=LEAST_DB["int8"],
            ),
            Variant(
                "SDPA", "best", "new", partial(sdpa, q, k, v), truth.error,
                decibels=truth.decibels, least_db=SDPA_LEAST_DB[setting.dtype],
            ),
        ],
        tuple,
    )  # fmt: skip


def _transformer(setting: Setting) -> Built:
    """One forward pass of a DiT in bfloat16: attention by kernel, everything else the same."""
    _, heads, length, _, dim = setting.shape
    side = 2 * math.isqrt(length)
    network = models.build(
        "dit", seed=0, sample_shape=(4, side, side), patch=2, width=heads * dim,
        depth=DIT_DEPTH[setting.shape_name], heads=heads,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if (
                "modulation" in name or "leave" in name
            ):  # they start at zero, and nothing would reach the output
                weight.normal_(0, 0.02, generator=generator)
    network.eval().requires_grad_(False).to(setting.device)
    x = torch.randn((1, *network.sample_shape), generator=generator).to(setting.device)
    t = torch.full((1,), 0.5, device=setting.device)
    truth = network(x, t).double()
    network.to(setting.state)
    x = x.to(setting.state)

    def forward(attention: str) -> torch.Tensor:
        for block in network.blocks:
            block.attention = attention
        return network(x, t)

    def without() -> torch.Tensor:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: v):
            return forward("sdpa")

    def error(out: torch.Tensor) -> float:
        return float((out.double() - truth).abs().max() / truth.abs().max())

    def decibels(out: torch.Tensor) -> float:
        return float(10 * torch.log10(truth.square().sum() / (out.double() - truth).square().sum()))

    shared = {"decibels": decibels, "least_db": 20.0}
    return Built(
        [
            Variant("int8", "fused", "new", partial(forward, "int8"), error, **shared),
            Variant("int8_bf16", "fused", "new", partial(forward, "int8_bf16"), error, **shared),
            Variant("bf16", "fused", "new", partial(forward, "bf16"), error, **shared),
            Variant("SDPA", "best", "new", partial(forward, "sdpa"), error, **shared),
            Variant("without attention", "part", "new", without, lambda _: None),
        ],
        tuple,
    )


def _bytes(setting: Setting) -> int:
    """Q, K and V read once, the output written once."""
    batch, heads, queries, keys, dim = setting.shape
    return 2 * batch * heads * (queries + keys) * dim * setting.state.itemsize


def _flops(setting: Setting, share: float = 1.0) -> int:
    batch, heads, queries, keys, dim = setting.shape
    return round(4 * batch * heads * queries * keys * dim * share)


ALL_CPU = ("int8", "int8_bf16", "bf16")
PRECISIONS = {"cpu": ALL_CPU, "cuda": ("int8_bf16", "int8_fp8", "fp8", "bf16", "int8")}
INT8 = {"cpu": ("int8",), "cuda": ("int8",)}


def _case(name: str, build, shapes: dict, dtypes=("bfloat16",), flops=_flops, cuda=None) -> Case:
    places = {"cpu": TINY | shapes, "cuda": TINY | (cuda or {})}
    return Case("attention", name, build, _bytes, flops, dtypes=dtypes, shapes=places)


CASES = [
    _case("attention_bfloat16", partial(_attention, precisions=PRECISIONS), LARGE, cuda=CUDA),
    _case(
        "attention_causal", partial(_attention, precisions=PRECISIONS, is_causal=True), FEW,
        flops=partial(_flops, share=0.5), cuda=CUDA,
    ),
    _case("attention_masked", partial(_attention, precisions=INT8, masked=True), MASKED),
    _case(
        "attention_float32", partial(_attention, precisions=INT8, isas=("avx512", "avx2")), FEW,
        dtypes=("float32",),
    ),
    _case("attention_small", _small, SMALL, dtypes=("float32", "bfloat16")),
    _case("attention_dit", _transformer, DIT_SHAPES),
]  # fmt: skip
