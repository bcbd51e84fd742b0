"""The families of pipelines that `edit` serves."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rfkernels.integrations.diffusers.editing.family import Family
from rfkernels.integrations.diffusers.editing.published import UNGUIDED

__all__ = ["FAMILIES", "family_of"]


class Flux(Family):
    """FLUX.1. Latents (B, 16, H/8, W/8); the network is told the scale, except the distilled schnell."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    without_embedding = UNGUIDED
    patch = 2

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, ...]:
        return self.pipe.encode_prompt(prompt, None, **options)[:2]

    def published_layers(self, method: str) -> str | None:
        """RF-Edit's are the last 18 of FLUX's 38 single-stream blocks; that share of another number."""
        if method != "rf-edit":
            return None
        count = self.pipe.transformer.config.num_single_layers
        numbers = range(count - round(count * 18 / 38), count)
        return rf"^single_transformer_blocks\.({'|'.join(map(str, numbers))})\.attn$"

    def packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)

    def schedule(self, steps: int, latents: Tensor) -> dict[str, Any]:
        config = self.pipe.scheduler.config
        mu = _mu(config, latents.shape[2] * latents.shape[3] // 4, max_shift=1.15)
        return {"sigmas": _even_sigmas(config, steps), "mu": mu}


class Flux2(Family):
    """FLUX.2. Latents (B, 128, H/16, W/16), patches normalized by the autoencoder's batch norm; the network
    is told the scale."""

    pipelines = ("Flux2Pipeline",)
    embeddings: ClassVar[dict[str, str]] = {"prompt_embeds": "encoder_hidden_states"}
    without_embedding = UNGUIDED

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, ...]:
        return self.pipe.encode_prompt(prompt, **options)[:1]

    def normalized(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (self.pipe._patchify_latents(latents) - mean) / deviation

    def denormalized(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return self.pipe._unpatchify_latents(latents * deviation + mean)

    def packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents)

    def schedule(self, steps: int, latents: Tensor) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(latents.shape[2] * latents.shape[3], steps)
        return {"sigmas": _even_sigmas(self.pipe.scheduler.config, steps), "mu": mu}

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (1, 128, 1, 1)."""
        vae = self.pipe.vae
        mean, variance = (
            values.view(1, -1, 1, 1).to(like.device, like.dtype)
            for values in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


class Flux2Klein(Flux2):
    """FLUX.2 klein, whose network is told no scale. Its pipeline returns latents of the autoencoder."""

    pipelines = ("Flux2KleinPipeline",)

    def packed(self, latents: Tensor) -> Tensor:
        return self.denormalized(latents)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5. Latents (B, 16, H/8, W/8); classifier-free guidance."""

    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, ...]:
        found = self.pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, **options
        )
        return found[0], found[2]

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    def schedule(self, steps: int, latents: Tensor) -> dict[str, Any]:
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        patch = self.pipe.transformer.config.patch_size
        tokens = (latents.shape[2] // patch) * (latents.shape[3] // patch)
        return {"mu": _mu(config, tokens, max_shift=1.16)}


class Wan(Family):
    """Wan 2.1 and 2.2, text to video. Latents (B, 16, 1 + (frames - 1)/4, H/8, W/8); classifier-free guidance."""

    pipelines = ("WanPipeline", "WanVideoToVideoPipeline")
    embeddings: ClassVar[dict[str, str]] = {"prompt_embeds": "encoder_hidden_states"}
    video = True

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        found = (self.pipe.transformer,)
        if self.boundary is not None:
            found += (self.pipe.transformer_2,)
        if None in found:
            raise ValueError(
                "edit: pipe must have all its networks; got a Wan pipeline without one"
            )
        return found

    @property
    def boundary(self) -> float | None:
        return self.pipe.config.get("boundary_ratio")

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, ...]:
        # 512 is the default of the pipeline's call; its encode_prompt has another.
        options = {"max_sequence_length": 512, **options}
        return self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **options)[:1]

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.networks[0].config.patch_size[1]

    def preprocess(self, image: Any, height: int, width: int) -> Tensor:
        video = self.pipe.video_processor.preprocess_video(image, height=height, width=width)
        frames, every = video.shape[2], self.pipe.vae_scale_factor_temporal
        if (frames - 1) % every:
            raise ValueError(
                f"edit: image must have 1 + {every} k frames, of which the autoencoder makes 1 + k; "
                f"got {frames}"
            )
        return video

    def normalized(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) * (1 / deviation)

    def denormalized(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents / (1 / deviation) + mean

    def postprocess(self, pixels: Tensor, output_type: str) -> Any:
        return self.pipe.video_processor.postprocess_video(pixels, output_type=output_type)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (1, 16, 1, 1, 1)."""
        config = self.pipe.vae.config
        mean, deviation = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation


def _mu(config: Any, tokens: int, max_shift: float) -> float:
    """The dynamic shift of a picture of so many tokens; the scheduler's config, or what the pipeline
    takes in its place."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )


def _even_sigmas(config: Any, steps: int) -> np.ndarray | None:
    """The levels that FLUX's pipelines lay themselves; None where they leave it to the scheduler."""
    if config.get("use_flow_sigmas"):
        return None
    return np.linspace(1.0, 1 / steps, steps)


FAMILIES: tuple[type[Family], ...] = (Flux, Flux2, Flux2Klein, StableDiffusion3, Wan)


def family_of(pipe: object) -> Family:
    """The pipeline with its family.

    Raises:
        TypeError: it is of none.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.")]
    for family in FAMILIES:
        if any(name in family.pipelines for name in names):
            return family(pipe)
    served = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise TypeError(f"edit: pipe must be one of {served}; got {type(pipe).__name__}")
