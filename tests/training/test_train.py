"""The loop: its arithmetic against a plain transcription, and the options against their meaning."""

import math

import pytest
import torch
from small_runs import Recorder, data, network, small, weights
from torch import nn

import rfkernels as rf
from rfkernels.data import Dataset, Rows, split, toy
from rfkernels.training import (
    ReflowConfig,
    TrainConfig,
    TrainingDivergedError,
    reflow,
    train_flow,
)
from rfkernels.training.sources import DataSource


def test_a_run_is_what_a_plain_loop_computes():
    """Every ingredient written out with torch alone, apart from the counter-based draws."""
    samples, config = data(), small(holdout=0.0, clip_norm=0.5, weight_decay=0.1, ema_decay=0.9)
    result = train_flow(network(), samples, config)

    model, seed = network(), config.seed
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=config.betas, weight_decay=0.1, fused=False, foreach=False
    )
    orders = [
        torch.argsort(
            (torch.tensor(2.0**24) * rf.rand(120, seed=rf.derive_seed(seed, "shuffle"), offset=e))
            .long()
            .reshape(2, 60)
            .mul(torch.tensor([[2**24], [1]]))
            .sum(0)
        )
        for e in range(4)
    ]
    rows, losses = torch.cat(orders), []
    for step in range(config.steps):
        place = torch.arange(step * 16, step * 16 + 16)
        x1 = samples.x[rows[place]]
        x0 = torch.stack(
            [rf.randn(2, seed=rf.derive_seed(seed, "noise"), offset=int(i)) for i in place]
        )
        t = rf.rand(16, seed=rf.derive_seed(seed, "time"), offset=step)
        xt = t[:, None] * x1 + (1 - t[:, None]) * x0
        loss = (model(xt, t) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warm = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        optimizer.param_groups[0]["lr"] = 1e-2 * warm
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
        losses.append(loss.item())

    torch.testing.assert_close(weights(result.model), weights(model), rtol=1e-4, atol=1e-5)
    expected = torch.cat([a.flatten().double() for a in average.values()])
    torch.testing.assert_close(weights(result.ema), expected, rtol=1e-4, atol=1e-5)
    logged = [entry["loss"] for entry in result.metrics]
    assert logged == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)], rel=1e-4)


def test_accumulation_gives_the_big_batch():
    whole = train_flow(network(), data(), small())
    parts = train_flow(network(), data(), small(accumulate=4))
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-3, atol=1e-5)
    assert parts.metrics[-1]["loss"] == pytest.approx(whole.metrics[-1]["loss"], rel=1e-4)
    # ... and is no repetition of the same samples: a batch of a quarter gives something else.
    other = train_flow(network(), data(), small(batch_size=4))
    assert (weights(other.model) - weights(whole.model)).abs().max() > 1e-2


def test_same_seed_same_bits_and_the_global_state_is_left_alone():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = train_flow(network(dropout=0.3), data(), small())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    second = train_flow(network(dropout=0.3), data(), small())
    assert torch.equal(weights(first.model), weights(second.model))
    other = train_flow(network(dropout=0.3), data(), small(seed=1))
    assert not torch.equal(weights(first.model), weights(other.model))


def test_every_sample_is_seen_once_an_epoch():
    samples = Dataset(torch.arange(50.0)[:, None])
    source = DataSource(
        samples,
        x0=None,
        coupling="independent",
        seed=3,
        holdout=0.0,
        conditional=False,
        device=torch.device("cpu"),
    )
    seen = torch.cat([source.draw(i * 20, 20).x1[:, 0] for i in range(5)])
    assert seen[:50].sort().values.tolist() == list(range(50))
    assert seen[50:].sort().values.tolist() == list(range(50))
    assert not torch.equal(seen[:50], seen[50:])
    # A batch may be larger than the data.
    assert source.draw(0, 100).x1.shape == (100, 1)


def test_label_dropout():
    labels = torch.arange(100) % 5
    samples = Dataset(labels[:, None].float().repeat(1, 2), labels)
    config = TrainConfig(steps=50, batch_size=64, label_dropout=0.25, holdout=0.0)
    model = Recorder()
    train_flow(model, samples, config)
    dropped = (torch.cat(model.labels) == 5).float()
    assert dropped.mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 3200))
    model = Recorder()
    train_flow(model, samples, small(holdout=0.0))
    assert (torch.cat(model.labels) < 5).all()


