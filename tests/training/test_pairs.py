"""The pair store: noise drawn again, shards resumed, damage found, and a teacher whose ends are
known."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import rfkernels as rf
from rfkernels import models
from rfkernels.flow import GaussianMixtureFlow
from rfkernels.training import PairStore, make_pairs, model_hash


def shift(x, t):
    """Straight lines: every end is its noise plus 3."""
    return torch.full_like(x, 3.0)


OPTIONS = {"seed": 9, "solver": "euler", "steps": 2, "batch": 4}


def make(folder, velocity=shift, count=10, **options):
    return make_pairs(velocity, count, (2,), folder=folder, **{**OPTIONS, **options})


def test_noise_is_drawn_again_and_never_stored(tmp_path):
    pairs = make(tmp_path / "p")
    assert len(pairs) == 10
    index = torch.tensor([7, 0, 7, 9])
    x0, x1, condition = pairs.batch(index)
    assert condition == {}
    torch.testing.assert_close(x1, x0 + 3)
    for row, i in zip(x0, index.tolist(), strict=True):
        assert torch.equal(row, rf.randn(2, seed=9, offset=i))
    for file in sorted((tmp_path / "p").glob("shard-*")):
        assert load_file(file).keys() == {"x1", "index"}
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["seed"] == 9
    assert (manifest["count"], manifest["shape"], manifest["solver"]) == (10, [2], "euler")
    assert manifest["x0"] == "drawn"


def test_pairs_do_not_depend_on_the_batch(tmp_path):
    one, other = make(tmp_path / "a", batch=3), make(tmp_path / "b", batch=10)
    assert torch.equal(one.x1, other.x1)


def test_ends_lie_where_the_closed_form_says(tmp_path):
    """N(0, I) to N(m, s^2 I): x1 = m + s x0 exactly."""
    flow = GaussianMixtureFlow(torch.tensor([[1.0, -2.0]]), 0.5)
    pairs = make(tmp_path / "p", flow.velocity, solver="heun", steps=200, batch=10)
    x0, x1, _ = pairs.batch(torch.arange(10))
    torch.testing.assert_close(x1, torch.tensor([1.0, -2.0]) + 0.5 * x0, atol=2e-3, rtol=0)


def test_labels_and_guidance_reach_the_teacher_and_the_store(tmp_path):
    def velocity(x, t, y=None):
        return torch.zeros_like(x) if y is None else y[:, None].float().expand_as(x)

    labels = torch.arange(10) % 3
    x0, x1, condition = make(tmp_path / "a", velocity, labels=labels).batch(torch.arange(10))
    assert torch.equal(condition["y"], labels)
    torch.testing.assert_close(x1 - x0, labels[:, None].float().expand(10, 2))
    guided = make(tmp_path / "b", velocity, labels=labels, guidance_scale=2.0)
    x0, x1, _ = guided.batch(torch.arange(10))
    torch.testing.assert_close(x1 - x0, 2.0 * labels[:, None].float().expand(10, 2))


def test_interrupted_store_is_finished(tmp_path):
    calls = []

    def counting(x, t):
        calls.append(len(x))
        return shift(x, t)

    whole = make(tmp_path / "whole")
    make(tmp_path / "p")
    (tmp_path / "p" / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs: 1 of 3 shards are missing.*resume=True"):
        PairStore(tmp_path / "p")
    pairs = make(tmp_path / "p", counting)
    assert calls == [1, 1, 4, 4]  # two steps: one pair to try, then only the missing shard
    assert torch.equal(pairs.x1, whole.x1)
    (tmp_path / "p" / ".shard-00002.safetensors.5.tmp").write_bytes(b"half")
    assert torch.equal(make(tmp_path / "p").x1, whole.x1)


def _wrong_rows(file):
    save_file({"x1": torch.zeros(4, 2), "index": torch.arange(4)}, file)


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b"torn"), _wrong_rows])
def test_damaged_shard_is_an_error_and_is_made_again(tmp_path, damage, caplog):
    whole = make(tmp_path / "p").x1
    file = tmp_path / "p" / "shard-00001.safetensors"
    damage(file)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: (damaged|does not hold)"):
        PairStore(tmp_path / "p")
    with caplog.at_level(logging.WARNING, logger="rfkernels"):
        assert torch.equal(make(tmp_path / "p").x1, whole)
    assert "making it again" in caplog.text


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 8}, "seed"),
        ({"steps": 3}, "steps"),
        ({"solver": "heun"}, "solver"),
        ({"count": 11}, "count"),
        ({"labels": torch.arange(10)}, "condition_sha256"),
    ],
)
def test_other_arguments_are_not_mixed_in(tmp_path, options, key):
    make(tmp_path / "p")

    def velocity(x, t, y=None):
        return shift(x, t)

    with pytest.raises(ValueError, match=f"was begun with other arguments: {key} is"):
        make(tmp_path / "p", velocity, **options)


def test_another_teacher_is_not_mixed_in(tmp_path):
    one, other = (models.build("mlp", seed=s, sample_shape=(2,), width=8) for s in (0, 1))
    make(tmp_path / "p", one)
    with pytest.raises(ValueError, match="model_sha256 is"):
        make(tmp_path / "p", other)
    assert model_hash(one) == model_hash(models.build("mlp", seed=0, sample_shape=(2,), width=8))
    assert model_hash(shift) is None


def test_nothing_is_overwritten(tmp_path):
    make(tmp_path / "p")
    with pytest.raises(FileExistsError, match="holds pairs already"):
        make(tmp_path / "p", resume=False)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no pairs"):
        make(tmp_path / "q")


def test_space_is_said_first_and_checked(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="rfkernels"):
        make(tmp_path / "p", count=1000, batch=1000)
    assert "1000 pairs need 0.0 MiB" in caplog.text
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=15_999))
    with pytest.raises(OSError, match="1000 pairs need"):
        make(tmp_path / "full", count=1000)  # 16 bytes a pair: 2 float32 and an index
    assert not (tmp_path / "full").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16_000))
    assert len(make(tmp_path / "full", count=1000, batch=500)) == 1000


def test_ctrl_c_keeps_the_finished_shards(tmp_path):
    def velocity(x, t, calls=[]):  # noqa: B006  (counts the calls)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return shift(x, t)

    with pytest.raises(KeyboardInterrupt, match="2 of 3 shards are finished"):
        make(tmp_path / "p", velocity)
    assert len(make(tmp_path / "p")) == 10


def test_teacher_in_training_mode_is_put_back(tmp_path):
    teacher = models.build("mlp", seed=0, sample_shape=(2,), width=8, dropout=0.5).train()
    first = make(tmp_path / "a", teacher)
    assert teacher.training
    assert torch.equal(first.x1, make(tmp_path / "b", teacher.eval()).x1)


def test_flow_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher's flow is not finite for pairs 0 to 3"):
        make(tmp_path / "p", lambda x, t: x * float("inf"))


def test_given_noise_is_read_from_the_store(tmp_path):
    """Pairs whose x0 is no draw (real data inverted, another domain) carry it."""
    pairs = make(tmp_path / "p")
    for n, file in enumerate(sorted(pairs.folder.glob("shard-*"))):
        save_file({**load_file(file), "x0": torch.full_like(load_file(file)["x1"], float(n))}, file)
    x0, _, _ = PairStore(tmp_path / "p").batch(torch.tensor([9, 0, 4]))
    assert x0[:, 0].tolist() == [2.0, 0.0, 1.0]


def test_store_in_mapped_files_gathers_the_same_rows(tmp_path, monkeypatch):
    from rfkernels.training import pairs as room

    labels = torch.arange(10) % 3

    def velocity(x, t, y):
        return shift(x, t) + y[:, None]

    whole = make(tmp_path / "p", velocity, labels=labels)
    monkeypatch.setattr(room, "_IN_MEMORY", 0)
    mapped = PairStore(tmp_path / "p")
    index = torch.tensor([9, 0, 4, 4, 3, 8])
    for a, b in zip(whole.batch(index)[:2], mapped.batch(index)[:2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mapped.batch(index)[2]["y"], labels[index])
    assert torch.equal(mapped.x1, whole.x1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"count": 0}, ValueError, "count: .* must be at least 1"),
        ({"count": 1.5}, TypeError, "count: must be a whole number"),
        ({"labels": torch.zeros(3)}, ValueError, "condition: y must have 10 rows"),
        ({"condition": {"text": "cat"}}, TypeError, "condition: text must be a tensor; got str"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: needs labels or a condition"),
    ],
)
def test_bad_arguments(tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        make(tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()
