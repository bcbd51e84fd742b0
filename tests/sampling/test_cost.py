"""What a run does outside the network: one kernel call a stage, nothing read from the device, and every
sample as if it were alone."""

from collections import Counter

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
    get_solver,
    sample,
)

ONE = [
    "euler",
    "midpoint",
    "heun",
    "rk4",
    "ab2",
    "ab3",
    "taylor",
    Taylor(order=3),
    Taylor(look_ahead=0.1),
]
ONE += ["fireflow", "uni-inv", "dpm++", DPMSolver(3), "unipc", UniPC(3), "curved-euler", "rf++"]
NOISY = ["ancestral", "sde", SDE(noisy_end=False), "renoise"]
SHAPE = (4, 3, 5, 5)
STEPS = 5


def name_of(value):
    return value if isinstance(value, str) else repr(value)


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

    def __call__(self, x, t, shift=0.0):
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


@pytest.mark.parametrize("solver", ONE + NOISY, ids=name_of)
def test_one_kernel_call_a_stage(solver):
    kernels, others, calls = watched(solver)
    assert kernels == calls >= STEPS
    assert others == []


GUIDED = {"condition": {"shift": 0.5}, "uncondition": {}}


@pytest.mark.parametrize(
    "scale", [3.0, torch.tensor([1.0, 2.0, 0.0, 4.0])], ids=["one", "per sample"]
)
@pytest.mark.parametrize("solver", ONE + NOISY, ids=name_of)
def test_guidance_is_in_the_same_call(solver, scale):
    kernels, others, calls = watched(solver, guidance_scale=scale, **GUIDED)
    stages = calls // 2
    # Only UniPC of order 3 needs more tensors than a kernel sums: it guides each velocity first.
    assert kernels == stages * (2 if solver == UniPC(3) else 1)
    assert others == []


@pytest.mark.parametrize(
    "guidance",
    [
        *(Rescaled(3.0), CFGZero(3.0), Projected(3.0, norm_threshold=2.0)),
        *(Projected(3.0, momentum=-0.5), Interval(3.0, 0.0, 1.0)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("solver", ONE + NOISY, ids=name_of)
def test_other_guidance_updates_by_one_call_too(solver, guidance):
    kernels, others, calls = watched(solver, guidance_scale=guidance, **GUIDED)
    found = get_solver(solver)
    # More than eight tensors in one update: then each velocity is guided first, by one more call.
    crowded = found.evaluations * guidance.tensors + found.tensors > 8
    extra = int(crowded) + int(guidance.remembers)  # momentum keeps a tensor
    assert kernels == (1 + extra) * (calls // 2)
    assert isinstance(guidance, Interval) == (others == [])  # the others read both for their sums


CROWDED = {
    "Projected()": ["rk4", "ab3", "DPMSolver(3)", "unipc", "UniPC(3)"],
    "Projected(momentum)": ["rk4", "ab3", "dpm++", "DPMSolver(3)", "unipc", "UniPC(3)"],
    "a number": ["UniPC(3)"],
}


def test_which_solvers_need_a_call_more():
    """As docs/samplers.md says."""
    solvers = [*SOLVERS, DPMSolver(3), UniPC(3), Taylor(order=3)]
    for tensors, names in zip((3, 4, 2), CROWDED.values(), strict=True):
        crowded = [
            solver if isinstance(solver, str) else f"{type(solver).__name__}({solver.order})"
            for solver in solvers
            if not (found := get_solver(solver)).adaptive
            and found.evaluations * tensors + found.tensors > 8
        ]
        assert sorted(crowded) == sorted(names)


@pytest.mark.parametrize("guidance", [None, 3.0, torch.tensor([1.0, 2.0, 0.0, 4.0])], ids=str)
@pytest.mark.parametrize(
    "solver", [s for s in ONE + NOISY if s != UniPC(3)] + ["flow-map"], ids=name_of
)
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


@pytest.mark.parametrize("solver", [*ONE, *NOISY, "flow-map"], ids=name_of)
@pytest.mark.parametrize(
    "guidance",
    [
        *(3.0, CFGZero(3.0, zero_steps=1), Rescaled(2.0), Interval(Projected(2.0), 0.2, 0.8)),
        *(Projected(2.0, norm_threshold=1.0, momentum=-0.5), torch.empty(4, device="meta")),
    ],
    ids=lambda g: "a tensor" if isinstance(g, torch.Tensor) else repr(g),
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
    "guidance",
    [None, 3.0, Rescaled(3.0), CFGZero(3.0, 1), Projected(3.0, norm_threshold=1.0, momentum=-0.5)],
    ids=repr,
)
@pytest.mark.parametrize("solver", [*ONE, *NOISY, "dopri5"], ids=name_of)
def test_each_sample_is_what_it_would_be_alone_to_the_bit(solver, guidance):
    if solver == "dopri5" and getattr(guidance, "remembers", False):
        pytest.skip("momentum needs fixed steps")
    x0 = torch.randn(7, 3, 37, generator=torch.Generator().manual_seed(1))
    seeds = torch.arange(11, 18)

    def pointwise(x, t, shift=0.0):
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
@pytest.mark.parametrize("solver", [*ONE, *NOISY, "dopri5", "flow-map"], ids=name_of)
def test_a_run_repeats_to_the_bit_on_any_number_of_threads(solver, guidance):
    x0 = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(1))

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
