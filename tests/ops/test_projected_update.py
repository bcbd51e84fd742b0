"""AdamP and SGDP steps on every backend and level, against the authors' package in float64 and the written formulas."""

# ruff: noqa: B023  (the closures run before the loop goes on)
from __future__ import annotations

import math
import warnings

import pytest
import torch
from cells import CELLS, FAST_CELLS, NATIVE_CPU, Cell, reference, same_bits
from hypothesis import given
from hypothesis import strategies as st
from tensors import LAYOUTS, laid_out, normal, shapes
from tolerances import BF16, DTYPES, F16, F32, F64, UNIT, compute

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason
from rfkernels.ops.projected_update import projected_update

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of old packages at import
    adamp = pytest.importorskip("adamp")

RULES = ("adamp", "sgdp")
KINDS = ("any", "rows", "layer")
SMALL = [(3, 7), (2, 3, 2, 2), (5,), ()]
SHAPES = [*SMALL, (64, 520), (3, 5001), (70, 9), (1, 9001), (7, 1), (40, 1030), (2, 16500), (3, 0), (0, 4)]  # fmt: skip


def gradient(w: torch.Tensor, kind: str, key: int) -> torch.Tensor:
    """float64: any, without a part along w in every row, or in the whole."""
    g = normal(*w.shape, dtype=F64, key=key)
    if kind == "any" or w.ndim < 2 or w.numel() == 0:
        return g
    w = w.detach().double()
    rows = (w.shape[0], -1) if kind == "rows" else (1, -1)
    a, b = g.reshape(rows), w.reshape(rows)
    return (a - b * ((a * b).sum(1, keepdim=True) / (b * b).sum(1, keepdim=True))).reshape(w.shape)


class Problem:
    """Parameters with their state; ``step`` moves them."""

    def __init__(self, rule, shapes_, dtype=F32, device="cpu", layout="contiguous", **options):
        self.rule, self.options = rule, options
        make = lambda shape, key: laid_out(normal(*shape, key=key).to(dtype), layout).to(device)  # noqa: E731
        self.weights = [make(shape, k) for k, shape in enumerate(shapes_)]
        state = [torch.zeros_like(w, dtype=compute(dtype)) for w in self.weights]
        self.first = state
        adam = rule == "adamp"
        self.second = [torch.zeros_like(s) for s in state] if adam else []
        self.steps = [torch.zeros((), device=device) for _ in state] if adam else []

    def step(self, grads, **more):
        device = self.weights[0].device
        projected_update(
            self.weights, [g.to(device) for g in grads], self.first, self.second, self.steps, rule=self.rule,
            **self.options, **more,
        )  # fmt: skip

    def tensors(self):
        return [*self.weights, *self.first, *self.second, *self.steps]


def options_of(rule: str, nesterov: bool, decay: float) -> dict:
    options = {"lr": 0.02, "nesterov": nesterov, "weight_decay": decay}
    return options | ({"betas": (0.9, 0.99)} if rule == "adamp" else {"momentum": 0.9})


def package(rule: str, weights, **options):
    """The authors' optimizer on copies of the weights."""
    parameters = [torch.nn.Parameter(w.detach().cpu().clone()) for w in weights]
    return parameters, {"adamp": adamp.AdamP, "sgdp": adamp.SGDP}[rule](parameters, **options)


