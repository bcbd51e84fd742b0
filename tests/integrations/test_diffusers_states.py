"""Schedulers changed between calls: assigned and edited schedules, edited configs, copies, inference mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

from diffusers import FlowMatchEulerDiscreteScheduler

from rfkernels.integrations import diffusers as rfd


def walk(scheduler):
    """The states of a run from 0 with outputs 1: the partial sums of the steps."""
    x, states = torch.zeros(1, 2), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones(1, 2), t, x).prev_sample
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
