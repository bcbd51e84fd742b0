"""Where our schedulers call the network, what they refuse, and that no step reads a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

import diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers_cases import CLASSES, RULES, cls_of, made
from torch.utils._python_dispatch import TorchDispatchMode

from rfkernels.integrations import diffusers as rfd


def test_layouts():
    for name, times, levels in (
        ("Euler", [1000, 500], [1, 0.5, 0]),
        ("Heun", [1000, 500, 500], [1, 0.5, 0.5, 0]),
        ("Midpoint", [1000, 750, 500, 250], [1, 0.75, 0.5, 0.25, 0]),
        ("FireFlow", [1000, 750, 250], [1, 0.75, 0.25, 0]),
        ("Multistep", [1000, 500], [1, 0.5, 0]),
    ):
        scheduler = cls_of(name)()
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        assert scheduler.timesteps.tolist() == times
        assert scheduler.sigmas.tolist() == levels
        assert scheduler.order == 1  # pipelines that give levels count entries
        scheduler.set_timesteps(2)
        assert scheduler.order == (2 if name in ("Heun", "Midpoint") else 1)
    for count in (1, 10, 1000):
        apart = rfd.RFMidpointScheduler(count)
        apart.set_timesteps(sigmas=[1.0, 0.5], timesteps=[0.9 * count, 0.1 * count])
        assert apart.timesteps.tolist() == pytest.approx([c * count for c in (0.9, 0.5, 0.1, 0.05)])


@pytest.mark.parametrize("name", CLASSES)
@settings(derandomize=True, deadline=None, database=None, max_examples=15)
@given(
    steps=st.integers(2, 60),
    count=st.sampled_from([100, 1000, 5000]),
    shift=st.floats(0.2, 12.0),
    mu=st.floats(0.2, 2.0),
    grid=st.sampled_from(["flow-match", "unipc", "dpm++"]),
    options=st.sets(
        st.sampled_from(
            ["use_dynamic_shifting", "single_shift", "invert_sigmas", "use_beta_sigmas"]
        )
    ),
    terminal=st.sampled_from([None, 0.05]),
)
def test_schedules_run_one_way(name, steps, count, shift, mu, grid, options, terminal):
    if grid != "flow-match":
        options -= {"invert_sigmas", "use_beta_sigmas"}
    scheduler = cls_of(name)(
        count,
        shift,
        grid=grid,
        shift_terminal=terminal if grid != "dpm++" else None,
        **dict.fromkeys(options, True),
    )
    scheduler.set_timesteps(steps, mu=mu)
    levels, times = scheduler.sigmas.double(), scheduler.timesteps.double()
    if "invert_sigmas" in options:
        levels, times = 1 - levels, count - times
    calls = {"Heun": 2 * steps - 1, "Midpoint": 2 * steps, "FireFlow": steps + 1}.get(name, steps)
    assert (len(times), len(levels)) == (calls, calls + 1)
    assert (levels.diff() <= 0).all()
    assert levels[0] == pytest.approx(1 - 1 / count if grid == "dpm++" else 1, abs=5 / count)
    assert levels[-1] == 0
    assert (times - count * levels[:-1]).abs().max() < 1e-5 * count


@pytest.mark.parametrize("name", ["Heun", "Midpoint", "FireFlow", "Multistep"])
def test_what_cannot_be_is_refused(name):
    x = torch.zeros(1, 2)
    scheduler = cls_of(name)()
    with pytest.raises(ValueError, match="set_timesteps must come first"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not its index"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="stochastic_sampling must be False"):
        cls_of(name)(stochastic_sampling=True)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(IndexError):
        scheduler.step(x, t, x)


@pytest.mark.parametrize("name", ["Heun", "FireFlow", "Multistep"])
def test_an_output_that_overwrites_a_kept_one_is_noticed(name):
    scheduler = cls_of(name)()
    scheduler.set_timesteps(4)
    memory, x = torch.ones(1, 3), torch.ones(1, 3)
    scheduler.step(memory.view(1, 3), scheduler.timesteps[0], x)
    with pytest.raises(RuntimeError, match="clone the network's output"):
        scheduler.step(memory.view(1, 3), scheduler.timesteps[1], x)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[:3]:  # the same tensor, as of a constant field, is no such case
        scheduler.step(memory, t, x)
    with pytest.raises(RuntimeError, match="clone the network's output"):  # if nobody writes to it
        scheduler.step(memory.mul_(2), scheduler.timesteps[3], x)


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the host, and allocations by op."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RULES)
def test_steps_read_nothing(name):
    scheduler = made(name, shift=3.0)
    x = torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    times = list(scheduler.timesteps)
    with Reads() as counted:
        for i, t in enumerate(times):
            x = scheduler.step(torch.cos(x + i), t, x).prev_sample
    assert counted.reads == 0
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    with Reads() as counted:
        theirs.scale_noise(torch.randn(4, 3), theirs.timesteps[[1, 5, 7, 9]], torch.randn(4, 3))
    assert counted.reads == 8  # the mode does see what it looks for
    ours = made(name)
    with Reads() as counted:
        ours.scale_noise(torch.randn(4, 3), ours.timesteps[[1, 5, 7, 9]], torch.randn(4, 3))
    assert counted.reads == 0


@pytest.mark.parametrize("name", RULES)
def test_on_a_device_that_cannot_be_read(name):
    """The meta device has no numbers: whatever asked for one would fail."""
    scheduler = made(name, shift=3.0)
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.sigmas.device.type == scheduler.timesteps.device.type == "meta"
    scheduler.set_begin_index(0)
    x = torch.empty(2, 4, 8, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta"
    table = made(name)
    t = torch.empty(2, device="meta")
    assert table.scale_noise(x, t, torch.empty_like(x)).shape == x.shape
    if name == "Euler":
        tokens = torch.empty(2, 6, 4, device="meta")
        scheduler.set_timesteps(5, device="meta")
        scheduler.set_begin_index(0)
        t = scheduler.timesteps[0]
        times = torch.empty(2, 6, device="meta")
        found = scheduler.step(tokens, t, tokens, per_token_timesteps=times).prev_sample
        assert found.shape == tokens.shape


def test_assigned_and_changed_schedules():
    scheduler = rfd.RFEulerScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2)
    scheduler.sigmas = torch.tensor([1.0, 0.25, 0.0])
    scheduler.timesteps = torch.tensor([1000.0, 250.0])
    assert scheduler.step(x, 250.0, 0 * x).prev_sample.tolist() == [[-0.25, -0.25]]
    scheduler.set_timesteps(4)
    scheduler.sigmas, scheduler.timesteps = np.asarray([1.0, 0.5, 0.0]), [1000.0, 500.0]
    assert scheduler.step(x, scheduler.timesteps[1], 0 * x).prev_sample.tolist() == [[-0.5, -0.5]]
    scheduler.set_timesteps(4)
    scheduler.sigmas[1] = 0.5
    scheduler.timesteps[1] = 777.0
    assert scheduler.step(x, 777.0, 0 * x).prev_sample[0, 0] == scheduler.sigmas[2] - 0.5
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        scheduler.sigmas = scheduler.sigmas.clone()
        assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape == x.shape


def test_gradients_pass():
    scheduler = rfd.RFMultistepScheduler()
    scheduler.set_timesteps(3)
    x = torch.ones(1, 2, requires_grad=True)
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(y.sin(), t, y).prev_sample
    y.sum().backward()
    assert x.grad.abs().min() > 0
