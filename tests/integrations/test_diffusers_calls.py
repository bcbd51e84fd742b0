"""What pipelines do with a scheduler besides stepping whole tensors: states written over, generators, its class, and each
way to lay out a schedule, in small pipelines of diffusers."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose pipelines these are"
)

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_pipes import network, vae
from schedulers_cases import RULES
from schedulers_cases import made as scheduler_of

from rfkernels.integrations import diffusers as rfd

KEEPING = ["Heun", "Midpoint", "dpm++", "unipc"]  # that need a sample again in a later call


def begun(solver):
    order = {"solver_order": 3} if solver in ("dpm++", "unipc") else {}
    scheduler = scheduler_of(solver, **order)
    scheduler.set_timesteps(6)
    return scheduler


def field(x, t):
    return torch.sin(3 * x) + t / 1000


def walked(scheduler, x):
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t), t, x).prev_sample
    return x


# --- states that are written over ----------------------------------------------------------------


@pytest.mark.parametrize("solver", RULES)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_part_that_is_written_over(solver, mode):
    """Kandinsky 5 and SkyReels V2 hold the state within a tensor and write each new one into its place."""
    width = 2
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = walked(begun(solver), start[:, :width].clone())
    scheduler = begun(solver)
    with mode():
        whole = start.clone()
        for t in scheduler.timesteps:
            part = whole[:, :width]
            whole[:, :width] = scheduler.step(field(part, t), t, part, return_dict=False)[0]
    assert torch.equal(whole[:, :width], expected)
    assert torch.equal(whole[:, width:], start[:, width:])


@pytest.mark.parametrize("solver", RULES)
def test_a_whole_state_that_is_written_over(solver):
    """Of this no copy is kept; who needs it again says so."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = walked(begun(solver), x.clone())
    scheduler = begun(solver)

    def run():
        for t in scheduler.timesteps:
            x.copy_(scheduler.step(field(x, t), t, x).prev_sample)

    if solver in KEEPING:
        message = r"Scheduler\.step: sample must not be written over while it is still needed"
        with pytest.raises(RuntimeError, match=message):
            run()
    else:
        run()
        assert torch.equal(x, expected)


@pytest.mark.parametrize("solver", KEEPING)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_in_the_middle_of_a_step_go_on_alone(solver, copied):
    """LTX-2 and Cosmos 3 copy their scheduler for sound; the sample was changed before it was kept."""
    scheduler = begun(solver)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).mul_(0.5)
    first, *others = scheduler.timesteps
    x = scheduler.step(field(x, first), first, x).prev_sample
    results = []
    for made in (copied(scheduler), scheduler):
        state = x
        for t in others:
            state = made.step(field(state, t), t, state).prev_sample
        results.append(state)
    assert torch.equal(*results)


# --- what is asked of every scheduler ------------------------------------------------------------


@pytest.mark.parametrize("solver", RULES)
def test_what_pipelines_ask_of_their_scheduler(solver):
    scheduler = begun(solver)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # EasyAnimate, Bria
    x = torch.ones(1, 3)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x  # Bria, of all others
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    t = scheduler.timesteps[0]
    # As Stable Audio 3 calls it.
    assert scheduler.step(x, t, x, generator=generator).prev_sample.isfinite().all()
    assert torch.equal(generator.get_state(), before)
    named = inspect.signature(scheduler.set_timesteps).parameters
    assert {"sigmas", "timesteps", "mu"} <= set(named)  # every pipeline that has a choice
    scheduler.set_timesteps(timesteps=torch.tensor([900.0, 500.0]), sigmas=torch.tensor([0.9, 0.5]))
    assert scheduler.num_inference_steps == 2


# --- pipelines -----------------------------------------------------------------------------------


def words(width=32):
    return torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))


def masked():
    return {"prompt_embeds": words(), "prompt_attention_mask": torch.ones(1, 7).bool()}


