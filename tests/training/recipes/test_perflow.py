"""PeRFlow: both objectives against NumPy, the sampler of noise predictions, windows of time."""

import numpy as np
import pytest
import torch
from diffusion_truth import (
    BATCH,
    TRAIN,
    Table,
    Tiny,
    column,
    ddim,
    exact_teacher,
    guided,
    linear_schedule,
    student,
    uniforms,
)
from torch import nn

import rfkernels as rf
from rfkernels import models
from rfkernels.flow import GaussianMixtureFlow
from rfkernels.models import NoisePrediction, WindowedNoisePrediction
from rfkernels.sampling import WindowGrid
from rfkernels.training import TrainConfig, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.recipes import RECIPES, PeRFlow

STEP = 2
ALPHA, SIGMA = linear_schedule()


def close(found, expected):
    return np.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("g", [None, 3.0])
@pytest.mark.parametrize("wrong", [None, "windows", "teacher", "guidance", "line"])
def test_velocities(g, wrong):
    source, origin = Table(g is not None), Tiny(-0.2, 0.5, 0.3, unit=1.0).requires_grad_(False)
    network = Tiny(0.3, 0.2, 0.4, unit=1.0)
    recipe = PeRFlow(train=TRAIN, guidance_scale=g)
    objective = recipe.objective(Setting(source, TRAIN, teacher=origin))
    found = objective.loss(network, objective.batch(STEP)).item()

    x0, x1, labels = source.numpy(STEP)
    t, y = uniforms("window time", STEP), None if g is None else labels
    if wrong == "guidance":
        g, y = (2.0 if g else None), labels
    count = 1 if wrong == "windows" else 4
    start = np.floor(t * count) / count
    x_a = column(1 - start) * x0 + column(start) * x1
    x = x_a
    for i in range(8):
        x = x + guided(origin, x, start + i / 8 / count, y, g) / 8 / count
    x_e = x_a + (x1 - x0) / count if wrong == "teacher" else x
    xt = x_a + column((t - start) * count) * (x_e - x_a)
    if wrong == "line":
        xt = column(1 - t) * x0 + column(t) * x1
    expected = np.mean((network.numpy(xt, t, y) - (x_e - x_a) * count) ** 2)
    assert close(found, expected) == (wrong is None)


@pytest.mark.parametrize("target", ["ddim", "diffused"])
@pytest.mark.parametrize("wrong", [None, "target", "teacher", "index"])
def test_noise(target, wrong):
    source = Table()
    origin = NoisePrediction(Tiny(-0.2, 0.5, 0.3), "linear").requires_grad_(False)
    network = NoisePrediction(Tiny(0.3, 0.2, 0.4), "linear")
    recipe = PeRFlow(train=TRAIN, epsilon_target=target, teacher_steps=5)
    objective = recipe.objective(Setting(source, TRAIN, teacher=origin))
    found = objective.loss(network, objective.batch(STEP)).item()

    x0, x1, _ = source.numpy(STEP)
    level = 1000 - np.floor(uniforms("window time", STEP) * 1000).astype(int)
    a = np.ceil(level / 250).astype(int) * 250
    e = a - 250
    first, last = a - 1, np.maximum(e - 1, 0)
    z_a = column(ALPHA[first]) * x1 + column(SIGMA[first]) * x0
    z, at = z_a, first
    for _ in range(5):
        after = np.maximum(at - (25 if wrong == "teacher" else 50), 0)
        z, at = ddim(z, at, after, origin.network.numpy(z, at)), after
    s, a, e = level / 1000, a / 1000, e / 1000
    z_s = z_a + (z - z_a) * column((s - a) / (e - a))
    ratio = ALPHA[last] / ALPHA[first]
    if target == "ddim":
        scale, size = ratio, SIGMA[last] - ratio * SIGMA[first]
    else:
        g = 1 / ratio
        scale, size = 1 / g, -np.sqrt(1 - g**2) / g
    noise = (z - column(scale) * z_a) / column(size)
    if wrong == "target":
        noise = x0
    asked = level - 1 if wrong == "index" else level
    expected = np.mean((network.network.numpy(z_s, asked) - noise) ** 2)
    assert close(found, expected) == (wrong is None)


