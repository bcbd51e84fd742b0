"""The editing methods on flows with exact velocities: identities, limits, what they move where, orders, costs.
Their updates step by step are in test_transcriptions.py."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.optimize import linear_sum_assignment

import rfkernels as rf
from rfkernels.editing import FlowEdit, RFEdit, RFInversion, UniEdit, edit, region_mask
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import CFGZero, Projected, reconstruct

LEFT = GaussianMixtureFlow([[-3.0, -1.0], [-3.0, 1.0]], 0.3)
RIGHT = GaussianMixtureFlow([[3.0, -1.0], [3.0, 1.0]], 0.3)
BOTH = GaussianMixtureFlow([[-3.0, -1.0], [-3.0, 1.0], [3.0, -1.0], [3.0, 1.0]], 0.3)
SOURCE, TARGET = {"side": "left"}, {"side": "right"}
EVERY = ("flowedit", "rf-inversion", "uniedit", "rf-edit", "rf-solver", "fireflow")


def velocity(x, t, side=None):
    return {"left": LEFT, "right": RIGHT, None: BOTH}[side](x, t)


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def x1():
    return LEFT.sample(256, seed=0, dtype=torch.float64)


# ---- FlowEdit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "uncondition"),
    [(1.0, None), (3.5, {}), (Projected(4.0, norm_threshold=2.0), {}), (CFGZero(4.0), {})],
)
@pytest.mark.parametrize("n_avg", [1, 3])
def test_flow_edit_to_the_same_prompt_gives_back_every_bit(x1, dtype, scale, uncondition, n_avg):
    x = x1.to(dtype)
    result = edit(
        lambda x, t, side=None: velocity(x.float(), t.float(), side).to(x.dtype),
        x, source=SOURCE, target=dict(SOURCE), method=FlowEdit(n_max=10, n_avg=n_avg), steps=12,
        source_guidance_scale=scale, target_guidance_scale=scale, uncondition=uncondition,
    )  # fmt: skip
    assert torch.equal(result.x, x)
    assert result.x.dtype == dtype
    assert result.nfe == 10 * 2 * n_avg * (1 if uncondition is None else 2)


@pytest.mark.parametrize("method", ["flowedit", "uniedit"])
def test_velocities_that_answer_in_the_same_memory_are_refused(x1, method):
    answer = torch.empty_like(x1)

    def overwriting(x, t, side):
        return answer.copy_(velocity(x, t, side))

    with pytest.raises(ValueError, match="must not overwrite what it returned before"):
        edit(overwriting, x1, source=SOURCE, target=TARGET, method=method, steps=7)


def test_flow_edit_finds_the_optimal_translation():
    x1 = LEFT.sample(500, seed=1)
    result = edit(velocity, x1, source=SOURCE, target=TARGET, method=FlowEdit(n_max=50), steps=50)
    moved = result.x - x1
    error = 5 * result.x.std(0) / math.sqrt(len(x1))
    assert bool(((result.x.mean(0) - torch.tensor([3.0, 0.0])).abs() < error).all())
    assert torch.equal(result.x[:, 1] > 0, x1[:, 1] > 0)  # no row changes
    cost = moved.square().sum(1).mean().item()
    assert cost == pytest.approx(36.0, rel=0.02)  # the translation by (6, 0)
    other = RIGHT.sample(500, seed=2)
    independent = (other - x1).square().sum(1).mean().item()
    assert cost < independent - 1
    pairs = linear_sum_assignment(torch.cdist(x1, result.x).square().numpy())[1]
    best = (result.x[torch.as_tensor(pairs)] - x1).square().sum(1).mean().item()
    assert cost < best + 0.2


def test_flow_edit_draws_what_a_sample_would_draw_alone(x1):
    seeds = torch.tensor([7, 8, 9])
    both, method = {"source": SOURCE, "target": TARGET}, FlowEdit(n_max=6, n_min=1)
    options = {**both, "steps": 6, "method": method}
    together = edit(velocity, x1[:3], seed=seeds, **options).x
    alone = edit(velocity, x1[1:2], seed=seeds[1:2], **options).x
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)
    again = edit(velocity, x1[:3], seed=8, **options).x
    assert rms(again, together) > 1e-3
    assert torch.equal(again, edit(velocity, x1[:3], seed=8, **options).x)


# ---- RF-Inversion


@pytest.mark.parametrize("grid", [None, 3.0, (0.0, 0.2, 0.7, 0.99)])
def test_rf_inversion_ends_where_it_is_steered_to(x1, grid):
    steps = None if isinstance(grid, tuple) else 10
    full = RFInversion(eta=1.0, stop=1.0)
    back = edit(velocity, x1, source=SOURCE, target=TARGET, method=full, steps=steps, grid=grid)
    assert torch.equal(back.x, x1)
    count = 3 if steps is None else steps
    assert back.nfe == count  # of inversion; eta = 1 needs no velocity
    # gamma = 1: inversion arrives at the noise itself, which sampling without eta carries to the target.
    free = RFInversion(gamma=1.0, eta=0.0)
    result = edit(velocity, x1, source=SOURCE, target=TARGET, method=free, steps=steps, grid=grid)
    assert result.nfe == count
    other = edit(
        velocity, x1 + 5, source=SOURCE, target=TARGET, method=free, steps=steps, grid=grid
    )
    assert torch.equal(result.x, other.x)
    assert result.x.mean(0)[0].item() > 2


def test_rf_inversion_without_control_is_the_euler_round_trip(x1):
    plain = RFInversion(gamma=0.0, eta=0.0)
    result = edit(velocity, x1, source=SOURCE, target=SOURCE, method=plain, steps=10)
    expected = reconstruct(velocity, x1, solver="euler", steps=10, condition=SOURCE)
    assert torch.equal(result.x, expected.x)
    assert result.nfe == expected.nfe == 20


def test_rf_inversion_error_falls_with_eta(x1):
    errors = []
    for eta in (0.0, 0.5, 0.9, 1.0):
        method = RFInversion(gamma=0.5, eta=eta, stop=1.0)
        result = edit(velocity, x1, source=SOURCE, target=SOURCE, method=method, steps=50)
        errors.append(rms(result.x, x1))
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0.0


# ---- UniEdit


@pytest.mark.parametrize(("steps", "alpha", "cost"), [(15, 0.6, 28), (10, 1.0, 31), (4, 0.1, 4)])
def test_uni_edit_with_equal_prompts_is_uni_inv_and_euler(x1, steps, alpha, cost):
    method = UniEdit(alpha=alpha)
    result = edit(velocity, x1, source=SOURCE, target=dict(SOURCE), method=method, steps=steps)
    start = 1 - max(1, round(alpha * steps)) / steps
    grid = [t for t in (i / steps for i in range(steps + 1)) if t > start - 1e-9]
    expected = reconstruct(
        velocity, x1, solver="uni-inv", sample_solver="euler", grid=grid, condition=SOURCE
    )
    assert torch.equal(result.x, expected.x)
    assert result.nfe == cost == 3 * (len(grid) - 1) + 1


def test_uni_edit_round_trip_has_order_two(x1):
    errors = [
        rms(edit(velocity, x1, source=SOURCE, target=SOURCE, method="uniedit", steps=n).x, x1)
        for n in (160, 320, 640)
    ]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(2.0, abs=0.15)


def test_mask_is_of_each_sample_and_of_absolute_values():
    difference = torch.zeros(3, 2, 2, 2)
    difference[0, 0, 0, 0], difference[0, 1, 0, 0] = 2.0, -2.0  # a signed mean would be 0
    difference[1, :, 1, 1] = 1e-3
    mask = region_mask(difference)
    assert mask.shape == (3, 1, 2, 2)
    assert mask[0].flatten().tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)
    assert mask[1].flatten().tolist() == pytest.approx([0, 0, 0, 1], abs=1e-3)
    assert mask[2].abs().max() == 0
    packed = region_mask(difference.flatten(2).transpose(1, 2), channel_dim=2)
    assert torch.equal(packed[..., 0], mask.flatten(1))


def test_mask_of_patches_is_that_of_packed_tokens():
    difference = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    squares = difference.view(2, 3, 2, 2, 3, 2)  # batch, channel, row, in it, column, in it
    tokens = squares.permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    expected = region_mask(tokens, channel_dim=2).view(2, 1, 2, 3)
    mask = region_mask(difference, patch=2)
    assert mask.shape == (2, 1, 4, 6)
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(mask[..., row::2, column::2], expected)


# ---- inversion and sampling


@pytest.mark.parametrize(
    ("method", "order", "steps", "cost"),
    [
        ("rf-edit", 3, (100, 200), 4),
        ("fireflow", 3, (100, 200), 2),
        (RFEdit("euler"), 1, (160, 320), 2),
        (RFEdit("heun"), 3, (100, 200), 4),
    ],
)
def test_round_trips_of_inversion_and_sampling(x1, method, order, steps, cost):
    results = [
        edit(velocity, x1, source=SOURCE, target=SOURCE, method=method, steps=n) for n in steps
    ]
    errors = [rms(result.x, x1) for result in results]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    extra = 2 if method == "fireflow" else 0
    assert results[0].nfe == cost * steps[0] + extra
    assert results[0].bank_bytes == 0


def test_round_trips_at_equal_cost_are_best_by_fireflow_then_rf_solver_then_euler():
    ring = GaussianMixtureFlow.ring()
    x1, errors = ring.sample(512, seed=0, dtype=torch.float64), []
    for method, steps in (("fireflow", 31), ("rf-solver", 16), (RFEdit("euler"), 32)):
        result = edit(ring, x1, source={}, target={}, method=method, steps=steps)
        assert result.nfe == 64
        errors.append(rms(result.x, x1))
    assert errors[0] < errors[1] < errors[2], errors


@pytest.mark.parametrize("method", EVERY)
def test_every_method_arrives_at_the_target(method, x1):
    result = edit(velocity, x1, source=SOURCE, target=TARGET, method=method, steps=30)
    assert result.x.shape == x1.shape
    assert result.x.dtype == x1.dtype
    arrived = (result.x[:, 0] > 1).double().mean().item()
    assert arrived > 0.95, arrived
    untouched = LEFT.sample(256, seed=0, dtype=torch.float64)
    assert torch.equal(x1, untouched)


@pytest.mark.parametrize("method", EVERY)
def test_low_precision_in_and_out(method, x1):
    seen = set()

    def spy(x, t, side=None):
        seen.add(x.dtype)
        return velocity(x.float(), t, side).to(x.dtype)

    narrow = x1.to(torch.bfloat16)
    result = edit(spy, narrow, source=SOURCE, target=TARGET, method=method, steps=12).x
    assert result.dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    wide = edit(velocity, narrow.float(), source=SOURCE, target=TARGET, method=method, steps=12).x
    # The velocities and the points they are taken at are rounded to 8 bits.
    assert rms(result.float(), wide) < 0.25


@pytest.mark.parametrize(
    "method", [*EVERY, FlowEdit(n_min=3), RFEdit("heun"), RFEdit("ab2"), RFEdit("taylor")]
)
def test_low_precision_is_the_network_s_alone(method, x1):
    """The state stays float32 from the first step to the last, between inversion and sampling too."""

    def narrow(x, t, side=None):
        return velocity(x.float(), t, side).to(torch.bfloat16)

    x, options = x1.to(torch.bfloat16), {"source": SOURCE, "target": TARGET, "method": method}
    got = edit(narrow, x, **options, steps=12).x
    wide = edit(
        lambda x, t, side=None: narrow(x.to(torch.bfloat16), t, side).float(), x.float(),
        **options, steps=12,
    ).x  # fmt: skip
    torch.testing.assert_close(got, wide.to(torch.bfloat16), rtol=0.008, atol=0)
    assert (got == wide.to(torch.bfloat16)).double().mean() > 0.99


@pytest.mark.parametrize("method", EVERY)
def test_guidance_counts_and_uses_both_scales(method, x1):
    calls = []

    def spy(x, t, side=None):
        calls.append(side)
        return velocity(x, t, side)

    options = {"source": SOURCE, "target": TARGET, "method": method, "steps": 7}
    plain = edit(spy, x1, **options)
    assert plain.nfe == len(calls)
    assert None not in calls
    calls.clear()
    guided = edit(spy, x1, **options, target_guidance_scale=1.5, uncondition={})
    assert guided.nfe == len(calls)
    assert calls.count(None) == calls.count("right") > 0
    calls.clear()
    both = edit(
        spy, x1, **options, source_guidance_scale=1.5, target_guidance_scale=1.5, uncondition={}
    )
    assert both.nfe == len(calls) == 2 * plain.nfe
    assert rms(plain.x, guided.x) > 1e-6
    assert rms(both.x, guided.x) > 1e-6


# ---- arguments


def test_empty_batch():
    result = edit(velocity, torch.zeros(0, 2), source=SOURCE, target=TARGET, steps=4)
    assert result.x.shape == (0, 2)
    assert result.nfe == 0


def test_no_gradients_and_the_room_is_reached_by_name(x1):
    result = rf.editing.edit(
        velocity, x1.clone().requires_grad_(), source=SOURCE, target=TARGET, steps=4
    )
    assert not result.x.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "sdedit"}, ValueError, "method must be one of flowedit"),
        ({"method": FlowEdit}, TypeError, "method must be a name or an object"),
        ({"source": "left"}, TypeError, "source must be a dict"),
        ({"target": None}, TypeError, "target must be a dict"),
        ({"steps": None}, ValueError, "steps must be given"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"features": 3}, TypeError, "features must be a Features object"),
        ({"target_guidance_scale": 2.0}, ValueError, "uncondition must be given"),
        ({"method": FlowEdit(n_max=5)}, ValueError, "n_min <= n_max <= steps"),
        ({"method": FlowEdit(n_max=1, n_min=2)}, ValueError, "n_min <= n_max <= steps"),
        ({"method": UniEdit(channel_dim=2)}, ValueError, "channel_dim must be a dimension"),
        ({"method": UniEdit(patch=2)}, ValueError, "patch must divide the two last sides"),
    ],
)
def test_wrong_arguments(x1, change, error, words):
    options = {"source": SOURCE, "target": TARGET, "steps": 4} | change
    with pytest.raises(error, match=words):
        edit(velocity, x1, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowEdit(n_avg=0), "n_avg: must be at least 1"),
        (lambda: FlowEdit(n_max=-1), "n_max: must be at least 0"),
        (lambda: RFInversion(gamma=1.1), "gamma: must be in"),
        (lambda: RFInversion(start=0.5), "start: must not be after stop"),
        (lambda: RFInversion(decay=-1.0), "decay: must not be negative"),
        (lambda: UniEdit(alpha=0.0), "alpha: must be in"),
        (lambda: UniEdit(omega=-1.0), "omega: must not be negative"),
        (lambda: UniEdit(patch=0), "patch: must be at least 1"),
        (lambda: RFEdit("dopri5"), "solver: must be deterministic"),
        (lambda: RFEdit("sde"), "solver: must be deterministic"),
        (lambda: RFEdit("sdedit"), "solver must be one of"),
    ],
)
def test_wrong_options(make, words):
    with pytest.raises(ValueError, match=words):
        make()
