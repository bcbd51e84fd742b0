"""`edit` on pipelines of small random networks: its parts are those of the pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose pipelines these are"
)
pytest.importorskip("transformers", reason="the pipelines' text encoders")

import diffusers
import diffusers_pipes
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers import FlowMatchEulerDiscreteScheduler as EULER
from diffusers_edits import (
    HEIGHT,
    NAMES,
    SHAPES,
    WIDTH,
    Nothing,
    Sampling,
    edit,
    found,
    image_for,
    kept,
    latents,
    made,
    noise,
    picture,
    sampled,
)

import rfkernels as rf

# Of latents near 1, where sums are made in another order: 1.1e-5 was met, with another number of threads.
ROUNDING = {"rtol": 0.0, "atol": 1e-4}


# --- the parts are those of the pipelines --------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_is_the_pipelines(name, scale):
    """Prompts, guidance, ids, packing, time and grid at once: the same noise gives the same latents."""
    pipe, start = kept(name), noise(name)
    expected = sampled(pipe, name, start, guidance_scale=scale)
    result = edit(
        pipe, image_for(name), "a dog", "a cat", method=Sampling(start), steps=4,
        target_guidance_scale=scale, output_type="latent",
    )  # fmt: skip
    assert found(result).shape == expected.shape
    torch.testing.assert_close(found(result), expected, **ROUNDING)
    assert result.nfe == (8 if name in ("sd3", "wan") and scale != 1 else 4)
    other = sampled(pipe, name, start, "a dog on grass", guidance_scale=scale)
    assert (found(result) - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pictures_are_the_pipelines(name, output_type):
    pipe, start = kept(name), noise(name)
    expected = sampled(pipe, name, start, guidance_scale=1.0, output_type=output_type)
    result = found(
        edit(
            pipe, image_for(name), "a dog", "a cat", method=Sampling(start), steps=4,
            target_guidance_scale=1.0, output_type=output_type,
        )
    )  # fmt: skip
    assert type(result) is type(expected)
    if output_type == "pil":
        first = result[0][0] if name == "wan" else result[0]
        assert first.size == (WIDTH, HEIGHT)
        difference = np.asarray(first).astype(int) - np.asarray(
            expected[0][0] if name == "wan" else expected[0]
        )
        assert np.abs(difference).max() <= 1
    else:
        assert result.shape == expected.shape
        assert float(abs(result - expected).max()) < 1e-4
    assert len(result) == 1


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_negative_prompt_guides_as_in_the_pipeline(name):
    """Stable Diffusion 3, and FLUX under true classifier-free guidance with an embedded scale beside it."""
    pipe, start = kept(name), noise(name)
    asked = {"negative_prompt": "blurry"}
    if name == "flux":
        expected = sampled(pipe, name, start, guidance_scale=2.5, true_cfg_scale=3.0, **asked)
        asked["embedded_guidance"] = 2.5
    else:
        expected = sampled(pipe, name, start, guidance_scale=3.0, **asked)
    result = edit(
        pipe, picture(), "a dog", "a cat", method=Sampling(start), steps=4,
        target_guidance_scale=3.0, output_type="latent", **asked,
    )  # fmt: skip
    torch.testing.assert_close(result.images, expected, **ROUNDING)
    assert result.nfe == 8


@pytest.mark.parametrize("cls", ["FluxPipeline", "Flux2KleinPipeline"])
def test_networks_that_are_told_no_scale(cls):
    """schnell and klein: unguided unless asked."""
    name = "flux" if cls == "FluxPipeline" else "flux2"
    pipe, start = made(name, cls=cls, guidance_embeds=False), noise(name)
    torch.manual_seed(4)
    options = {"method": Sampling(start), "steps": 4, "output_type": "latent"}
    embeddings = {"prompt_embeds": torch.randn(1, 7, 32 if name == "flux" else 48)}
    if name == "flux":
        embeddings["pooled_prompt_embeds"] = torch.randn(1, 32)
    expected = sampled(pipe, name, start, None, **embeddings, guidance_scale=1.0)
    result = edit(pipe, picture(), embeddings, embeddings, **options)
    torch.testing.assert_close(result.images, expected, **ROUNDING)
    assert result.nfe == 4
    negative = {key: -value for key, value in embeddings.items()}
    given = {f"negative_{key}": value for key, value in negative.items()}
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    expected = sampled(pipe, name, start, None, **embeddings, **given, **{scale: 2.0})
    options |= {"target_guidance_scale": 2.0, "negative_prompt": negative}
    result = edit(pipe, picture(), embeddings, embeddings, **options)
    torch.testing.assert_close(result.images, expected, **ROUNDING)
    assert result.nfe == 8


def test_the_two_networks_of_wan():
    pipe = made(
        "wan", transformer_2=diffusers_pipes.network("Wan", num_layers=1), boundary_ratio=0.9
    )
    start = noise("wan")
    expected = sampled(pipe, "wan", start, guidance_scale=2.0)
    options = {"method": Sampling(start), "steps": 4, "output_type": "latent"}
    result = edit(pipe, image_for("wan"), "a dog", "a cat", target_guidance_scale=2.0, **options)
    torch.testing.assert_close(result.frames, expected, **ROUNDING)
    pipe.register_to_config(boundary_ratio=None)
    assert not torch.allclose(sampled(pipe, "wan", start, guidance_scale=2.0), expected, atol=1e-3)
    pipe.transformer = None
    with pytest.raises(ValueError, match="pipe must have all its networks"):
        edit(pipe, image_for("wan"), "a dog", "a cat", **options)


def test_wan_with_a_time_for_every_token():
    pipe, start = made("wan", expand_timesteps=True), noise("wan")
    expected = sampled(pipe, "wan", start, guidance_scale=1.0)
    result = edit(
        pipe, image_for("wan"), "a dog", "a cat", method=Sampling(start), steps=4,
        target_guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(result.frames, expected, **ROUNDING)


SCHEDULERS = [
    ("flux", EULER, {"shift": 3.0}),
    ("flux", EULER, {**diffusers_pipes.FLUX, "base_shift": 0.3, "max_shift": 2.0}),
    ("flux", UniPCMultistepScheduler, diffusers_pipes.UNIPC),
    ("flux2", EULER, diffusers_pipes.FLUX),
    ("sd3", EULER, {"shift": 3.0}),
    ("sd3", EULER, {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 3.0}),
    ("sd3", FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    ("sd3", DPMSolverMultistepScheduler, diffusers_pipes.UNIPC),
    ("wan", EULER, {"shift": 5.0}),
    ("wan", EULER, {"shift": 5.0, "use_karras_sigmas": True}),
    ("wan", UniPCMultistepScheduler, diffusers_pipes.UNIPC),
    ("wan", UniPCMultistepScheduler, {**diffusers_pipes.UNIPC, "final_sigmas_type": "sigma_min"}),
    ("wan", DPMSolverMultistepScheduler, diffusers_pipes.UNIPC),
]


@pytest.mark.parametrize(("name", "cls", "config"), SCHEDULERS)
def test_the_grid_is_the_pipelines(name, cls, config):
    """1 - sigma of the run that the pipeline makes, each level once, to the bit; of whatever size."""
    pipe, method = made(name, cls(**config)), Nothing()
    edit(pipe, image_for(name), "", "", method=method, steps=7)
    sampled(pipe, name, noise(name), num_inference_steps=7)
    sigmas = dict.fromkeys(pipe.scheduler.sigmas.tolist())
    assert method.setting.times == tuple(1 - sigma for sigma in sigmas)
    assert len(sigmas) == (7 if config.get("final_sigmas_type") else 8)


def test_a_dynamic_shift_depends_on_the_size():
    pipe, small, large = kept("flux"), Nothing(), Nothing()
    edit(pipe, picture(), "", "", method=small, steps=4)
    edit(pipe, picture(), "", "", method=large, steps=4, height=96, width=96)
    assert large.setting.x1.shape == (1, 4, 12, 12)
    assert large.setting.times[1] < small.setting.times[1]


def test_a_shift_that_was_set_and_schedulers_of_ours():
    pipe, method = made("sd3"), Nothing()
    pipe.scheduler.set_shift(7.0)
    edit(pipe, picture(), "", "", method=method, steps=4)
    pipe.scheduler.set_timesteps(4)
    expected = tuple(1 - sigma for sigma in pipe.scheduler.sigmas.tolist())
    assert method.setting.times == expected
    own = rf.integrations.diffusers.RFMidpointScheduler
    for name in ("sd3", "wan"):
        pipe = made(name)
        edit(pipe, image_for(name), "", "", method=method, steps=4)
        before = method.setting.times
        pipe.scheduler = own.from_config(pipe.scheduler.config)
        edit(pipe, image_for(name), "", "", method=method, steps=4)
        assert method.setting.times == before


def test_latents_are_those_of_image_to_image(monkeypatch):
    """Which adds noise by the scheduler, here none."""

    def unmixed(pipe):
        monkeypatch.setattr(type(pipe.scheduler), "scale_noise", lambda self, latents, *_: latents)
        return pipe

    given, plain = picture(1), torch.float32
    device, generator = torch.device("cpu"), torch.Generator()
    pipe = unmixed(made("flux", cls="FluxImg2ImgPipeline"))
    pixels = pipe.image_processor.preprocess(given)
    packed, _ = pipe.prepare_latents(
        pixels, None, 1, 4, HEIGHT, WIDTH, plain, device, generator
    )  # fmt: skip
    expected = pipe._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor)
    torch.testing.assert_close(latents(pipe, given), expected, **ROUNDING)
    assert expected.std() > 0.1

    pipe = unmixed(made("sd3", cls="StableDiffusion3Img2ImgPipeline"))
    expected = pipe.prepare_latents(pixels, None, 1, 1, plain, device, generator)
    torch.testing.assert_close(latents(pipe, given), expected, **ROUNDING)

    pipe = made("flux2")
    expected = pipe._encode_vae_image(pixels, generator)
    torch.testing.assert_close(latents(pipe, given), expected, **ROUNDING)

    pipe = unmixed(made("wan", cls="WanVideoToVideoPipeline"))
    video = pipe.video_processor.preprocess_video(image_for("wan"))
    expected = pipe.prepare_latents(video, 1, 4, HEIGHT, WIDTH, plain, device, generator)
    torch.testing.assert_close(latents(pipe, image_for("wan")), expected, **ROUNDING)
    assert expected.shape == SHAPES["wan"]


@pytest.mark.parametrize("cls", ["FluxInpaintPipeline", "StableDiffusion3InpaintPipeline"])
def test_relatives_of_the_pipelines(cls):
    name = "flux" if cls.startswith("Flux") else "sd3"
    options = {"steps": 3, "output_type": "latent"}
    expected = edit(made(name), picture(), "a cat", "a dog", **options)
    result = edit(made(name, cls=cls), picture(), "a cat", "a dog", **options)
    assert torch.equal(result.images, expected.images)


def test_the_autoencoder_without_a_distribution():
    pipe = made("flux")
    torch.manual_seed(0)
    pipe.vae = diffusers.AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        shift_factor=0.1,
        scaling_factor=0.3,
    ).eval()
    pixels = pipe.image_processor.preprocess(picture())
    with torch.no_grad():
        expected = (pipe.vae.encode(pixels).latents - 0.1) * 0.3
    torch.testing.assert_close(latents(pipe, picture()), expected)


# --- pictures --------------------------------------------------------------------------------------


def test_kinds_of_pictures():
    pipe, given = kept("sd3"), picture()
    expected = latents(pipe, given)
    values = np.asarray(given).astype(np.float32) / 255
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    for same in (values, values[None], tensor, tensor[None], [given], [values], [tensor]):
        torch.testing.assert_close(latents(pipe, same), expected, **ROUNDING)
    two = latents(pipe, [given, picture(1)])
    torch.testing.assert_close(two[:1], expected, **ROUNDING)
    torch.testing.assert_close(two[1:], latents(pipe, picture(1)), **ROUNDING)

    pipe, given = kept("wan"), image_for("wan")
    expected = latents(pipe, given)
    values = np.stack([np.asarray(one) for one in given]).astype(np.float32) / 255
    tensor = torch.from_numpy(values).permute(0, 3, 1, 2)
    for same in (values, values[None], tensor, tensor[None], [given], [values], [tensor]):
        torch.testing.assert_close(latents(pipe, same), expected, **ROUNDING)
    assert latents(pipe, picture()).shape == (1, 4, 1, 4, 6)  # a picture is a video of one frame


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    """That of the picture, rounded down; or the one asked for."""
    pipe = kept(name)
    large = picture(0, 50, 65)
    assert edit_size(pipe, large) == (64, 48)
    assert edit_size(pipe, large, height=16) == (64, 16)
    assert edit_size(pipe, large, height=64, width=32) == (32, 64)


def edit_size(pipe, image, **options):
    result = found(edit(pipe, image, "a cat", "a dog", method=Nothing(), **options))[0]
    return (result[0] if isinstance(result, list) else result).size
