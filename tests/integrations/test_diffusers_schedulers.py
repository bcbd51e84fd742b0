"""Our diffusers schedulers beside diffusers' own: the same schedules, steps and errors, to the bit where promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffusers.utils import logging
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rfkernels.integrations import diffusers as rfd

FIELDS = [
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "time_shift_type",
    "stochastic_sampling",
]


@pytest.fixture(autouse=True)
def _quiet():
    """diffusers warns of explicit timesteps through its log."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@st.composite
def configs(draw):
    config = {
        "num_train_timesteps": draw(st.sampled_from([1000, 250])),
        "shift": draw(st.floats(0.2, 12.0)),
        "use_dynamic_shifting": draw(st.booleans()),
        "invert_sigmas": draw(st.booleans()),
        "shift_terminal": draw(st.sampled_from([None, 0.02, 0.1])),
        "time_shift_type": draw(st.sampled_from(["exponential", "linear"])),
    }
    resampling = draw(st.sampled_from([None, "karras", "exponential", "beta"]))
    if resampling is not None:
        config[f"use_{resampling}_sigmas"] = True
    return config


@st.composite
def schedules(draw):
    """Arguments of set_timesteps."""
    n = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["steps", "sigmas", "timesteps", "both"]))
    arguments = {"mu": draw(st.floats(0.3, 1.5))}
    levels = sorted(
        draw(st.lists(st.floats(0.01, 1.0), min_size=n, max_size=n, unique=True)), reverse=True
    )
    if kind == "steps":
        return arguments | {"num_inference_steps": n}
    if kind in ("sigmas", "both"):
        arguments["sigmas"] = levels
    if kind in ("timesteps", "both"):
        arguments["timesteps"] = levels  # of num_train_timesteps
    return arguments


def pair(config):
    return FlowMatchEulerDiscreteScheduler(**config), rfd.RFEulerScheduler(**config)


def state(scheduler):
    return (
        scheduler.sigmas,
        scheduler.timesteps,
        scheduler.step_index,
        scheduler.begin_index,
        scheduler.sigma_min,
        scheduler.sigma_max,
        scheduler.shift,
        len(scheduler),
    )


def assert_same_state(ours, theirs):
    for found, expected in zip(state(ours), state(theirs), strict=True):
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype
            assert found.device == expected.device
            assert torch.equal(found, expected)
        else:
            assert found == expected


@settings(max_examples=200, deadline=None)
@given(configs(), schedules())
def test_schedules_are_diffusers_to_the_bit(config, arguments):
    theirs, ours = pair(config)
    assert_same_state(ours, theirs)
    if "timesteps" in arguments:
        count = config["num_train_timesteps"]
        arguments = arguments | {"timesteps": [count * level for level in arguments["timesteps"]]}
    with np.errstate(all="ignore"):  # a terminal stretch of one level divides by zero, in both
        theirs.set_timesteps(**arguments)
        assume(bool(torch.isfinite(theirs.sigmas).all()))
        ours.set_timesteps(**arguments)
    assert_same_state(ours, theirs)
    assert ours.num_inference_steps == theirs.num_inference_steps


def test_fields_and_their_order():
    import inspect

    theirs = list(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.values())
    ours = list(inspect.signature(rfd.RFEulerScheduler.__init__).parameters.values())
    assert [p.name for p in theirs[1:]] == FIELDS
    assert [(p.name, p.default) for p in ours[1:15]] == [(p.name, p.default) for p in theirs[1:]]
    euler = (rfd.RFEulerScheduler, FlowMatchEulerDiscreteScheduler)
    heun = (rfd.RFHeunScheduler, FlowMatchHeunDiscreteScheduler)
    methods = [name for name, method in vars(euler[1]).items() if inspect.isfunction(method)]
    called = [(*euler, name) for name in methods if name[0] != "_"] + [(*heun, "step")]
    assert len(called) > 7
    for *classes, name in called:
        ours, theirs = (
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(cls, name)).parameters.values()
            ]
            for cls in classes
        )
        assert ours == theirs
    assert rfd.RFEulerScheduler.order == 1
    # Pipelines branch on these.
    made = rfd.RFEulerScheduler()
    for name in ("init_noise_sigma", "add_noise", "betas"):
        assert not hasattr(made, name)


