"""What a run does outside the network: one kernel call a stage, nothing read from the device, and every
sample as if it were alone."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfkernels.sampling import (
    SDE,
    SOLVERS,
    CFGZero,
    DPMSolver,
    Interval,
    Projected,
    Rescaled,
    Taylor,
    UniPC,
    sample,
)

NOISY = ["ancestral", "sde", SDE(noisy_end=False), "renoise"]
# Every solver with fixed steps; the test of the guide's list below checks that none is missing.
EVERY = ["euler", "midpoint", "heun", "rk4", "ab2", "ab3", "taylor", Taylor(order=3)]
EVERY += [Taylor(look_ahead=0.1), "fireflow", "uni-inv", "dpm++", DPMSolver(3), "unipc", UniPC(3)]
EVERY += ["curved-euler", "rf++", "flow-map", *NOISY]
SHAPE = (4, 3, 5, 5)
STEPS = 5
SCALES = torch.tensor([1.0, 2.0, 0.0, 4.0])


def name_of(value):
    if isinstance(value, (DPMSolver, UniPC)):
        return f"{type(value).__name__}({value.order})"  # as the guide writes them
    return "per sample" if isinstance(value, torch.Tensor) else str(value)


def every_solver_and_every_guidance(solvers, few, guidances):
    """Cases of a test: each solver with the first kind of guidance, and each other kind with a few solvers."""
    cases = [(solver, guidances[0]) for solver in solvers]
    cases += [(solver, guidance) for guidance in guidances[1:] for solver in few]
    return pytest.mark.parametrize(("solver", "guidance"), cases, ids=name_of)


def seed_for(solver):
    return {"seed": 3} if solver in NOISY else {}


class Watch(TorchDispatchMode):
    """Counts kernel calls and collects other operations on tensors as large as the state, outside of the
    network; refuses reads of single values anywhere."""

    def __init__(self):
        super().__init__()
        self.kernels, self.others, self.network = 0, [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert "_local_scalar_dense" not in name
        result = function(*args, **(kwargs or {}))
        if not self.network and isinstance(result, torch.Tensor) and result.numel() == 300:
            if name.startswith("rfkernels."):
                self.kernels += 1
            elif not any(word in name for word in ("view", "detach", "alias")):
                self.others.append(name)
        return result


class Network:
    """dx/dt = t - x (1 + shift), whose inside is none of the watch's business."""

    def __init__(self, watch):
        self.watch, self.calls = watch, 0

    def __call__(self, x, t, shift=0.0, span=None):
        self.watch.network, self.calls = True, self.calls + 1
        v = t[:, None, None, None] - x * (1 + shift)
        self.watch.network = False
        return v


def watched(solver, **options):
    """(kernel calls, other operations of that size, calls of the network)."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    watch = Watch()
    network = Network(watch)
    with torch.no_grad(), watch:
        sample(network, x0, steps=STEPS, solver=solver, **seed_for(solver), **options)
    return watch.kernels, watch.others, network.calls


GUIDED = {"condition": {"shift": 0.5}, "uncondition": {}}
# Where the sum of an update has more than eight tensors, each velocity is guided first, by a call more.
CROWDED = {
    "guidance": {"UniPC(3)"},
    "Projected": {"rk4", "ab3", "DPMSolver(3)", "unipc"},
    "Projected with momentum": {"dpm++"},
}


def crowded_under(guidance):
    """The names of those solvers."""
    kinds = [] if guidance is None else ["guidance"]
    if isinstance(guidance, Projected):
        kinds += ["Projected", "Projected with momentum"][: 2 if guidance.momentum else 1]
    return set().union(*(CROWDED[kind] for kind in kinds))


def test_the_guide_lists_the_solvers_that_need_a_call_more():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    sentence = re.search(
        r"a call sums eight tensors at most, so (.*) under guidance, and (.*) under `Projected` "
        r"\(with momentum (.*) too\), guide each velocity first",
        " ".join(page.split()),
    )
    listed = [set(re.findall("`(.+?)`", names)) for names in sentence.groups()]
    assert listed == list(CROWDED.values())
    assert set(SOLVERS) - {"dopri5"} <= set(EVERY)
    assert set().union(*listed) <= {name_of(solver) for solver in EVERY}


@pytest.mark.parametrize(
    "guidance",
    [
        *(None, 3.0, SCALES, Interval(3.0, 0.0, 1.0), Rescaled(3.0), CFGZero(3.0)),
        *(Projected(3.0, norm_threshold=2.0), Projected(3.0, momentum=-0.5)),
    ],
    ids=name_of,
)
def test_every_solver_updates_by_one_kernel_call_a_stage(guidance):
    """Guidance is in it; the kinds that need sums over a sample read both velocities for those alone."""
    sums = isinstance(guidance, (Rescaled, CFGZero, Projected))
    found, expected = {}, {}
    for solver in EVERY:
        given = {} if guidance is None else {"guidance_scale": guidance, **GUIDED}
        kernels, others, calls = watched(solver, **given)
        stages = calls if guidance is None else calls // 2
        assert stages >= STEPS
        found[name_of(solver)] = kernels / stages, others != []
        crowded = name_of(solver) in crowded_under(guidance)
        memory = getattr(guidance, "momentum", 0.0) != 0  # a tensor of its own
        expected[name_of(solver)] = 1 + crowded + memory, sums
    assert found == expected


@pytest.mark.parametrize("guidance", [None, 3.0, SCALES], ids=name_of)
@pytest.mark.parametrize("solver", ["rk4", "ab3", "fireflow", "unipc", "sde", "flow-map"])
def test_the_networks_low_precision_input_is_written_by_the_same_call(solver, guidance):
    """No operation of torch's touches tensors of the state's size but the first conversion of x0; the
    profiler sees those, and the kernels called directly take no part of it."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    answer, other = torch.ones_like(x0), torch.zeros_like(x0)
    seen = []

    def network(x, t, v=answer, span=None):
        seen.append(x.dtype)
        return v  # no operation of its own

    given = {} if guidance is None else {"condition": {}, "uncondition": {"v": other}}
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        sample(
            network, x0, steps=STEPS, solver=solver, guidance_scale=guidance, **given,
            **seed_for(solver),
        )  # fmt: skip
    touched = Counter(event.name for event in profile.events() if list(SHAPE) in event.input_shapes)
    stages = len(seen) // (1 if guidance is None else 2)
    # A state and a copy for each stage, both uninitialised memory.
    assert touched.pop("aten::empty_like") == 2 * stages
    for name in ("aten::detach", "detach", "aten::to", "aten::_to_copy", "aten::copy_"):
        assert touched.pop(name, 1) == 1
    assert not touched
    assert set(seen) == {torch.bfloat16}


