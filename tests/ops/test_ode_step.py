"""Steps on every backend and instruction set level: bit-equal to the reference, near the float64 truth, and algebra."""

# ruff: noqa: B023  (the closures run before the loop goes on)
from __future__ import annotations

import pytest
import torch
from cells import CELLS, NATIVE, NATIVE_CPU, Cell, reference, same_bits, same_results
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import (
    LAYOUTS,
    SCALAR_KINDS,
    laid_out,
    normal,
    operands,
    partner_dtypes,
    scalar,
    scalars,
    seeds,
    shapes,
)
from tolerances import BF16, DTYPES, F16, F32, F64, combination, within

import rfkernels as rf

# Several tiles of 1024 with a ragged tail; odd strides; samples shorter and longer than a tile.
PARITY_SHAPES = [(3, 701), (2, 3, 17, 24), (70, 3), (2501,)]


def on(cell: Cell, value):
    return value.to(cell.device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cell_gives_the_bits_of_the_reference(cell: Cell, dtype):
    for shape in PARITY_SHAPES[: 1 if cell.interpreted else None]:
        layout = LAYOUTS[(len(shape) + shape[0]) % len(LAYOUTS)]
        x, v, u = (on(cell, laid_out(normal(*shape, dtype=dtype, key=k), layout)) for k in range(3))
        low = v.to(BF16)
        for kind in ("float", "per sample, strided"):
            dt, g = (on(cell, scalar(kind, value, shape[0])) for value in (0.37, 2.5))
            calls = {
                "euler": lambda dt=dt, x=x, low=low: rf.euler_step(x, low, dt, cast=F16),
                "guided": lambda dt=dt, g=g, x=x, v=v, u=u: rf.euler_step(
                    x, v, dt, v_uncond=u, guidance_scale=g
                ),
                "taylor": lambda dt=dt, x=x, v=v, u=u, low=low: rf.taylor_step(
                    x, (v, u, low), dt, cast=BF16
                ),
                "linear": lambda dt=dt, g=g, x=x, v=v, u=u: rf.linear_step(
                    x,
                    (v, u),
                    (dt, g),
                    x_coefficient=dt,
                    noise_scale=g,
                    seed=2**62 + 5,
                    offset=2**40 + 7,
                ),
            }
            for name, call in calls.items():
                same_results(cell, cell.run("ode_step", call), reference(call), (name, kind, shape))


@settings(max_examples=60)
@given(st.data())
def test_euler_on_any_input(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    special = data.draw(st.booleans())
    low = data.draw(st.sampled_from(partner_dtypes(dtype)))
    x = data.draw(operands(shape, dtype, special=special))
    v = data.draw(operands(shape, low, special=special))
    dt = data.draw(scalars(shape[0]))
    cast = data.draw(st.sampled_from((None, *DTYPES)))
    options = {"cast": cast}
    if data.draw(st.booleans()):
        options |= {
            "v_uncond": data.draw(operands(shape, low)),
            "guidance_scale": data.draw(scalars(shape[0])),
        }
    expected = reference(lambda: rf.euler_step(x, v, dt, **options))
    for cell in NATIVE_CPU:
        actual = cell.run(
            "ode_step", lambda: rf.euler_step(x, v, dt, **options), launches=x.numel() > 0
        )
        same_results(cell, actual, expected)


@settings(max_examples=60)
@given(st.data())
def test_linear_and_taylor_on_any_input(data):
    shape, dtype = data.draw(shapes(limit=2500)), data.draw(st.sampled_from(DTYPES))
    special = data.draw(st.booleans())
    count = data.draw(st.integers(0, 8))
    low = st.sampled_from(partner_dtypes(dtype))
    x = data.draw(operands(shape, dtype, special=special))
    tensors = [data.draw(operands(shape, data.draw(low), special=special)) for _ in range(count)]
    factors = [data.draw(scalars(shape[0])) for _ in range(count)]
    options = {
        "x_coefficient": data.draw(scalars(shape[0])),
        "cast": data.draw(st.sampled_from((None, *DTYPES))),
    }
    if data.draw(st.booleans()):
        options |= {
            "noise_scale": data.draw(scalars(shape[0])),
            "seed": data.draw(seeds(shape[0])),
            "offset": data.draw(seeds(shape[0])),
        }
    calls = [lambda: rf.linear_step(x, tensors, factors, **options)]
    if 1 <= count <= 3:
        calls.append(lambda: rf.taylor_step(x, tensors, factors[0], cast=options["cast"]))
    for call in calls:
        expected = reference(call)
        for cell in NATIVE_CPU:
            same_results(cell, cell.run("ode_step", call, launches=x.numel() > 0), expected)


@pytest.mark.parametrize("cell", NATIVE)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_near_the_float64_truth(cell: Cell, dtype):
    x, *t = (normal(5, 411, dtype=dtype, key=k, device=cell.device) for k in range(9))
    x64, t64 = x.double(), [a.double() for a in t]
    c = [0.3 * (-1) ** k / (k + 1) for k in range(8)]
    actual = cell.run("ode_step", lambda: rf.linear_step(x, t, c, x_coefficient=0.9))
    truth = 0.9 * x64 + sum(a * b for a, b in zip(c, t64, strict=True))
    size = 0.9 * x64.abs() + sum(abs(a) * b.abs() for a, b in zip(c, t64, strict=True))
    within(actual, truth, combination(dtype, truth, size, 9), "linear")

    dt, g = 0.1, 7.5
    actual = cell.run(
        "ode_step", lambda: rf.euler_step(x, t[0], dt, v_uncond=t[1], guidance_scale=g)
    )
    truth = x64 + dt * (t64[1] + g * (t64[0] - t64[1]))
    size = x64.abs() + dt * (t64[1].abs() + g * (t64[0].abs() + t64[1].abs()))
    within(actual, truth, combination(dtype, truth, size, 4), "guided")

    actual = cell.run("ode_step", lambda: rf.taylor_step(x, t[:3], dt))
    parts = [x64, dt * t64[0], dt**2 / 2 * t64[1], dt**3 / 6 * t64[2]]
    truth, size = sum(parts), sum(part.abs() for part in parts)
    within(actual, truth, combination(dtype, truth, size, 6), "taylor")


@pytest.mark.parametrize("cell", NATIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_any_operand_and_nothing_else_is_written(cell: Cell, layout):
    shape = (3, 40, 33)
    for target in range(3):
        memory = [laid_out(normal(*shape, key=k), layout) for k in range(3)]
        x, v, u = (t if t.device.type == cell.device else t.to(cell.device) for t in memory)
        expected = reference(
            lambda x=x, v=v, u=u: rf.euler_step(x, v, 0.3, v_uncond=u, guidance_scale=2.0)
        )
        out = (x, v, u)[target]
        kept = [t.clone() for i, t in enumerate((x, v, u)) if i != target]
        returned = cell.run(
            "ode_step",
            lambda x=x, v=v, u=u, out=out: rf.euler_step(
                x, v, 0.3, v_uncond=u, guidance_scale=2.0, out=out
            ),
        )
        assert returned is out
        same_bits(out, expected, (layout, target))
        for a, b in zip((t for i, t in enumerate((x, v, u)) if i != target), kept, strict=True):
            same_bits(a, b)
    gap = laid_out(normal(*shape), layout)
    storage = torch.empty(0, dtype=F32).set_(gap.untyped_storage())
    before = storage.clone()
    with cell.active():
        if cell.device == "cpu":
            rf.euler_step(gap.contiguous(), gap.contiguous(), 0.5, out=gap)
    assert (storage != before).sum() <= gap.numel()
    assert ((before == 77.0) <= (storage == 77.0)).all(), "memory between the elements was written"


def test_out_of_many_terms_may_be_the_last_one():
    for cell in NATIVE_CPU:
        for target in range(9):
            x, *t = (normal(3, 1500, key=k) for k in range(9))
            everything = [x, *t]
            expected = reference(
                lambda x=x, t=t: rf.linear_step(x, t, [0.1] * 8, noise_scale=0.2, seed=1)
            )
            cell.run("ode_step", lambda x=x, t=t, o=everything[target]: rf.linear_step(
                x, t, [0.1] * 8, noise_scale=0.2, seed=1, out=o))  # fmt: skip
            same_bits(everything[target], expected, (str(cell), target))


@pytest.mark.parametrize("shift", [1, 7, -3])
def test_a_shifted_overlap_is_computed_from_the_old_values(shift):
    for cell in NATIVE_CPU:
        memory = normal(3000)
        x, out = memory[10:2900], memory[10 + shift : 2900 + shift]
        v = normal(2890, key=1)
        expected = reference(lambda x=x, v=v: rf.euler_step(x, v, 0.5))
        cell.run("ode_step", lambda x=x, v=v, out=out: rf.euler_step(x, v, 0.5, out=out))
        same_bits(out, expected)


def test_a_reversed_view_as_out_is_computed_from_the_old_values():
    x = normal(40, 40)
    expected = reference(lambda: rf.euler_step(x, x, 0.5))
    rf.euler_step(x, x, 0.5, out=x.t())
    same_bits(x.t(), expected)


def test_scalars_inside_the_output_are_read_before_it_is_written():
    memory = normal(3, 5)
    expected = reference(lambda: rf.linear_step(memory, [memory], [memory[:, 0]]))
    rf.linear_step(memory, [memory], [memory[:, 0]], out=memory)
    same_bits(memory, expected)
    one = normal(3, 2000)
    expected = reference(lambda: rf.euler_step(one, one, one[1, 500]))
    rf.euler_step(one, one, one[1, 500], out=one)
    same_bits(one, expected)


@pytest.mark.parametrize("cast", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_is_a_copy_of_the_stored_state(dtype, cast):
    x, v = normal(3, 1100, dtype=dtype), normal(3, 1100, dtype=dtype, key=1)
    given = laid_out(torch.zeros(3, 1100, dtype=cast), "sliced")
    for cell in NATIVE_CPU:
        state, copy = cell.run("ode_step", lambda: rf.euler_step(x, v, 0.1, cast=cast))
        same_bits(copy, state.to(cast))
        state, copy = cell.run(
            "ode_step", lambda: rf.linear_step(x, (v,) * 6, (0.1,) * 6, cast=given)
        )
        assert copy is given
        same_bits(copy, state.to(cast))


def test_cast_may_be_a_term_or_the_output():
    x, v = normal(3, 1100), normal(3, 1100, key=1)
    expected = reference(lambda: rf.euler_step(x, v, 0.5))
    for cell in NATIVE_CPU:
        copy = v.clone()
        state, given = cell.run("ode_step", lambda: rf.euler_step(x, copy, 0.5, cast=copy))
        same_bits(state, expected)
        same_bits(given, expected)
        out = torch.empty_like(x)
        cell.run("ode_step", lambda: rf.euler_step(x, v, 0.5, out=out, cast=out))
        same_bits(out, expected)


@pytest.mark.parametrize("kind", SCALAR_KINDS)
def test_scalars_are_rounded_to_the_compute_type_first(kind):
    x, v = normal(6, 50), normal(6, 50, key=1)
    dt = scalar(kind, 0.1, 6)
    column = torch.as_tensor(dt).to(F32)
    expected = x + (column if column.ndim == 0 else column[:, None]) * v
    same_bits(rf.euler_step(x, v, dt), expected)


def test_taylor_coefficients_are_products_of_the_rounded_step():
    x, zero, one = torch.zeros(100), torch.zeros(100), torch.ones(100)
    for n in range(1, 101):
        dt = torch.tensor(1.0 / n)
        same_bits(rf.taylor_step(x, (zero, one), 1.0 / n)[0], dt * dt * 0.5)
        same_bits(
            rf.taylor_step(x, (zero, zero, one), 1.0 / n)[0], dt * dt * dt * torch.tensor(1.0 / 6.0)
        )


def test_guidance_identities():
    x, v, u = (normal(4, 300, key=k) for k in range(3))
    for cell in NATIVE_CPU:
        with cell.active():
            same_bits(
                rf.euler_step(x, v, 0.25, v_uncond=u, guidance_scale=0.0), rf.euler_step(x, u, 0.25)
            )
            within(
                rf.euler_step(x, v, 0.25, v_uncond=u, guidance_scale=1.0),
                rf.euler_step(x, v, 0.25),
                1e-6,
            )
            same_bits(
                rf.euler_step(x, v, 0.25, v_uncond=v, guidance_scale=9.0), rf.euler_step(x, v, 0.25)
            )
            folded = rf.linear_step(x, (v, u), (0.25 * 3.0, 0.25 * (1 - 3.0)))
            within(rf.euler_step(x, v, 0.25, v_uncond=u, guidance_scale=3.0), folded, 4e-6)


def test_step_algebra():
    x, v = normal(4, 300), normal(4, 300, key=1)
    for cell in NATIVE_CPU:
        with cell.active():
            same_bits(rf.euler_step(x, v, 0.0), x)
            same_bits(rf.taylor_step(x, (v,), 0.3), rf.euler_step(x, v, 0.3))
            same_bits(rf.linear_step(x, (v,), (0.3,)), rf.euler_step(x, v, 0.3))
            same_bits(rf.linear_step(x, (), (), x_coefficient=0.3), x * 0.3)
            # Powers of two are exact: linear in dt, and two half steps of a constant field are one.
            steps = torch.tensor([0.25, 0.5, 1.0, 2.0])
            zero = torch.zeros_like(x)
            same_bits(rf.euler_step(zero, v, steps), steps[:, None] * v)
            x64, v64 = x.double(), v.double()
            two = rf.euler_step(rf.euler_step(x64, v64, 0.125), v64, 0.125)
            within(two, rf.euler_step(x64, v64, 0.25), 1e-15)
            order = torch.tensor([2, 0, 3, 1])
            dt = torch.tensor([0.1, 0.2, 0.3, 0.4])
            same_bits(rf.euler_step(x, v, dt)[order], rf.euler_step(x[order], v[order], dt[order]))


def test_noise_is_randn_and_per_sample_seeds_travel_with_the_sample():
    x = normal(4, 5, 77)
    seeds_, offsets = torch.tensor([3, 2**40, 5, 9]), torch.tensor([0, 1, 2**35, 2])
    order = torch.tensor([2, 0, 3, 1])
    for cell in NATIVE_CPU:
        with cell.active():
            z = rf.randn(4, 5, 77, seed=11, offset=3)
            same_bits(rf.linear_step(x, (), (), noise_scale=0.5, seed=11, offset=3), x + 0.5 * z)
            each = rf.linear_step(x, (), (), noise_scale=0.5, seed=seeds_, offset=offsets)
            alone = rf.linear_step(x[2], (), (), noise_scale=0.5, seed=5, offset=2**35)
            same_bits(each[2], alone)
            moved = rf.linear_step(
                x[order], (), (), noise_scale=0.5, seed=seeds_[order], offset=offsets[order]
            )
            same_bits(moved, each[order])


def test_threads_do_not_change_a_bit(threads):
    x, v = normal(3, 41, 1000), normal(3, 41, 1000, key=1)
    for cell in NATIVE_CPU:
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(
                cell.run(
                    "ode_step", lambda: rf.linear_step(x, (v,), (0.1,), noise_scale=1.0, seed=4)
                )
            )
        same_bits(found[1], found[0])
        same_bits(found[2], found[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_outputs_that_bypass_the_cache(dtype):
    # From 4 MiB on: an odd start, so that neither end is a whole cache line.
    numel = (4 << 20) // dtype.itemsize + 4321
    memory = torch.full((numel + 64,), 7.0, dtype=dtype)
    x, v = normal(numel, dtype=dtype), normal(numel, dtype=dtype, key=1)
    expected = (x.float() + 0.5 * v.float()).to(dtype)
    for cell in NATIVE_CPU:
        out = memory.fill_(7.0)[13 : 13 + numel]
        cell.run("ode_step", lambda out=out: rf.euler_step(x, v, 0.5, out=out))
        same_bits(out, expected, str(cell))
        assert (memory[:13] == 7.0).all()
        assert (memory[13 + numel :] == 7.0).all()


def test_offsets_beyond_two_to_the_31_elements(tmp_path):
    # A sparse file: 4 GiB of address space, a few pages of memory.
    file = tmp_path / "sparse.bin"
    with file.open("wb") as handle:
        handle.truncate(2 * (2**31 + 2**16))
    try:
        memory = torch.from_file(str(file), shared=True, size=2**31 + 2**16, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space for a sparse file: {error}")
    out = memory.as_strided((3, 5), (2**30 + 11, 2**8 + 1))
    assert out[2, 4].data_ptr() - out.data_ptr() > 2**32
    x = normal(3, 5, dtype=BF16)
    for cell in NATIVE_CPU:
        out.zero_()
        cell.run("ode_step", lambda: rf.euler_step(x, x, 0.5, out=out))
        same_bits(out, (x.float() + 0.5 * x.float()).to(BF16))
        same_bits(
            cell.run("ode_step", lambda: rf.euler_step(out, out, 0.5)),
            reference(lambda: rf.euler_step(out, out, 0.5)),
        )


def test_zero_dimensions_and_empty_batches():
    for cell in NATIVE_CPU:
        x = torch.tensor(1.5)
        same_bits(cell.run("ode_step", lambda x=x: rf.euler_step(x, x, 2.0)), torch.tensor(4.5))
        for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
            x = torch.empty(shape)
            with cell.active():
                assert rf.euler_step(x, x, torch.ones(shape[0])).shape == shape
                state, copy = rf.linear_step(x, (x,), (1.0,), noise_scale=1.0, seed=3, cast=F16)
            assert state.shape == copy.shape == shape


def test_more_dimensions_than_the_kernels_take():
    x = normal(2, *(1,) * 15, 3, dtype=F64)
    expected = x + 0.5 * x
    same_bits(rf.euler_step(x, x, 0.5), expected)
    same_bits(rf.euler_step(x, x, 0.5, out=torch.empty_like(x)), expected)
