"""Reflow and distillation: what they minimise, and that a ring and two moons become straight
(reduced budgets)."""

import math

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels import metrics, models
from rfkernels.data import toy
from rfkernels.training import (
    DistillConfig,
    PairStore,
    ReflowConfig,
    TrainConfig,
    distill,
    make_pairs,
    reflow,
    train_flow,
)
from rfkernels.training.objective import Setting
from rfkernels.training.recipes.rectified_flow import DistillObjective, FlowObjective
from rfkernels.training.sources import PairSource

TRAIN = TrainConfig(steps=10, batch_size=16, log_every=5, checkpoint_every=5, warmup_steps=2)
CPU = torch.device("cpu")


def network(classes=None, seed=1, **options):
    return models.build(
        "mlp", seed=seed, sample_shape=(2,), width=16, depth=1, num_classes=classes, **options
    )


def teacher(classes=None):
    """A network whose field is not zero."""
    model, generator = network(classes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def small(recipe, **options):
    return recipe(**{"pairs": 40, "pair_batch": 16, "pair_steps": 2, "train": TRAIN, **options})


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(teacher(), 40, (2,), folder=tmp_path / "pairs", seed=3, steps=2, batch=16)


def test_reflow_batches_are_the_pairs_on_their_lines(pairs):
    source = PairSource(pairs, seed=0, holdout=0.25, device=CPU)
    batch = FlowObjective(Setting(source, TRAIN)).batch(0)
    x0, x1, _ = pairs.batch(torch.arange(40))
    table = {tuple((b - a).tolist()): i for i, (a, b) in enumerate(zip(x0, x1, strict=True))}
    rows = [table[tuple(v.tolist())] for v in batch["target"]]
    assert max(rows) < 30  # the last quarter is held out
    assert len(set(rows)) == 16
    t = batch["t"][:, None]
    torch.testing.assert_close(batch["xt"], (1 - t) * x0[rows] + t * x1[rows])
    held = FlowObjective(Setting(source, TRAIN)).held_out()
    torch.testing.assert_close(held["target"], (x1 - x0)[30:])


def test_distillation_asks_for_the_end_at_its_own_times(pairs):
    source = PairSource(pairs, seed=0, holdout=0.0, device=CPU)
    one = DistillObjective(Setting(source, TRAIN), k=1, distance="l2").batch(0)
    assert not one["t"].any()
    x0, _, _ = pairs.batch(torch.arange(40))
    assert {tuple(v) for v in one["xt"].tolist()} <= {tuple(v) for v in x0.tolist()}
    config = TrainConfig(batch_size=3000)
    times = DistillObjective(Setting(source, config), k=4, distance="l2").batch(0)["t"]
    values, counts = times.unique(return_counts=True)
    assert values.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert (counts - 750).abs().max() < 5 * math.sqrt(3000 * 0.25 * 0.75)


def test_distances_agree_where_they_must(pairs):
    """For one step the end point's squared error is the velocity's, whoever computes it."""
    source = PairSource(pairs, seed=0, holdout=0.0, device=CPU)
    model, seen = teacher(), []

    def per_sample(prediction, target):
        seen.append((prediction, target))
        return (prediction - target).square().flatten(1).mean(1)

    losses = []
    for distance in ("l2", per_sample, nn.functional.mse_loss):
        objective = DistillObjective(Setting(source, TRAIN), k=1, distance=distance)
        batch = objective.batch(0)
        losses.append(objective.loss(model, batch).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    prediction, target = seen[0]
    with torch.no_grad():
        torch.testing.assert_close(prediction, batch["xt"] + model(batch["xt"], batch["t"]))
    torch.testing.assert_close(target - batch["xt"], batch["target"])
    wrong = DistillObjective(Setting(source, TRAIN), k=1, distance=lambda a, b: (a - b).square())
    with pytest.raises(ValueError, match=r"distance: must return \(16,\) losses or a 0-d tensor"):
        wrong.loss(model, wrong.batch(0))


def test_distillation_of_the_way_back_asks_for_the_source(pairs):
    """Times 1/k .. 1, and x_t - t v against x0: what an inversion of k Euler steps evaluates."""
    source = PairSource(pairs, seed=0, holdout=0.0, device=CPU)
    x0, x1, _ = pairs.batch(torch.arange(40))
    one = DistillObjective(Setting(source, TRAIN), k=1, distance="l2", reverse=True).batch(0)
    assert (one["t"] == 1).all()
    assert {tuple(v) for v in one["xt"].tolist()} <= {tuple(v) for v in x1.tolist()}
    config = TrainConfig(batch_size=300)
    many = DistillObjective(Setting(source, config), k=4, distance="l2", reverse=True)
    assert many.batch(0)["t"].unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    seen = []

    def distance(prediction, target):
        seen.append((prediction, target))
        return (prediction - target).square().flatten(1).mean(1)

    model = teacher()
    ours = DistillObjective(Setting(source, TRAIN), k=4, distance=distance, reverse=True)
    batch = ours.batch(0)
    loss = ours.loss(model, batch)
    prediction, target = seen[0]
    assert {tuple(v) for v in target.tolist()} <= {tuple(v) for v in x0.tolist()}
    with torch.no_grad():
        back = batch["xt"] - batch["t"][:, None] * model(batch["xt"], batch["t"])
    torch.testing.assert_close(prediction, back)
    t = batch["t"][:, None]
    torch.testing.assert_close(target, batch["xt"] - t * batch["target"], rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx((back - target).square().mean().item(), rel=1e-5)


def test_reflow_starts_from_the_teacher_and_leaves_it_alone(tmp_path):
    first = train_flow(network(), toy("moons", 100), TRAIN)
    before = {n: v.clone() for n, v in first.ema.state_dict().items()}
    result = reflow(first, small(ReflowConfig), run=tmp_path / "run")
    start = rf.load(tmp_path / "run").model
    for name, value in first.ema.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(result.model.enter.weight, first.ema.enter.weight)
    assert start.enter.weight.requires_grad
    manifest = PairStore(tmp_path / "run" / "pairs").manifest
    assert manifest["seed"] == rf.derive_seed(0, "pairs 1")
    assert manifest["model_sha256"] == rf.training.model_hash(first.ema)


def test_every_kind_of_teacher_gives_the_same_student(tmp_path):
    first = train_flow(network(2), toy("moons", 100), TRAIN, run=tmp_path / "first")
    config = small(ReflowConfig)
    results = [
        reflow(first, config),
        reflow(tmp_path / "first", config, run=tmp_path / "a"),
        reflow(str(tmp_path / "first"), config, progress=True),
        reflow(rf.load(tmp_path / "first"), config),
        reflow(first.ema.requires_grad_(True), config, labels=torch.arange(40) % 2),
    ]
    for result in results[1:]:
        for name, value in results[0].model.state_dict().items():
            assert torch.equal(value, result.model.state_dict()[name])
    labels = PairStore(tmp_path / "a" / "pairs").batch(torch.arange(40))[2]["y"]
    assert labels.bincount().tolist() == [20, 20]
    assert results[1].num_classes == 2


def test_rounds_chain(tmp_path):
    result = reflow(teacher(), small(ReflowConfig, rounds=2), run=tmp_path / "run")
    assert result.run == tmp_path / "run"
    loaded = rf.load(tmp_path / "run")
    assert loaded.folder == tmp_path / "run" / "round-2"
    for name, value in result.ema.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    stores = [PairStore(tmp_path / "run" / f"round-{n}" / "pairs") for n in (1, 2)]
    one = rf.load(tmp_path / "run" / "round-1").model
    assert stores[1].manifest["model_sha256"] == rf.training.model_hash(one)
    assert stores[0].seed != stores[1].seed
    again = reflow(teacher(), small(ReflowConfig, rounds=2), run=tmp_path / "run", resume=True)
    assert torch.equal(again.ema.enter.weight, result.ema.enter.weight)


def test_distill_with_given_pairs_and_another_student(tmp_path, pairs):
    config = small(DistillConfig, k=2)
    result = distill(teacher(), config, pairs=pairs, run=tmp_path / "run")
    assert not (tmp_path / "run" / "pairs").exists()
    assert rf.load(tmp_path / "run").config == config
    same = distill(teacher(), config, pairs=tmp_path / "pairs")
    assert torch.equal(result.model.enter.weight, same.model.enter.weight)
    student = models.build("mlp", seed=5, sample_shape=(2,), width=8, depth=1)
    assert distill(teacher(), config, pairs=pairs, student=student).model is student
    assert distill(teacher(), config).metrics[-1]["step"] == 10


def test_bad_requests_write_nothing(tmp_path, pairs):
    run = tmp_path / "run"
    cases = [
        (lambda: reflow(nn.Linear(2, 2), run=run), ValueError, "sample_shape: give the shape"),
        (
            lambda: reflow(teacher(), sample_shape=(3,), run=run),
            ValueError,
            "sample_shape: the teach",
        ),
        (lambda: reflow(3, run=run), TypeError, "teacher: must be a RunResult"),
        (lambda: reflow(tmp_path / "no", run=run), FileNotFoundError, "holds no run"),
        (lambda: reflow(teacher(), TRAIN, run=run), TypeError, "config: must be a ReflowConfig"),
        (
            lambda: reflow(teacher(), small(ReflowConfig, solver="eulr"), run=run),
            ValueError,
            "solver",
        ),
        (
            lambda: reflow(teacher(), small(ReflowConfig, guidance_scale=2.0), run=run),
            ValueError,
            "guidance_scale: needs a conditional teacher",
        ),
        (
            lambda: reflow(teacher(2), small(ReflowConfig), labels=torch.zeros(3), run=run),
            ValueError,
            "labels: must have one row per pair, 40",
        ),
        (
            lambda: distill(teacher(), pairs=tmp_path / "none", run=run),
            FileNotFoundError,
            "holds no pairs",
        ),
        (
            lambda: distill(teacher(), pairs=pairs, labels=torch.zeros(40), run=run),
            ValueError,
            "labels: the pairs have theirs",
        ),
        (
            lambda: distill(models.build("mlp", sample_shape=(3,), width=8), pairs=pairs, run=run),
            ValueError,
            r"pairs: must be of the teacher's shape, \(3,\); got \(2,\)",
        ),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    narrow = models.build("mlp", sample_shape=(3,), width=8)
    for options in ({"pairs": pairs}, {}):
        with pytest.raises(ValueError, match="model: cannot take the samples"):
            distill(teacher(), small(DistillConfig), student=narrow, run=run, **options)
    assert not run.exists()


def test_adaptive_solver_makes_pairs():
    config = small(ReflowConfig, solver="dopri5", pair_steps=None)
    assert reflow(teacher(), config).metrics[-1]["step"] == 10


@pytest.mark.parametrize("name", ["ring", "moons"])
def test_a_toy_becomes_straight(name):
    """One step of the first flow misses the data, one of the reflowed flow meets it; the cost does
    not grow."""
    train = TrainConfig(steps=400, batch_size=256, learning_rate=5e-3, holdout=0.0, ema_decay=0.99)
    model = models.build("mlp", seed=0, sample_shape=(2,), width=64, depth=2)
    first = train_flow(model, toy(name), train)
    second = reflow(first, ReflowConfig(pairs=6000, pair_batch=6000, pair_steps=12, train=train))

    truth = toy(name, size=2000, seed=1).x
    x0 = rf.randn(2000, 2, seed=11)
    ends = {
        (stage, steps): rf.sample(result.ema, x0, steps=steps)
        for stage, result in (("first", first), ("second", second))
        for steps in (1, 20)
    }
    energy = {key: float(metrics.energy_distance(x, truth)) for key, x in ends.items()}
    scale = truth.var(0).sum().item()
    # The first flow's single step goes to the mean of the data, where there are none.
    assert energy["first", 1] > 0.05 * scale
    assert energy["second", 1] < 0.01 * max(scale, 2.0)
    assert energy["first", 20] < 0.01 * max(scale, 2.0)

    straight = {
        stage: float(metrics.straightness(result.ema, x0, 20))
        for stage, result in (("first", first), ("second", second))
    }
    assert straight["second"] < 0.05 < straight["first"]
    # Reflow never raises the transport cost of the coupling that it is trained on.
    exact = rf.sample(first.ema, x0, steps=12, solver="heun")
    cost = [(end - x0).square().sum(1).mean().item() for end in (exact, ends["second", 20])]
    assert cost[1] < 1.03 * cost[0]
    independent = (truth - x0).square().sum(1).mean().item()
    assert cost[0] < 0.8 * independent


def test_three_rectified_flow_of_a_ring(tmp_path):
    """Two rounds: the 3-RF keeps the data and costs no more; the 2-RF is straight already."""
    train = TrainConfig(steps=300, batch_size=256, learning_rate=5e-3, holdout=0.0, ema_decay=0.98)
    model = models.build("mlp", seed=0, sample_shape=(2,), width=64, depth=2)
    first = train_flow(model, toy("ring"), train)
    config = ReflowConfig(rounds=2, pairs=4000, pair_batch=4000, pair_steps=10, train=train)
    third = reflow(first, config, run=tmp_path / "run")
    second = rf.load(tmp_path / "run" / "round-1").model
    x0, truth = rf.randn(2000, 2, seed=11), toy("ring", size=2000, seed=1).x
    flows = {1: first.ema, 2: second, 3: third.ema}
    ends = {k: rf.sample(flow, x0, steps=20, solver="heun") for k, flow in flows.items()}
    cost = {k: (end - x0).square().sum(1).mean().item() for k, end in ends.items()}
    assert cost[3] < 1.03 * cost[2] < 1.03**2 * cost[1]
    straight = {k: float(metrics.straightness(flow, x0, 20)) for k, flow in flows.items()}
    assert max(straight[2], straight[3]) < 0.1 < straight[1]
    scale = truth.var(0).sum().item()
    one_step = float(metrics.energy_distance(rf.sample(third.ema, x0, steps=1), truth))
    assert (
        one_step
        < 0.01 * scale
        < 0.05 * scale
        < float(metrics.energy_distance(rf.sample(first.ema, x0, steps=1), truth))
    )


@pytest.mark.parametrize("k", [1, 2])
def test_a_student_of_the_way_back_is_a_fast_encoder(tmp_path, k):
    """N(m, s^2 I) to N(0, I): x1 goes to (x1 - m) / s."""
    from rfkernels.flow import GaussianMixtureFlow

    mean = torch.tensor([[2.0, -1.0]])
    flow = GaussianMixtureFlow(mean, 0.5)
    pairs = make_pairs(flow.velocity, 2000, (2,), folder=tmp_path / "p", steps=30, batch=2000)
    train = TrainConfig(steps=250, batch_size=128, learning_rate=1e-2, ema_decay=0.95, holdout=0.0)
    config = DistillConfig(k=k, reverse=True, train=train)
    student = distill(network(), config, pairs=pairs, run=tmp_path / "run").ema
    x1 = mean + 0.5 * rf.randn(500, 2, seed=4)
    codes = rf.invert(student, x1, steps=k)
    assert (codes - (x1 - mean) / 0.5).square().mean().sqrt() < 0.15
    assert rf.load(tmp_path / "run").config == config
    with pytest.raises(TypeError, match="reverse: must be true or false; got 1"):
        DistillConfig(reverse=1)


def test_students_of_one_and_two_steps_follow_their_teacher(tmp_path):
    """A teacher known in closed form: N(0, I) to N(m, s^2 I) sends x0 to m + s x0, along curves."""
    from rfkernels.flow import GaussianMixtureFlow

    mean = torch.tensor([[2.0, -1.0]])
    flow = GaussianMixtureFlow(mean, 0.5)
    pairs = make_pairs(flow.velocity, 2000, (2,), folder=tmp_path / "p", steps=30, batch=2000)
    x0 = rf.randn(500, 2, seed=4)
    for k in (1, 2):
        config = DistillConfig(
            k=k,
            train=TrainConfig(
                steps=250, batch_size=128, learning_rate=1e-2, ema_decay=0.95, holdout=0.0
            ),
        )
        student = distill(network(), config, pairs=pairs).ema
        ends = rf.sample(student, x0, steps=k)
        assert (ends - (mean + 0.5 * x0)).square().mean().sqrt() < 0.12