def test_label_dropout_needs_a_null_label():
    for model, samples, message in (
        (network(), data(), "label_dropout: needs a conditional network and labels"),
        (network(2), Dataset(data().x), "label_dropout: needs a conditional network and labels"),
    ):
        with pytest.raises(ValueError, match=message):
            train_flow(model, samples, small(label_dropout=0.1))
    mine = Recorder()
    mine.null_label = None
    with pytest.raises(ValueError, match="attribute null_label; Recorder has none"):
        train_flow(mine, data(), small(label_dropout=0.1, conditional=True))


@pytest.mark.parametrize("name", ["uniform", "logit-normal"])
def test_times_follow_the_distribution_and_time_max(name):
    model = Recorder()
    config = TrainConfig(steps=40, batch_size=64, time_distribution=name, time_max=0.5, holdout=0.0)
    train_flow(model, data(), config)
    times = torch.cat(model.times)
    assert times.min() >= 0
    assert 0.45 < times.max() <= 0.5
    below = (times < 0.125).float().mean().item()
    # P(t < 1/4): 1/4 for the uniform, Phi(logit 1/4) = 0.136 for the logit-normal.
    truth = {"uniform": 0.25, "logit-normal": 0.136}[name]
    assert below == pytest.approx(truth, abs=5 * math.sqrt(truth * (1 - truth) / 2560))


def test_held_out_loss_is_that_of_the_split():
    samples, config = data(), small(holdout=0.25)
    result = train_flow(network(), samples, config)
    held = split(samples, 0.25, config.seed)[1].x
    t = (torch.arange(len(held)) + 0.5) / len(held)
    x0 = rf.randn(
        *held.shape, seed=rf.derive_seed(0, "holdout noise"), offset=torch.arange(len(held))
    )
    xt = t[:, None] * held + (1 - t[:, None]) * x0
    with torch.no_grad():
        loss = (result.ema(xt, t) - (held - x0)).square().mean().item()
    assert result.metrics[-1]["holdout_loss"] == pytest.approx(loss, rel=1e-4)
    assert "holdout_loss" not in train_flow(network(), samples, small(holdout=0.0)).metrics[-1]


@pytest.mark.parametrize("path", ["linear", "trigonometric", "vp", "sub-vp"])
@pytest.mark.parametrize("loss", ["mse", "pseudo_huber"])
def test_paths_and_losses_run(path, loss):
    result = train_flow(network(), data(), small(path=path, loss=loss))
    assert math.isfinite(result.metrics[-1]["loss"])


def test_options_change_what_is_trained():
    base = weights(train_flow(network(), data(), small()).model)
    for options in (
        {"coupling": "ot"},
        {"autocast": "bfloat16"},
        {"path": "trigonometric"},
        {"loss": "pseudo_huber_elementwise"},
        {"time_distribution": "u-shaped"},
        {"weight_decay": 0.5},
        {"clip_norm": 1e-3},
        {"schedule": "constant"},
    ):
        other = weights(train_flow(network(), data(), small(**options)).model)
        assert not torch.equal(other, base), options