def walk(scheduler, x, outputs, **options):
    """Every state of a run with given network outputs."""
    states = []
    for t, v in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(v, t, x, return_dict=False, **options)[0]
        states.append(x)
    return states


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 8), st.booleans())
def test_float32_steps_are_diffusers_to_the_bit(config, n, begin):
    config["shift_terminal"] = None
    theirs, ours = pair(config)
    outputs = [normal(i, 2, 3, 4, 5) for i in range(n)]
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(n, mu=0.8)
        if begin:
            scheduler.set_begin_index(0)
    x = normal(99, 2, 3, 4, 5)
    for found, expected in zip(walk(ours, x, outputs), walk(theirs, x, outputs), strict=True):
        assert torch.equal(found, expected)
    assert ours.step_index == theirs.step_index == n
    with pytest.raises(IndexError):
        ours.step(outputs[0], ours.timesteps[0], x)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("of_state", DTYPES)
@pytest.mark.parametrize("of_output", DTYPES)
def test_dtypes(of_state, of_output):
    theirs, ours = pair({"shift": 3.0})
    exact = rfd.RFEulerScheduler(shift=3.0, bit_exact=True)
    x = normal(0, 2, 16, 32, 32, dtype=of_state)
    v = normal(1, 2, 16, 32, 32, dtype=of_output)
    found = {}
    for name, scheduler in (("theirs", theirs), ("ours", ours), ("exact", exact)):
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(2)
        found[name] = scheduler.step(v, scheduler.timesteps[2], x).prev_sample
        assert found[name].dtype == of_output
    assert torch.equal(found["exact"], found["theirs"])
    dt = (theirs.sigmas[3] - theirs.sigmas[2]).double()
    truth = x.double() + dt * v.double()
    errors = {name: (value.double() - truth).abs().mean() for name, value in found.items()}
    if of_output == torch.float32:
        assert of_state == torch.float64 or torch.equal(found["ours"], found["theirs"])
    else:
        assert errors["ours"] <= errors["theirs"]
    if of_output == torch.float64 and of_state == torch.float64:
        assert errors["ours"] < 1e-15
        assert errors["theirs"] > 1e-9  # it passes through float32
    elif of_output == of_state == torch.bfloat16:
        # one rounding: the nearest bfloat16 to the float32 sum
        nearest = (x.float() + dt.float() * v.float()).bfloat16()
        assert torch.equal(found["ours"], nearest)
        assert 0.8 < (found["ours"] == found["theirs"]).float().mean() < 0.99


