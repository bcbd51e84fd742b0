"""The counter-based generator: known answers, a golden file, one stream everywhere, and the distribution of the numbers."""

# ruff: noqa: E731  (the closures run before the loop goes on)
from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from cells import _C, CELLS, NATIVE_CPU, Cell, reference, same_bits, same_results
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensors import seeds, shapes
from tolerances import BF16, DTYPES, F16, F32, F64

import rfkernels as rf
from rfkernels.backends.reference.random import philox4x32

# Known answers of Philox4x32-10, published with Random123: (counter, key, output).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip
GOLDEN = json.loads(Path(__file__).with_name("golden_random.json").read_text())
NAMES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}


def words(seed: int, offset: int, first: int, count: int) -> torch.Tensor:
    """(count, 4) output words of the counters first, first + 1, ... in the reference generator."""
    index = torch.arange(first, first + count)
    low, high = 0xFFFFFFFF, 32
    fill = lambda value: torch.full_like(index, value)
    counter = (index & low, index >> high, fill(offset & low), fill(offset >> high))
    return torch.stack(philox4x32(counter, (fill(seed & low), fill(seed >> high))), 1)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers_of_random123(counter, key, output):
    as_tensors = lambda values: tuple(torch.tensor([v]) for v in values)
    found = philox4x32(as_tensors(counter), as_tensors(key))
    assert tuple(int(w) for w in found) == output
    if _C is not None:
        assert _C.philox4x32(counter, key) == output


@pytest.mark.parametrize("cell", CELLS)
def test_known_answers_through_the_public_function(cell: Cell):
    # rand shows the leading 24 bits of each word; the first answer is seed 0, offset 0, elements 0 to 3.
    found = cell.run("random", lambda: rf.rand(4, seed=0, device=cell.device))
    assert [int(u * 2**24) for u in found.tolist()] == [w >> 8 for w in KNOWN[0][2]]
    # The others have words that no seed below 2^63 or element index reaches in full, so only lanes of the reference words.
    for seed, offset in ((2**63 - 1, 2**63 - 1), (0x299F31D0A4093822, 0x0370734413198A2E)):
        found = cell.run(
            "random", lambda s=seed, o=offset: rf.rand(6, seed=s, offset=o, device=cell.device)
        )
        assert [int(u * 2**24) for u in found.tolist()] == (
            words(seed, offset, 0, 2).flatten()[:6] >> 8
        ).tolist()


def key_of(value):
    return torch.tensor(value) if isinstance(value, list) else value


