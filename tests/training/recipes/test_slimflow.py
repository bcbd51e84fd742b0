"""SlimFlow: its two objectives against NumPy, the identities of annealing, the two-step target on
fields that are known exactly, and a small one-step student of a ring."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels import metrics, models
from rfkernels.data import toy
from rfkernels.flow import GaussianMixtureFlow
from rfkernels.training import TrainConfig, make_pairs, train_recipe
from rfkernels.training.objective import Setting
from rfkernels.training.processes import Processes
from rfkernels.training.recipes import SlimFlowDistill, SlimFlowReflow
from rfkernels.training.recipes.rectified_flow import FlowObjective
from rfkernels.training.recipes.slimflow import two_step_target
from rfkernels.training.sources import ALL, Draw

BATCH, SEED, SHAPE = 64, 5, (2, 3, 4)
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)


class Table:
    """A source of fixed pairs, float64, whose rows are the positions."""

    def __init__(self, shape=SHAPE, count=10 * BATCH, drawn=False):
        self.sample_shape, self.device = shape, torch.device("cpu")
        self.x1 = 2.0 + rf.randn(count, *shape, seed=1, dtype=torch.float64)
        self.x0 = None if drawn else rf.randn(count, *shape, seed=2, dtype=torch.float64)

    def draw(self, start, count, part=ALL):
        rows = torch.arange(start, start + count)[part]
        if self.x0 is None:
            return Draw(self.x1[rows].float(), None, 7, rows, {})
        return Draw(self.x1[rows], self.x0[rows], None, None, {})

    def held_out(self):
        return self.draw(0, 8)


class Tiny(nn.Module):
    """a x + b tanh(x) + c t, in the precision of x; `numpy` is the same function."""

    def __init__(self, a, b, c):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b, c], dtype=torch.float64))

    def forward(self, x, t):
        a, b, c = self.weight
        return a * x + b * torch.tanh(x) + c * t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def numpy(self, x, t):
        a, b, c = self.weight.detach().numpy()
        return a * x + b * np.tanh(x) + c * t.reshape(-1, *[1] * (x.ndim - 1))


def uniforms(purpose, step):
    seed = rf.derive_seed(SEED, purpose)
    return rf.rand(BATCH, seed=seed, offset=step).double().numpy()


def normals(purpose, step, shape=SHAPE):
    index = torch.arange(step * BATCH, (step + 1) * BATCH)
    noise = rf.randn(BATCH, *shape, seed=rf.derive_seed(SEED, purpose), offset=index)
    return noise.double().numpy()


def column(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


def anneal_in_numpy(anneal, k, steps):
    done = k / steps
    return {
        "linear": 1 - min(1, done),
        "exp": math.exp(-done),
        "cosine": (1 + math.cos(math.pi * min(1, done))) / 2,
    }.get(anneal, anneal)


def reflow_in_numpy(source, step, b, flip):
    """(t, x_t, target) by the formulas of the paper's appendix, sample by sample."""
    rows = slice(step * BATCH, (step + 1) * BATCH)
    z, x1 = source.x0[rows].numpy().copy(), source.x1[rows].numpy().copy()
    if flip:
        for i, u in enumerate(uniforms("flip", step)):
            if u < 0.5:
                z[i], x1[i] = z[i, :, :, ::-1].copy(), x1[i, :, :, ::-1].copy()
    zb = math.sqrt(1 - b * b) * z + b * normals("annealing noise", step)
    # Times are the middles of 2^24 cells, rounded to float32.
    t = (uniforms("time", step) + 2.0**-25).astype(np.float32).astype(np.float64)
    at = column(t, x1)
    return t, (1 - at) * zb + at * x1, x1 - zb


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("anneal", "anneal_steps", "step"),
    [("linear", 20, 5), ("exp", 0.3, 4), ("cosine", 0.08, 3), (0.6, 20, 9), ("linear", 3, 7)],
)
def test_reflow_is_what_the_formulas_say(anneal, anneal_steps, step, flip):
    recipe = SlimFlowReflow(anneal=anneal, anneal_steps=anneal_steps, flip=flip, train=TRAIN)
    source, network = Table(), Tiny(0.3, -1.0, 0.5)
    objective = recipe.objective(Setting(source, TRAIN))
    steps = anneal_steps * 100 if isinstance(anneal_steps, float) else anneal_steps
    b = anneal_in_numpy(anneal, step, steps)
    assert recipe.noise_share(step) == pytest.approx(b, abs=1e-15)
    t, xt, target = reflow_in_numpy(source, step, b, flip)
    batch = objective.batch(step)
    np.testing.assert_allclose(batch["t"].numpy(), t, atol=1e-10)
    np.testing.assert_allclose(batch["xt"].numpy(), xt, atol=1e-10)
    np.testing.assert_allclose(batch["target"].numpy(), target, atol=1e-10)
    expected = ((network.numpy(xt, t) - target) ** 2).mean()
    assert objective.loss(network, batch).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("change", [{"anneal": 0.0}, {"anneal": 0.75}, {"flip": False}])