@pytest.mark.parametrize("bit_exact", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_stochastic_sampling(bit_exact, per_token):
    theirs, ours = pair({"stochastic_sampling": True, "shift": 2.0})
    ours = rfd.RFEulerScheduler.from_config(ours.config, bit_exact=bit_exact)
    x, outputs = normal(0, 2, 6, 8), [normal(i, 2, 6, 8) for i in range(1, 6)]
    options = (
        {"per_token_timesteps": torch.linspace(100, 900, 12).reshape(2, 6)} if per_token else {}
    )
    runs = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        runs.append(
            walk(scheduler, x, outputs, generator=torch.Generator().manual_seed(3), **options)
        )
    for found, expected in zip(*runs, strict=True):
        assert torch.equal(found, expected) or not bit_exact
        assert (found - expected).abs().max() < 2e-6


def test_lcm_is_stochastic_sampling():
    theirs = FlowMatchLCMScheduler(shift=3.0)
    ours = rfd.RFEulerScheduler.from_config(theirs.config, stochastic_sampling=True, bit_exact=True)
    runs = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        outputs, generator = [normal(i, 2, 6) for i in range(5)], torch.Generator().manual_seed(3)
        runs.append(walk(scheduler, normal(9, 2, 6), outputs, generator=generator))
    assert torch.equal(*map(torch.stack, runs))


@pytest.mark.parametrize("of_output", DTYPES)
def test_times_per_token(of_output):
    theirs, ours = pair({"shift": 3.0})
    if of_output == torch.float64:
        ours = rfd.RFEulerScheduler(shift=3.0, bit_exact=True)
    x, v = normal(0, 2, 9, 8, dtype=of_output), normal(1, 2, 9, 8, dtype=of_output)
    times = torch.tensor([[0.0, 1.0, 40.0, 200.0, 500.0, 750.0, 900.0, 999.0, 1000.0]] * 2)
    for tokens in (times, times[:1]):
        results = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
            results.append(
                scheduler.step(
                    -v, scheduler.timesteps[0], x, per_token_timesteps=tokens, return_dict=False
                )[0]
            )
            assert scheduler.step_index == 1
        assert results[0].dtype == results[1].dtype == torch.promote_types(of_output, torch.float32)
        assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"per_token_timesteps must be \(B, T\)"):
        ours.step(v, ours.timesteps[0], x, per_token_timesteps=times[..., None])


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, None])
def test_errors_are_those_of_diffusers(cls):
    cls = cls or rfd.RFEulerScheduler
    with pytest.raises(ValueError):
        cls(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="time_shift_type"):
        cls(time_shift_type="cubic")
    made = cls()
    with pytest.raises(TypeError):
        made.set_timesteps()
    for arguments in (
        {"sigmas": [1.0, 0.5], "timesteps": [1000.0]},
        {"num_inference_steps": 3, "sigmas": [1.0]},
        {"num_inference_steps": 3, "timesteps": [1000.0]},
    ):
        with pytest.raises(ValueError, match="length"):
            made.set_timesteps(**arguments)
    with pytest.raises(ValueError, match="mu"):
        cls(use_dynamic_shifting=True).set_timesteps(4)
    made.set_timesteps(4)
    x = torch.zeros(1, 2)
    for index in (0, True, torch.tensor(0), torch.tensor(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match=cls.__name__):
            made.step(x, index, x)
    with pytest.raises(IndexError):
        made.step(x, 333.0, x)
    with pytest.raises(IndexError):
        made.index_for_timestep(333.0)
    with pytest.raises(AttributeError):
        made.scale_noise(x, 1000.0, x)
    with pytest.raises(TypeError):
        made.scale_noise(x, made.timesteps[:1], None)
    with pytest.raises(IndexError):
        made.scale_noise(x, torch.tensor([333.0]), x)


def test_beta_sigmas_without_scipy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match="SciPy"):
        rfd.RFEulerScheduler(use_beta_sigmas=True)


def test_times_are_found_despite_rounding():
    ours = rfd.RFEulerScheduler()
    theirs = FlowMatchEulerDiscreteScheduler()
    lost = [t for t in range(1, 1001) if not (theirs.timesteps == t).any()]
    assert lost  # the training table has 254.00002 for 254, and others
    assert [1000 - ours.index_for_timestep(float(t)) for t in range(1, 1001)] == list(
        range(1, 1001)
    )
    for t in (0.0, 0.5, 253.99, 1001.0, math.nan):
        with pytest.raises(IndexError):
            ours.index_for_timestep(t)
    schedule = torch.tensor([900.0, 500.0, 500.0, 500.0, 100.0, 100.0])
    for t in schedule:
        expected = theirs.index_for_timestep(t, schedule)
        assert ours.index_for_timestep(t, schedule) == expected
        assert ours.index_for_timestep(t.item(), schedule) == expected


def test_the_double_shift_and_its_cure():
    """Issue 13243 of diffusers: the last level above 0 is not the one that the constructor laid out."""
    theirs, ours = pair({"shift": 3.0})
    table = ours.sigmas
    once = rfd.RFEulerScheduler(shift=3.0, single_shift=True)
    for scheduler in (theirs, ours, once):
        scheduler.set_timesteps(10)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.sigmas[-2] > 2.9 * table[-1]
    assert once.sigmas[-2] == table[-1]
    assert once.sigmas[0] == 1
    line = np.linspace(1, 1e-3, 10)
    expected = 3 * line / (1 + 2 * line)
    np.testing.assert_allclose(once.sigmas[:-1].numpy(), expected, rtol=1e-6)