@pytest.mark.parametrize("target", ["ddim", "diffused"])
def test_the_sampler_takes_the_published_steps(target):
    """Against the formulas with their divisions: z_e^ = l_s z + n_s eps, v = (z_e^ - z) / (e - s)."""
    network = Tiny(0.3, 0.2, 0.4)
    field = WindowedNoisePrediction(NoisePrediction(network, "linear"), 4, target)
    z = rf.randn(5, 2, 3, seed=1, dtype=torch.float64)
    found = rf.sample(field, z, steps=8, grid=WindowGrid(4))
    x = z.numpy()
    for j in range(8):
        s = 1 - j / 8
        a = np.ceil(s * 4) / 4
        e = a - 0.25
        bar_a, bar_e = (ALPHA[max(round(1000 * v) - 1, 0)] ** 2 for v in (a, e))
        scale = np.sqrt(bar_e / bar_a)
        size = np.sqrt(1 - bar_e) - np.sqrt(bar_e * (1 - bar_a) / bar_a)
        if target == "diffused":
            size = -np.sqrt(1 - bar_a / bar_e) / np.sqrt(bar_a / bar_e)
        below = scale * (s - a) + (e - s)
        end = scale * (e - a) / below * x + size * (e - s) / below * network.numpy(x, 1000 * s)
        x = x - (end - x) / (e - s) / 8
    np.testing.assert_allclose(found.detach().numpy(), x, rtol=1e-10)
    # float32 times fall into the same windows, whose coefficients are the same.
    narrow = rf.sample(field, z.float(), steps=8, grid=WindowGrid(4))
    np.testing.assert_allclose(narrow.detach().numpy(), x, rtol=1e-4, atol=1e-4)
    assert field(z, torch.ones(5, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("target", ["ddim", "diffused"])
def test_the_sampler_follows_the_lines_of_the_objective(target):
    """A network that answers with the objective's own noise* moves z_a to z_e, wherever it is asked."""
    origin = NoisePrediction(Tiny(-0.2, 0.5, 0.3), "linear").requires_grad_(False)
    recipe = PeRFlow(train=TRAIN, epsilon_target=target)
    objective = recipe.objective(Setting(Table(), TRAIN, teacher=origin))
    batch = objective.batch(STEP)

    class Answer(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, k):
            return self.value

    window = (batch["t"] * 4).floor() / 4
    z_a, top, _ = objective.states({**batch, "t": window})
    velocities = []
    for share in (0.0, 0.3, 0.6):
        z, level, noise = objective.states({**batch, "t": window + share / 4})
        field = WindowedNoisePrediction(NoisePrediction(Answer(noise), "linear"), 4, target)
        velocities.append(field(z, 1 - level.double() / 1000))
        torch.testing.assert_close(velocities[-1], velocities[0], rtol=1e-9, atol=1e-9)
        travelled = column((top - level).double().numpy() / 1000)
        torch.testing.assert_close(
            z_a + velocities[0] * torch.from_numpy(travelled), z, rtol=1e-11, atol=1e-11
        )


def test_window_grids():
    grid = WindowGrid(4)
    assert grid.times(4, 0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grid.times(1, 0.0, 1.0) == grid.times(4, 0.0, 1.0)
    assert grid.times(6, 0.0, 1.0) == [0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0]
    assert (
        rf.sample(lambda x, t: x, torch.ones(1, 1), steps=2, grid=grid, return_info=True).nfe == 4
    )
    for call, message in (
        (lambda: WindowGrid(0), "WindowGrid: windows must be at least 1; got 0"),
        (lambda: grid.times(None, 0.0, 1.0), "steps must be given"),
        (lambda: grid.times(4, 0.1, 1.0), "t_start and t_end must be 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="windows must be a whole number"):
        WindowGrid(2.0)


MEAN, WIDTH = torch.tensor([[2.0, -1.0]]), 0.4
# Known in closed form: N(0, I) to N(m, c^2 I) sends x0 to m + c x0, along curves.
GAUSSIAN = GaussianMixtureFlow(MEAN, WIDTH)


def miss(field, x0):
    """Root mean square distance from the exact ends, after one step in each of two windows."""
    with torch.no_grad():
        end = rf.sample(field, x0, steps=2, grid=WindowGrid(2))
    return (end - MEAN - WIDTH * x0).square().mean().sqrt()


def test_a_velocity_student_needs_a_step_a_window():
    """Two steps of the teacher miss the ends, two of the student, one in each window, do not."""
    train = TrainConfig(
        steps=250, batch_size=128, learning_rate=1e-2, ema_decay=0.95, holdout=0.0, log_every=250
    )
    origin, x0 = Exact(), rf.randn(500, 2, seed=11)
    recipe = PeRFlow(train=train, windows=2, teacher_steps=4, teacher_solver="midpoint")
    data = GAUSSIAN.sample(2000, seed=3)
    result = train_recipe(recipe, TwoWindows(), data, teacher=origin)
    assert miss(result.ema, x0) < 0.06 < 0.2 < miss(origin, x0)


def test_the_noise_to_learn_needs_a_step_a_window():
    """The best answer at the windows' starts, here affine in the state and found by least squares, takes
    one step a window to the ends; a network learns it."""
    source = Table(shape=(2,))
    source.x1, source.x0 = (
        GAUSSIAN.sample(10 * BATCH, seed=3, dtype=torch.float64),
        rf.randn(10 * BATCH, 2, seed=2, dtype=torch.float64),
    )
    origin = exact_teacher(GAUSSIAN)
    recipe = PeRFlow(train=TRAIN, windows=2, teacher_steps=100)
    objective = recipe.objective(Setting(source, TRAIN, teacher=origin))
    maps = {}
    for t in (0.0, 0.5):
        batch = {"x0": source.x0, "x1": source.x1, "t": torch.full((10 * BATCH,), t)}
        z, level, noise = objective.states(batch)
        affine = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
        maps[int(level[0])] = torch.linalg.lstsq(affine, noise).solution

    class Affine(nn.Module):
        def forward(self, x, k):
            return torch.cat([x, torch.ones(len(x), 1)], 1) @ maps[round(float(k[0]))].float()

    learnt = WindowedNoisePrediction(NoisePrediction(Affine(), "linear"), 2)
    # The data end is the schedule's first index, where 3 % of noise are left.
    assert miss(learnt, rf.randn(500, 2, seed=11)) < 0.06

    train = TrainConfig(steps=80, batch_size=128, learning_rate=1e-2, ema_decay=0.9, log_every=80)
    recipe = PeRFlow(train=train, windows=2, teacher_steps=4)
    data, network = GAUSSIAN.sample(1000, seed=3), student("epsilon")
    result = train_recipe(recipe, network, data, teacher=origin)
    assert result.metrics[-1]["holdout_loss"] < 0.3  # 1 for a network that answers 0


class TwoWindows(nn.Module):
    """A network for each of two windows: the field that PeRFlow asks for jumps between them, which one
    small network of smooth time features rounds off."""

    def __init__(self):
        super().__init__()
        self.each = nn.ModuleList(
            models.build("mlp", seed=n, sample_shape=(2,), width=32, depth=1) for n in (1, 2)
        )

    def forward(self, x, t):
        first = (t < 0.5).float()[:, None]
        return first * self.each[0](x, t) + (1 - first) * self.each[1](x, t)


class Exact(nn.Module):
    """The Gaussian's velocity field as a network."""

    def __init__(self):
        super().__init__()
        self.unused, self.sample_shape = nn.Parameter(torch.zeros(1)), (2,)

    def forward(self, x, t):
        return GAUSSIAN(x, t)


def test_bad_options():
    assert RECIPES["perflow"] is PeRFlow
    for make, message in (
        (lambda: PeRFlow(windows=0), "windows: must be at least 1"),
        (lambda: PeRFlow(teacher_solver="dopri5"), "teacher_solver: must take fixed steps"),
        (lambda: PeRFlow(epsilon_target="b"), "epsilon_target: must be one of ddim, diffused"),
        (lambda: PeRFlow(train=TrainConfig(path="vp")), "train.path: windows are cut"),
        (
            lambda: WindowedNoisePrediction(student("v")),
            "prediction: must predict epsilon; got 'v'",
        ),
        (lambda: WindowedNoisePrediction(student("epsilon"), 3), "windows: must divide the sched"),
        (
            lambda: WindowedNoisePrediction(student("epsilon"), 4, "a"),
            "epsilon_target: must be one of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="prediction: must be a NoisePrediction; got Linear"):
        WindowedNoisePrediction(nn.Linear(2, 2))
    data = torch.zeros(20, 2)
    small = TrainConfig(steps=2, batch_size=4, holdout=0.0)
    with pytest.raises(ValueError, match="windows: must divide the schedule's steps, 1000; got 3"):
        train_recipe(
            PeRFlow(windows=3, train=small), student("epsilon"), data, teacher=exact_teacher()
        )
    with pytest.raises(TypeError, match="prediction: must be a NoisePrediction; got MLPVelocity"):
        train_recipe(
            PeRFlow(train=small), student("epsilon").network.inner, data, teacher=exact_teacher()
        )
    assert TRAIN.batch_size == BATCH