def test_couplings_with_a_second_data_set():
    left, right = torch.randn(40, 2), 10 + torch.randn(40, 2)

    def source(coupling):
        return DataSource(
            Dataset(right),
            x0=Dataset(left),
            coupling=coupling,
            seed=0,
            holdout=0.0,
            conditional=False,
            device=torch.device("cpu"),
        )

    given = source("given").draw(0, 40)
    pairs = {tuple(r.tolist()): tuple(a.tolist()) for a, r in zip(left, right, strict=True)}
    assert all(
        pairs[tuple(b.tolist())] == tuple(a.tolist())
        for a, b in zip(given.x0, given.x1, strict=True)
    )
    free, moved = source("independent").draw(0, 40), source("ot").draw(0, 40)
    assert torch.equal(free.x1, moved.x1)
    assert torch.equal(free.x0.sort(0).values, moved.x0.sort(0).values)
    cost = [(d.x1 - d.x0).square().sum().item() for d in (given, free, moved)]
    assert cost[2] < min(cost[:2])
    for options, message in (
        ({"x0": torch.randn(30, 3)}, "x0: samples must have the shape"),
        ({"config": small(coupling="given")}, 'coupling: "given" needs x0'),
        ({"x0": torch.randn(30, 2), "config": small(coupling="given")}, "as many rows in x0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_flow(network(), Dataset(right), **{"config": small(), **options})


def test_domain_transfer_learns_the_shift():
    left = torch.randn(500, 2)
    config = TrainConfig(steps=150, batch_size=64, learning_rate=1e-2, ema_decay=0.9)
    result = train_flow(network(), left + 3.0, config, x0=left)
    moved = rf.sample(result.ema, torch.randn(300, 2), steps=8)
    torch.testing.assert_close(moved.mean(0), torch.full((2,), 3.0), atol=0.5, rtol=0)


def test_endless_streams_train_and_hold_out():
    result = train_flow(network(), toy("ring"), small())
    assert math.isfinite(result.metrics[-1]["holdout_loss"])
    assert result.num_classes is None
    assert train_flow(network(8), toy("ring"), small(label_dropout=0.1)).num_classes == 8


def test_two_streams_are_independent():
    source = DataSource(
        toy("ring"),
        x0=toy("ring"),
        coupling="independent",
        seed=0,
        holdout=0.1,
        conditional=True,
        device=torch.device("cpu"),
    )
    draw = source.draw(0, 4000)
    assert torch.equal(draw.x1, toy("ring", 4000).x)
    assert torch.equal(draw.condition["y"], toy("ring", 4000).labels)
    correlation = torch.corrcoef(torch.cat([draw.x0, draw.x1], dim=1).T)[:2, 2:]
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_a_data_set_of_the_users_own():
    class Squares:
        name, size, sample_shape, has_labels = "squares", 30, (2,), False

        def rows(self, index):
            assert index.max() < 30
            return Rows(index[:, None].float().repeat(1, 2) / 30, None)

    mine = train_flow(network(), Squares(), small(holdout=0.2))
    same = train_flow(network(), Squares().rows(torch.arange(30)).x, small(holdout=0.2))
    assert torch.equal(weights(mine.model), weights(same.model))


def test_grad_mode_of_the_caller():
    with torch.no_grad():
        quiet = train_flow(network(), data(), small())
    assert torch.equal(weights(quiet.model), weights(train_flow(network(), data(), small()).model))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch.inference_mode"):
        train_flow(network(), data(), small())


@pytest.mark.parametrize("endless", [False, True])
def test_a_default_device_does_not_matter(tmp_path, endless):
    """Rows are counted on the CPU; with CUDA as the default device every run, and the pairs of a reflow, failed."""
    expected, samples = train_flow(network(), toy("ring") if endless else data(), small()), data()
    model = network()
    with torch.device("meta"):
        found = train_flow(
            model, toy("ring") if endless else samples, small(), run=tmp_path / "run"
        )
        straight = reflow(
            found, ReflowConfig(pairs=64, pair_steps=2, train=small()), run=tmp_path / "reflow"
        )
    assert torch.equal(weights(found.model), weights(expected.model))
    assert straight.metrics[-1]["step"] == 12


class Broken(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.inner, self.calls, self.step = nn.Linear(2, 2), 0, step

    def forward(self, x, t):
        self.calls += self.training
        return self.inner(x) * (float("nan") if self.calls >= self.step else 1.0)


@pytest.mark.parametrize("step", [1, 8, 12])
def test_nan_stops_the_run_and_is_never_saved(tmp_path, step):
    with pytest.raises(
        TrainingDivergedError, match=r"stopped being finite.*last good checkpoint is step"
    ):
        train_flow(Broken(step), data(), small(), run=tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == (["step-0"] if step <= 6 else ["step-0", "step-6"])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "nan" not in metrics.lower()


def test_bad_networks_are_refused_before_anything_is_written(tmp_path):
    class Wrong(nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    cases = [
        (
            Wrong(2, 3),
            ValueError,
            r"model: must return a tensor of the shape of x, \(2, 2\); got \(2, 3\)",
        ),
        (Wrong(3, 2), ValueError, r"model: cannot take the samples \(x \(2, 2\), t\)"),
        (nn.Identity(), ValueError, "model: has no weights to train"),
        (lambda x, t: x, TypeError, "model: must be a torch.nn.Module; got function"),
        (network(2), ValueError, "labels must be below the network's num_classes, 2; got 4"),
    ]
    labelled = (torch.randn(50, 2), torch.arange(50) % 5)
    for model, kind, message in cases:
        with pytest.raises(kind, match=message):
            train_flow(model, labelled, small(), run=tmp_path / "run")
    with pytest.raises(TypeError, match="config: must be a TrainConfig; got dict"):
        train_flow(network(), data(), {"steps": 3}, run=tmp_path / "run")
    with pytest.raises(ValueError, match="conditional: True needs data with labels"):
        train_flow(network(2), data().x, small(conditional=True), run=tmp_path / "run")
    with pytest.raises(ValueError, match="sample_every: writes files"):
        train_flow(network(), data(), small(sample_every=5))
    assert not (tmp_path / "run").exists()


def test_buffers_reach_the_average():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x, t):
            if self.training:
                self.calls += 1
            return self.inner(x)

    result = train_flow(Counting(), data(), small())
    assert result.ema.calls == result.model.calls == 12
