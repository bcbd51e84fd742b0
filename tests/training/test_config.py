"""Configs: bad options are refused with the option's name, and JSON gives back what went in."""

import json

import pytest

from rfkernels import flow
from rfkernels.training import (
    DistillConfig,
    OwnObject,
    ReflowConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from rfkernels.training.recipes import MeanFlow, PeRFlow, RectifiedFlowPlusPlus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: must be at least 1; got 0"),
        ({"batch_size": 10, "accumulate": 3}, "accumulate: must divide batch_size, 10; got 3"),
        ({"learning_rate": 0}, "learning_rate: must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate: must be finite"),
        ({"schedule": "step"}, "schedule: must be one of cosine, constant; got 'step'"),
        ({"warmup_steps": -1}, "warmup_steps: must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas: must lie in"),
        ({"clip_norm": 0.0}, "clip_norm: must be positive or None"),
        ({"ema_decay": 1.0}, r"ema_decay: must be in \[0, 1\)"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**63}, r"seed: must be below 2\*\*63"),
        ({"path": "quadratic"}, "path: must be one of"),
        ({"time_distribution": "gauss"}, "must be one of uniform"),
        ({"time_max": 1.5}, "time_max: must be in"),
        ({"path": "vp", "time_max": 1.0}, "time_max: must not exceed 0.99999, the largest time"),
        (
            {"path": flow.CustomPath(abs, abs, t_end=0.5), "time_min": 0.5},
            "time_min: must be below",
        ),
        ({"loss": "l1"}, "loss: must be one of mse"),
        ({"huber_c": 0.1}, "huber_c: belongs to the pseudo-Huber losses"),
        ({"coupling": "greedy"}, "coupling: must be one of independent, ot, ot-global, given"),
        ({"label_dropout": 1.0}, "label_dropout: must be in"),
        ({"holdout": -0.1}, "holdout: must be in"),
        ({"autocast": "float16"}, "autocast: must be one of None, bfloat16"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_paths_with_a_finite_target_may_be_trained_to_their_end():
    for path in ("linear", "trigonometric", "sub-vp"):
        assert TrainConfig(path=path, time_max=1.0).time_max == 1.0
    assert TrainConfig(path="vp", time_max=1 - 1e-5, time_min=1e-3).time_min == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3.0}, "steps: must be a whole number; got 3.0"),
        ({"steps": True}, "steps: must be a whole number; got True"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number; got 'fast'"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_bad_types(options, message):
    with pytest.raises(TypeError, match=message):
        TrainConfig(**options)


def test_bad_recipes():
    for make, message in (
        (lambda: ReflowConfig(rounds=0), "rounds: must be at least 1"),
        (lambda: ReflowConfig(pairs=1), "pairs: must be at least 2"),
        (lambda: ReflowConfig(train=TrainConfig(coupling="ot")), "train.coupling: pairs are"),
        (lambda: DistillConfig(k=0), "k: must be at least 1"),
        (lambda: DistillConfig(distance="lpips"), "distance: must be 'l2' or a callable"),
        (lambda: DistillConfig(train=TrainConfig(path="vp")), "train.path: a student of Euler"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="train: must be a TrainConfig; got dict"):
        ReflowConfig(train={})


def test_frozen():
    with pytest.raises(AttributeError):
        TrainConfig().steps = 3


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(steps=7, betas=(0.5, 0.9), clip_norm=None, autocast="bfloat16", seed=2**63 - 1),
        TrainConfig(time_distribution=flow.LogitNormal(0.4, 0.9), path=flow.VPPath(0.2, 10.0)),
        TrainConfig(time_distribution=flow.Shifted(flow.UShaped(4.0), 3.0)),
        ReflowConfig(
            rounds=2, pair_steps=None, solver="dopri5", train=TrainConfig(loss="pseudo_huber")
        ),
        DistillConfig(k=4, guidance_scale=2.0),
    ],
)
def test_json_round_trip(config):
    text = json.dumps(to_dict(config))
    assert from_dict(type(config), json.loads(text)) == config


def test_objects_of_the_users_own_are_named():
    def distance(a, b):
        return (a - b).abs().mean()

    config = DistillConfig(distance=distance)
    again = from_dict(DistillConfig, json.loads(json.dumps(to_dict(config))))
    assert isinstance(again.distance, OwnObject)
    assert again.distance.name.endswith("distance")
    path = flow.CustomPath(lambda t: t, lambda t: 1 - t)
    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(TrainConfig(path=path)))))
    assert again.path == OwnObject("rfkernels.flow.paths.CustomPath")


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="stepz: TrainConfig has no such option; it has"):
        from_dict(TrainConfig, {"stepz": 3})
    with pytest.raises(ValueError, match="lr: TrainConfig has no such option"):
        from_dict(ReflowConfig, {"train": {"lr": 1}})
    with pytest.raises(TypeError, match="TrainConfig: must be a mapping"):
        from_dict(TrainConfig, [1])


class MyStraightPath(flow.LinearPath):
    """A path of the user's own."""


@pytest.mark.parametrize("cls", [DistillConfig, MeanFlow, PeRFlow, RectifiedFlowPlusPlus])
def test_a_straight_path_of_the_users_own_is_read_back_by_name(cls):
    config = cls(train=TrainConfig(path=MyStraightPath()))
    again = from_dict(cls, json.loads(json.dumps(to_dict(config))))
    assert isinstance(again.train.path, OwnObject)
