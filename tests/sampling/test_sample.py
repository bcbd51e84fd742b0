"""sample and invert as a user meets them: counting, results, precision, gradients, errors."""

import math

import pytest
import torch
from torch import nn

from rfkernels.sampling import (
    AB2,
    RK4,
    Dopri5,
    Euler,
    Heun,
    Midpoint,
    Solution,
    Taylor,
    get_solver,
    invert,
    sample,
)
from rfkernels.sampling import field as field_module

# Raised inside torch the first time it differentiates forward.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

JVP = Taylor(derivative="jvp")
FIXED = ["euler", "midpoint", "heun", "rk4", "ab2", "taylor", JVP]
ALL = [*FIXED, "dopri5"]
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1, "taylor": 2}


class Counting:
    """dx/dt = t - x, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, **condition):
        self.calls += 1
        return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) - x


def exact(x0):
    """dx/dt = t - x at t = 1."""
    return (x0 + 1) * math.exp(-1)


@pytest.fixture
def x0():
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("direction", [sample, invert])
@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_nfe_is_the_number_of_calls(solver, direction, guided, x0):
    velocity = Counting()
    guidance = {"guidance_scale": 2.0, "uncondition": {}} if guided else {}
    info = direction(velocity, x0, steps=7, solver=solver, return_info=True, **guidance)
    name = get_solver(solver).name
    expected = (7 * EVALUATIONS[name] + (name == "ab2")) * (2 if guided else 1)
    assert info.nfe == velocity.calls == expected


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_every_solver_solves(solver, x0):
    result = sample(Counting(), x0, steps=400, solver=solver)
    assert result.shape == x0.shape
    torch.testing.assert_close(result, exact(x0), rtol=0, atol=4e-3)


@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_each_move_is_one_kernel_call(solver, x0, monkeypatch):
    moves = []
    for name in ("euler_step", "taylor_step", "linear_step"):
        original = getattr(field_module, name)

        def spy(*args, original=original, name=name, **kwargs):
            moves.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(field_module, name, spy)
    expected = {
        "euler": ["euler_step"] * 3,
        "midpoint": ["euler_step"] * 6,
        "heun": ["euler_step", "linear_step"] * 3,
        "rk4": ["euler_step", "euler_step", "euler_step", "linear_step"] * 3,
        "ab2": ["euler_step", "euler_step", "linear_step", "linear_step"],
        "taylor": ["taylor_step"] * 3 if solver is JVP else ["euler_step"] * 6,
    }
    sample(Counting(), x0, steps=3, solver=solver)
    assert moves == expected[get_solver(solver).name]
    if solver == "euler":
        moves.clear()
        sample(Counting(), x0, steps=3, guidance_scale=2.0, uncondition={})
        assert moves == ["euler_step"] * 3


@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("direction", [sample, invert])
def test_the_info_of_a_run(solver, direction, x0):
    info = direction(Counting(), x0, steps=4, solver=solver, return_info=True)
    times = torch.linspace(0, 1, 5)
    assert torch.equal(info.times, times if direction is sample else times.flip(0))
    assert info.trajectory.shape == (5, *x0.shape)
    assert torch.equal(info.trajectory[0], x0)
    assert torch.equal(info.trajectory[-1], info.x)
    assert torch.equal(info.x, direction(Counting(), x0, steps=4, solver=solver))
    before = info.trajectory.clone()
    info.x.zero_()
    x0.zero_()
    assert torch.equal(info.trajectory, before)


@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_the_trajectory_passes_the_states_of_shorter_runs(solver, x0):
    """The states at t_i are the results of runs that stop there; ab2 only looks back."""
    grid = [0.0, 0.1, 0.4, 1.0]
    info = sample(Counting(), x0, grid=grid, solver=solver, return_info=True)
    for index in (1, 2):
        part = sample(Counting(), x0, grid=grid[: index + 1], solver=solver)
        assert torch.equal(info.trajectory[index], part)


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


def test_a_module_with_conditions_keeps_no_graph():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 4)
            self.layer = nn.Linear(5, 4)

        def forward(self, x, t, label, scale=1.0):
            return self.layer(torch.cat([x + scale * self.table(label), t[:, None]], dim=1))

    network, x0, label = Network(), torch.randn(6, 4), torch.arange(6) % 3
    result = sample(network, x0, steps=3, condition={"label": label, "scale": 0.5})
    assert not result.requires_grad
    assert torch.is_grad_enabled()
    row = sample(network, x0[2:3], steps=3, condition={"label": label[2:3], "scale": 0.5})
    torch.testing.assert_close(result[2:3], row)
    adaptive = sample(network, x0, solver="dopri5", condition={"label": label, "scale": 0.5})
    fine = sample(network, x0, steps=500, solver="rk4", condition={"label": label, "scale": 0.5})
    torch.testing.assert_close(adaptive, fine, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_gradients_when_an_argument_asks_for_them(solver):
    x0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def velocity(x, t, bias):
        return x.sin() * t[:, None] + bias

    def run(x0, scale):
        return sample(
            velocity, x0, steps=2, solver=solver, guidance_scale=scale,
            condition={"bias": 1.0}, uncondition={"bias": -0.5},
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (x0, scale))
    assert not run(x0.detach(), scale.detach()).requires_grad
    with torch.no_grad():
        assert not run(x0, scale).requires_grad


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_torch_func_differentiates_the_whole_run(solver):
    """dx/dt = t - x is linear: every element is multiplied by the same number."""
    x0 = torch.randn(3, 2, dtype=torch.float64)

    def run(x):
        return sample(Counting(), x, steps=3, solver=solver)

    factor = (run(x0 + 1) - run(x0)).mean()
    _, forward = torch.func.jvp(run, (x0,), (torch.ones_like(x0),))
    reverse = torch.func.grad(lambda x: run(x).sum())(x0)
    tolerance = 1e-4 if solver == "dopri5" else 1e-9
    for gradient in (forward, reverse):
        torch.testing.assert_close(gradient, factor.expand(3, 2), rtol=0, atol=tolerance)


def test_inference_mode(x0):
    with torch.inference_mode():
        for solver in ALL:
            result = sample(Counting(), x0 * 1, steps=100, solver=solver)
            torch.testing.assert_close(result, exact(x0), rtol=0, atol=2e-2)


def test_the_loop_of_fixed_steps_reads_nothing_from_the_device():
    """A meta tensor has no values to read: a host synchronisation would raise."""
    x0 = torch.empty(4, 3, device="meta", dtype=torch.bfloat16)
    scale = torch.empty(4, device="meta")
    for solver in ("euler", "midpoint", "heun", "rk4", "ab2", "taylor"):
        info = sample(
            lambda x, t: x * t[:, None], x0, steps=3, solver=solver, guidance_scale=scale,
            uncondition={}, return_info=True,
        )  # fmt: skip
        assert info.x.is_meta
        assert info.x.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_nothing_to_sample(shape, solver):
    velocity = Counting()
    info = sample(velocity, torch.empty(shape), steps=3, solver=solver, return_info=True)
    assert info.x.shape == shape
    assert info.trajectory.shape == (4, *shape)
    assert velocity.calls == 0
    assert (
        info.nfe == 0 if solver == "heun" else torch.equal(info.nfe, torch.zeros(shape[0]).long())
    )


@pytest.mark.parametrize("solver", FIXED, ids=str)
def test_a_not_a_number_stays_in_its_row(solver, x0):
    x0[1, 0, 0] = math.nan
    result = sample(Counting(), x0, steps=2, solver=solver)
    assert result[1, 0, 0].isnan()
    assert result[[0, 2, 3, 4]].isfinite().all()


def test_the_callback_gets_step_time_and_state(x0):
    seen = []
    info = sample(
        Counting(), x0, steps=4, callback=lambda *given: seen.append(given), return_info=True
    )
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    for index, t, x in seen:
        assert torch.equal(t, torch.full((5,), (index + 1) / 4))
        assert torch.equal(x, info.trajectory[index + 1])


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_the_progress_bar_is_on_standard_error(solver, x0, capsys):
    sample(Counting(), x0, steps=5, solver=solver, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"sample ({solver})" in captured.err
    assert "100%" in captured.err
    invert(Counting(), x0, steps=5)
    assert capsys.readouterr().err == ""


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


def test_solvers_by_name_and_object(x0):
    pairs = {
        "euler": Euler(), "midpoint": Midpoint(), "heun": Heun(), "rk4": RK4(), "ab2": AB2(),
        "taylor": Taylor(), "dopri5": Dopri5(),
    }  # fmt: skip
    for name, solver in pairs.items():
        assert get_solver(name) == solver
        assert get_solver(solver) is solver
        by_name = sample(Counting(), x0, steps=3, solver=name)
        assert torch.equal(by_name, sample(Counting(), x0, steps=3, solver=solver))


def test_a_solver_of_ones_own(x0):
    class Leap:
        name, adaptive = "leap", False

        def integrate(self, field, x0, run):
            state = field.start(x0)
            velocity = field(state, field.time(run.times[0], state))
            end = field.advance(state.x, [(run.times[-1] - run.times[0], velocity)])
            return Solution(end.model_input, field.calls, None)

    assert torch.equal(
        sample(Counting(), x0, steps=9, solver=Leap()), sample(Counting(), x0, steps=1)
    )


REFUSED = [
    ({"steps": 0}, ValueError, "sample: steps must be at least 1; got 0"),
    ({"steps": -3}, ValueError, "at least 1; got -3"),
    ({"steps": 2.0}, TypeError, "steps must be an integer; got float"),
    ({"steps": True}, TypeError, "steps must be an integer; got bool"),
    ({"steps": None}, ValueError, "steps must be given with solver 'euler'"),
    ({"solver": "eulr"}, ValueError, "euler, midpoint, heun, rk4, ab2, taylor, dopri5, .*; got 'eulr'"),
    ({"solver": Heun}, TypeError, r"such as Heun\(\)"),
    ({"solver": 3}, TypeError, "integrate; got int"),
    ({"rtol": 1e-3}, ValueError, "'euler' takes fixed steps; got rtol=0.001"),
    ({"seed": 3}, ValueError, "solver 'euler' draws no noise; got 3"),
    ({"seed": 0, "solver": "dopri5"}, ValueError, "draws no noise; got 0"),
    ({"t_start": 0.5, "t_end": 0.5}, ValueError, "0 <= t_start < t_end <= 1"),
    ({"t_start": -0.1}, ValueError, "0 <= t_start"),
    ({"t_end": 1.1}, ValueError, "t_end <= 1"),
    ({"t_end": math.nan}, ValueError, "t_end <= 1"),
    ({"t_end": "1"}, TypeError, "t_end must be a number"),
    ({"guidance_scale": 2.0}, ValueError, "uncondition must be given with guidance_scale"),
    ({"guidance_scale": True, "uncondition": {}}, TypeError, "guidance_scale must be a number"),
    ({"guidance_scale": "7", "uncondition": {}}, TypeError, "guidance_scale must be a number"),
    ({"guidance_scale": math.inf, "uncondition": {}}, ValueError, "must be finite"),
    ({"guidance_scale": torch.ones(4), "uncondition": {}}, ValueError, r"\(5,\) tensor; got shape"),
    ({"condition": [1]}, TypeError, "condition must be a dict"),
    ({"uncondition": 3}, TypeError, "uncondition must be a dict"),
    ({"callback": 3}, TypeError, "callback must be callable"),
    ({"compile": "fast"}, ValueError, "compile must be None, True or one of default"),
    ({"stepz": 3}, TypeError, "unexpected keyword argument 'stepz'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused_arguments(arguments, error, message, x0):
    velocity = Counting()
    with pytest.raises(error, match=message):
        sample(velocity, x0, **{"steps": 2, **arguments})
    assert velocity.calls == 0


def test_errors_name_the_function_that_was_called(x0):
    with pytest.raises(ValueError, match="invert: steps must be at least 1"):
        invert(Counting(), x0, steps=0)
    with pytest.raises(TypeError, match="invert: x1 must be a tensor"):
        invert(Counting(), None, steps=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x0 must be a tensor; got list"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "x0 must be float32.*int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "x0 must be float32.*complex64"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "strided tensor; got layout torch.sparse_coo"),
        (torch.zeros(()), ValueError, "batch dimension"),
    ],
)
def test_refused_sources(x, error, message):
    with pytest.raises(error, match=message):
        sample(Counting(), x, steps=1)


@pytest.mark.parametrize("solver", ["euler", "dopri5", JVP], ids=str)
@pytest.mark.parametrize(
    ("velocity", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"shape of x, \(5, 3, 4\); got \(5, 1, 4\)"),
        (lambda x, t: x[:1], ValueError, r"shape of x, \(5, 3, 4\); got \(1, 3, 4\)"),
        (lambda x, t: (x,), TypeError, "must return a tensor; got tuple"),
        (lambda x, t: None, TypeError, "must return a tensor; got NoneType"),
        (lambda x, t: x.double(), TypeError, "float64 only if x is float64"),
        (lambda x, t: x.long(), TypeError, "floating point tensor; got torch.int64"),
        (lambda x, t: x.to("meta"), ValueError, "on the device of x, cpu; got meta"),
        (lambda x, t: x.mul_(2), ValueError, "must not write into x"),
        (lambda x, t: x.flatten(1).neg_().view_as(x), ValueError, "must not write into x"),
    ],
)
def test_refused_answers_of_the_velocity(solver, velocity, error, message, x0):
    with pytest.raises(error, match="velocity: " + ".*" + message):
        sample(velocity, x0, steps=2, solver=solver)


def test_something_else_than_a_velocity(x0):
    with pytest.raises(TypeError, match=r"sample: velocity must be callable as velocity\(x, t"):
        sample(x0, x0, steps=1)


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"order": 4}, {"derivative": "exact"}], ids=lambda o: str(o)
)
def test_refused_taylor(options):
    with pytest.raises(ValueError, match="Taylor: "):
        Taylor(**options)
