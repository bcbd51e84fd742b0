"""Schedulers changed between calls: assigned and edited schedules, edited configs, copies, inference mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers_cases import RULES, made

from rfkernels.integrations import diffusers as rfd


def walk(scheduler, dtype=torch.float32, begin=0):
    """The states of a run from 0 with outputs 1: the partial sums of the steps."""
    x, output, states = torch.zeros(1, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype), []
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(output, t, x).prev_sample
        states.append(x[0, 0].item())
    return states


def beside(act):
    """What `act` makes of diffusers' scheduler and of ours."""
    return act(FlowMatchEulerDiscreteScheduler), act(rfd.RFEulerScheduler)


def pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_copies_have_the_edits(copied, earlier):
    """A copy of a tensor counts its changes anew, so counts alone do not tell what was read."""

    def act(cls):
        scheduler = cls()
        scheduler.set_timesteps(4)
        for _ in range(earlier):
            scheduler.sigmas[0] = 1.0
        walk(scheduler)
        scheduler.sigmas[-1] = 0.5
        scheduler.timesteps[2] = 300.0
        scheduler._step_index = None
        made = copied(scheduler)
        return walk(made), made.index_for_timestep(300.0)

    theirs, ours = beside(act)
    assert ours == theirs


def test_edits_in_inference_mode_count():
    """As Cosmos does it, which ends the run at the last level but one."""

    def act(cls):
        scheduler = cls()
        with torch.inference_mode():
            scheduler.set_timesteps(4)
            scheduler.sigmas[-1] = scheduler.sigmas[-2]
            return walk(copy.deepcopy(scheduler))

    theirs, ours = beside(act)
    assert ours == theirs
    assert ours[-1] == ours[-2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_levels_of_any_dtype(dtype):
    def act(cls):
        scheduler = cls(shift=3.0)
        scheduler.set_timesteps(7)
        scheduler.sigmas = scheduler.sigmas.to(dtype)
        return walk(scheduler)

    theirs, ours = beside(act)
    assert ours == theirs


@pytest.mark.parametrize("name", RULES)
@settings(derandomize=True, deadline=None, database=None, max_examples=15)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9),
    st.sampled_from([None, "first", "last", "assigned"]),
    st.integers(0, 17),
)
def test_a_constant_field_leads_to_the_levels_there_are(name, levels, edit, begin):
    """With output 1 every state is sigma - sigma_0 by any rule; levels in any order, some twice, and edited; from any
    entry."""
    scheduler = made(name)
    if name in ("dpm++", "unipc"):  # whose weights are huge on the way up to 1
        levels.sort(reverse=True)
    scheduler.set_timesteps(sigmas=levels)
    if edit == "last":
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
    elif edit == "first":
        scheduler.sigmas[0] *= 0.9
    elif edit == "assigned":
        scheduler.sigmas = scheduler.sigmas / 2 + 0.1
    begin %= len(scheduler.timesteps)
    scheduler.set_begin_index(begin)
    states = walk(scheduler, torch.float64, begin)
    levels = scheduler.sigmas.double()[begin:]
    assert states == pytest.approx((levels[1:] - levels[0]).tolist(), abs=2e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_within_a_run_go_on_alone(name, copied):
    """Two runs take turns, one of them from a copy made after every call."""
    grid = {"dpm++": "dpm++", "unipc": "unipc"}.get(name, "flow-match")
    scheduler, x = made(name, shift=2.0, grid=grid), torch.linspace(-1, 1, 6).reshape(2, 3)
    scheduler.set_timesteps(5)
    alone = copy.deepcopy(scheduler)
    state = other = expected = x
    for t in scheduler.timesteps:
        expected = alone.step(expected.cos(), t, expected).prev_sample
        state = scheduler.step(state.cos(), t, state).prev_sample
        branch, scheduler = scheduler, copied(scheduler)
        if len(scheduler.timesteps) > scheduler.step_index:
            other = branch.step(state.sin(), t, state).prev_sample  # of no effect on the copy
    assert torch.equal(state, expected)
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("name", RULES)
def test_the_transforms_of_torch_func_pass(name):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)

    def end(x):
        scheduler = made(name)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x).prev_sample
        return x

    leaf = x.clone().requires_grad_()
    end(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: end(x).sum())(x), leaf.grad)
    tangent = torch.func.jvp(end, (x,), (torch.ones_like(x),))[
        1
    ]  # the field acts on every element alone
    torch.testing.assert_close(tangent, leaf.grad)
    torch.testing.assert_close(torch.func.vmap(end)(x), end(x))


@pytest.mark.parametrize("begin", [None, 2])
@pytest.mark.parametrize("name", RULES)
def test_loops_that_reset_the_index_begin_anew(name, begin):
    """As scripts do that lay out one schedule for many samples, after a run to the end and after one that was left."""
    scheduler, x = made(name), torch.linspace(-1, 1, 6).reshape(2, 3)
    scheduler.set_timesteps(5)
    if begin is not None:
        scheduler.set_begin_index(begin)
    results = []
    for length in (9, 1, 9):
        state, scheduler._step_index = x, None
        for t in scheduler.timesteps[begin:][:length]:
            state = scheduler.step(state.cos(), t, state).prev_sample
        results.append(state)
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("other", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_changed_state_is_gone_on_from(other):
    """As inpainting and callbacks do it. diffusers' UniPC corrects from the state before and so loses the change."""
    theirs = getattr(diffusers, other)(use_flow_sigmas=True, prediction_type="flow_prediction")
    ours, change, results = rfd.RFMultistepScheduler.from_config(theirs.config), 0.5, []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
        x = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
        for i, t in enumerate(scheduler.timesteps[:4]):
            x = scheduler.step(torch.cos(x + i), t, x + change * (i == 3)).prev_sample
        results.append(x)
    expected = results[0]
    if other.startswith("UniPC"):
        expected = expected + ours.sigmas[4] / ours.sigmas[3] * change
    torch.testing.assert_close(results[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "before", "after"),
    [
        ("use_dynamic_shifting", True, False),
        ("invert_sigmas", False, True),
        ("shift_terminal", None, 0.1),
        ("time_shift_type", "exponential", "linear"),
        ("stochastic_sampling", False, True),
    ],
)
def test_edits_of_the_config_count(field, before, after):
    """diffusers reads its config by attribute, and so do we."""

    def act(cls):
        scheduler = cls(**{"use_dynamic_shifting": True, field: before})
        setattr(scheduler.config, field, after)
        scheduler.set_timesteps(5, mu=0.7)
        torch.manual_seed(0)
        return scheduler.timesteps.tolist(), walk(scheduler)

    theirs, ours = beside(act)
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)


