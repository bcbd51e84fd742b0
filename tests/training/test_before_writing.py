"""What does not fit together is refused before a run writes anything."""

import json

import pytest
import torch

from rfkernels import models
from rfkernels.flow import LinearBetas
from rfkernels.training import (
    DistillConfig,
    ReflowConfig,
    TrainConfig,
    distill,
    from_dict,
    invert_data,
    load,
    make_pairs,
    reflow,
    to_dict,
    train_flow,
    train_recipe,
)
from rfkernels.training.recipes import (
    FeatureWeighted,
    InstaFlowDistill,
    PeRFlow,
    RectifiedDiffusionConsistency,
    RectifiedDiffusionPhased,
    RectifiedFlowPlusPlus,
    ReMeanFlow,
    Shortcut,
    SlimFlowDistill,
    SlimFlowReflow,
)
from rfkernels.training.recipes.rectified_flow import FlowObjective
from rfkernels.training.trial import noise_draw, try_objective

X = torch.linspace(-1, 1, 64).reshape(32, 2)
LABELS = torch.arange(32) % 8
SMALL = TrainConfig(steps=4, batch_size=8, tensorboard=False)
PAIRS = {"pairs": 16, "pair_steps": 1, "train": SMALL}


def mlp(**options):
    return models.build("mlp", seed=0, sample_shape=(2,), width=8, depth=1, **options)


def diffusion(steps=40):
    inner = {"name": "mlp", "options": {"sample_shape": [2], "width": 8, "depth": 1}}
    return models.build(
        "noise-prediction", seed=0, network=inner, schedule=LinearBetas(steps=steps)
    )


def per_element(a, b):
    return (a - b).square()


def per_sample(a, b):
    return (a - b).square().mean(1)


PHASED = RectifiedDiffusionPhased(grid_steps=20, segments=2, train=SMALL)
FINEST = RectifiedDiffusionPhased(grid_steps=40, segments=40, train=SMALL)
CONSISTENCY = RectifiedDiffusionConsistency(grid_steps=10, train=SMALL)
WINDOWS = PeRFlow(windows=2, train=SMALL)
NARROWEST = PeRFlow(windows=40, train=SMALL)
LATE = InstaFlowDistill(
    distance=per_sample,
    decoder=torch.nn.Linear(5, 3),
    perceptual_from=3,
    guidance_scale=None,
    **PAIRS,
)
GUIDED = ReMeanFlow(target_guidance_scale=2.0, **PAIRS)
ODD = RectifiedFlowPlusPlus(perceptual=per_element, **PAIRS)
NAMED = from_dict(
    RectifiedFlowPlusPlus,
    json.loads(json.dumps(to_dict(RectifiedFlowPlusPlus(perceptual=per_sample, **PAIRS)))),
)
FEATURES = FeatureWeighted(features=torch.nn.Linear(5, 3), train=SMALL)


@pytest.mark.parametrize(
    ("recipe", "model", "teacher", "data", "message"),
    [
        (WINDOWS, mlp(), diffusion(), X, "prediction: must be a NoisePrediction; got MLPVelocity"),
        (WINDOWS, diffusion(20), diffusion(), X, "model: must have the teacher's schedule"),
        (PHASED, diffusion(80), diffusion(), X, "model: must have the teacher's schedule"),
        (FINEST, None, diffusion(), X, "segments: must be fewer than the steps of .*, 40; got 40"),
        (
            NARROWEST,
            None,
            diffusion(),
            X,
            r"windows: must be fewer than the steps of .*, 40; got 40",
        ),
        (CONSISTENCY, diffusion(80), diffusion(), X, "model: must have the teacher's schedule"),
        (WINDOWS, mlp(num_classes=8), mlp(), (X, LABELS), "teacher: cannot take the samples"),
        (
            WINDOWS,
            mlp(num_classes=8),
            mlp(num_classes=3),
            (X, LABELS),
            "labels must be below the network's num_classes, 3; got 7",
        ),
        (LATE, None, mlp(), None, "instaflow-distill: cannot be trained with what it was given"),
        (FEATURES, mlp(), None, X, "feature-weighted: cannot be trained with what it was given"),
        (GUIDED, mlp(flow_map=True), mlp(), None, "target_guidance_scale: guidance in the target"),
        (ODD, None, mlp(), None, r"perceptual: must return \(8,\) distances"),
        (NAMED, None, mlp(), None, "perceptual: give the object itself; got the name of one"),
        (SlimFlowReflow(flip=True, **PAIRS), None, mlp(), None, "flip: needs images"),
        (
            SlimFlowReflow(**PAIRS),
            mlp(num_classes=3),
            mlp(num_classes=8),
            None,
            "labels: must be from 0 to the network's null label, 3; got 7",
        ),
    ],
)
def test_recipes(tmp_path, recipe, model, teacher, data, message):
    run, shape = tmp_path / "run", (2,) if teacher is not None else None
    with pytest.raises((ValueError, TypeError), match=message):
        train_recipe(recipe, model, data, teacher=teacher, sample_shape=shape, run=run)
    assert not run.exists()


