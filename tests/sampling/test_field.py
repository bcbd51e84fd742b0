"""What the velocity is given and may answer: memory, times, precision, strides, wrong answers."""

import math
from itertools import product

import pytest
import torch
from sampling_cases import ALL, FIXED, JVP, Counting, exact

from rfkernels.sampling import CFGZero, Interval, Projected, Rescaled, invert, sample


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_the_input_and_what_the_velocity_saw_stay_as_they_were(solver, x0):
    before, seen = x0.clone(), []

    def recording(x, t):
        seen.append((x, x.clone()))
        return x  # its own input, the hardest answer to alias

    result = sample(recording, x0, steps=3, solver=solver)
    assert torch.equal(x0, before)
    assert all(torch.equal(kept, copy) for kept, copy in seen)
    assert torch.equal(result, sample(lambda x, t: x.clone(), x0, steps=3, solver=solver))


def test_times_given_to_the_velocity_are_its_own(x0):
    def scaling(x, t):
        t *= 999
        return t[:, None, None] / 999 - x

    for solver in FIXED:
        if solver is JVP:
            continue  # a forward derivative does not allow writing into its inputs
        ours = sample(scaling, x0, steps=3, solver=solver)
        torch.testing.assert_close(ours, sample(Counting(), x0, steps=3, solver=solver))