@pytest.mark.parametrize("other", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_edits_of_a_flow_shift_count(other):
    theirs = getattr(diffusers, other)(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    for edit in (
        lambda scheduler: setattr(scheduler.config, "flow_shift", 8.0),
        lambda scheduler: scheduler.register_to_config(flow_shift=5.0),
    ):
        ours = rfd.RFMidpointScheduler.from_config(theirs.config)
        for scheduler in (theirs, ours):
            edit(scheduler)
            scheduler.set_timesteps(5)
        assert torch.equal(ours.sigmas[::2], theirs.sigmas)
        assert ours.shift == theirs.config.flow_shift
        ours.set_shift(2.0)
        assert ours.shift == 2.0
    # A flow_shift that an earlier scheduler left is not one.
    straight = diffusers.FlowMatchEulerDiscreteScheduler.from_config(theirs.config, shift=4.0)
    assert rfd.RFMultistepScheduler.from_config(straight.config, grid="unipc").shift == 4.0


def test_compiled_steps_see_edits():
    """One graph for Euler's step, as in diffusers; a compiled step reads the levels as they are now."""

    def act(cls):
        torch._dynamo.reset()
        scheduler = cls()
        step = torch.compile(scheduler.step, backend="eager", fullgraph=True)
        ends = []
        for end in (0.0, 0.25):
            scheduler.set_timesteps(4)
            scheduler.set_begin_index(0)
            scheduler.sigmas[-1] = end
            x = torch.ones(1, 2)
            for t in scheduler.timesteps:
                x = step(x.sin(), t, x, return_dict=False)[0]
            ends.append(x)
        return torch.cat(ends)

    theirs, ours = beside(act)
    assert torch.equal(ours, theirs)
    assert not torch.equal(*ours)


@pytest.mark.parametrize("name", ["Heun", "Midpoint", "dpm++", "unipc"])
def test_steps_whose_calls_are_compiled_in_part(name):
    """Dynamo makes symbols of levels that change, and stops to compile after some calls; what a compiled call kept serves
    the next."""
    torch._dynamo.reset()
    scheduler, ends = made(name, shift=2.0), []
    for step in (scheduler.step, torch.compile(scheduler.step, backend="eager")):
        for n in (4, 3):
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(0)
            x = torch.linspace(-1, 1, 6)
            for t in scheduler.timesteps:
                x = step(x.sin(), t, x, return_dict=False)[0]
            ends.append(x)
    torch.testing.assert_close(ends[2:], ends[:2])


def test_heun_with_noise_in_some_calls():
    """The second call ends what the first began, whatever its own arguments are."""

    def act(cls):
        scheduler = cls(shift=2.0)
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        generator = torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            churn = (3.0, 0.0, -0.3)[i % 3]
            x = scheduler.step(x.sin(), t, x, s_churn=churn, generator=generator).prev_sample
        return x

    theirs, ours = (
        act(cls) for cls in (diffusers.FlowMatchHeunDiscreteScheduler, rfd.RFHeunScheduler)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    inverted = rfd.RFHeunScheduler(invert_sigmas=True)  # from sigma 0, where nothing is added
    inverted.set_timesteps(4)
    x = torch.ones(1, 2)
    assert inverted.step(x, inverted.timesteps[0], 0 * x, s_churn=2.0).prev_sample.isfinite().all()


def test_the_default_device_is_not_asked():
    """As set by torch.device("meta") or set_default_device("cuda"): schedules are made on the CPU all the same."""

    def act(cls):
        x = torch.ones(3, 2)
        with torch.device("meta"):
            scheduler = cls(shift=3.0)
            noisy = scheduler.scale_noise(x, scheduler.timesteps[[3, 500, 999]], 2 * x)
            scheduler.set_timesteps(4)
            x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
        return torch.cat([noisy, x]), scheduler.sigmas

    theirs, ours = beside(act)
    assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_times_of_noise_on_another_device(count):
    scheduler, x = rfd.RFEulerScheduler(), torch.ones(3, 2, device="meta")
    noisy = scheduler.scale_noise(x, scheduler.timesteps[:count], x)
    assert (noisy.device, noisy.shape) == (x.device, x.shape)


def test_times_of_noise_in_any_shape():
    def act(cls):
        scheduler, x = cls(shift=3.0), torch.ones(3, 2, 2)
        times = scheduler.timesteps[[3, 500, 999]]
        return torch.cat([scheduler.scale_noise(x, t, 2 * x) for t in (times, times[:, None])])

    theirs, ours = beside(act)
    assert torch.equal(ours, theirs)
