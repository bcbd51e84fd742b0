"""Pipelines of small random networks: latents as with diffusers' schedulers, saved, loaded and begun midway."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose pipelines these are"
)

import diffusers
import diffusers_pipes
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers_pipes import FLUX, UNIPC, network
from schedulers_cases import CLASSES, cls_of

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.integrations import diffusers as rfd

LTX = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "shift_terminal": 0.1,
}


def ltx_vae():
    """A video of 5 frames of 32 x 32 from latents of 2 frames of 8 x 8, 4 channels."""
    torch.manual_seed(0)
    sides = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    scaling = (True, True, False, False)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        patch_size=1,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        **sides,
        **{f"decoder_{name}": value for name, value in sides.items()},
    ).eval()


def ltx(scheduler, cls=diffusers.LTXPipeline):
    nothing = dict.fromkeys(("text_encoder", "tokenizer"))
    return cls(scheduler=scheduler, vae=ltx_vae(), transformer=network("LTX"), **nothing)


VIDEO = (diffusers.WanPipeline, diffusers.LTXPipeline, diffusers.LTXConditionPipeline)


def call(pipe, steps=4, **options):
    """Latents (or what output_type says) of a run with fixed embeddings and noise."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    width = 48 if isinstance(pipe, diffusers.Flux2Pipeline) else 32
    text = torch.randn(1, 7, width, generator=generator)
    arguments = {
        "prompt_embeds": text,
        "num_inference_steps": steps,
        "generator": generator,
        "output_type": "latent",
        "guidance_scale": 1.0,
        "height": 32,
        "width": 32,
    }
    if isinstance(pipe, VIDEO):
        arguments |= {"num_frames": 5, "guidance_scale": 2.0, "negative_prompt_embeds": -text}
    elif not isinstance(pipe, diffusers.Flux2Pipeline):
        arguments["pooled_prompt_embeds"] = torch.randn(1, 32, generator=generator)
    if isinstance(pipe, VIDEO[1:]):
        arguments["prompt_attention_mask"] = torch.ones(1, 7)
        arguments["negative_prompt_attention_mask"] = torch.ones(1, 7)
    return pipe(**{**arguments, **options}, return_dict=False)[0]


flux, flux2, sd3, wan = (
    functools.partial(getattr(diffusers_pipes, name), text=False)
    for name in ("flux", "flux2", "sd3", "wan")
)
CASES = {
    "Flux": (flux, FLUX),
    "Flux2": (flux2, FLUX),
    "SD3": (sd3, {"shift": 3.0}),
    "Wan": (wan, {"shift": 5.0}),
    "LTX": (ltx, LTX),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_latents_as_with_the_scheduler_of_diffusers(name):
    make, config = CASES[name]
    pipe = make(FlowMatchEulerDiscreteScheduler(**config))
    expected = call(pipe)
    pipe.scheduler = rf.integrations.diffusers.RFEulerScheduler.from_config(pipe.scheduler.config)
    found = call(pipe)
    assert torch.isfinite(found).all()
    assert found.std() > 0
    assert torch.equal(found, expected)
    assert torch.equal(call(pipe), expected)  # a second run starts afresh


@functools.cache
def many_euler_steps(name):
    make, config = CASES[name]
    return call(make(FlowMatchEulerDiscreteScheduler(**config)), 80)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheduler", CLASSES[1:])
def test_other_schedulers_run_and_agree(name, scheduler):
    """All of them go to the same flow's end, where Euler comes with many steps."""
    make, config = CASES[name]
    pipe = make(FlowMatchEulerDiscreteScheduler(**config))
    pipe.scheduler = cls_of(scheduler).from_config(pipe.scheduler.config)
    euler, found = many_euler_steps(name), call(pipe, 30)
    assert found.shape == euler.shape
    assert found.dtype == euler.dtype
    assert 0 < (found - euler).norm() / euler.norm() < 0.15


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_tokens_have_times_of_their_own(strength):
    """LTX's pipeline that holds a frame: its tokens are clean, the schedule may begin midway."""
    pipe = ltx(FlowMatchEulerDiscreteScheduler(), diffusers.LTXConditionPipeline)
    frame = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    start = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"image": frame, "frame_index": 0, "strength": 0.9, "denoise_strength": strength}
    options |= {"latents": start} if strength < 1 else {}
    results = []
    for cls in (FlowMatchEulerDiscreteScheduler, rfd.RFEulerScheduler):
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        results.append(call(pipe, 5, **options))
    assert results[0].isfinite().all()
    assert torch.equal(*results)
    assert not torch.equal(results[0], call(pipe, 5, **{**options, "image": 1 - frame}))
    pipe.scheduler = rfd.RFMidpointScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(TypeError, match="per_token_timesteps"):
        call(pipe, 5, **options)


