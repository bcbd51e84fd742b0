"""`rfkernels train --recipe`: tiny runs from end to end, going on with them, and what is refused."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rfkernels import derive_seed, models, training
from rfkernels.cli.distances import NamedDistance
from rfkernels.cli.main import main
from rfkernels.cli.recipes import _like_teacher, _objects, summary
from rfkernels.training import OwnObject
from rfkernels.training.recipes import RECIPES, SlimFlowReflow

MLP = ["--model", "mlp", "--model-option", "width=16", "--model-option", "depth=1"]
TINY = ["--batch-size", "16", "--steps", "4", "--quiet"]
PAIRS = ["--recipe-option", "pairs=32", "--recipe-option", "pair_steps=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """a: a conditional teacher; b: a smaller annealed 2-RF of it; c: its one-step distillation."""
    folder = tmp_path_factory.mktemp("runs")
    a, b, c = (str(folder / name) for name in "abc")
    wider = ["--model-option", "width=24", "--model-option", "depth=1"]
    assert main(["train", "--dataset", "digits", "--conditional", "--run", a, *wider, *TINY]) == 0
    options = [*PAIRS, "--recipe-option", "anneal=cosine", "--set", "checkpoint_every=2"]
    slim = ["train", "--recipe", "slimflow-reflow", "--teacher", a, "--run", b]
    assert main([*slim, *MLP, *options, *TINY]) == 0
    distill = [
        "train",
        "--recipe",
        "slimflow-distill",
        "--teacher",
        b,
        "--pairs-from",
        f"{b}/pairs",
    ]
    named = ["--recipe-option", "distance=perceptual:random-conv", "--set", "checkpoint_every=2"]
    assert main([*distill, "--run", c, *named, *TINY]) == 0
    return folder


def averaged(run):
    return load_file(run / "checkpoints" / "step-4" / "ema.safetensors")


def undo_last(run):
    last = run / "checkpoints" / "step-4"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_listed_and_round_trips(name, capsys):
    cls = RECIPES[name]
    needed = _objects(cls)  # no JSON makes these; config.json names them
    recipe = cls(**{option: OwnObject("mine.own") for option in needed})
    again = training.from_dict(cls, json.loads(json.dumps(training.to_dict(recipe))))
    for field in dataclasses.fields(cls):
        if field.name not in needed:
            assert getattr(again, field.name) == getattr(recipe, field.name), field.name
    assert recipe.name == name
    line = summary(cls)
    assert 20 < len(line) < 180
    assert line.endswith(".")
    assert main(["train", "--recipe", "list"]) == 0
    assert any(
        said.startswith(name) and said.endswith(line)
        for said in capsys.readouterr().out.splitlines()
    )


def test_what_the_runs_are(runs):
    said = {name: json.loads((runs / name / "config.json").read_text()) for name in "abc"}
    assert [said[n]["kind"] for n in "abc"] == ["train", "slimflow-reflow", "slimflow-distill"]
    assert said["b"]["model"]["options"]["width"] == 16
    assert said["b"]["model"]["options"]["num_classes"] == 10  # as the teacher's
    assert said["b"]["config"]["anneal"] == "cosine"
    assert said["c"]["model"] == said["b"]["model"]  # a copy of the teacher
    assert said["c"]["config"]["distance"]["name"] == "perceptual:random-conv"
    assert said["c"]["config"]["train"]["learning_rate"] == 1e-3  # the recipe's own default
    assert (runs / "b" / "pairs").is_dir()
    assert not (runs / "c" / "pairs").exists()


def test_the_command_trains_what_python_trains(runs):
    network = models.build(
        "mlp",
        seed=derive_seed(0, "init"),
        sample_shape=(1, 8, 8),
        width=16,
        depth=1,
        num_classes=10,
    )
    train = training.TrainConfig(steps=4, batch_size=16)
    recipe = SlimFlowReflow(pairs=32, pair_steps=1, anneal="cosine", train=train)
    result = training.train_recipe(recipe, network, teacher=runs / "a")
    ours = averaged(runs / "b")
    assert all(torch.equal(value, ours[name]) for name, value in result.ema.state_dict().items())


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_run_goes_on_without_its_options(runs, name):
    """The teacher and files are said again; the recipe, its options and its distance are not."""
    before = averaged(runs / name)
    undo_last(runs / name)
    again = {"b": ["--teacher", runs / "a"], "c": ["--teacher", runs / "b", "--pairs-from"]}[name]
    again = [*map(str, again), *([str(runs / "b" / "pairs")] if name == "c" else [])]
    assert main(["train", "--run", str(runs / name), "--resume", "--quiet", *again]) == 0
    after = averaged(runs / name)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_stopped_while_making_pairs_it_goes_on_with_the_printed_command(
    runs, tmp_path, capsys, monkeypatch
):
    """No checkpoint holds the network yet: it is made again, here as the teacher's copy."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ["--recipe", "slimflow-reflow", "--teacher", str(runs / "a"), *PAIRS, *TINY]
    assert main(["train", "--run", str(whole), *words]) == 0

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["rfkernels.training.pair_run"], "teacher_pairs", stopped)
        assert main(["train", "--run", str(run), *words]) == 130
    printed = capsys.readouterr().out.strip().splitlines()[-1].partition("to go on: rfkernels ")[2]
    assert printed
    assert main([*shlex.split(printed), "--quiet"]) == 0
    ours, theirs = averaged(run), averaged(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_flow_map_by_the_command(runs, tmp_path):
    """A recipe on data: the network takes spans, and `sample` has the run's own solver."""
    run = tmp_path / "run"
    words = ["--recipe", "meanflow", "--dataset", "digits", *MLP, "--run", str(run)]
    assert main(["train", *words, *TINY]) == 0
    described = json.loads((run / "config.json").read_text())
    assert described["model"]["options"]["flow_map"] is True
    assert training.load(run).default_solver == "flow-map"
    out = tmp_path / "x.npz"
    assert main(["sample", str(run), "--n", "2", "--steps", "1", "--out", str(out), "-q"]) == 0
    before = averaged(run)
    undo_last(run)
    assert main(["train", "--run", str(run), "--resume", "--quiet"]) == 0
    assert all(torch.equal(before[key], value) for key, value in averaged(run).items())


def test_a_flow_map_of_a_velocity_has_its_architecture(runs):
    teacher = training.load(runs / "a").model
    described, network = _like_teacher(teacher, flow_map=True, seed=0)
    assert described["options"] == {**teacher.options, "flow_map": True}
    span = torch.full((2,), 0.5)
    assert network(torch.zeros(2, 1, 8, 8), span, span=span).shape == (2, 1, 8, 8)
    assert _like_teacher(network, flow_map=True, seed=0) == (described, None)  # a copy


def test_a_flow_between_data_sets(tmp_path, capsys):
    run = str(tmp_path / "run")
    words = ["--dataset", "moons", "--source", "ring", "--run", run, *MLP, *TINY]
    assert main(["train", *words]) == 0
    assert "rfkernels sample" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["source"]["name"] == "ring"
    assert main(["train", "--run", run, "--resume", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "magic"], "recipe: must be one of "),
        (["--recipe", "slimflow-reflow"], "teacher: slimflow-reflow needs one, e.g. --teacher"),
        (["--recipe", "slimflow-reflow", "--teacher", "nothing"], "nothing holds no run"),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--dataset", "digits"],
            "dataset: slimflow-reflow trains on pairs of its teacher",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--conditional"],
            "conditional: slimflow-reflow trains on pairs of its teacher",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--model-option", "width=8"],
            "model-option: belongs to a new network; without --model it is the teacher's",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--recipe-option", "aneal=1"],
            "aneal: SlimFlowReflow has no such option; it has anneal",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--recipe-option", "anneal=2"],
            "anneal: must be in [0, 1]; got 2",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--recipe-option", "train={}"],
            "recipe-option: options of TrainConfig are given by --set",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--set", "stpes=3"],
            "stpes: TrainConfig has no such option",
        ),
        (
            ["--recipe", "slimflow-reflow", "--teacher", "A", "--pairs-from", "nowhere"],
            "pairs: nowhere holds no pairs",
        ),
        (
            ["--recipe", "slimflow-distill", "--teacher", "A", "--recipe-option",
             "distance=perceptual:eyes"],
            "network: must be efficientnet-lite0",
        ),
        (["--teacher", "A", "--dataset", "digits"], "teacher: belongs to a recipe"),
        (["--recipe-option", "a=1", "--dataset", "digits"], "recipe-option: belongs to a recipe"),
        (
            ["--recipe", "feature-weighted", "--dataset", "digits"],
            "recipe: feature-weighted needs features, an object of your own; run it in Python",
        ),
        (["--recipe", "meanflow"], "dataset: meanflow trains on one, e.g. --dataset digits"),
        (
            ["--recipe", "meanflow", "--dataset", "digits", "--pairs-from", "x"],
            "pairs-from: meanflow trains on data; got x",
        ),
        (
            ["--recipe", "meanflow", "--dataset", "digits", "--teacher", "A"],
            "teacher: meanflow has none",
        ),
    ],
)  # fmt: skip
def test_bad_calls_say_which_option_in_one_line(runs, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    words = [str(runs / "a") if word == "A" else word for word in words]
    assert main(["train", "--run", "new", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_recipe_is_not_resumed(runs, capsys):
    words = ["--run", str(runs / "b"), "--resume", "--teacher", str(runs / "a")]
    assert main(["train", "--recipe", "slimflow-distill", *words]) == 2
    assert "holds a run of kind 'slimflow-reflow'" in capsys.readouterr().err
    assert main(["train", *words, "--recipe-option", "anneal=linear"]) == 2
    assert "config.anneal is 'cosine' in the run and 'linear' now" in capsys.readouterr().err


def test_a_named_distance_is_that_of_the_metrics():
    from rfkernels.metrics.perceptual import PerceptualDistance

    a, b = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = NamedDistance("perceptual:random-conv")(a, b)
    assert torch.equal(found, PerceptualDistance("random-conv")(a, b))
    assert found.shape == (3,)


def test_the_guide_names_every_recipe():
    guide = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    guide = re.sub("<!--.*?-->", "", guide, flags=re.DOTALL)
    assert [name for name in RECIPES if name not in guide] == []
    named = set(re.findall(r"--recipe ([a-z0-9-]+)", guide)) - {"list"}
    assert named <= set(RECIPES), named - set(RECIPES)
