"""Velocity fields from local folders of diffusers: the network in one, and what its pipeline's scheduler says."""

import json

import pytest
import torch
from diffusers_direct import FAMILIES as DIRECT
from diffusers_family import build, images

import rfkernels as rf
from rfkernels.flow import CosineBetas, LinearBetas, ScaledLinearBetas
from rfkernels.integrations import diffusers as rfd
from rfkernels.integrations.diffusers import DiffusersVelocity, velocity_from_pretrained


def pipeline(folder, scheduler, part="unet", name="UNet2D"):
    build(DIRECT[name])[0].save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    return folder


def test_the_pipelines_scheduler_says_what_is_predicted(tmp_path):
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        LTXEulerAncestralRFScheduler,
    )

    for number, (scheduler, prediction, schedule) in enumerate(
        (
            (DDPMScheduler(), "epsilon", LinearBetas(1e-4, 0.02)),
            (
                DDIMScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    prediction_type="v_prediction",
                ),
                "v",
                ScaledLinearBetas(),
            ),
            (
                DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
                "x1",
                CosineBetas(),
            ),
        )
    ):
        model = velocity_from_pretrained(pipeline(tmp_path / str(number), scheduler))
        assert (model.prediction, model.schedule) == (prediction, schedule)
        torch.testing.assert_close(
            model.schedule.alpha_bar, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-9
        )
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        LTXEulerAncestralRFScheduler(),
        rfd.RFMidpointScheduler(),
        rfd.RFMultistepScheduler(),
    ):
        folder = tmp_path / type(scheduler).__name__
        flow = pipeline(folder, scheduler, "transformer", "SD3")
        assert isinstance(velocity_from_pretrained(flow), DiffusersVelocity)


def test_what_a_scheduler_does_not_say_is_given(tmp_path):
    from diffusers import DDIMScheduler, EDMEulerScheduler

    zero = pipeline(tmp_path / "zero", DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr has no counterpart"):
        velocity_from_pretrained(zero)
    assert velocity_from_pretrained(zero, schedule="cosine").prediction == "epsilon"
    other = pipeline(tmp_path / "other", EDMEulerScheduler())  # on levels of its own
    for options in ({}, {"schedule": "cosine"}, {"prediction": "epsilon"}):
        with pytest.raises(ValueError, match="EDMEulerScheduler has no schedule of betas"):
            velocity_from_pretrained(other, **options)
    said = velocity_from_pretrained(other, prediction="v", schedule="cosine")
    assert (said.prediction, said.schedule) == ("v", CosineBetas())


def test_half_precision_weights(tmp_path):
    inner, given = build(DIRECT["SD3"])
    inner.save_pretrained(tmp_path)
    model = velocity_from_pretrained(tmp_path, dtype=torch.bfloat16)
    given = {
        name: given[name].bfloat16() for name in ("encoder_hidden_states", "pooled_projections")
    }
    found = rf.sample(model, images().bfloat16(), steps=2, condition=given)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_folders_that_hold_no_network(tmp_path):
    inner = build(DIRECT["UNet2D"])[0]
    inner.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    for name, kind, message in (
        ("none", FileNotFoundError, "source: .* is no folder"),
        ("empty", FileNotFoundError, "holds no network"),
        ("other", TypeError, "got AutoencoderKL"),
        ("pickled", OSError, "safetensors"),
    ):
        with pytest.raises(kind, match=message):
            velocity_from_pretrained(tmp_path / name, prediction="velocity")