def test_without_its_annealing_or_mirror_it_is_something_else(change):
    right = {"anneal": 0.7, "flip": True, "train": TRAIN}
    source = Table()
    _, xt, target = reflow_in_numpy(source, 2, 0.7, flip=True)
    batch = SlimFlowReflow(**right).objective(Setting(source, TRAIN)).batch(2)
    np.testing.assert_allclose(batch["xt"].numpy(), xt, atol=1e-10)
    wrong = SlimFlowReflow(**{**right, **change}).objective(Setting(source, TRAIN)).batch(2)
    assert np.abs(wrong["xt"].numpy() - xt).max() > 0.05
    assert np.abs(wrong["target"].numpy() - target).max() > 0.05


@pytest.mark.parametrize("drawn", [False, True])
def test_the_ends_of_annealing_are_reflow_and_independent_batches_to_the_bit(drawn):
    source = Table(drawn=drawn)
    reflow = FlowObjective(Setting(source, TRAIN)).batch(3)
    none = SlimFlowReflow(anneal=0.0, train=TRAIN).objective(Setting(source, TRAIN)).batch(3)
    assert all(torch.equal(none[name], reflow[name]) for name in ("t", "xt", "target"))
    full = SlimFlowReflow(anneal=1, train=TRAIN).objective(Setting(source, TRAIN)).batch(3)
    x1 = source.draw(3 * BATCH, BATCH).x1
    seed, index = rf.derive_seed(SEED, "annealing noise"), torch.arange(3 * BATCH, 4 * BATCH)
    xt, target, _ = rf.interpolate(x1, reflow["t"], seed=seed, offset=index)
    assert torch.equal(full["xt"], xt)
    assert torch.equal(full["target"], target)
    # The held-out loss is that of reflow whatever the annealing.
    held = SlimFlowReflow(anneal=1, train=TRAIN).objective(Setting(source, TRAIN)).held_out()
    assert torch.equal(held["xt"], FlowObjective(Setting(source, TRAIN)).held_out()["xt"])


@pytest.mark.parametrize(("b", "correlation"), [(0.3, 0.9539), (0.7, 0.7141)])
def test_annealed_noise_stays_standard_normal(b, correlation):
    train = TrainConfig(batch_size=100_000)
    source = Table((2,), 100_000)
    target = SlimFlowReflow(anneal=b, train=train).objective(Setting(source, train)).batch(0)
    zb, z = (source.x1 - target["target"]).flatten(), source.x0.flatten()
    n = len(z)
    assert zb.var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
    found = torch.corrcoef(torch.stack((zb, z)))[0, 1].item()
    assert found == pytest.approx(correlation, abs=5 * (1 - correlation**2) / math.sqrt(n) + 5e-5)
    assert abs(zb.mean().item()) < 5 / math.sqrt(n)


def distill_in_numpy(source, step, student, teacher, weight, least, most):
    rows = slice(step * BATCH, (step + 1) * BATCH)
    z, x1, zero = source.x0[rows].numpy(), source.x1[rows].numpy(), np.zeros(BATCH)
    first = ((z + student.numpy(z, zero) - x1) ** 2).mean()
    z, r = normals("two-step noise", step), least + (most - least) * uniforms("two-step time", step)
    u, at = student.numpy(z, zero), column(r, z)
    x_r = z + at * u
    y_r = x_r + (1 - at) * teacher.numpy(x_r, r)
    return first + weight * ((z + u - y_r) ** 2).mean()


