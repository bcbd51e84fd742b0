"""How far quantized attention is from exact attention on the inputs that decide it, and that each remedy is needed."""

from __future__ import annotations

import pytest
import torch
from attention_cells import ALL, AttentionCell, every_cell
from attention_inputs import GENERATORS, decibels, exact, sinks

import rfkernels as rf
from rfkernels.backends.reference import attention as attention_module
from rfkernels.backends.reference import quantize as quantize_module

LENGTH, ROWS = 1024, 128  # keys, and queries: every row is a sample of the same error
# Least median SQNR over 8 seeds, in dB.
GATES = {
    "int8_u8": {
        "normal": 35.0, "biased K": 30.0, "biased K, outliers in Q and K": 28.0, "large values": 33.0,
        "sinks": 25.0, "sinks without value": 25.0,
    },
    "int8_bf16": {
        "normal": 37.0, "biased K": 30.0, "biased K, outliers in Q and K": 28.0, "large values": 37.0,
        "sinks": 35.0, "sinks without value": 35.0,
    },
    # e4m3 has 3 bits of mantissa, whatever is done to it: 28.5 dB from P and V, 25.5 with Q and K.
    "int8_fp8": dict.fromkeys(GENERATORS, 27.0),
    "fp8": dict.fromkeys(GENERATORS, 22.0),
    # From float32, whose rounding to bfloat16 dominates; large scores (biased K) lose absolute bits.
    "bf16": {
        "normal": 45.0, "biased K": 35.0, "biased K, outliers in Q and K": 35.0, "large values": 45.0,
        "sinks": 45.0, "sinks without value": 45.0,
    },
}  # fmt: skip
_truths: dict[tuple[str, int], tuple] = {}


def problem(name: str, dim: int):
    """Inputs and their exact attention, made once."""
    if (name, dim) not in _truths:
        q, k, v = GENERATORS[name](LENGTH, dim)
        tensors = q[:, :, :ROWS], k, v
        _truths[name, dim] = tensors, exact(*tensors)
    return _truths[name, dim]


def median(cell: AttentionCell, tensors, truth) -> float:
    return float(decibels(cell.attention(*tensors), truth).median())


@every_cell
@pytest.mark.parametrize("dim", [64, 128])
def test_gates(cell, dim):
    if cell.isa == "baseline" and dim == 128:
        pytest.skip("portable code takes 20 s, and its codes are those of the other levels")
    for name in ("normal", "sinks") if cell.isa == "baseline" else GENERATORS:
        found, least = median(cell, *problem(name, dim)), GATES[cell.scheme][name]
        assert found >= least, f"{cell}, {name}, D {dim}: {found:.1f} dB, at least {least}"


@every_cell
def test_bfloat16_inputs_lose_little_in_the_exact_mode(cell):
    if cell.scheme != "bf16":
        pytest.skip("the other schemes quantize")
    tensors = [t.bfloat16() for t in problem("normal", 64)[0]]
    # The output's own rounding to bfloat16 gives 53 dB.
    assert median(cell, tensors, exact(*tensors)) >= 50.0


def reference(scheme: str) -> AttentionCell:
    return next(c for c in ALL if (c.backend, c.scheme) == ("reference", scheme))


def unrotated(x: torch.Tensor) -> torch.Tensor:
    """What ``rotate`` does to lengths, without the rotation."""
    length = quantize_module.padded_dim(x.shape[-1])
    return torch.nn.functional.pad(x * length**0.5, (0, length - x.shape[-1]))


def test_without_the_rotation_outliers_break_the_gate(monkeypatch):
    tensors, truth = problem("biased K", 64)
    cell = reference("int8_bf16")
    assert median(cell, tensors, truth) >= 35.0
    monkeypatch.setattr(quantize_module, "rotate", unrotated)
    assert median(cell, tensors, truth) < 33.0


def test_without_the_smoothing_a_bias_of_k_breaks_the_gate(monkeypatch):
    tensors, truth = problem("biased K", 64)
    cell = reference("int8_bf16")
    assert median(cell, tensors, truth) >= 35.0
    monkeypatch.setattr(quantize_module, "key_mean", lambda k, valid: torch.zeros_like(k[:, :, 0]))
    assert median(cell, tensors, truth) < 32.0


def test_without_the_floating_reference_a_sink_breaks_the_gate(monkeypatch):
    # A sink of 6 nats before 8191 keys: their P is 255 exp(x - 6) at most, so the running maximum rounds most to 0 or 1.
    q, k, v = sinks(8192, 64, seeds=4)
    tensors = q[:, :, :64], k, v
    truth, cell = exact(*tensors), reference("int8_u8")
    assert median(cell, tensors, truth) >= 34.0
    monkeypatch.setattr(attention_module, "FLOOR", 0.0)
    assert median(cell, tensors, truth) < 28.0


def test_without_scales_per_key_large_values_break_the_gate(monkeypatch):
    tensors, truth = problem("large values", 64)
    cell = reference("int8_u8")
    assert median(cell, tensors, truth) >= 33.0
    monkeypatch.setattr(quantize_module, "KEY_SCALE_MIN", 1.0)
    assert median(cell, tensors, truth) < 31.0


@every_cell
def test_kernels_pass_where_the_remedies_decide(cell):
    """The native and Triton kernels have no switches: on the same inputs they are as good as the reference."""
    if cell.scheme != "int8_u8":
        pytest.skip("the gates of int8_u8 are the ones that need every remedy")
    q, k, v = sinks(8192, 64, seeds=2)
    tensors = q[:, :, :64], k, v
    assert median(cell, tensors, exact(*tensors)) >= 34.0


def test_the_worst_case_of_the_handed_over_dtypes():
    # float16 has 11 bits of mantissa and bfloat16 8: why float16 under "bf16" goes to PyTorch.
    tensors = [t.half() for t in problem("normal", 64)[0]]
    truth = exact(*tensors)
    rf.attention_stats(reset=True)
    found = rf.attention(*tensors, precision="bf16")
    assert float(decibels(found, truth).median()) >= 60.0
    ((precision, reason),) = rf.attention_stats(reset=True).handovers
    assert precision == "bf16"
    assert reason.startswith("float16 inputs lose")