def follows_the_package(cell: Cell | None, rule, kind, nesterov, decay, dtype, shapes_, steps):
    options = options_of(rule, nesterov, decay)
    device = "cpu" if cell is None else cell.device
    ours = Problem(rule, shapes_, dtype, device, **options)
    theirs, optimizer = package(rule, ours.weights, **options)
    for t in range(steps):
        for k, p in enumerate(theirs):
            p.grad = gradient(p, kind, 100 * t + k).to(dtype)
        grads = [p.grad for p in theirs]
        optimizer.step()
        call = lambda grads=grads: ours.step(grads)  # noqa: E731
        reference(call) if cell is None else cell.run("projected_update", call)
    bound = 1e-12 if dtype == F64 else 1e-6
    for w, p in zip(ours.weights, theirs, strict=True):
        torch.testing.assert_close(w.cpu(), p.detach(), rtol=bound, atol=bound)
    names = {"adamp": ("exp_avg", "exp_avg_sq"), "sgdp": ("momentum",)}[rule]
    for name, moments in zip(names, (ours.first, ours.second), strict=False):
        for m, p in zip(moments, theirs, strict=True):
            torch.testing.assert_close(m.cpu(), optimizer.state[p][name], rtol=bound, atol=bound)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_reference_follows_the_package(rule, dtype):
    for kind in KINDS:
        for nesterov, decay in ((False, 0.0), (True, 0.1)):
            follows_the_package(None, rule, kind, nesterov, decay, dtype, SMALL, 8)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_every_cell_follows_the_package(cell: Cell, rule, dtype):
    slow = cell.interpreted
    # Without empty tensors: the package fails on them.
    shapes_ = SMALL if slow else [s for s in SHAPES if 0 not in s]
    for kind in KINDS:
        ways = ((False, 0.1), (True, 0.0))
        for nesterov, decay in ways[kind == "layer" :][:1] if slow else ways:
            follows_the_package(cell, rule, kind, nesterov, decay, dtype, shapes_, 2 if slow else 6)


@pytest.mark.parametrize("cell", FAST_CELLS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_in_every_dtype_and_layout(cell: Cell, rule, dtype):
    # Against the reference from the same state: moments to the bit, weights to a few roundings.
    for n, layout in enumerate((*LAYOUTS, "channels last")):
        for kind in KINDS:
            options = options_of(rule, n % 2 == 0, 0.1)
            shapes_ = [(4, 6, 3, 3), (9, 520), (33,), (2, 4099)]
            expected = Problem(rule, shapes_, dtype, **options)
            if layout == "channels last":
                actual = Problem(rule, shapes_, dtype, cell.device, **options)
                actual.weights[0] = actual.weights[0].to(memory_format=torch.channels_last)
                actual.first[0] = torch.zeros_like(actual.weights[0], dtype=compute(dtype))
            else:
                actual = Problem(rule, shapes_, dtype, cell.device, layout, **options)
            for t in range(2):
                grads = [gradient(w, kind, 9 * t + k).to(dtype) for k, w in enumerate(expected.weights)]  # fmt: skip
                reference(lambda grads=grads: expected.step(grads))
                cell.run("projected_update", lambda grads=grads: actual.step(grads))
                projecting = rule == "sgdp" and n % 2  # the update is the buffer
                for a, e in zip(actual.first + actual.second, expected.first + expected.second, strict=True):  # fmt: skip
                    if projecting or t:
                        torch.testing.assert_close(a.cpu(), e, rtol=2e-6, atol=2e-6)
                    else:
                        same_bits(a, e, (str(cell), layout))
                for a, e in zip(actual.weights, expected.weights, strict=True):
                    bound = 2 * UNIT[dtype] + 64 * UNIT[compute(dtype)]
                    torch.testing.assert_close(a.cpu(), e, rtol=bound, atol=bound)
                # From equal states again: a rounding of a 16-bit weight is no error of the next step.
                for a, e in zip(actual.tensors(), expected.tensors(), strict=True):
                    a.copy_(e)


@given(st.data())
def test_levels_threads_and_backends_agree(data):
    rule = data.draw(st.sampled_from(RULES))
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes_ = data.draw(st.lists(shapes(limit=3000), min_size=1, max_size=4))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=4, max_size=4))
    options = options_of(rule, data.draw(st.booleans()), data.draw(st.sampled_from((0.0, 0.1))))
    layout = data.draw(st.sampled_from(LAYOUTS))
    found = []
    for cell in NATIVE_CPU:
        problem = Problem(rule, shapes_, dtype, layout=layout, **options)
        for t in range(2):
            grads = [
                gradient(w, kind, 7 * t + k).to(dtype)
                for k, (w, kind) in enumerate(zip(problem.weights, kinds * 2, strict=False))
            ]
            cell.run("projected_update", lambda p=problem, g=grads: p.step(g))
        found.append(problem.tensors())
    for tensors in found[1:]:
        for a, e in zip(tensors, found[0], strict=True):
            same_bits(a, e)