@pytest.mark.parametrize("distance", ["l2", lambda a, b: (a - b).square().flatten(1).mean(1)])
def test_distillation_is_what_the_formulas_say(distance):
    source, student, teacher = Table(), Tiny(0.3, -1.0, 0.5), Tiny(-0.4, 0.8, 1.0)
    setting = Setting(source, TRAIN, teacher=teacher)

    def loss(**options):
        objective = SlimFlowDistill(distance=distance, train=TRAIN, **options).objective(setting)
        batch = objective.batch(4)
        student.zero_grad()
        value = objective.loss(student, batch)
        value.backward()
        return value.item(), student.weight.grad.clone(), teacher.weight.grad

    value, gradient, of_teacher = loss()
    assert of_teacher is None
    right = distill_in_numpy(source, 4, student, teacher, 1.0, 0.2, 0.8)
    assert value == pytest.approx(right, abs=1e-10)
    assert loss(two_step_weight=0.25, r_range=(0.5, 1.0))[0] == pytest.approx(
        distill_in_numpy(source, 4, student, teacher, 0.25, 0.5, 1.0), abs=1e-10
    )
    for wrong in ({"two_step_weight": 0.0}, {"r_range": (0.0, 1.0)}):
        assert abs(loss(**wrong)[0] - right) > 1e-3
    # The target is a constant: its gradient is that with the target's own student frozen.
    fresh = torch.from_numpy(normals("two-step noise", 4))
    frozen = Tiny(*student.weight.tolist())
    r = torch.from_numpy(0.2 + 0.6 * uniforms("two-step time", 4))
    zero = torch.zeros(BATCH)
    target = two_step_target(teacher, fresh, frozen(fresh, zero), r)
    z, x1 = source.x0[4 * BATCH : 5 * BATCH], source.x1[4 * BATCH : 5 * BATCH]
    student.zero_grad()
    expected = (z + student(z, zero) - x1).square().mean()
    (expected + (fresh + student(fresh, zero) - target).square().mean()).backward()
    torch.testing.assert_close(student.weight.grad, gradient, rtol=1e-9, atol=1e-12)


def test_held_out_distance_is_to_the_pairs_alone():
    source, student = Table(), Tiny(0.3, -1.0, 0.5)
    objective = SlimFlowDistill(train=TRAIN).objective(Setting(source, TRAIN))
    z, x1 = source.x0[:8].numpy(), source.x1[:8].numpy()
    expected = ((z + student.numpy(z, np.zeros(8)) - x1) ** 2).mean()
    assert objective.loss(student, objective.held_out()).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "recipe", [SlimFlowReflow(anneal=0.5, flip=True, train=TRAIN), SlimFlowDistill(train=TRAIN)]
)
def test_processes_share_the_samples_of_one(recipe):
    source = Table()
    whole = recipe.objective(Setting(source, TRAIN)).batch(2)
    parts = [
        recipe.objective(Setting(source, TRAIN, processes=Processes(rank, 4))).batch(2)
        for rank in range(4)
    ]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_two_steps_of_a_straight_teacher_are_one():
    mean, scale = 3.0, 0.4  # z -> m + c z along straight lines

    def straight(x, t):
        t = t[:, None]
        return mean + (scale - 1) * (x - t * mean) / (1 - t + t * scale)

    z, r = rf.randn(500, 2, seed=0).double(), rf.rand(500, seed=1).double()
    u = straight(z, torch.zeros(500, dtype=torch.float64))
    torch.testing.assert_close(two_step_target(straight, z, u, r), z + u, rtol=0, atol=1e-12)
    assert not two_step_target(straight, z, u.requires_grad_(), r).requires_grad


def ring_flow():
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixtureFlow(4 * torch.stack((angle.cos(), angle.sin()), dim=1), 0.5)


def test_two_steps_are_better_than_one_on_a_curved_field():
    """Root mean square errors to the end of the ODE, and why r keeps off the ends."""
    ring, count = ring_flow(), 8_000
    z, uniform = rf.randn(count, 2, seed=0).double(), rf.rand(count, seed=1).double()
    end = rf.sample(ring, z, steps=30, solver="rk4")
    u = ring(z, torch.zeros(count, dtype=torch.float64))

    def error(y):
        return (y - end).square().sum(1).mean().sqrt().item()

    assert error(z + u) == pytest.approx(4.06, rel=0.01)
    assert error(two_step_target(ring, z, u, 0.2 + 0.6 * uniform)) == pytest.approx(1.87, rel=0.03)
    assert error(two_step_target(ring, z, u, uniform)) == pytest.approx(2.65, rel=0.03)


