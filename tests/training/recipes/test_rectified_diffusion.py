"""Rectified Diffusion, its phased form and its consistency distillation: objectives against NumPy, exact
closures, and small students of an exact denoiser."""

import numpy as np
import pytest
import torch
from diffusion_truth import (
    BATCH,
    MIXTURE,
    TRAIN,
    Table,
    Tiny,
    column,
    ddim,
    exact_teacher,
    guided,
    huber,
    linear_schedule,
    student,
    uniforms,
)
from torch import nn

import rfkernels as rf
from rfkernels import metrics
from rfkernels.models import NoisePrediction
from rfkernels.training import TrainConfig, make_pairs, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import (
    RECIPES,
    RectifiedDiffusion,
    RectifiedDiffusionConsistency,
    RectifiedDiffusionPhased,
)

STEP = 3
ALPHA, SIGMA = linear_schedule()


def model(a=0.3, b=0.2, c=0.4, prediction="epsilon"):
    return NoisePrediction(Tiny(a, b, c), "linear", prediction)


def teacher():
    return model(-0.2, 0.5, 0.3).requires_grad_(False)


def close(found, expected):
    return np.allclose(found, expected, rtol=1e-10, atol=1e-12)


# --- stage 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("loss", ["noise", "data"])
@pytest.mark.parametrize("wrong", [None, "pairing", "schedule", "loss"])
def test_the_objective(loss, prediction, wrong):
    source, network = Table(), model(prediction=prediction)
    objective = RectifiedDiffusion(train=TRAIN, loss=loss).objective(Setting(source, TRAIN))
    batch = objective.batch(STEP)
    found = objective.loss(network, batch).item()

    x0, x1, _ = source.numpy(STEP)
    k = (uniforms("diffusion index", STEP) * 1000).astype(int)
    alpha, sigma = column(ALPHA[k]), column(SIGMA[k])
    if wrong == "pairing":  # independent noise, as in ordinary training
        x0 = x0[::-1]
    if wrong == "schedule":
        bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[k]
        alpha, sigma = column(np.sqrt(bar)), column(np.sqrt(1 - bar))
    x_k = alpha * x1 + sigma * x0
    answer = network.network.numpy(x_k, k)
    if prediction == "epsilon":
        noise, data = answer, (x_k - sigma * answer) / alpha
    else:
        noise, data = sigma * x_k + alpha * answer, alpha * x_k - sigma * answer
    expected = np.mean((noise - x0) ** 2) if loss == "noise" else huber(data - x1)
    if wrong == "loss":
        expected = huber(noise - x0) if loss == "noise" else np.mean((data - x1) ** 2)
    assert close(found, expected) == (wrong is None)
    assert batch["t"].shape == (BATCH,)


def test_the_data_loss_weights_gradients_by_the_noise_ratio():
    """For small residuals; beyond h the Huber form cuts the weight off."""
    x, noise = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    network = NoisePrediction(nn.Identity(), "linear")
    for k, size in ((999, 1e-7), (10, 1e-7)):
        index = torch.tensor([k])
        answer = torch.full((1, 1), size, dtype=torch.float64, requires_grad=True)
        data, _ = network.estimates(x, index, answer)
        objective = RectifiedDiffusion(train=TRAIN).objective(Setting(Table(), TRAIN))
        objective.huber(data, noise, 1e-3).backward()
        ratio = SIGMA[k] / ALPHA[k]
        assert answer.grad.item() == pytest.approx(size * ratio**2 / 1e-3, rel=1e-4)


