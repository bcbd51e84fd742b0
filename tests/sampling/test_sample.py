"""sample and invert as a user meets them: counting, results, trajectories, gradients, callbacks."""

import math

import pytest
import torch
from sampling_cases import ALL, EVALUATIONS, FIXED, JVP, Counting, exact
from torch import nn

from rfkernels.sampling import Solution, get_solver, invert, sample
from rfkernels.sampling import field as field_module


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
    info.x.add_(0)  # counted as a write into what it shares memory with
    assert all(x._version == 0 for _, _, x in seen)
    for index, t, x in seen:
        assert torch.equal(t, torch.full((5,), (index + 1) / 4))
        assert torch.equal(x, info.trajectory[index + 1])


@pytest.mark.parametrize("solver", [*FIXED, "dopri5", "fireflow", "unipc"], ids=str)
def test_a_callback_that_writes_into_the_state_is_an_error(solver, x0):
    def clamping(index, t, x):
        x.clamp_(-1, 1)

    with pytest.raises(
        ValueError, match=r"callback: must not write into x; got x changed .* step 0"
    ):
        sample(Counting(), x0, steps=3, solver=solver, callback=clamping)


def test_a_callback_may_stop_the_run_and_nothing_is_left_behind(x0):
    class StopIt(Exception):
        pass

    def stop(index, t, x):
        if index == 1:
            raise StopIt

    expected = sample(Counting(), x0, steps=3)
    for solver in ("euler", "fireflow", "dopri5"):
        with pytest.raises(StopIt):
            sample(Counting(), x0, steps=3, solver=solver, callback=stop, progress=True)
    assert torch.is_grad_enabled()
    assert torch.equal(sample(Counting(), x0, steps=3), expected)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_the_progress_bar_is_on_standard_error(solver, x0, capsys):
    sample(Counting(), x0, steps=5, solver=solver, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"sample ({solver})" in captured.err
    assert "100%" in captured.err
    invert(Counting(), x0, steps=5)
    assert capsys.readouterr().err == ""


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
