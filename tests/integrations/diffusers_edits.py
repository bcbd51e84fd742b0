"""What the tests of `edit` on pipelines share: pictures, methods that show what they are given, pipelines."""

from __future__ import annotations

import functools

import diffusers_pipes
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import rfkernels as rf
from rfkernels.sampling import get_solver

HEIGHT, WIDTH, WORDS = 32, 48, 8
SHAPES = {"flux": (1, 4, 4, 6), "flux2": (1, 16, 2, 3), "sd3": (1, 4, 4, 6), "wan": (1, 4, 2, 4, 6)}
NAMES = list(SHAPES)


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
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
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
