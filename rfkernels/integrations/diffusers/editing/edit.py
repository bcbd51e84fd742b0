"""`edit`: the training-free editing of `rfkernels.editing` on a pipeline of diffusers, from picture to picture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rfkernels.editing import Features, Method
from rfkernels.editing import edit as edit_samples
from rfkernels.editing.edit import check_features
from rfkernels.integrations.diffusers.editing.families import family_of
from rfkernels.integrations.diffusers.editing.family import Family
from rfkernels.integrations.diffusers.editing.network import PipelineVelocity, exchanging
from rfkernels.integrations.diffusers.editing.published import EMBEDDED, UNGUIDED, with_defaults
from rfkernels.sampling.guidance import Guidance

__all__ = ["PipelineEdit", "edit"]

Prompt = str | Sequence[str] | Mapping[str, Tensor]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class PipelineEdit:
    """What :func:`edit` returns.

    Attributes:
        images: the edited pictures, as the pipeline returns its ``images``; None for videos.
        frames: the edited videos, as the pipeline returns its ``frames``; None for pictures.
        nfe: evaluations of the network per sample; classifier-free guidance counts twice.
        bank_bytes, bank_error, bank_missed: as those of ``rfkernels.editing.edit``.
    """

    images: Any
    frames: Any
    nfe: int
    bank_bytes: int
    bank_error: float
    bank_missed: int


def edit(
    pipe: Any,
    image: Any,
    source_prompt: Prompt,
    target_prompt: Prompt,
    *,
    method: str | Method = "flowedit",
    steps: int | None = None,
    source_guidance_scale: float | Tensor | Guidance | None = None,
    target_guidance_scale: float | Tensor | Guidance | None = None,
    negative_prompt: Prompt | None = None,
    embedded_guidance: float | Tensor | None = None,
    features: Features | None = None,
    layers: str | None = None,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    seed: int | Tensor = 0,
    output_type: str = "pil",
    progress: bool = False,
) -> PipelineEdit:
    """Change pictures or videos from what ``source_prompt`` says to what ``target_prompt`` says, without
    training, by the network, autoencoder, text encoders and time grid of a pipeline.

    Served are FluxPipeline, StableDiffusion3Pipeline, their Img2Img and Inpaint relatives,
    Flux2Pipeline, Flux2KleinPipeline, WanPipeline and WanVideoToVideoPipeline. The pipeline is left
    as it was, and its models are offloaded where it offloads them. All models run in their own dtypes;
    the state is float32. The picture is encoded as the mean of the autoencoder's distribution, so that
    nothing is drawn there.

    Args:
        pipe: the pipeline.
        image: for pictures what ``pipe.image_processor`` takes: a PIL image, an array (H, W, 3) or
            (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), or a list of them; for videos what
            ``pipe.video_processor`` takes: a list of PIL images, an array (frames, H, W, 3) or tensor
            (frames, 3, H, W), one with the batch before, or a list of them. Arrays and tensors are in
            [0, 1]. Wan's autoencoder wants 1 + 4 k frames.
        source_prompt: what image shows: a string, a list of strings, or a dict of embeddings by the
            names of the pipeline's arguments, ``{"prompt_embeds": ..., "pooled_prompt_embeds": ...}``
            for FLUX and Stable Diffusion 3, ``{"prompt_embeds": ...}`` for FLUX.2 and Wan. Of
            pictures and prompts, each may be one or B.
        target_prompt: what it shall show.
        method: "flowedit", "rf-inversion", "uniedit", "rf-edit", "fireflow" or an object that carries
            its options, such as ``FlowEdit(n_max=20)``; see ``rfkernels.editing.edit``.
        steps: of the pipeline's time grid; None for those that the method was published with.
        source_guidance_scale, target_guidance_scale: FLUX.1-dev and FLUX.2 are told them, each side
            its own, at one evaluation. Stable Diffusion 3, Wan and networks without an embedding of
            the scale are guided by them classifier-free, at two evaluations where it is not 1. None
            for those that the method was published with:

            ==============  ===================================  ===================================
            method          steps and scales that FLUX is told   steps and scales of SD3 and Wan
            ==============  ===================================  ===================================
            flowedit        28 (24 taken): 1.5 and 5.5           50 (33 taken): 3.5 and 13.5
            rf-inversion    28: 0 and 3.5                        28: 1 and 3.5
            uniedit         15: 1 and 1                          15: 1 and 1
            rf-edit         30: 1 and 2                          30: 1 and 2
            fireflow        8: 1 and 2                           8: 1 and 2
            ==============  ===================================  ===================================

            FLUX networks without an embedding, such as schnell and klein, have 1 and 1. Of other
            models than FLUX.1-dev, only FlowEdit's of Stable Diffusion 3 are published.
        negative_prompt: of classifier-free guidance; None for the empty prompt.
        embedded_guidance: for networks that are told a scale: what they are told on both sides, in
            which case the two scales are classifier-free (1 and 1 if None).
        features: attention features to share, for "rf-edit" and "fireflow".
        layers: a regular expression that is searched in the names of the transformer's attention
            layers, whose order ``features.blocks`` counts. None for those that were published, the last
            18 of FLUX.1's 38 single-stream blocks with "rf-edit", where features names no blocks;
            else for all but cross-attention. Where a pipeline has two networks, those of the second
            come after those of the first.
        height, width: pixels; None for those of image, rounded down to what the pipeline can do. The
            processor resizes.
        max_sequence_length: tokens of the prompts; None for the pipeline's default.
        seed: of the noise that "flowedit" and "rf-inversion" draw, an int, or an int64 tensor (B,), with
            which a sample does not depend on the others.
        output_type: "pil", "np", "pt", or "latent" for latents as the pipeline returns them.
        progress: show a bar on standard error.

    Returns:
        :class:`PipelineEdit`.

    Raises:
        TypeError, ValueError: a pipeline that is not served, a scheduler that is not one of flows, a
            network with a cache, or an argument of the wrong type or out of range.
    """
    family = family_of(pipe)
    _refuse_caches(family)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"edit: output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}"
        )
    if layers is not None and features is None:
        raise ValueError(f"edit: layers must be left out without features; got {layers!r}")
    guidance = _kind_of_guidance(family, embedded_guidance)
    method, steps, defaults = with_defaults(method, steps, guidance, family.patch)
    check_features(features, method)
    scales = {
        "source": defaults.source if source_guidance_scale is None else source_guidance_scale,
        "target": defaults.target if target_guidance_scale is None else target_guidance_scale,
    }
    guided = guidance != EMBEDDED and not all(_is_one(scale) for scale in scales.values())
    if negative_prompt is not None and not guided:
        cure = "embedded_guidance" if guidance == EMBEDDED else "a scale other than 1"
        raise ValueError(
            "edit: negative_prompt must be left out without classifier-free guidance, which this "
            f"network has with {cure}"
        )
    if layers is None and features is not None and features.blocks is None:
        layers = family.published_layers(method.name)

    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(pipe.maybe_free_model_hooks)
        pixels = family.pixels(image, height, width)
        prompts = {"source_prompt": source_prompt, "target_prompt": target_prompt}
        if guided:
            prompts["negative_prompt"] = "" if negative_prompt is None else negative_prompt
        conditions = {
            name: family.condition(name, prompt, max_sequence_length)
            for name, prompt in prompts.items()
        }
        latents, conditions = _of_one_batch(family.encode(pixels), conditions)
        times = family.times(steps, latents)
        if guidance == EMBEDDED:
            for side, scale in scales.items():
                told = _told(f"{side}_guidance_scale", scale, latents)
                conditions[f"{side}_prompt"]["guidance"] = told
            scales = dict.fromkeys(scales, 1.0)
        elif embedded_guidance is not None:
            told = _told("embedded_guidance", embedded_guidance, latents)
            for condition in conditions.values():
                condition["guidance"] = told
        if features is not None:
            stack.enter_context(exchanging(family.networks, layers))
        edited = edit_samples(
            PipelineVelocity(family.networks, family.boundary),
            latents,
            source=conditions["source_prompt"],
            target=conditions["target_prompt"],
            method=method,
            grid=times,
            source_guidance_scale=scales["source"],
            target_guidance_scale=scales["target"],
            uncondition=conditions.get("negative_prompt"),
            features=features,
            seed=seed,
            progress=progress,
        )
        found = family.decode(edited.x, output_type)
    pictures = (None, found) if family.video else (found, None)
    return PipelineEdit(
        *pictures, edited.nfe, edited.bank_bytes, edited.bank_error, edited.bank_missed
    )


def _refuse_caches(family: Family) -> None:
    """What enable_cache keeps of one call would answer the next, which is of another prompt."""
    for network in family.networks:
        if getattr(network, "is_cache_enabled", False):
            raise ValueError(
                "edit: pipe must have networks without a cache (disable_cache takes it away); "
                f"got {type(network).__name__} with one"
            )


def _kind_of_guidance(family: Family, embedded_guidance: object) -> str:
    if family.told_guidance:
        return EMBEDDED if embedded_guidance is None else UNGUIDED
    if embedded_guidance is not None:
        raise ValueError(
            "edit: embedded_guidance must be left out for a network without an embedding of the "
            f"guidance scale; got {embedded_guidance!r}"
        )
    return family.without_embedding


def _is_one(scale: object) -> bool:
    """Whether such a scale needs no second call."""
    return _is_number(scale) and scale == 1


def _is_number(value: object) -> bool:
    """NumPy's too, but no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _told(name: str, scale: object, latents: Tensor) -> Tensor:
    """(B,) float32 for the network."""
    if not (_is_number(scale) or isinstance(scale, Tensor)):
        raise TypeError(
            f"edit: {name} must be a number or a tensor, which the network is told; "
            f"got {type(scale).__name__}"
        )
    if not (isinstance(scale, Tensor) or math.isfinite(scale)):
        raise ValueError(f"edit: {name} must be finite; got {scale}")
    told = torch.as_tensor(scale, dtype=torch.float32, device=latents.device)
    if told.shape not in ((), latents.shape[:1]):
        raise ValueError(
            f"edit: {name} must be a number, a 0-d or a ({len(latents)},) tensor; "
            f"got shape {tuple(told.shape)}"
        )
    return told.expand(len(latents))


def _of_one_batch(
    latents: Tensor, conditions: dict[str, dict[str, Tensor]]
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Both with the greatest number of rows among them; single rows are repeated.

    Raises:
        ValueError: there are others.
    """
    rows = {"image": len(latents)}
    for name, condition in conditions.items():
        for value in condition.values():
            rows[name] = max(len(value), rows.get(name, 0))
    count = max(rows.values())
    if not set(rows.values()) <= {1, count}:
        got = ", ".join(f"{name} {number}" for name, number in rows.items())
        raise ValueError(f"edit: image and prompts must each be one or equally many; got {got}")

    def repeated(value: Tensor) -> Tensor:
        return value if len(value) == count else value.expand(count, *value.shape[1:]).contiguous()

    conditions = {
        name: {argument: repeated(value) for argument, value in condition.items()}
        for name, condition in conditions.items()
    }
    return repeated(latents), conditions