class RingField(nn.Module):
    """The exact flow to the ring as a network; a teacher needs weights to be copied."""

    sample_shape = (2,)

    def __init__(self):
        super().__init__()
        self.field, self.weight = ring_flow(), nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.weight * self.field(x, t)


def test_a_small_student_learns_to_draw_in_one_step(tmp_path):
    """Measured, one step: energy distance 2.6 for the exact field, .009 after annealed reflow, .008
    after distillation; error to the end of the ODE 4.06, .47, .44."""
    pairs = make_pairs(RingField(), 4000, (2,), folder=tmp_path / "pairs", steps=16, batch=4000)
    loop = {"batch_size": 128, "ema_decay": 0.99}
    small = models.build("mlp", seed=0, sample_shape=(2,), width=48, depth=2)
    recipe = SlimFlowReflow(train=TrainConfig(steps=500, learning_rate=5e-3, **loop))
    second = train_recipe(recipe, small, teacher=RingField(), pairs=pairs)
    recipe = SlimFlowDistill(train=TrainConfig(steps=200, learning_rate=2e-3, **loop))
    final = train_recipe(recipe, teacher=second, pairs=pairs, run=tmp_path / "run")
    noise, real = rf.randn(4000, 2, seed=9), toy("ring", size=4000, seed=1).x
    end = rf.sample(ring_flow(), noise, steps=40, solver="heun")
    energy, error = {}, {}
    for name, field in (("exact", ring_flow()), ("2-RF", second.ema), ("final", final.ema)):
        x = rf.sample(field, noise, steps=1)
        energy[name] = float(metrics.energy_distance(x, real))
        error[name] = (x - end).square().sum(1).mean().sqrt().item()
    assert energy["exact"] > 1.0
    assert energy["2-RF"] < 0.02
    assert energy["final"] < 0.02
    assert error["final"] < error["2-RF"] < 0.7
    loaded = rf.load(tmp_path / "run")
    assert loaded.kind == "slimflow-distill"
    assert loaded.config == recipe


def test_distillation_resumes_to_the_bit(tmp_path):
    network = models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1)
    loop = {"steps": 6, "batch_size": 16, "warmup_steps": 2, "holdout": 0.0}
    recipe = SlimFlowDistill(
        pairs=40, pair_steps=1, train=TrainConfig(**loop, checkpoint_every=3, keep_checkpoints=9)
    )
    whole = train_recipe(recipe, teacher=network, run=tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "step-6").iterdir():
        file.unlink()
    (tmp_path / "run" / "checkpoints" / "step-6").rmdir()
    again = train_recipe(recipe, teacher=network, run=tmp_path / "run", resume=True)
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, again.ema.state_dict()[name]), name


@pytest.mark.parametrize(
    ("recipe", "options", "error", "said"),
    [
        (SlimFlowReflow, {"anneal": "square"}, ValueError, "anneal: must be one of linear, exp"),
        (SlimFlowReflow, {"anneal": 1.5}, ValueError, r"anneal: must be in \[0, 1\]; got 1.5"),
        (SlimFlowReflow, {"anneal": None}, TypeError, "anneal: must be a number; got None"),
        (SlimFlowReflow, {"anneal_steps": 0}, ValueError, "anneal_steps: must be at least 1"),
        (SlimFlowReflow, {"anneal_steps": 1.5}, ValueError, "anneal_steps: a fraction of the run"),
        (SlimFlowReflow, {"flip": 1}, TypeError, "flip: must be true or false; got 1"),
        (SlimFlowDistill, {"distance": "l1"}, ValueError, "distance: must be 'l2' or a callable"),
        (SlimFlowDistill, {"two_step_weight": -1}, ValueError, "two_step_weight: must not be neg"),
        (SlimFlowDistill, {"r_range": (0.8, 0.2)}, ValueError, "r_range: must be 0 <= least"),
        (SlimFlowDistill, {"r_range": 0.5}, ValueError, "r_range: must be two numbers; got 0.5"),
        (SlimFlowDistill, {"train": TrainConfig(path="vp")}, ValueError, "train.path: a student"),
    ],
)
def test_bad_options_are_refused(recipe, options, error, said):
    with pytest.raises(error, match=said):
        recipe(**options)


def test_points_have_no_mirror():
    recipe = SlimFlowReflow(flip=True, train=TRAIN)
    with pytest.raises(ValueError, match=r"flip: needs images \(C, H, W\); got \(2,\)"):
        recipe.objective(Setting(Table((2,)), TRAIN))