def test_explicit_timesteps_by_either_rule():
    """The table of the two versions of diffusers."""
    kept, shifted = (
        rfd.RFEulerScheduler(shift=3.0, explicit_timesteps=r) for r in ("keep", "shift")
    )
    for scheduler, times in ((kept, [1000, 500]), (shifted, [1000, 750])):
        scheduler.set_timesteps(timesteps=[1000, 500])
        assert scheduler.timesteps.tolist() == times
        assert scheduler.sigmas.tolist() == [1, 0.75, 0]
        scheduler.set_timesteps(timesteps=[1000, 500], sigmas=[1.0, 0.25])
        assert scheduler.timesteps.tolist() == [1000, 500]
        assert scheduler.sigmas.tolist() == [1, 0.5, 0]


def test_shift_methods():
    theirs, ours = pair({"shift_terminal": 0.1})
    t = torch.linspace(1, 0.05, 9)
    assert torch.equal(ours.time_shift(0.7, 1.5, t), theirs.time_shift(0.7, 1.5, t))
    assert torch.equal(ours.stretch_shift_to_terminal(t), theirs.stretch_shift_to_terminal(t))
    for scheduler in (theirs, ours):
        scheduler.set_shift(4.0)
        scheduler.set_timesteps(6)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_noise", DTYPES)
def test_scale_noise(dtype, of_noise):
    theirs, ours = pair({"shift": 3.0})
    exact = rfd.RFEulerScheduler(shift=3.0, bit_exact=True)
    x, noise = normal(0, 5, 3, 16, 16, dtype=dtype), normal(1, 5, 3, 16, 16, dtype=of_noise)
    for ready in ("table", "begun", "in a run"):
        results = []
        for scheduler in (theirs, ours, exact):
            if ready != "table":
                scheduler.set_timesteps(9)
                scheduler.set_begin_index(3)
            if ready == "in a run":
                scheduler.step(noise, scheduler.timesteps[3], x)
            for t in (scheduler.timesteps[[0, 4, 2, 8, 4]], scheduler.timesteps[5:6]):
                results.append(scheduler.scale_noise(x, t, noise))
        for a, b, c in zip(results[:2], results[2:4], results[4:], strict=True):
            assert a.dtype == b.dtype == c.dtype
            assert torch.equal(a, c)
            if dtype == of_noise == torch.float32:
                assert torch.equal(a, b)
            assert (a.double() - b.double()).abs().max() < 0.05
    level = theirs.sigmas[4].double()
    truth = level * noise.double() + (1 - level) * x.double()
    theirs_error, ours_error = ((r.double() - truth).abs().mean() for r in (results[0], results[2]))
    assert ours_error <= theirs_error


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("churn", [0.0, 2.0])
def test_heun(shift, churn):
    theirs, ours = FlowMatchHeunDiscreteScheduler(shift=shift), rfd.RFHeunScheduler(shift=shift)
    runs = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
        generator = torch.Generator().manual_seed(0)
        x, states = normal(0, 2, 4, 6, 6), []
        for t in scheduler.timesteps:
            assert scheduler.state_in_first_order == (len(states) % 2 == 0)
            v = torch.cos(3 * t / 1000) * x
            x = scheduler.step(v, t, x, s_churn=churn, s_tmax=0.9, generator=generator).prev_sample
            states.append(x)
        runs.append(states)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.order == theirs.order == 2
    for found, expected in zip(*runs, strict=True):
        assert (found - expected).abs().max() < 5e-6 * expected.abs().max()
    assert ours.index_for_timestep(ours.timesteps[3]) == theirs.index_for_timestep(
        ours.timesteps[3]
    )