@pytest.mark.parametrize("rule", RULES)
def test_threads_do_not_change_a_bit(threads, rule):
    # Fewer rows than threads, long rows, many small parameters and a large one.
    shapes_ = [(2, 40_000), (300, 300), *[(16, 40)] * 30, (3, 20_000), (50_001,)]
    for kind in KINDS:
        expected = None
        start = [normal(*shape, key=k) for k, shape in enumerate(shapes_)]
        grads = [gradient(w, kind, k).float() for k, w in enumerate(start)]
        for cell, count in ((NATIVE_CPU[0], 1), (NATIVE_CPU[-1], 2), (NATIVE_CPU[-1], 3)):
            threads(count)
            problem = Problem(rule, shapes_, **options_of(rule, False, 0.1))
            cell.run("projected_update", lambda p=problem, g=grads: p.step(g))
            expected = expected or problem.tensors()
            for a, e in zip(problem.tensors(), expected, strict=True):
                same_bits(a, e)


@pytest.mark.parametrize("cell", FAST_CELLS)
def test_the_projected_update_has_nothing_along_the_weight(cell: Cell):
    # Row-invariant loss, no decay: |w|^2 grows by |step|^2 and no more.
    for dtype, bound in ((F64, 1e-7), (F32, 2e-6)):
        problem = Problem("adamp", [(8, 48), (5, 700)], dtype, cell.device, lr=0.05)
        for t in range(4):
            before = [w.clone() for w in problem.weights]
            grads = [gradient(w.cpu(), "rows", 5 * t + k).to(dtype) for k, w in enumerate(before)]
            cell.run("projected_update", lambda g=grads: problem.step(g))
            for w, old in zip(problem.weights, before, strict=True):
                w, old = w.double(), old.double()
                move = w - old
                along = (move * old).sum(1).abs() / (move.norm(dim=1) * old.norm(dim=1))
                assert along.max() <= bound
                grown = old.square().sum(1) + move.square().sum(1)
                torch.testing.assert_close(w.square().sum(1), grown, rtol=bound, atol=0.0)


@pytest.mark.parametrize("cell", FAST_CELLS)
def test_averages_move_in_the_same_pass(cell: Cell):
    for dtype, other in ((F32, F32), (BF16, F32), (F16, F16), (F64, F64), (F32, BF16)):
        shapes_ = [(4, 300), (3, 5), (7,)]
        problem = Problem("adamp", shapes_, dtype, cell.device, lr=0.1, average_decay=0.9)
        averages = [normal(*s, key=50 + k).to(cell.device, other) for k, s in enumerate(shapes_)]
        averages[1] = None
        old = [None if a is None else a.to(compute(dtype), copy=True) for a in averages]
        grads = [gradient(w.cpu(), "rows", k).to(dtype) for k, w in enumerate(problem.weights)]
        cell.run("projected_update", lambda p=problem, g=grads, a=averages: p.step(g, averages=a))
        for a, e, w in zip(averages, old, problem.weights, strict=True):
            if a is not None:
                w = w.to(e.dtype)
                expected = (e + torch.tensor(1.0 - 0.9, dtype=F64).to(e.dtype) * (w - e)).to(other)
                same_bits(a, expected, (dtype, other))