def test_a_small_student_becomes_first_order(tmp_path):
    """One step of the teacher goes to the mean of the data; one of the student meets the data."""
    origin = exact_teacher()
    pairs = make_pairs(origin, 4000, (2,), folder=tmp_path / "p", steps=12, batch=4000)
    train = TrainConfig(
        steps=300, batch_size=256, learning_rate=5e-3, ema_decay=0.99, holdout=0.1, log_every=350
    )
    result = train_recipe(RectifiedDiffusion(train=train), student(), teacher=origin, pairs=pairs)
    x0, truth = rf.randn(1500, 2, seed=11), MIXTURE.sample(1500, seed=12)
    one = {
        name: float(metrics.energy_distance(rf.sampling.ddim(net, x0, steps=1), truth))
        for name, net in (("teacher", origin), ("student", result.ema))
    }
    assert one["student"] < 0.03 < 0.5 < one["teacher"]
    defect = {
        name: metrics.first_order_defect(net, x0).defect
        for name, net in (("teacher", origin), ("student", result.ema))
    }
    assert defect["student"] < 0.25 < 0.5 < defect["teacher"]
    assert result.metrics[-1]["holdout_loss"] < 0.2


# --- phased ------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [None, 3.0])
@pytest.mark.parametrize("wrong", [None, "segment", "guidance", "slope", "target"])
def test_the_phased_objective(g, wrong):
    source, origin, network = Table(labels=g is not None), teacher(), model()
    recipe = RectifiedDiffusionPhased(train=TRAIN, guidance_scale=g)
    objective = recipe.objective(Setting(source, TRAIN, teacher=origin))
    batch = objective.batch(STEP)
    found = objective.loss(network, batch).item()

    x0, x1, labels = source.numpy(STEP)
    y = None if g is None else labels
    if wrong == "guidance":
        g = 2.0 if g is not None else None
        y = labels
    segment = (uniforms("phased segment", STEP) * (2 if wrong == "segment" else 4)).astype(int)
    a = np.array([249, 499, 749, 999])[segment]
    e = np.maximum(a - 250, 0)
    x_a = column(ALPHA[a]) * x1 + column(SIGMA[a]) * x0
    x_e, at = x_a, a
    for _ in range(10):
        after = np.maximum(at - 25, 0)
        x_e, at = ddim(x_e, at, after, guided(origin.network, x_e, at, y, g)), after
    ratio = SIGMA / ALPHA
    slope = (x_e / column(ALPHA[e]) - x_a / column(ALPHA[a])) / column(ratio[e] - ratio[a])
    if wrong == "slope":
        slope = x0
    k = e + 1 + (uniforms("phased index", STEP) * (a - e)).astype(int)
    x_k = column(ALPHA[k]) * (x_a / column(ALPHA[a]) + column(ratio[k] - ratio[a]) * slope)
    noise = network.network.numpy(x_k, k, y)
    end = column(ALPHA[e]) * (x_k / column(ALPHA[k]) + column(ratio[e] - ratio[k]) * noise)
    expected = huber(end - (x1 if wrong == "target" else x_e))
    assert close(found, expected) == (wrong is None)
    assert (k > e).all()
    assert (k <= a).all()


def test_guiding_noise_guides_data():
    """x1^ + w (x1^_y - x1^_none) is what the guided noise estimate implies."""
    network, g = teacher().network, 3.0
    x, _, y = Table().numpy(0)
    k = np.full(BATCH, 500)
    noise = guided(network, x, k, y, g)
    data = [(x - column(SIGMA[k]) * network.numpy(x, k, c)) / column(ALPHA[k]) for c in (y, None)]
    w = g - 1
    both = data[0] + w * (data[0] - data[1])
    np.testing.assert_allclose(both, (x - column(SIGMA[k]) * noise) / column(ALPHA[k]), rtol=1e-11)


