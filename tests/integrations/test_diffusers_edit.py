"""`edit` on pipelines of small random networks: its parts are those of the pipelines, and its results the
method's."""

from __future__ import annotations

import functools
import types

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
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_video2video
from PIL import Image

import rfkernels as rf
from rfkernels.editing import Features, FlowEdit, RFInversion
from rfkernels.editing import edit as edit_samples
from rfkernels.integrations.diffusers import allow_exchange, velocity_from_pretrained
from rfkernels.sampling import ClassifierFree, get_solver

# diffusers' own, of a class of its own and of NumPy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HEIGHT, WIDTH, WORDS = 32, 48, 8
SHAPES = {"flux": (1, 4, 4, 6), "flux2": (1, 16, 2, 3), "sd3": (1, 4, 4, 6), "wan": (1, 4, 2, 4, 6)}
NAMES = list(SHAPES)
EULER = FlowMatchEulerDiscreteScheduler


@pytest.fixture(autouse=True)
def wan_without_ftfy(monkeypatch):
    """Wan's pipeline repairs the text of prompts by ftfy, which changes nothing of ours."""
    same = types.SimpleNamespace(fix_text=lambda text: text)
    for module in (pipeline_wan, pipeline_wan_video2video):
        monkeypatch.setattr(module, "ftfy", same, raising=False)


class Sampling:
    """A method that forgets the picture: Euler steps from given noise under the target."""

    name = "sampling"
    shares_features = False

    def __init__(self, noise):
        self.noise = noise

    def run(self, setting):
        run = setting.run(setting.times, 0.0, 1.0)
        return get_solver("euler").integrate(setting.target_field(), self.noise, run).x


class Given(Sampling):
    """A method that returns what it was made with."""

    def run(self, setting):
        return self.noise


class Nothing:
    """A method that returns what it was given, and shows it."""

    name = "nothing"
    shares_features = False

    def run(self, setting):
        self.setting = setting
        return setting.x1


def edit(pipe, *args, **options):
    """With prompts of few tokens, to be quick."""
    return rf.integrations.diffusers.edit(pipe, *args, **{"max_sequence_length": WORDS, **options})


def made(name, scheduler=None, **options):
    if scheduler is None and name == "wan":
        scheduler = EULER(shift=5.0)
    pipe = getattr(diffusers_pipes, name)(scheduler, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed=0, height=HEIGHT, width=WIDTH):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def image_for(name, seed=0):
    return [picture(seed + n) for n in range(5)] if name == "wan" else picture(seed)


def found(result):
    assert (result.images is None) != (result.frames is None)
    return result.images if result.frames is None else result.frames


def latents(pipe, image, **options):
    method = Nothing()
    edit(pipe, image, "a cat", "a dog", method=method, output_type="latent", **options)
    return method.setting.x1


def noise(name, batch=1, seed=3):
    return torch.randn(batch, *SHAPES[name][1:], generator=torch.Generator().manual_seed(seed))