@pytest.mark.parametrize("case", GOLDEN, ids=[c["name"] for c in GOLDEN])
def test_golden_numbers(case):
    draw = getattr(rf, case["function"])
    call = lambda: draw(
        case["shape"],
        seed=key_of(case["seed"]),
        offset=key_of(case["offset"]),
        dtype=NAMES[case["dtype"]],
    )
    for where, out in [
        ("reference", reference(call)),
        *((str(c), c.run("random", call)) for c in NATIVE_CPU),
    ]:
        bits = out.flatten().view(
            {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
        )
        width = 2 * out.element_size()
        first = [f"{int(b) & (1 << 4 * width) - 1:0{width}x}" for b in bits[:6]]
        assert first == case["first"], where
        assert (
            hashlib.sha256(out.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            == case["sha256"]
        ), where


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("draw", [rf.randn, rf.rand])
def test_every_cell_draws_the_numbers_of_the_reference(cell: Cell, draw):
    table = torch.tensor([5, 2**62 + 5, 2**33])
    keys = [
        (3, 0),
        (2**63 - 1, 2**63 - 1),
        (table, 7),
        (2**32 - 1, table),
        (table, torch.stack((table, table), 1)[:, 1]),
    ]
    for shape in ((3, 1031), (3, 5), (3, 2, 129))[: 1 if cell.interpreted else None]:
        for dtype in (F32,) if cell.interpreted else DTYPES:
            for seed, offset in keys[1:4:2] if cell.interpreted else keys:
                there = [
                    k.to(cell.device) if isinstance(k, torch.Tensor) else k for k in (seed, offset)
                ]
                call = lambda s=shape, k=there, d=dtype: draw(
                    s, seed=k[0], offset=k[1], device=cell.device, dtype=d
                )
                expected = reference(
                    lambda s=shape, a=seed, b=offset, d=dtype: draw(s, seed=a, offset=b, dtype=d)
                )
                same_results(cell, cell.run("random", call), expected, (shape, dtype))


@given(st.data())
def test_any_shape_and_key(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    seed, offset = data.draw(seeds(shape[0])), data.draw(seeds(shape[0]))
    for draw in (rf.randn, rf.rand):
        call = lambda draw=draw: draw(shape, seed=seed, offset=offset, dtype=dtype)
        expected = reference(call)
        for cell in NATIVE_CPU:
            same_bits(cell.run("random", call, launches=expected.numel() > 0), expected, str(cell))


def test_threads_do_not_change_a_bit(threads):
    for cell in NATIVE_CPU:
        for key in (5, torch.arange(70)):
            found = []
            for count in (1, 2, 3):
                threads(count)
                found.append(cell.run("random", lambda key=key: rf.randn(70, 1501, seed=key)))
            same_bits(found[1], found[0])
            same_bits(found[2], found[0])


def test_an_element_depends_on_its_index_alone():
    long = rf.randn(5000, seed=3, offset=9)
    for size in (1, 2, 3, 4, 5, 15, 16, 17, 255, 257, 1023, 1025, 4999):
        same_bits(rf.randn(size, seed=3, offset=9), long[:size])
    same_bits(rf.randn(50, 100, seed=3, offset=9).flatten(), long)
    each = rf.randn(4, 33, seed=torch.tensor([7, 8, 9, 7]), offset=torch.tensor([0, 0, 1, 2]))
    for row, (seed, offset) in zip(each, ((7, 0), (8, 0), (9, 1), (7, 2)), strict=True):
        same_bits(row, rf.randn(33, seed=seed, offset=offset))


def test_other_keys_give_other_numbers():
    keys = [(0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32), (2**62, 0), (0, 2**62)]
    draws = torch.stack([rf.randn(4000, seed=s, offset=o) for s, o in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / math.sqrt(4000)
    seeds_ = {
        rf.derive_seed(s, p) for s in (0, 1, 2**63 - 1) for p in ("time", "noise", "pairs", "")
    }
    assert len(seeds_) == 12
    assert all(0 <= s < 2**63 for s in seeds_)
    # Runs of earlier versions are resumed with these.
    assert rf.derive_seed(0, "time") == 2564787344463870478
    assert rf.derive_seed(2**63 - 1, "pairs") == 6045207778436783684


def test_uniforms_are_below_one_and_use_every_bit_of_their_dtype():
    for dtype, bits in ((F32, 24), (F64, 24), (F16, 11), (BF16, 8)):
        u = rf.rand(300_000, seed=1, dtype=dtype).double()
        assert u.min() >= 0
        assert u.max() <= 1 - 2.0**-bits
        steps = u * 2**bits
        assert (steps == steps.round()).all()
        if bits <= 11:
            assert len(steps.unique()) == 2**bits
        assert stats.kstest(u.numpy() + 2.0 ** -(bits + 1), "uniform").pvalue > 1e-4


def test_normals_have_the_normal_distribution():
    z = rf.randn(400_000, seed=12345).double().numpy()
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # Standard errors of mean, variance, skewness, kurtosis; five of each.
    for found, expected, error in (
        (z.mean(), 0, 1), (z.var(), 1, math.sqrt(2)),
        (stats.skew(z), 0, math.sqrt(6)), (stats.kurtosis(z), 0, math.sqrt(24)),
    ):  # fmt: skip
        assert abs(found - expected) < 5 * error / math.sqrt(n)
    for tail in (3.0, 4.0):
        rate = 2 * stats.norm.sf(tail)
        assert abs((abs(z) > tail).sum() - n * rate) < 5 * math.sqrt(n * rate)
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)


def test_normals_against_box_muller_in_float64():
    w = words(77, 5, 0, 50_000)
    u1, u2 = ((w[:, ::2] >> 8) + 1).double() * 2.0**-24, (w[:, 1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    truth = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten()
    radius = radius.repeat_interleave(2, -1).flatten()
    for cell in NATIVE_CPU:
        z = cell.run("random", lambda: rf.randn(200_000, seed=77, offset=5)).double()
        # Angle, polynomials, root and product: 2^-24 each of the radius, and the angle's own rounding up to pi/4.
        assert ((z - truth).abs() <= 4 * 2.0**-24 * radius + 1e-12).all()
    assert truth.abs().max() > 4


def test_the_extreme_words():
    # u1 = 1 gives radius 0; the largest radius is sqrt(48 ln 2), from u1 = 2^-24.
    from rfkernels.backends.reference.random import _radius

    ends = _radius(torch.tensor([0xFFFFFFFF, 0]))
    assert ends[0] == 0
    assert abs(ends[1].item() - math.sqrt(48 * math.log(2))) < 1e-6


def test_counters_beyond_32_bits_follow_the_definition():
    # The low counter word of element 2^34 wraps; seen in the reference words, as no tensor here is that long.
    assert not torch.equal(words(1, 0, 2**32, 2), words(1, 0, 0, 2))
    for seed, offset in ((2**63 - 1, 0), (0, 2**63 - 1), (2**32, 2**32 + 1)):
        for cell in NATIVE_CPU:
            found = cell.run("random", lambda s=seed, o=offset: rf.rand(400, seed=s, offset=o))
            assert (found.double() * 2**24).long().tolist() == (
                words(seed, offset, 0, 100).flatten() >> 8
            ).tolist()


def test_device_and_dtype_defaults():
    assert rf.randn(2, 3, seed=0).dtype == F32
    assert (
        rf.randn((2, 3), seed=0).shape
        == rf.randn(2, 3, seed=0).shape
        == rf.randn(torch.Size((2, 3)), seed=0).shape
    )
    assert rf.randn(seed=0).shape == rf.randn((), seed=0).shape == ()
    assert rf.randn(4, seed=0, device="meta").is_meta