ALONE = {"guidance_scale": 1.0}
# Pipeline, network and its options, config of the scheduler, arguments of a call.
PIPELINES = {
    # the state is a part of a tensor
    "Kandinsky5": (
        diffusers.Kandinsky5T2VPipeline,
        {},
        {"shift": 5.0},
        lambda: {
            "prompt_embeds_qwen": words(),
            "prompt_embeds_clip": torch.ones(1, 16),
            "prompt_cu_seqlens": torch.tensor([0, 7]),
            "num_frames": 5,
            **ALONE,
        },
    ),
    # timesteps beside sigmas, cut off to whole ones, and a linear shift
    "CogView4": (
        diffusers.CogView4Pipeline,
        {},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25},
        lambda: {"prompt_embeds": words(), **ALONE},
    ),
    # from 0 up to 1
    "Mochi": (
        diffusers.MochiPipeline,
        {},
        {"invert_sigmas": True},
        lambda: {**masked(), "num_frames": 7, **ALONE},
    ),
    # steps in float32 whatever the network's dtype
    "ZImage": (
        diffusers.ZImagePipeline,
        {},
        {"shift": 3.0},
        lambda: {"prompt_embeds": [words()[0]], "guidance_scale": 0.0},
    ),
    "QwenImage": (
        diffusers.QwenImagePipeline,
        {"in_channels": 16, "patch_size": 2},
        {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
        lambda: {
            "prompt_embeds": words(),
            "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.int64),
            "true_cfg_scale": 1.0,
        },
    ),
    "Chroma": (
        diffusers.ChromaPipeline,
        {"in_channels": 16},
        {"use_beta_sigmas": True},
        lambda: {**masked(), **ALONE},
    ),
    # asks for the class; sigmas of its own where the shift is static
    "Bria": (
        diffusers.BriaPipeline,
        {"in_channels": 16},
        {"use_dynamic_shifting": True},
        lambda: {"prompt_embeds": words(), **ALONE},
    ),
    "Lumina2": (diffusers.Lumina2Pipeline, {}, {"shift": 6.0}, lambda: {**masked(), **ALONE}),
    "AuraFlow": (diffusers.AuraFlowPipeline, {}, {"shift": 1.73}, lambda: {**masked(), **ALONE}),
    "HunyuanVideo": (
        diffusers.HunyuanVideoPipeline,
        {},
        {"shift": 7.0},
        lambda: {**masked(), "pooled_prompt_embeds": torch.ones(1, 32), "num_frames": 5},
    ),
}


@functools.cache
def pipeline(name):
    cls, options, config, _ = PIPELINES[name]
    parts = inspect.signature(cls.__init__).parameters.values()
    given = {
        part.name: None for part in parts if part.default is part.empty and part.name != "self"
    }
    given |= {"vae": vae()} if name == "Bria" else {}
    given |= {
        "transformer": network(name, **options),
        "scheduler": FlowMatchEulerDiscreteScheduler(**config),
    }
    made = cls(**given)
    made.set_progress_bar_config(disable=True)
    return made, made.scheduler.config


def call(name, scheduler, steps):
    pipe, _ = pipeline(name)
    pipe.scheduler = scheduler
    arguments = {
        **PIPELINES[name][3](),
        "num_inference_steps": steps,
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**arguments)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_run_with_any_of_ours(name):
    """Euler to the bit; Heun's rule and AB2 over 12 steps no farther from many Euler steps than 3 Euler steps are."""
    config = pipeline(name)[1]
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    few = call(name, theirs, 3)
    assert few.isfinite().all()
    assert torch.equal(call(name, rfd.RFEulerScheduler.from_config(config), 3), few)
    many = call(name, theirs, 30)
    for cls in (
        rfd.RFHeunScheduler,
        rfd.RFMidpointScheduler,
        rfd.RFFireFlowScheduler,
        rfd.RFMultistepScheduler,
    ):
        found = call(name, cls.from_config(config), 12)
        assert (found - many).norm() < (few - many).norm(), cls


def test_times_that_a_pipeline_cuts_off():
    """SkyReels V2 forces frames on times of their own, made of the scheduler's by `long()`, each with a scheduler's copy."""
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=network("SkyReelsV2"),
        vae=None,
        scheduler=rfd.RFMidpointScheduler(shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)

    def run(steps):
        return pipe(
            prompt=None,
            prompt_embeds=words(),
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
            return_dict=False,
        )[0]

    with pytest.raises(ValueError, match="timestep must be an entry of timesteps"):
        run(2)
    pipe.scheduler = rfd.RFEulerScheduler(shift=5.0, integer_timesteps=True)
    few, many = run(3), run(30)
    for cls in (rfd.RFHeunScheduler, rfd.RFMidpointScheduler, rfd.RFFireFlowScheduler):
        pipe.scheduler = cls(shift=5.0, integer_timesteps=True)
        assert (run(12) - many).norm() < (few - many).norm(), cls