def sampled(pipe, name, start, prompt="a cat", **options):
    """What the pipeline makes of that noise."""
    if name == "flux":
        start = pipe._pack_latents(start, *start.shape)
    if name == "wan":
        options["num_frames"] = 5
    common = {
        "height": HEIGHT, "width": WIDTH, "max_sequence_length": WORDS, "num_inference_steps": 4,
        "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    return pipe(prompt=prompt, latents=start, **{**common, **options})[0]


@functools.cache
def kept(name):
    """One for all tests that leave it as it was."""
    return made(name)


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
    torch.testing.assert_close(found(result), expected, rtol=1e-5, atol=1e-5)
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
    torch.testing.assert_close(result.images, expected, rtol=1e-5, atol=1e-5)
    assert result.nfe == 8


@pytest.mark.parametrize("cls", ["FluxPipeline", "Flux2KleinPipeline"])
def test_networks_that_are_told_no_scale(cls):
    """schnell and klein: unguided unless asked."""
    name = "flux" if cls == "FluxPipeline" else "flux2"
    pipe, start = made(name, cls=cls, guidance_embeds=False), noise(name)
    options = {"method": Sampling(start), "steps": 4, "output_type": "latent"}
    embeddings = {"prompt_embeds": torch.randn(1, 7, 32 if name == "flux" else 48)}
    if name == "flux":
        embeddings["pooled_prompt_embeds"] = torch.randn(1, 32)
    expected = sampled(pipe, name, start, None, **embeddings, guidance_scale=1.0)
    result = edit(pipe, picture(), embeddings, embeddings, **options)
    torch.testing.assert_close(result.images, expected, rtol=1e-5, atol=1e-5)
    assert result.nfe == 4
    negative = {key: -value for key, value in embeddings.items()}
    given = {f"negative_{key}": value for key, value in negative.items()}
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    expected = sampled(pipe, name, start, None, **embeddings, **given, **{scale: 2.0})
    options |= {"target_guidance_scale": 2.0, "negative_prompt": negative}
    result = edit(pipe, picture(), embeddings, embeddings, **options)
    torch.testing.assert_close(result.images, expected, rtol=1e-5, atol=1e-5)
    assert result.nfe == 8


def test_the_two_networks_of_wan():
    pipe = made(
        "wan", transformer_2=diffusers_pipes.network("Wan", num_layers=1), boundary_ratio=0.9
    )
    start = noise("wan")
    expected = sampled(pipe, "wan", start, guidance_scale=2.0)
    options = {"method": Sampling(start), "steps": 4, "output_type": "latent"}
    result = edit(pipe, image_for("wan"), "a dog", "a cat", target_guidance_scale=2.0, **options)
    torch.testing.assert_close(result.frames, expected, rtol=1e-5, atol=1e-5)
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
    torch.testing.assert_close(result.frames, expected, rtol=1e-5, atol=1e-5)


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
    assert len(sigmas) == 7 if config.get("final_sigmas_type") else 8


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
    torch.testing.assert_close(latents(pipe, given), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1

    pipe = unmixed(made("sd3", cls="StableDiffusion3Img2ImgPipeline"))
    expected = pipe.prepare_latents(pixels, None, 1, 1, plain, device, generator)
    torch.testing.assert_close(latents(pipe, given), expected, rtol=1e-5, atol=1e-5)

    pipe = made("flux2")
    expected = pipe._encode_vae_image(pixels, generator)
    torch.testing.assert_close(latents(pipe, given), expected, rtol=1e-5, atol=1e-5)

    pipe = unmixed(made("wan", cls="WanVideoToVideoPipeline"))
    video = pipe.video_processor.preprocess_video(image_for("wan"))
    expected = pipe.prepare_latents(video, 1, 4, HEIGHT, WIDTH, plain, device, generator)
    torch.testing.assert_close(latents(pipe, image_for("wan")), expected, rtol=1e-5, atol=1e-5)
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
        torch.testing.assert_close(latents(pipe, same), expected, rtol=1e-5, atol=1e-5)
    two = latents(pipe, [given, picture(1)])
    torch.testing.assert_close(two[:1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two[1:], latents(pipe, picture(1)), rtol=1e-5, atol=1e-5)

    pipe, given = kept("wan"), image_for("wan")
    expected = latents(pipe, given)
    values = np.stack([np.asarray(one) for one in given]).astype(np.float32) / 255
    tensor = torch.from_numpy(values).permute(0, 3, 1, 2)
    for same in (values, values[None], tensor, tensor[None], [given], [values], [tensor]):
        torch.testing.assert_close(latents(pipe, same), expected, rtol=1e-5, atol=1e-5)
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


# --- the methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True])
def test_equal_prompts_and_scales_give_the_round_trip_to_the_bit(name, half):
    pipe, image = made(name) if half else kept(name), image_for(name)
    if half:
        pipe.transformer.to(torch.bfloat16)
    options = {"steps": 3, "source_guidance_scale": 2.0, "target_guidance_scale": 2.0}
    result = edit(pipe, image, "a cat", "a cat", **options, output_type="latent")
    expected = found(edit(pipe, image, "a cat", "a cat", method=Nothing(), output_type="latent"))
    assert found(result).dtype == torch.float32
    assert torch.equal(found(result), expected)
    result = edit(pipe, image, "a cat", "a cat", **options, output_type="pt")
    expected = edit(pipe, image, "a cat", "a cat", method=Nothing(), output_type="pt")
    assert torch.equal(found(result), found(expected))
    other = edit(pipe, image, "a cat", "a dog", **options, output_type="pt")
    assert (found(other) - found(expected)).abs().max() > 1e-4


def test_the_round_trip_is_the_autoencoders():
    pipe = kept("flux")
    pixels = pipe.image_processor.preprocess(picture())
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    result = edit(pipe, picture(), "a cat", "a cat", method=Nothing(), output_type="np")
    np.testing.assert_allclose(result.images, expected, atol=1e-5)


def test_flowedit_of_flux_by_hand():
    """The network told 1.5 on the source's side and 5.5 on the target's, on the pipeline's grid."""
    pipe, method = kept("flux"), Nothing()
    edit(pipe, picture(), "a cat", "a dog", method=method)
    times = method.setting.times
    conditions = []
    for prompt, guidance in (("a cat", 1.5), ("a dog", 5.5)):
        words, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=WORDS)
        conditions.append(
            {
                "encoder_hidden_states": words,
                "pooled_projections": pooled,
                "guidance": torch.tensor([guidance]),
            }
        )
    expected = edit_samples(
        velocity_from_pretrained(pipe.transformer), method.setting.x1, seed=7,
        source=conditions[0], target=conditions[1], method=FlowEdit(n_max=24), grid=times,
    )  # fmt: skip
    result = edit(pipe, picture(), "a cat", "a dog", seed=7, output_type="latent")
    assert len(times) == 29
    assert result.nfe == expected.nfe == 48
    assert torch.equal(result.images, pipe._pack_latents(expected.x, 1, 4, 4, 6))


DEFAULTS = [  # evaluations: twice those of a guided side
    ("sd3", "flowedit", 33 * 4),
    ("sd3", "rf-inversion", 28 + 2 * 28),
    ("flux", "rf-inversion", 2 * 28),
    ("flux", "uniedit", 28),
    ("flux2", "rf-edit", 4 * 30),
    ("flux", "fireflow", 2 * 9),
    ("wan", "fireflow", 9 + 2 * 9),
]


@pytest.mark.parametrize(("name", "method", "nfe"), DEFAULTS)
def test_published_defaults(name, method, nfe):
    result = edit(kept(name), image_for(name), "a cat", "a dog", method=method)
    assert result.nfe == nfe
    assert result.bank_bytes == result.bank_missed == 0
    first = found(result)[0]
    assert (first[0] if name == "wan" else first).size == (WIDTH, HEIGHT)


def test_a_method_object_keeps_its_options():
    pipe = kept("sd3")
    options = {"steps": 6, "source_guidance_scale": 1.0, "target_guidance_scale": 1.0}
    result = edit(pipe, picture(), "a cat", "a dog", method=FlowEdit(n_max=2, n_avg=2), **options)
    assert result.nfe == 8
    inverted = RFInversion(eta=1.0, stop=1.0)
    result = edit(
        pipe, picture(), "a cat", "a dog", method=inverted, **options, output_type="latent"
    )
    torch.testing.assert_close(result.images, latents(pipe, picture()))


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_a_sample_does_not_depend_on_the_others(name):
    pipe = kept(name)
    images = [image_for(name, 0), image_for(name, 10)]
    seeds = torch.tensor([5, 9])
    options = {"steps": 3, "output_type": "latent"}
    both = found(edit(pipe, images, ["a cat", "a dog"], "a dog on grass", seed=seeds, **options))
    for index, prompt in enumerate(("a cat", "a dog")):
        alone = edit(
            pipe, images[index], prompt, "a dog on grass", seed=seeds[index : index + 1], **options
        )
        torch.testing.assert_close(found(alone), both[index : index + 1], rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_one_picture_and_several_prompts():
    pipe, seeds = kept("flux"), torch.tensor([5, 5])
    options = {"steps": 3, "output_type": "latent"}
    both = edit(pipe, picture(), "a cat", ["a dog", "a cat on grass"], seed=seeds, **options).images
    assert both.shape == (2, 6, 16)
    for index, prompt in enumerate(("a dog", "a cat on grass")):
        alone = edit(pipe, picture(), "a cat", prompt, seed=seeds[:1], **options).images
        torch.testing.assert_close(alone, both[index : index + 1], rtol=1e-4, atol=1e-4)


def test_embeddings_stand_for_prompts():
    pipe = made("sd3")
    options = {"steps": 3, "output_type": "latent", "negative_prompt": "blurry"}
    expected = edit(pipe, picture(), "a cat", "a dog", **options).images
    embedded = {}
    for prompt in ("a cat", "a dog", "blurry"):
        words, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=WORDS
        )
        embedded[prompt] = {"prompt_embeds": words, "pooled_prompt_embeds": pooled}
    pipe.text_encoder = pipe.tokenizer = None
    options["negative_prompt"] = embedded["blurry"]
    result = edit(pipe, picture(), embedded["a cat"], embedded["a dog"], **options)
    assert torch.equal(result.images, expected)


def test_the_length_of_prompts():
    method, lengths = Nothing(), []
    for name in NAMES:
        for length in (None, 64):
            options = {"method": method, "steps": 2, "max_sequence_length": length}
            edit(kept(name), image_for(name), "a cat", "a dog", **options)
            lengths.append(method.setting.source["encoder_hidden_states"].shape[1])
    assert lengths == [512, 64, 512, 64, 8 + 256, 8 + 64, 512, 64]


# --- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_shared_and_classes_restored(name):
    pipe, image = kept(name), image_for(name)
    classes = [type(module) for module in pipe.transformer.modules()]
    options = {
        "method": "rf-edit", "steps": 3, "output_type": "latent",
        "source_guidance_scale": 1.0, "target_guidance_scale": 1.0,
    }  # fmt: skip
    plain = edit(pipe, image, "a cat", "a dog", **options)
    shared = edit(pipe, image, "a cat", "a dog", **options, features=Features(steps=2))
    assert plain.bank_bytes == 0
    assert shared.bank_bytes > 0
    assert shared.bank_missed == 0
    assert shared.nfe == plain.nfe == 12
    assert not torch.equal(found(shared), found(plain))
    quantized = Features(steps=2, store="int8")
    small = edit(pipe, image, "a cat", "a dog", **options, features=quantized)
    assert small.bank_bytes < 0.4 * shared.bank_bytes
    assert 0 < small.bank_error < 0.02
    assert [type(module) for module in pipe.transformer.modules()] == classes


def test_features_by_hand():
    pipe, method = kept("flux"), Nothing()
    options = {"steps": 3, "source_guidance_scale": 1.0, "target_guidance_scale": 2.0}
    layers, features = r"^transformer_blocks\.\d", Features(steps=2, blocks=[1], what="kv")
    edit(pipe, picture(), "a cat", "a dog", method=method, **options)
    setting = method.setting
    result = edit(
        pipe, picture(), "a cat", "a dog", method="rf-edit", output_type="latent", **options,
        features=features, layers=layers,
    )  # fmt: skip
    velocity = velocity_from_pretrained(pipe.transformer)
    assert len(allow_exchange(velocity, r"\.transformer_blocks\.\d")) == 2
    expected = edit_samples(
        velocity, setting.x1, source=setting.source, target=setting.target, method="rf-edit",
        grid=setting.times, features=features,
    )  # fmt: skip
    assert torch.equal(result.images, pipe._pack_latents(expected.x, 1, 4, 4, 6))
    assert result.bank_bytes == expected.bank_bytes


def test_the_published_layers_of_flux(monkeypatch):
    """Single-stream blocks after number 19 of 38 for RF-Edit, all for FireFlow or where blocks are named."""
    pipe = made("flux", num_layers=1, num_single_layers=38, num_attention_heads=1)
    counts = []
    for method, blocks, layers in (
        ("rf-edit", None, None),
        ("fireflow", None, None),
        ("rf-edit", [0, 1], None),
        ("rf-edit", None, r"single_transformer_blocks\.(2\d|3[0-7])\.attn"),
    ):
        result = edit(
            pipe, picture(), "a cat", "a dog", method=method, steps=1, layers=layers,
            features=Features(steps=1, blocks=blocks), output_type="latent",
        )  # fmt: skip
        counts.append((result.bank_bytes, result.images))
    tokens, width = WORDS + 6, 16
    block = tokens * width * 4  # of one evaluation
    assert [count for count, _ in counts] == [
        2 * 18 * block,
        2 * 39 * block,
        2 * 2 * block,
        2 * 18 * block,
    ]
    assert torch.equal(counts[0][1], counts[3][1])


# --- the pipeline afterwards -------------------------------------------------------------------------


def states(pipe):
    scheduler = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in vars(pipe.scheduler).items()
    }
    modules = [(type(module), module.training) for module in pipe.transformer.modules()]
    return scheduler, modules, pipe.transformer.dtype, pipe.vae.dtype


def assert_unchanged(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, after[0][name]), name


class Broken:
    name = "broken"
    shares_features = True

    def run(self, setting):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_pipeline_is_left_as_it_was(name, monkeypatch):
    pipe = made(name)
    pipe.vae.to(torch.bfloat16)
    pipe.transformer.train()
    allow_exchange(pipe.transformer, r"blocks\.0\.")
    sampled(pipe, name, noise(name), guidance_scale=1.0)  # leaves the scheduler amid its run
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(None))
    before = states(pipe)
    options = {"steps": 2, "features": Features(steps=1)}
    result = edit(pipe, image_for(name), "a cat", "a dog", method="fireflow", **options)
    assert result.bank_bytes > 0
    assert_unchanged(before, states(pipe))
    assert len(freed) == 1
    with pytest.raises(RuntimeError, match="broken on purpose"):
        edit(pipe, image_for(name), "a cat", "a dog", method=Broken(), **options)
    assert_unchanged(before, states(pipe))
    assert len(freed) == 2


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_half_precision_pipeline(name):
    """Every model runs in bfloat16; the state between evaluations is float32."""
    pipe, method = made(name).to(torch.bfloat16), Nothing()
    options = {"source_guidance_scale": 1.0, "target_guidance_scale": 1.0, "steps": 3}
    edit(pipe, image_for(name), "a cat", "a dog", method=method, **options)
    setting = method.setting
    assert setting.x1.dtype == torch.float32
    assert setting.source["encoder_hidden_states"].dtype == torch.bfloat16
    network = velocity_from_pretrained(pipe.transformer)
    expected = edit_samples(
        lambda x, t, **condition: network(x.bfloat16(), t, **condition).float(), setting.x1,
        source=setting.source, target=setting.target, grid=setting.times, method="rf-edit",
    ).x  # fmt: skip
    options |= {"output_type": "np"}
    result = edit(pipe, image_for(name), "a cat", "a dog", method="rf-edit", **options)
    decoded = edit(pipe, image_for(name), "", "", method=Given(expected), output_type="np")
    np.testing.assert_array_equal(found(result), found(decoded))
    assert float(found(result).std()) > 0.01