@pytest.mark.parametrize("segments", [1, 4, 8])
def test_phases_close(segments):
    """At the start of a segment the state is x_a; the slope's own step leads to x_e; k is never e."""
    recipe = RectifiedDiffusionPhased(train=TRAIN, segments=segments)
    objective = recipe.objective(Setting(Table(), TRAIN, teacher=teacher()))
    batch = objective.batch(STEP)
    batch["t"] = torch.full((BATCH,), 1 - 2**-24)  # the largest uniform number
    a, k, e = objective.indices(batch)
    assert torch.equal(k, a)
    x_a, x_k, x_e = objective.states(batch)
    # x_a in units of the noise that it holds: to rounding.
    assert (x_k - x_a).abs().max() < 1e-14
    schedule = objective.teacher.schedule
    ratio, alpha = schedule.noise_ratio, schedule.alpha
    gap = (ratio[e] - ratio[a]).numpy()
    slope = (x_e.numpy() / column(alpha[e]) - x_a.numpy() / column(alpha[a])) / column(gap)
    for u in (0.0, 0.37, 0.9):
        batch["t"] = torch.full((BATCH,), u)
        _, k, _ = objective.indices(batch)
        assert ((k > e) & (k <= a)).all()
        end = objective.teacher.ddim_step(objective.states(batch)[1], k, e, torch.tensor(slope))
        assert ((end - x_e).abs() / x_e.abs().clamp_min(1)).max() < 3e-14
    # Every index of every segment is drawn, but its end.
    many = {"segment": torch.arange(1000) % segments, "t": (torch.arange(1000) + 0.5) / 1000}
    a, k, e = objective.indices(many)
    assert k.min() == 1
    assert k.max() == 999