def test_a_teacher_that_cannot_take_the_pairs_condition(tmp_path):
    folder = tmp_path / "pairs"
    pairs = make_pairs(mlp(num_classes=8), 16, (2,), steps=1, folder=folder, labels=LABELS[:16])
    recipe, student = SlimFlowDistill(train=SMALL), mlp(num_classes=8)
    with pytest.raises(ValueError, match="y: this MLPVelocity was built without num_classes"):
        train_recipe(
            recipe, student, teacher=mlp(), sample_shape=(2,), pairs=pairs, run=tmp_path / "run"
        )
    few = mlp(num_classes=3)
    with pytest.raises(ValueError, match=r"labels: must be from 0 to .*, 3; got 7"):
        distill(
            few, DistillConfig(train=SMALL), sample_shape=(2,), pairs=pairs, run=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_students_of_pairs_that_another_teacher_made(tmp_path):
    """Neither the shape nor the labels are the teacher's to say."""
    folder = tmp_path / "pairs"
    make_pairs(mlp(num_classes=8), 16, (2,), steps=1, folder=folder, labels=LABELS[:16])
    config, run = DistillConfig(train=SMALL), tmp_path / "run"
    teacher = torch.nn.Linear(2, 2)  # says neither shape nor classes
    result = distill(teacher, config, pairs=folder, student=mlp(num_classes=8), run=run)
    assert (result.sample_shape, result.num_classes, result.conditional) == ((2,), 8, True)
    assert load(run).num_classes == 8
    with pytest.raises(TypeError, match="pairs: must be a PairStore or its folder; got tuple"):
        distill(teacher, config, pairs=(X, X))


@pytest.mark.parametrize("first", [-1, 4])
def test_pairs_of_labels_that_the_network_does_not_have(tmp_path, first):
    labels = torch.full((16,), 1)
    labels[9] = first
    with pytest.raises(ValueError, match=f"labels: must be from 0 to .*, 3; got {first}"):
        make_pairs(mlp(num_classes=3), 16, (2,), steps=1, folder=tmp_path / "p", labels=labels)
    with pytest.raises(ValueError, match=f"labels: must be from 0 to .*, 3; got {first}"):
        invert_data(mlp(num_classes=3), (X[:16], labels), steps=1, folder=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_distances(tmp_path):
    config = DistillConfig(distance=per_element, **PAIRS)
    with pytest.raises(ValueError, match=r"distance: must return \(8,\) losses"):
        distill(mlp(), config, sample_shape=(2,), run=tmp_path / "run")
    named = from_dict(DistillConfig, json.loads(json.dumps(to_dict(config))))
    with pytest.raises(ValueError, match="distance: give the object itself; got the name of one"):
        distill(mlp(), named, sample_shape=(2,), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [-1, 9])
def test_labels_that_the_teacher_does_not_have(tmp_path, first):
    labels = torch.full((16,), 2)
    labels[15] = first  # a probe of the first ones would not meet it
    with pytest.raises(ValueError, match=f"labels: must be from 0 to .*, 8; got {first}"):
        reflow(
            mlp(num_classes=8),
            ReflowConfig(**PAIRS),
            sample_shape=(2,),
            labels=labels,
            run=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    labels[15] = 8  # the null label
    reflow(mlp(num_classes=8), ReflowConfig(**PAIRS), sample_shape=(2,), labels=labels)


def test_inference_mode(tmp_path):
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"train_flow: cannot train inside"):
            train_flow(mlp(), X, SMALL, run=tmp_path / "run")
        with pytest.raises(RuntimeError, match=r"reflow: cannot train inside"):
            reflow(mlp(), ReflowConfig(**PAIRS), sample_shape=(2,), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_pairs_made_otherwise(tmp_path):
    made = [make_pairs(mlp(), 16, (2,), steps=n, folder=tmp_path / f"{n}") for n in (1, 2)]
    config, run = DistillConfig(train=SMALL), tmp_path / "run"
    distill(mlp(), config, sample_shape=(2,), pairs=made[0], run=run)
    with pytest.raises(ValueError, match=r"other options: pairs.steps is 1 in the run and 2 now"):
        distill(mlp(), config, sample_shape=(2,), pairs=made[1], run=run, resume=True)
    distill(mlp(), config, sample_shape=(2,), pairs=made[0], run=run, resume=True)


def test_teachers_that_are_no_flow_from_noise(tmp_path):
    encoder = distill(mlp(), DistillConfig(reverse=True, **PAIRS), sample_shape=(2,))
    with pytest.raises(ValueError, match="teacher: must lead from noise to data"):
        reflow(encoder, ReflowConfig(**PAIRS), run=tmp_path / "run")
    shortcut = train_recipe(Shortcut(finest=8, train=SMALL), mlp(flow_map=True), X)
    with pytest.raises(ValueError, match=r"solver: must be 'flow-map' with this teacher"):
        reflow(shortcut, ReflowConfig(**PAIRS), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    reflow(shortcut, ReflowConfig(solver="flow-map", **PAIRS))


def test_labels_of_pairs_are_not_asked_for_by_option():
    train = TrainConfig(steps=4, batch_size=8, conditional=False)
    with pytest.raises(ValueError, match=r"train.conditional: pairs have the condition"):
        ReflowConfig(train=train)


def test_a_trial_changes_nothing():
    """Weights, modes and the random state stay the caller's; it meets the first and last step."""
    network, steps = mlp(dropout=0.5).train(), []
    weights = {name: value.clone() for name, value in network.state_dict().items()}

    class Noted(FlowObjective):
        def batch(self, step):
            steps.append(step)
            return super().batch(step)

        def loss(self, model, batch):
            assert not model.training
            torch.rand(3)
            return super().loss(model, batch)

    state = torch.get_rng_state()
    draw = noise_draw(4, (2,), None, torch.device("cpu"))
    try_objective("trial", Noted, network, draw, SMALL, None)
    assert steps == [0, 3]
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[n]) for n, value in network.state_dict().items())