# --- refusals ----------------------------------------------------------------------------------------


def test_pipelines_that_are_not_served():
    kontext = diffusers.FluxKontextPipeline(**made("flux").components)
    served = "edit: pipe must be one of FluxPipeline, .*WanPipeline.*; got "
    for pipe, name in (
        (kontext, "FluxKontextPipeline"),
        (made("flux").transformer, "FluxTransformer"),
    ):
        with pytest.raises(TypeError, match=served + name):
            edit(pipe, picture(), "a cat", "a dog")


def test_schedulers_that_are_not_of_flows():
    for name in ("flux", "sd3"):
        pipe = made(name, DDIMScheduler())
        with pytest.raises(ValueError, match=r"pipe\.scheduler must be one of flows; got DDIMSch"):
            edit(pipe, image_for(name), "a cat", "a dog")


REFUSED = [
    (
        {"output_type": "jpeg"},
        ValueError,
        "output_type must be one of pil, np, pt, latent; got 'jp",
    ),
    ({"method": "sdedit"}, ValueError, "method must be one of flowedit"),
    ({"method": 3}, TypeError, "method must be a name or an object"),
    ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer; got float"),
    ({"steps": True}, TypeError, "steps must be an integer; got bool"),
    ({"layers": "attn"}, ValueError, "layers must be left out without features; got 'attn'"),
    ({"features": 3, "method": "rf-edit"}, TypeError, "features must be a Features object"),
    ({"features": Features(1)}, ValueError, "must be left out, since method 'flowedit' shares"),
    (
        {"features": Features(1), "method": "rf-edit", "layers": "nowhere"},
        ValueError,
        "names like 'nowhere'; got none",
    ),
    (
        {"negative_prompt": "blurry"},
        ValueError,
        "negative_prompt must be left out .* embedded_guid",
    ),
    (
        {"negative_prompt": "blurry", "embedded_guidance": 3.5},
        ValueError,
        "negative_prompt must be left out .* a scale other than 1",
    ),
    ({"source_guidance_scale": "big"}, TypeError, "source_guidance_scale must be a number or a t"),
    ({"target_guidance_scale": True}, TypeError, "target_guidance_scale must be a number or a t"),
    (
        {"target_guidance_scale": ClassifierFree(2.0)},
        TypeError,
        "target_guidance_scale must be a number or a tensor, which the network is told; got Clas",
    ),
    (
        {"target_guidance_scale": torch.ones(3)},
        ValueError,
        r"target_guidance_scale must be a number, a 0-d or a \(1,\) tensor; got shape \(3,\)",
    ),
    ({"embedded_guidance": "x"}, TypeError, "embedded_guidance must be a number or a tensor"),
    ({"height": 40}, ValueError, "height must be a multiple of 16; got 40"),
    ({"width": 0}, ValueError, "width must be a multiple of 16; got 0"),
    ({"width": 32.0}, TypeError, "width must be an integer; got float"),
    ({"seed": 1.5}, TypeError, "seed must be an int"),
    ({"source_prompt": 3}, TypeError, "source_prompt must be a string, a list of str.*; got 3"),
    ({"target_prompt": []}, TypeError, r"target_prompt must be a string, .*; got \[\]"),
    ({"target_prompt": ["a", 3]}, TypeError, "target_prompt must be a string"),
    (
        {"target_prompt": {"prompt_embeds": torch.ones(1, 7, 32)}},
        ValueError,
        "target_prompt must have the keys prompt_embeds, pooled_prompt_embeds; got 'prompt_embeds'",
    ),
    (
        {"target_prompt": {"prompt_embeds": 3, "pooled_prompt_embeds": torch.ones(1, 32)}},
        TypeError,
        r"target_prompt\['prompt_embeds'\] must be a tensor with the batch first; got int",
    ),
    (
        {"source_prompt": ["a"] * 2, "target_prompt": ["a"] * 3},
        ValueError,
        "must each be one or equally many; got image 1, source_prompt 2, target_prompt 3",
    ),
    ({"image": "cat.png"}, TypeError, "image must be a PIL image, a NumPy array.*; got str"),
    ({"image": []}, TypeError, "image must be a PIL .*; got an empty list"),
    (
        {"image": np.zeros((32, 32))},
        ValueError,
        r"image must have channels.*; got shape \(32, 32\)",
    ),
    ({"image": picture().convert("RGBA")}, ValueError, "image must have 3 channels.*; got 4"),
    ({"image": picture().convert("L")}, ValueError, "image must have 3 channels.*; got 1"),
    ({"image": torch.zeros(1, 4, 32, 32)}, ValueError, "image must have 3 channels.*; got 4"),
    (
        {"image": np.full((32, 32, 3), 255, np.uint8)},
        ValueError,
        r"image must lie in \[0, 1\]; got values from 255 to 255",
    ),
    (
        {"image": picture(0, 8, 32)},
        ValueError,
        "height must be a multiple of 16; got a picture of 8",
    ),
]


@pytest.mark.parametrize(("changed", "error", "text"), REFUSED)
def test_refusals(changed, error, text):
    pipe = kept("flux")
    arguments = {"image": picture(), "source_prompt": "a cat", "target_prompt": "a dog", "steps": 2}
    with pytest.raises(error, match=text):
        edit(pipe, **{**arguments, **changed})


def test_more_refusals():
    with pytest.raises(
        ValueError, match="embedded_guidance must be left out for a network without"
    ):
        edit(made("sd3"), picture(), "a cat", "a dog", embedded_guidance=2.0)
    with pytest.raises(
        ValueError, match="prompt_embeds, pooled_prompt_embeds, since the pipeline has no"
    ):
        edit(made("flux", text=False), picture(), "a cat", "a dog")
    pipe = made("wan")
    with pytest.raises(ValueError, match=r"image must have 1 \+ 4 k frames.*; got 4"):
        edit(pipe, image_for("wan")[:4], "a cat", "a dog")
    with pytest.raises(ValueError, match="negative_prompt must be left out"):
        edit(
            pipe, image_for("wan"), "a", "a", negative_prompt="blurry",
            source_guidance_scale=1, target_guidance_scale=1.0,
        )  # fmt: skip
