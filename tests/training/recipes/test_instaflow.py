"""InstaFlow: its two stages against NumPy, the algebra of guidance that its pairs rest on, and a
label-conditioned one-step student."""

import numpy as np
import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels import models
from rfkernels.flow import GaussianMixtureFlow
from rfkernels.training import OwnObject, PairStore, TrainConfig, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import InstaFlowDistill
from rfkernels.training.sources import ALL, Draw

BATCH, SHAPE = 32, (1, 4, 4)
TRAIN = TrainConfig(steps=10, batch_size=BATCH)


class Table:
    """A source of fixed labelled pairs, float64, whose rows are the positions."""

    def __init__(self):
        self.sample_shape, self.device = SHAPE, torch.device("cpu")
        self.x0, self.x1 = rf.randn(2, 10 * BATCH, *SHAPE, seed=1, dtype=torch.float64)
        self.y = torch.arange(10 * BATCH) % 3

    def draw(self, start, count, part=ALL):
        rows = torch.arange(start, start + count)[part]
        return Draw(self.x1[rows], self.x0[rows], None, None, {"y": self.y[rows]})

    def held_out(self):
        return self.draw(0, 8)


class Labelled(nn.Module):
    """a x + b y + t with a label y."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.8], dtype=torch.float64))

    def forward(self, x, t, y):
        a, b = self.weight
        return a * x + (b * y.double() + t)[:, None, None, None]


def squares(a, b):
    return (a - b).square().flatten(1).sum(1)


def decoder(x):
    return torch.sin(x).repeat_interleave(2, dim=-1)


def in_numpy(source, step, perceptual, decode=True):
    rows = slice(step * BATCH, (step + 1) * BATCH)
    z, x1, y = source.x0[rows].numpy(), source.x1[rows].numpy(), source.y[rows].numpy()
    velocity = 0.5 * z - 0.8 * y[:, None, None, None]
    if not perceptual:
        return ((velocity - (x1 - z)) ** 2).mean()
    images = (z + velocity, x1)
    if decode:
        images = tuple(np.repeat(np.sin(x), 2, axis=-1) for x in images)
    return ((images[0] - images[1]) ** 2).reshape(BATCH, -1).sum(1).mean()


def objective_of(**options):
    recipe = InstaFlowDistill(**{"distance": squares, "train": TRAIN, **options})
    return recipe.objective(Setting(Table(), TRAIN, null_label=3))


@pytest.mark.parametrize(("start", "first"), [(4, 4), (0.35, 4), (0, 0), (9, 9)])
def test_the_stages_are_what_the_formulas_say(start, first):
    objective, network = objective_of(decoder=decoder, perceptual_from=start), Labelled()
    for step in (0, 3, 4, 9):
        loss = objective.loss(network, objective.batch(step)).item()
        assert loss == pytest.approx(in_numpy(Table(), step, step >= first), abs=1e-10)
        assert abs(loss - in_numpy(Table(), step, step < first)) > 1e-3
    held = objective.loss(network, objective.held_out()).item()
    z, x1, y = Table().x0[:8], Table().x1[:8], Table().y[:8]
    target = x1 - z
    expected = (0.5 * z - 0.8 * y.double()[:, None, None, None] - target).square().mean().item()
    assert held == pytest.approx(expected, abs=1e-10)


def test_without_its_decoder_or_distance_it_is_something_else():
    network = Labelled()
    right = in_numpy(Table(), 5, perceptual=True)
    plain = objective_of(perceptual_from=0)
    assert plain.loss(network, plain.batch(5)).item() == pytest.approx(
        in_numpy(Table(), 5, perceptual=True, decode=False), abs=1e-10
    )
    assert abs(plain.loss(network, plain.batch(5)).item() - right) > 1e-3
    l2 = objective_of(distance="l2", perceptual_from=0)
    assert l2.loss(network, l2.batch(5)).item() == pytest.approx(
        in_numpy(Table(), 5, perceptual=False), abs=1e-10
    )


def test_the_decoder_is_differentiated_where_the_student_is_and_nowhere_else():
    seen = []

    def watched(x):
        seen.append((x.requires_grad, torch.is_grad_enabled()))
        return decoder(x)

    objective, network = objective_of(decoder=watched, perceptual_from=0), Labelled()
    objective.loss(network, objective.batch(0)).backward()
    assert seen == [(False, False), (True, True)]
    assert network.weight.grad.abs().min() > 0


def test_guidance_is_empty_plus_alpha_times_the_difference():
    """Scale 1 gives the conditional sample, 0 the unconditional one, alpha the published form."""
    a, b = rf.randn(2, 6, seed=3, dtype=torch.float64)

    def velocity(x, t, y=None):
        slope = a[:2] if y is None else torch.stack((a[2:4], b[2:4]))[y]
        return torch.sin(x) * slope + (b[:2] if y is None else b[4:])

    x, y = rf.randn(20, 2, seed=1).double(), torch.arange(20) % 2
    given = {"steps": 3, "condition": {"y": y}, "uncondition": {}}
    text = rf.sample(velocity, x, steps=3, condition={"y": y})
    empty = rf.sample(velocity, x, steps=3)
    assert torch.equal(rf.sample(velocity, x, guidance_scale=1.0, **given), text)
    torch.testing.assert_close(
        rf.sample(velocity, x, guidance_scale=0.0, **given), empty, rtol=0, atol=1e-12
    )
    for alpha in (1.5, 2.0):
        state = x.clone()
        for step in range(3):
            t = torch.full((20,), step / 3, dtype=torch.float64)
            v = alpha * velocity(state, t, y) + (1 - alpha) * velocity(state, t)
            state = state + v / 3
        drawn = rf.sample(velocity, x, guidance_scale=alpha, **given)
        torch.testing.assert_close(drawn, state, rtol=0, atol=1e-12)
        assert (drawn - text).abs().max() > 0.01


def modes_of(labels):
    """The first of the two opposite modes of each of four labels, (N, 2)."""
    angle = labels * torch.pi / 4
    return 4 * torch.stack((angle.cos(), angle.sin()), dim=1)


class LabelledRing(nn.Module):
    """The exact flow to two opposite Gaussians by label, or to all eight without one."""

    sample_shape, null_label = (2,), 4

    def __init__(self):
        super().__init__()
        means = modes_of(torch.arange(8))
        self.whole = GaussianMixtureFlow(means, 0.5)
        self.each = [GaussianMixtureFlow(means[[k, k + 4]], 0.5) for k in range(4)]
        self.weight = nn.Parameter(torch.ones(()))  # a teacher is copied, weights and all

    def forward(self, x, t, y=None):
        if y is None:
            return self.weight * self.whole(x, t)
        by_label = torch.stack([field(x, t) for field in self.each])
        return self.weight * by_label[y, torch.arange(len(y))]


def test_one_step_by_label(tmp_path):
    """Both stages on pairs at guidance 1.5: the share of one-step samples within three standard
    deviations of a mode of their label. Measured: 0 for the teacher, .91 for the student."""
    network = models.build("mlp", seed=0, sample_shape=(2,), width=48, depth=2, num_classes=4)
    recipe = InstaFlowDistill(
        pairs=4000,
        pair_steps=10,
        pair_batch=4000,
        distance=lambda a, b: (a - b).abs().mean(1),
        train=TrainConfig(steps=400, batch_size=128, learning_rate=5e-3, ema_decay=0.99),
    )
    student = train_recipe(recipe, network, teacher=LabelledRing(), run=tmp_path / "run")
    assert PairStore(tmp_path / "run" / "pairs").manifest["guidance_scale"] == 1.5
    assert isinstance(rf.load(tmp_path / "run").config.distance, OwnObject)

    def share(field):
        labels, noise = torch.arange(2000) % 4, rf.randn(2000, 2, seed=5)
        x = rf.sample(field, noise, steps=1, condition={"y": labels})
        away = torch.minimum(*((x - sign * modes_of(labels)).norm(dim=1) for sign in (1, -1)))
        return (away < 1.5).float().mean().item()

    assert share(LabelledRing()) < 0.05
    assert share(student.ema) > 0.8


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"perceptual_from": 1.5}, ValueError, "perceptual_from: a fraction of the run must be"),
        ({"perceptual_from": -1}, ValueError, "perceptual_from: must be at least 0; got -1"),
        ({"decoder": 3}, TypeError, "decoder: must be callable; got int"),
        ({"decoder": decoder}, ValueError, "decoder: serves a callable distance; got 'l2'"),
        ({"distance": "lpips"}, ValueError, "distance: must be 'l2' or a callable; got 'lpips'"),
        ({"guidance_scale": "high"}, TypeError, "guidance_scale: must be a number; got 'high'"),
    ],
)
def test_bad_options_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        InstaFlowDistill(**options)


def test_what_only_has_a_name_cannot_be_trained_with():
    recipe = InstaFlowDistill(distance=OwnObject("mine.distance"), train=TRAIN)
    with pytest.raises(ValueError, match="distance: give the object itself; got the name of one"):
        recipe.objective(Setting(Table(), TRAIN))


def test_guidance_needs_a_condition():
    plain = models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1)
    with pytest.raises(ValueError, match="guidance_scale: needs a conditional teacher"):
        train_recipe(InstaFlowDistill(pairs=10, train=TRAIN), teacher=plain)