def test_wan_keeps_the_shift_of_its_multistep_scheduler():
    pipe = wan(UniPCMultistepScheduler(**{**UNIPC, "flow_shift": 5.0}))
    expected = call(pipe, 6)
    pipe.scheduler = rfd.RFMultistepScheduler.from_config(
        pipe.scheduler.config, integer_timesteps=True
    )
    found = call(pipe, 6)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    pipe.scheduler = rfd.RFMidpointScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.shift == 5.0


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [*(("Flux", name) for name in CLASSES), ("Flux2", "Midpoint"), ("LTX", "Multistep")],
)
def test_a_pipeline_is_saved_and_loaded(name, scheduler, tmp_path):
    make, config = CASES[name]
    pipe = make(cls_of(scheduler)(**config, single_shift=True))
    expected = call(pipe, 3, output_type="np")
    assert expected.shape[-3:] == (32, 32, 3)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["rfkernels.integrations.diffusers", f"RF{scheduler}Scheduler"]
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    nothing = {name: None for name in names if name in pipe.components}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **nothing)
    assert type(again.scheduler) is cls_of(scheduler)
    assert again.scheduler.config.single_shift
    # Loaded weights lie elsewhere in memory, which moves the last digit of a product.
    assert np.abs(call(again, 3, output_type="np") - expected).max() < 1e-5
    # another scheduler may be given in its place
    other = cls_of("Euler").from_pretrained(tmp_path, subfolder="scheduler")
    assert other.config.max_shift == config["max_shift"]
    replaced = type(pipe).from_pretrained(tmp_path, scheduler=other, **nothing)
    assert type(replaced.scheduler) is cls_of("Euler")


@pytest.mark.parametrize("scheduler", CLASSES)
@pytest.mark.parametrize(("name", "strength"), [("Flux", 0.6), ("Flux", 0.4), ("SD3", 0.6)])
def test_image_to_image_begins_midway(name, strength, scheduler):
    """The pipeline skips entries of the schedule by `order` and mixes noise in at the first one left. Flux gives levels
    and then takes the number of entries for that of the steps."""
    make, config = CASES[name]
    text = make(FlowMatchEulerDiscreteScheduler(**config))
    cls = getattr(
        diffusers, {"Flux": "FluxImg2ImgPipeline"}.get(name, "StableDiffusion3Img2ImgPipeline")
    )
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for made in (FlowMatchEulerDiscreteScheduler(**config), cls_of(scheduler)(**config)):
        pipe = cls(**{**text.components, "scheduler": made})
        results.append(call(pipe, 40, image=picture, strength=strength))
    if scheduler == "Euler":
        assert torch.equal(*results)
    else:  # FireFlow begins at a midpoint, half a step from where the others do
        bound = 0.25 if scheduler == "FireFlow" else 0.15
        assert 0 < (results[0] - results[1]).norm() / results[0].norm() < bound


class ExactTransformer(ModelMixin, ConfigMixin):
    """Stands for SD3's network and answers with the exact field of a flow; counts its calls."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 4, patch_size: int = 2) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        means = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        self.flow = GaussianMixtureFlow(means, 0.4)
        self.calls = 0

    def forward(self, hidden_states, timestep, **_):
        self.calls += 1
        return (-self.flow(hidden_states, 1 - timestep / 1000),)


def test_fewer_calls_for_the_same_error():
    network_of_it = ExactTransformer()
    pipe = sd3(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=network_of_it)
    config = pipe.scheduler.config

    def measured(cls, steps, **options):
        pipe.scheduler = cls.from_config(config, **options)
        network_of_it.calls = 0
        latents = call(pipe, steps)
        return latents, network_of_it.calls

    truth, _ = measured(rfd.RFMidpointScheduler, 400)
    errors, calls = {}, {}
    for name, cls, steps, options in (
        ("euler", FlowMatchEulerDiscreteScheduler, 40, {}),
        ("midpoint", rfd.RFMidpointScheduler, 10, {}),
        ("heun", rfd.RFHeunScheduler, 10, {}),
        ("fireflow", rfd.RFFireFlowScheduler, 16, {}),
        ("ab2", rfd.RFMultistepScheduler, 20, {"algorithm": "ab2"}),
        ("dpm++", rfd.RFMultistepScheduler, 20, {"algorithm": "dpm++", "grid": "dpm++"}),
        ("unipc", rfd.RFMultistepScheduler, 20, {"algorithm": "unipc", "grid": "unipc"}),
    ):
        latents, calls[name] = measured(cls, steps, **options)
        errors[name] = float((latents - truth).norm() / truth.norm())
    assert calls == {
        "euler": 40, "midpoint": 20, "heun": 19, "fireflow": 17, "ab2": 20, "dpm++": 20, "unipc": 20,
    }  # fmt: skip
    assert max(value for name, value in errors.items() if name != "euler") < errors["euler"], errors