@pytest.mark.parametrize("cell", FAST_CELLS)
@pytest.mark.parametrize("rule", RULES)
def test_two_phases_give_what_one_call_gives(cell: Cell, rule):
    seen = []
    for kind in KINDS:
        shapes_ = [(6, 40), (3, 5000), (9,)]
        one, two = (Problem(rule, shapes_, F32, cell.device, **options_of(rule, True, 0.1)) for _ in range(2))  # fmt: skip
        grads = [gradient(w.cpu(), kind, k).float() for k, w in enumerate(one.weights)]
        cell.run("projected_update", lambda p=one, g=grads: p.step(g))
        cell.run("projected_update", lambda p=two, g=grads: p.step(g, reduce=seen.append))
        for a, e in zip(two.tensors(), one.tensors(), strict=True):
            same_bits(a, e)
    w, g = normal(6, 40, key=0).double(), gradient(normal(6, 40, key=0), "any", 0)
    expected = [(g * w).sum(), (g * g).sum(), (w * w).sum()]
    torch.testing.assert_close(seen[0][0, 1:4].cpu(), torch.stack(expected), rtol=1e-5, atol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(g, w, dim=1).abs().max()
    torch.testing.assert_close(seen[0][0, 0].cpu(), cosines, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("cell", FAST_CELLS)
@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_in_its_row_and_empty_tensors_pass(cell: Cell, rule):
    problem = Problem(rule, [(4, 600), (3, 0), (0, 4), (5,)], F32, cell.device, lr=0.1)
    grads = [gradient(w.cpu(), "rows", k).float() for k, w in enumerate(problem.weights)]
    grads[0][2, 17] = math.nan
    grads[3][1] = math.inf
    cell.run("projected_update", lambda: problem.step(grads))
    assert problem.weights[0].isfinite().all(1).tolist() == [True, True, False, True]
    assert problem.weights[0].isnan().sum() == 1  # not projected: by elements
    assert problem.weights[3].isfinite().sum() == 4
    assert all(s == 1.0 for s in problem.steps)


def test_learning_rates_in_tensors():
    for cell in NATIVE_CPU:
        grads = [gradient(normal(4, 60), "rows", 1).float()]
        given = [Problem("adamp", [(4, 60)], lr=0.25) for _ in range(3)]
        for problem, lr in zip(given, (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=F64)), strict=True):  # fmt: skip
            problem.options = {"lr": lr}
            cell.run("projected_update", lambda p=problem: p.step(grads))
            same_bits(problem.weights[0], given[0].weights[0])


def test_written_weights_are_marked():
    w = torch.nn.Parameter(normal(3, 5))
    loss = (w * w).sum()
    problem = Problem("sgdp", [(3, 5)], lr=0.1)
    problem.weights = [w]
    problem.step([normal(3, 5, key=1)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arguments(rule="adamp"):
    """Of the registered op."""
    problem = Problem(rule, [(4, 30), (7,)])
    grads = [gradient(w, "rows", k).float() for k, w in enumerate(problem.weights)]
    averages = [torch.zeros(4, 30)]
    return (
        problem.weights, grads, problem.first, problem.second, problem.steps, averages, [True, False], [True, False],
        0.1, None, rule, False, 0.9, 0.99, 1e-8, 0.01, 0.1, 0.1, 0.9,
    )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    torch.library.opcheck(torch.ops.rfkernels.projected_update.default, arguments(rule))


def test_compiles_into_a_whole_graph():
    torch._dynamo.reset()
    eager, traced = (Problem("adamp", [(4, 30), (7,)], lr=0.1) for _ in range(2))
    grads = [gradient(w, "rows", k).float() for k, w in enumerate(eager.weights)]
    compiled = torch.compile(lambda g: traced.step(g), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        eager.step(grads)
        compiled(grads)
    for a, e in zip(traced.tensors(), eager.tensors(), strict=True):
        same_bits(a, e)


def test_the_registered_op_is_the_same_step():
    given, problem = arguments(), Problem("adamp", [(4, 30), (7,)])
    problem.options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01, "average_decay": 0.9}
    average = torch.zeros(4, 30)
    problem.step(given[1], averages=[average, None])
    torch.ops.rfkernels.projected_update(*given)
    found = [*given[0], *given[2], *given[4], *given[5]]
    wanted = [*problem.weights, *problem.first, *problem.steps, average]
    for a, e in zip(found, wanted, strict=True):
        same_bits(a, e)


BAD = [
    (ValueError, "rule must be one of adamp, sgdp; got 'adam'", {"rule": "adam"}),
    (ValueError, r"lr must be at least 0; got -1", {"lr": -1}),
    (TypeError, "lr must be a number; got '1'", {"lr": "1"}),
    (ValueError, r"lr must be a number or one in a floating point tensor", {"lr": torch.zeros(2)}),
    (ValueError, r"betas\[1\] must be in \[0, 1\); got 1.0", {"betas": (0.9, 1.0)}),
    (ValueError, "eps must be positive; got 0", {"eps": 0}),
    (ValueError, "average_decay must be in", {"average_decay": 1.5}),
    (TypeError, "delta must be a number; got True", {"delta": True}),
    (ValueError, "projected must have 1 entries; got 2", {"projected": [True, False]}),
    (ValueError, "averages must have 1 entries, one per weight; got 2", {"averages": [None] * 2}),
    (ValueError, r"averages\[0\] must be a torch.float32 tensor of shape \(3, 5\)", {"averages": [torch.zeros(5)]}),
    (ValueError, r"grads\[0\] must be a torch.float32 tensor .*; got a torch.float64", {"grads": [normal(3, 5, dtype=F64)]}),
    (ValueError, r"steps\[0\] must be a 0-d float32 tensor", {"steps": [torch.zeros(1)]}),
    (TypeError, r"grads\[0\] must be a strided tensor", {"grads": [torch.zeros(3, 5).to_sparse()]}),
    (TypeError, r"weights\[0\] must be float32", {"weights": [torch.zeros(3, 5, dtype=torch.int32)]}),
    (ValueError, "second and steps must be empty for sgdp", {"rule": "sgdp"}),
    (ValueError, "momentum must not be 1 with weight", {"rule": "sgdp", "momentum": 1.0, "weight_decay": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "text", "change"), BAD, ids=[b[1][:40] for b in BAD])
def test_wrong_arguments_are_refused_and_nothing_is_written(error, text, change):
    keys = {"weights": [normal(3, 5)], "grads": [normal(3, 5, key=1)], "first": [torch.zeros(3, 5)]}
    keys |= {"second": [torch.zeros(3, 5)], "steps": [torch.zeros(())], "lr": 0.1}
    before = keys["weights"][0].clone()
    weights = keys["weights"][0]
    with pytest.raises(error, match=text):
        projected_update(**keys | change)
    same_bits(weights, before)
    assert keys["steps"][0] == 0.0


def test_the_extension_takes_no_layout_on_trust():
    _C = pytest.importorskip("rfkernels._C")
    state = [torch.zeros(4, 6)], [torch.zeros(4, 6)], [torch.zeros(())], [], [True], [0]
    numbers = (0, False, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.1, 0.0)
    plain, gaps = torch.zeros(4, 6), torch.zeros(4, 12)[:, ::2]
    turned = plain.T.contiguous().T
    for weight, grad in ((gaps, gaps), (plain, gaps), (turned, plain), (plain, torch.zeros(6, 4))):
        with pytest.raises(ValueError, match=r"projected_update: (weights|grads|first)\[0\] must"):
            _C.projected_update([weight], [grad], *state, numbers, 0, 0, 0)
    with pytest.raises(ValueError, match="one entry per weight"):
        _C.projected_update([plain], [], *state, numbers, 0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_no_synchronisation_and_graphs_on_cuda(backend):
    if unavailable_reason(backend, "cuda", "projected_update"):
        pytest.skip(f"{backend} does not serve CUDA here")
    shapes_ = [(64, 300), (5, 5000), (33,)]
    rates = (torch.tensor(0.03125, device="cuda"), 0.03125)
    eager, captured = (Problem("adamp", shapes_, F32, "cuda", lr=lr) for lr in rates)
    grads = [gradient(w.cpu(), "rows", k).float().cuda() for k, w in enumerate(eager.weights)]
    with rf.use_backend(backend):
        eager.step(grads)
        captured.step(grads)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                eager.step(grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step(grads)
        for _ in range(3):
            graph.replay()
    for a, e in zip(captured.tensors(), eager.tensors(), strict=True):
        same_bits(a, e)