def test_times_are_fresh_for_each_call_of_an_adaptive_solver_too(x0):
    """Under guidance both calls are at the same times, which the first may have scaled."""

    def scaling(x, t, shift=0.0):
        t *= 999
        return t[:, None, None] / 999 - x + shift

    options = {
        "solver": "dopri5", "guidance_scale": 2.0, "condition": {"shift": 1.0}, "uncondition": {}
    }  # fmt: skip
    for direction in (sample, invert):
        ours = direction(scaling, x0.double(), **options)
        theirs = direction(
            lambda x, t, shift=0.0: t[:, None, None] - x + shift, x0.double(), **options
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("solver", [*ALL, "fireflow", "unipc", "sde"], ids=str)
def test_autocast_is_for_the_network_alone(solver):
    """Its answers are bfloat16, the state is not: small steps are not lost."""
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.eye(3))
    x0 = torch.linspace(1, 2, 12).reshape(4, 3)
    options = {"steps": 200, "solver": solver, **({"seed": 1} if solver == "sde" else {})}
    if solver == "dopri5":
        options |= {"rtol": 1e-2, "atol": 1e-2}
    expected = sample(lambda x, t: layer(x), x0, **options)
    answers = set()

    def network(x, t):
        answers.add(layer(x).dtype)
        return layer(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample(network, x0, **options)
    assert found.dtype == torch.float32
    assert answers == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_trajectories_of_another_half_precision_than_autocasts(solver, x0):
    x0 = x0.to(torch.float16)
    options = {"steps": 2, "solver": solver, "return_info": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample(lambda x, t: -x, x0, **options)
    expected = sample(lambda x, t: -x, x0, **options)
    assert torch.equal(found.trajectory, expected.trajectory)


INTERVAL = Interval(2.3, 0.2, 0.7)
OTHERS = [2.3, Rescaled(2.3), CFGZero(2.3), Projected(2.3, 0.2, 1.0)]


@pytest.mark.parametrize(
    ("solver", "guidance"),
    [(solver, INTERVAL) for solver in [*ALL, "unipc", "sde"]]
    + [(solver, guidance) for guidance in OTHERS for solver in ("dopri5", "unipc")],
    ids=str,
)
def test_the_default_dtype_does_not_matter(solver, guidance, x0):
    def velocity(x, t, shift):
        return (shift - x.sin()) * (1 + t[:, None, None])

    options = {
        "steps": 3, "solver": solver, "guidance_scale": guidance, "return_info": True,
        "condition": {"shift": 1.0}, "uncondition": {"shift": 0.0},
        **({"seed": 1} if solver == "sde" else {}),
    }  # fmt: skip
    for x, default in product((x0, x0.double()), (torch.float64, torch.bfloat16)):
        expected = sample(velocity, x, **options)
        torch.set_default_dtype(default)
        try:
            found = sample(velocity, x, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.trajectory, expected.trajectory)
        assert torch.equal(found.times, expected.times)


@pytest.mark.parametrize("solver", ["dopri5", "curved-euler", "sde", "unipc"])
def test_the_default_device_does_not_matter(solver, x0):
    options = {"steps": 3, "solver": solver, **({"seed": 1} if solver == "sde" else {})}
    expected = sample(Counting(), x0, **options, return_info=True)
    with torch.device("meta"):
        found = sample(Counting(), x0, **options, return_info=True)
        nothing = sample(Counting(), x0[:0], **options, return_info=True)
    assert torch.equal(found.trajectory, expected.trajectory)
    assert torch.equal(torch.as_tensor(found.nfe), torch.as_tensor(expected.nfe))
    if solver == "dopri5":
        assert nothing.nfe.device.type == "cpu"


def test_times_and_shapes_the_velocity_gets(x0):
    seen = []

    def velocity(x, t):
        seen.append((tuple(x.shape), tuple(t.shape), x.dtype, t.dtype, t[0].item()))
        return x

    sample(velocity, x0.double(), steps=2, solver="heun")
    shape, f64 = tuple(x0.shape), torch.float64
    assert seen == [(shape, (5,), f64, f64, t) for t in (0.0, 0.5, 0.5, 1.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_source_has_a_float32_state(dtype, x0):
    """Euler written out: float32 state, the velocity reads and answers in the low precision."""
    seen, x0 = set(), x0.to(dtype)

    def velocity(x, t):
        seen.add((x.dtype, t.dtype))
        return (1 - x) * 0.3

    info = sample(velocity, x0, steps=50, return_info=True)
    state = x0.float()
    for _ in range(50):
        state = state + torch.tensor(1 / 50) * velocity(state.to(dtype), torch.ones(1)).float()
    assert seen == {(dtype, torch.float32)}
    assert info.x.dtype == info.trajectory.dtype == dtype
    torch.testing.assert_close(info.x, state.to(dtype), rtol=0, atol=torch.finfo(dtype).eps)
    # A bfloat16 state would lose the small steps.
    true = 1 + (x0.double() - 1) * math.exp(-0.3)
    assert (info.x.double() - true).abs().max() < 2 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_low_precision_runs_with_every_solver(solver, x0):
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if solver == "dopri5" else {}
    result = sample(Counting(), x0.bfloat16(), steps=100, solver=solver, **tolerances)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact(x0), rtol=0, atol=0.05)


def test_low_precision_velocities_of_a_float32_state(x0):
    result = sample(lambda x, t: (1 - x).bfloat16(), x0, steps=20, solver="heun")
    assert result.dtype == torch.float32
    full = sample(lambda x, t: 1 - x, x0, steps=20, solver="heun")
    torch.testing.assert_close(result, full, rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_strides_do_not_matter(solver):
    x = torch.randn(4, 6, 8, 10)
    plain = sample(Counting(), x[:, :, ::2], steps=3, solver=solver)
    for view in (
        x.to(memory_format=torch.channels_last)[:, :, ::2],
        x.mT.contiguous().mT[:, :, ::2],
    ):
        torch.testing.assert_close(sample(Counting(), view, steps=3, solver=solver), plain)
    expanded = sample(Counting(), torch.ones(1, 3).expand(4, 3), steps=3, solver=solver)
    torch.testing.assert_close(expanded[0], expanded[3])


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_samples_may_be_single_numbers(solver):
    x0 = torch.linspace(-2, 2, 7)
    flat = sample(Counting(), x0, steps=9, solver=solver, guidance_scale=2.0, uncondition={})
    column = sample(
        Counting(), x0[:, None], steps=9, solver=solver, guidance_scale=2.0, uncondition={}
    )
    torch.testing.assert_close(flat, column[:, 0])


@pytest.mark.parametrize("solver", [*(s for s in ALL if s is not JVP), "ab3", "unipc", "fireflow"])
def test_an_answer_overwritten_by_the_next_call_is_an_error(solver, x0):
    """Else both velocities of guidance, or of two stages, would silently be the same."""
    memory = torch.empty(10, 3, 4)

    def overwriting(x, t, shift=0.0):
        return memory[: len(x)].copy_(t[:, None, None] - x + shift)

    message = "velocity: must not overwrite what it returned before"
    for given in ({"guidance_scale": 2.0, "condition": {"shift": 1.0}, "uncondition": {}}, {}):
        if solver in ("euler", "midpoint", "taylor") and not given:
            continue  # each answer is used before the next one
        with pytest.raises(ValueError, match=message):
            sample(overwriting, x0, steps=4, solver=solver, **given)
    if solver in ("euler", "midpoint", "taylor"):
        ours = sample(overwriting, x0, steps=4, solver=solver)
        assert torch.equal(ours, sample(Counting(), x0, steps=4, solver=solver))
    # The same tensor every time is none of that.
    same = torch.ones_like(x0)
    constant = sample(lambda x, t, **_: same, x0, steps=4, solver=solver)
    torch.testing.assert_close(constant, x0 + 1)


def test_compile_compiles_the_velocity(x0, monkeypatch):
    asked = []

    def compiler(function, mode):
        asked.append((function, mode))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    velocity = Counting()
    plain = sample(velocity, x0, steps=2)
    for choice, mode in ((True, None), ("max-autotune", "max-autotune"), ("default", "default")):
        assert torch.equal(sample(velocity, x0, steps=2, compile=choice), plain)
        assert asked.pop() == (velocity, mode)
    sample(velocity, x0, steps=2, compile=False)
    assert asked == []


def test_an_overwritten_output_of_a_compiled_velocity_is_copied(x0, monkeypatch):
    """CUDA graphs answer in the same memory every time; heun needs two answers at once."""
    memory = torch.empty_like(x0)
    monkeypatch.setattr(
        torch, "compile", lambda function, mode: lambda x, t: memory.copy_(function(x, t))
    )
    result = sample(Counting(), x0, steps=3, solver="heun", compile="reduce-overhead")
    assert torch.equal(result, sample(Counting(), x0, steps=3, solver="heun"))


@pytest.mark.parametrize(
    ("velocity", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"shape of x, \(5, 3, 4\); got \(5, 1, 4\)"),
        (lambda x, t: x[:1], ValueError, r"shape of x, \(5, 3, 4\); got \(1, 3, 4\)"),
        (lambda x, t: (x,), TypeError, "must return a tensor; got tuple"),
        (lambda x, t: None, TypeError, "must return a tensor; got NoneType"),
        (lambda x, t: x.double(), TypeError, "float64 only if x is float64"),
        (lambda x, t: x.long(), TypeError, "floating point tensor, of .*; got torch.int64"),
        (lambda x, t: x.to(torch.complex64), TypeError, "got torch.complex64"),
        (lambda x, t: x.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
        (lambda x, t: x.to("meta"), ValueError, "on the device of x, cpu; got meta"),
        (lambda x, t: x.mul_(2), ValueError, "must not write into x"),
        (lambda x, t: x.flatten(1).neg_().view_as(x), ValueError, "must not write into x"),
    ],
)
def test_refused_answers_of_the_velocity(velocity, error, message, x0):
    with pytest.raises(error, match="velocity: " + ".*" + message):
        sample(velocity, x0, steps=2)


@pytest.mark.parametrize("solver", ["dopri5", JVP], ids=str)
def test_refused_answers_of_solvers_that_call_it_in_their_own_way(solver, x0):
    with pytest.raises(ValueError, match="velocity: must not write into x"):
        sample(lambda x, t: x.flatten(1).neg_().view_as(x), x0, steps=2, solver=solver)
    with pytest.raises(TypeError, match=r"velocity: .*float64 only if x is float64"):
        sample(lambda x, t: x.double(), x0, steps=2, solver=solver)