def test_a_first_order_teacher_leaves_nothing_to_learn():
    """Where the teacher's noise is constant along paths, the teacher itself has no phased loss."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x, k):
            return self.value.expand_as(x)

    origin = NoisePrediction(Constant(), "linear")
    for recipe in (
        RectifiedDiffusionPhased(train=TRAIN),
        RectifiedDiffusionConsistency(train=TRAIN),
    ):
        objective = recipe.objective(Setting(Table(), TRAIN, teacher=origin))
        objective.attach(origin)
        assert objective.loss(origin, objective.batch(0)).item() < 1e-20


def test_a_phased_student_needs_as_many_steps_as_segments():
    origin, model_ = exact_teacher(), student()
    train = TrainConfig(
        steps=300, batch_size=256, learning_rate=5e-3, ema_decay=0.99, holdout=0.0, log_every=300
    )
    recipe = RectifiedDiffusionPhased(train=train, segments=2, grid_steps=10)
    result = train_recipe(recipe, model_, MIXTURE.sample(4000, seed=3), teacher=origin)
    x0, truth = rf.randn(1500, 2, seed=11), MIXTURE.sample(1500, seed=12)
    energy = {
        name: float(metrics.energy_distance(rf.sampling.ddim(net, x0, steps=2), truth))
        for name, net in (("teacher", origin), ("student", result.ema))
    }
    assert energy["student"] < 0.03 < energy["teacher"]


# --- consistency -------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [None, 3.0])
@pytest.mark.parametrize("wrong", [None, "average", "teacher", "guidance", "boundary"])
def test_the_consistency_objective(g, wrong):
    source, origin, network, average = (
        Table(g is not None),
        teacher(),
        model(),
        model(0.1, -0.3, 0.2),
    )
    recipe = RectifiedDiffusionConsistency(train=TRAIN, guidance_scale=g, grid_steps=10)
    objective = recipe.objective(Setting(source, TRAIN, teacher=origin))
    objective.attach(average)
    found = objective.loss(network, objective.batch(STEP)).item()

    x0, x1, labels = source.numpy(STEP)
    y = None if g is None else labels
    a = ((uniforms("consistency index", STEP) * 10).astype(int) + 1) * 100 - 1
    b = np.maximum(a - 100, 0)
    last = np.full(BATCH, 50 if wrong == "boundary" else 0)
    x_a = column(ALPHA[a]) * x1 + column(SIGMA[a]) * x0
    if wrong == "guidance":
        g, y = (2.0 if g else None), labels
    stepped = network if wrong == "teacher" else origin
    x_b = ddim(x_a, a, b, guided(stepped.network, x_a, a, y, g))
    targets = network if wrong == "average" else average
    target = ddim(x_b, b, last, targets.network.numpy(x_b, b, y))
    end = ddim(x_a, a, last, network.network.numpy(x_a, a, y))
    assert close(found, huber(end - target)) == (wrong is None)


def test_consistency_targets_carry_no_gradient_and_end_at_the_state():
    source, origin, network = Table(), teacher(), model()
    average = model(0.1, -0.3, 0.2)
    objective = RectifiedDiffusionConsistency(train=TRAIN).objective(
        Setting(source, TRAIN, teacher=origin)
    )
    objective.attach(average)
    objective.loss(network, objective.batch(0)).backward()
    assert network.network.weight.grad.abs().max() > 0
    assert average.network.weight.grad is None
    x = rf.randn(4, 2, seed=1, dtype=torch.float64)
    k = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(objective.end(network, x, k, {}), x)


def test_a_consistent_student_in_one_step_and_after_an_interruption(tmp_path):
    """Resuming gives the bits of the uninterrupted run: the averaged network, from which targets come,
    is part of the checkpoint."""
    origin, data = exact_teacher(), MIXTURE.sample(4000, seed=3)
    train = TrainConfig(
        steps=300,
        batch_size=256,
        learning_rate=5e-3,
        ema_decay=0.95,
        holdout=0.0,
        log_every=100,
        checkpoint_every=250,
    )
    recipe = RectifiedDiffusionConsistency(train=train, grid_steps=10)
    whole = train_recipe(recipe, student(), data, teacher=origin, run=tmp_path / "run")
    x0, truth = rf.randn(1500, 2, seed=11), MIXTURE.sample(1500, seed=12)
    energy = {
        name: float(metrics.energy_distance(rf.sampling.ddim(net, x0, steps=1), truth))
        for name, net in (("teacher", origin), ("student", whole.ema))
    }
    assert energy["student"] < 0.06 < 0.5 < energy["teacher"]

    for file in (tmp_path / "run" / "checkpoints" / "step-300").iterdir():
        file.unlink()
    (tmp_path / "run" / "checkpoints" / "step-300").rmdir()
    again = train_recipe(recipe, student(), data, teacher=origin, run=tmp_path / "run", resume=True)
    for net, other in ((whole.model, again.model), (whole.ema, again.ema)):
        for name, value in net.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
    assert rf.load(tmp_path / "run", model=student()).config == recipe


# --- options -----------------------------------------------------------------------------------


def test_bad_options():
    for make, message in (
        (lambda: RectifiedDiffusion(loss="huber"), "loss: must be 'noise' or 'data'"),
        (lambda: RectifiedDiffusion(huber_c=0.0), "huber_c: must be positive"),
        (lambda: RectifiedDiffusionPhased(segments=3), "segments: must divide grid_steps, 40"),
        (lambda: RectifiedDiffusionConsistency(grid_steps=1), "grid_steps: must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    data, small = torch.zeros(20, 2), {"train": TrainConfig(steps=2, batch_size=4, holdout=0.0)}
    for recipe in (RectifiedDiffusionPhased, RectifiedDiffusionConsistency):
        assert RECIPES[recipe.name] is recipe
        for options, message in (
            (
                {"grid_steps": 300, "segments": 4},
                "grid_steps: must divide the steps of the teacher's",
            ),
            ({"guidance_scale": 2.0}, "guidance_scale: needs a conditional network and labels"),
        ):
            options = {k: v for k, v in options.items() if hasattr(recipe, k)}
            with pytest.raises(ValueError, match=message):
                train_recipe(recipe(**options, **small), student(), data, teacher=exact_teacher())
        other = student().with_schedule("scaled-linear")
        with pytest.raises(
            ValueError, match="model: must have the teacher's schedule, LinearBetas"
        ):
            train_recipe(recipe(**small), other, data, teacher=exact_teacher())
        with pytest.raises(TypeError, match="model: must be a rfkernels"):
            train_recipe(recipe(**small), nn.Linear(2, 2), data, teacher=exact_teacher())
        bare = student().network.inner
        with pytest.raises(TypeError, match="teacher: must be a rfkernels"):
            train_recipe(recipe(**small), student(), data, teacher=bare)