def test_an_interval_calls_the_unconditional_network_inside_only():
    _, _, calls = watched("euler", guidance_scale=Interval(3.0, 0.2, 0.6), **GUIDED)
    assert calls == STEPS + 3  # at 0.2, 0.4 and 0.6


def test_a_trajectory_costs_lagged_solvers_the_states_they_do_not_need():
    kernels, _, calls = watched("fireflow", return_info=True)
    assert (calls, kernels) == (STEPS + 1, 2 * STEPS)


@every_solver_and_every_guidance(
    EVERY,
    ["rk4", "unipc", "sde"],
    [
        Projected(2.0, norm_threshold=1.0, momentum=-0.5),
        *(3.0, CFGZero(3.0, zero_steps=1), Rescaled(2.0), Interval(Projected(2.0), 0.2, 0.8)),
        torch.empty(4, device="meta"),
    ],
)
def test_nothing_has_values_to_read(solver, guidance):
    """A meta tensor has none: reading one would raise."""
    x0 = torch.empty(4, 3, device="meta", dtype=torch.bfloat16)
    seeds = {"seed": torch.empty(4, dtype=torch.int64, device="meta")} if solver in NOISY else {}
    info = sample(
        lambda x, t, span=None: x * t[:, None], x0, steps=3, solver=solver,
        guidance_scale=guidance, uncondition={}, return_info=True, **seeds,
    )  # fmt: skip
    assert info.x.is_meta
    assert info.x.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("solver", "guidance"),
    [
        (solver, guidance)
        for guidance in (
            *(None, 3.0, Rescaled(3.0), CFGZero(3.0, 1)),
            Projected(3.0, norm_threshold=1.0, momentum=-0.5),
        )
        # Momentum needs fixed steps.
        for solver in (EVERY if isinstance(guidance, Projected) else [*EVERY, "dopri5"])
    ],
    ids=name_of,
)
def test_each_sample_is_what_it_would_be_alone_to_the_bit(solver, guidance):
    x0 = torch.randn(7, 3, 37, generator=torch.Generator().manual_seed(1))
    seeds = torch.arange(11, 18)

    def pointwise(x, t, shift=0.0, span=None):
        return (t[:, None, None] - x) * (1.5 + shift) + shift

    def run(rows):
        noise = {"seed": seeds[rows]} if solver in NOISY else {}
        return sample(
            pointwise, x0[rows], steps=4, solver=solver, guidance_scale=guidance,
            condition={"shift": 0.25}, uncondition={}, **noise,
        )  # fmt: skip

    together = run(slice(None))
    for row in (0, 4, 6):
        assert torch.equal(run(slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize("guidance", [None, Rescaled(3.0)], ids=repr)
@pytest.mark.parametrize("solver", ["rk4", "ab3", "taylor", "unipc", "sde", "dopri5"])
def test_a_run_repeats_to_the_bit_on_any_number_of_threads(solver, guidance):
    """54,000 elements: kernels of less than 32,768 run on one thread, and torch's do."""
    x0 = torch.randn(5, 3, 60, 60, generator=torch.Generator().manual_seed(1))

    def pointwise(x, t, shift=0.0, span=None):
        return (t[:, None, None, None] - x) * 1.5 + shift

    def run():
        return sample(
            pointwise, x0, steps=3, solver=solver, guidance_scale=guidance,
            condition={"shift": 0.25}, uncondition={}, **seed_for(solver),
        )  # fmt: skip

    one = run()
    assert torch.equal(run(), one)
    torch.set_num_threads(3)
    try:
        assert torch.equal(run(), one)
    finally:
        torch.set_num_threads(1)
