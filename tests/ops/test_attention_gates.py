"""What quantized attention promises of its accuracy: least SQNR at length 4096, the median of 8 seeds, on hard inputs too.

The truth is PyTorch's attention in float64, of every fourth query row: all keys count, and this takes seconds.
"""

from __future__ import annotations

import attention_inputs as inputs
import pytest
import torch

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason

LENGTH, SEEDS, STEP = 4096, 8, 4
# Least decibels by inputs and scheme. bf16 rounds K itself, so its promise is for inputs without a large common part.
GATES = {
    "normal": {"int8_u8": 35.0, "int8_bf16": 37.0, "bf16": 45.0},
    "biased K": {"int8_u8": 30.0},
    "biased K, outliers in Q and K": {"int8_u8": 28.0},
    "large values": {"int8_u8": 33.0},
    "sinks": {"int8_u8": 25.0},
    "sinks without value": {"int8_u8": 25.0},
}

pytestmark = pytest.mark.skipif(
    unavailable_reason("native", "cpu", "attention") is not None, reason="no native kernels here"
)


def native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scheme: str) -> torch.Tensor:
    """The native kernel's output, after the counters have shown that this scheme ran and nothing else."""
    rf.attention_stats(reset=True)
    with rf.use_backend("native"):
        found = rf.attention(q, k, v, precision=scheme)
    stats = rf.attention_stats(reset=True)
    assert stats.calls == {(scheme, scheme, "native"): 1}
    assert not stats.handovers
    assert not any(stats.exact_heads.values())
    return found


def median_decibels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schemes) -> dict[str, float]:
    """By scheme the median over the seeds."""
    truth = inputs.exact(q[:, :, ::STEP], k, v)
    return {
        scheme: inputs.measures(native(q, k, v, scheme)[:, :, ::STEP], truth)["sqnr"]
        for scheme in schemes
    }


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", GATES)
def test_every_scheme_keeps_its_promise(name, dim):
    q, k, v = inputs.GENERATORS[name](LENGTH, dim, SEEDS)
    found = median_decibels(q, k, v, GATES[name])
    missed = {
        scheme: found[scheme] for scheme, least in GATES[name].items() if found[scheme] < least
    }
    assert not missed


@pytest.mark.parametrize("dim", [64, 128])
def test_bf16_keeps_what_bfloat16_inputs_have(dim):
    q, k, v = (x.bfloat16() for x in inputs.normal(LENGTH, dim, SEEDS))
    assert median_decibels(q, k, v, ["bf16"])["bf16"] >= 50.0


@pytest.mark.parametrize("scheme", ["int8_u8", "int8_bf16"])
def test_int8_is_nearer_than_fp8_with_a_scale_a_head(scheme):
    """On every input ours is nearer to the truth than K and V with one fp8 scale a head could be, by 6 dB and more."""
    for name in ("normal", "biased K", "sinks"):
        q, k, v = inputs.GENERATORS[name](1024, 64, 4)
        truth = inputs.exact(q, k, v)
        rounded = (_one_scale(x) for x in (q, k, v))
        theirs = inputs.measures(inputs.exact(*rounded), truth)["sqnr"]
        assert inputs.measures(native(q, k, v, scheme), truth)["sqnr"] > theirs + 6.0


def _one_scale(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax((2, 3), keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
