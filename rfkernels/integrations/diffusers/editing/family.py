"""What editing needs of a pipeline, and what is the same in all families of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rfkernels.integrations.diffusers.editing.published import CFG
from rfkernels.sampling.arguments import check_integer

__all__ = ["Family"]


class Family:
    """A pipeline, seen by `edit`. What stands here serves pictures and AutoencoderKL.

    Args:
        pipe: the pipeline; nothing of it is changed.
    """

    # Names of the classes.
    pipelines: ClassVar[tuple[str, ...]]
    # The pipeline's names of embedded prompts, to those of the network's arguments.
    embeddings: ClassVar[dict[str, str]] = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    }
    # Whether what is edited are videos.
    video: ClassVar[bool] = False
    # What guidance does for a network that is not told a scale.
    without_embedding: ClassVar[str] = CFG
    # Side of the squares of latents that are UniEdit's tokens, as its authors' ports have it.
    patch: ClassVar[int] = 1

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    # --- the network ---------------------------------------------------------------------------

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """One network, or the two for high and for low noise."""
        return (self.pipe.transformer,)

    @property
    def boundary(self) -> float | None:
        """The noise level between two networks."""
        return None

    @property
    def told_guidance(self) -> bool:
        """Whether the network has an embedding of the guidance scale."""
        return bool(self.networks[0].config.get("guidance_embeds", False))

    def published_layers(self, method: str) -> str | None:
        """Attention layers whose features the method was published to share; None for all."""
        return None

    # --- prompts -------------------------------------------------------------------------------

    def condition(self, name: str, prompt: object, length: int | None) -> dict[str, Tensor]:
        """The network's arguments for a prompt, one row for each of its strings.

        Args:
            name: of the prompt among the arguments of `edit`.
            prompt: a string, several, or embeddings by the pipeline's names.
            length: tokens of the longest prompt; None for what the pipeline takes by default.
        """
        if isinstance(prompt, Mapping):
            found = self._given(name, prompt)
        else:
            if isinstance(prompt, str):
                prompt = [prompt]
            if not _strings(prompt):
                raise TypeError(
                    f"edit: {name} must be a string, a list of strings or a dict of embeddings; "
                    f"got {prompt!r}"
                )
            if self.pipe.text_encoder is None:
                raise ValueError(
                    f"edit: {name} must be a dict of {', '.join(self.embeddings)}, since the "
                    f"pipeline has no text encoder; got {prompt!r}"
                )
            options = {} if length is None else {"max_sequence_length": length}
            found = self.encode_prompt(list(prompt), **options)
        place = {"device": self.pipe._execution_device, "dtype": self.networks[0].dtype}
        pairs = zip(self.embeddings.values(), found, strict=True)
        return {argument: tensor.to(**place) for argument, tensor in pairs}

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, ...]:
        """The embeddings in the order of ``embeddings``, by the pipeline's own method."""
        raise NotImplementedError

    def _given(self, name: str, prompt: Mapping[str, Tensor]) -> list[Tensor]:
        if set(prompt) != set(self.embeddings):
            raise ValueError(
                f"edit: {name} must have the keys {', '.join(self.embeddings)}; "
                f"got {', '.join(map(repr, prompt)) or 'none'}"
            )
        for key, value in prompt.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"edit: {name}[{key!r}] must be a tensor with the batch first; "
                    f"got {type(value).__name__}"
                )
        return [prompt[key] for key in self.embeddings]

    # --- pictures and latents ------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        """Heights and widths are multiples of this many pixels."""
        return self.pipe.vae_scale_factor * 2

    def pixels(self, image: object, height: int | None, width: int | None) -> Tensor:
        """(B, 3, H, W), for videos (B, 3, frames, H, W), in [-1, 1].

        Args:
            image: in the formats that the pipeline's processor takes.
            height, width: pixels; None for those of the (first) picture, rounded down.
        """
        sides = []
        for name, given, own in zip(
            ("height", "width"), (height, width), _sides(image), strict=True
        ):
            side = own - own % self.multiple if given is None else given
            side = check_integer("edit", name, side, "an integer")
            if side < 1 or side % self.multiple:
                got = f"a picture of {own}" if given is None else side
                raise ValueError(f"edit: {name} must be a multiple of {self.multiple}; got {got}")
            sides.append(side)
        pixels = self.preprocess(image, *sides)
        if pixels.shape[1] != 3:
            raise ValueError(
                "edit: image must have 3 channels, as image.convert('RGB') has; "
                f"got {pixels.shape[1]}"
            )
        # [0, 1] became [-1, 1]; what the processor took for [-1, 1] stayed. Both may be off by rounding.
        if not pixels.abs().amax() <= 1.01:  # NaN is neither
            least, greatest = ((float(value) + 1) / 2 for value in pixels.aminmax())
            raise ValueError(
                f"edit: image must lie in [0, 1]; got values from {least:g} to {greatest:g}"
            )
        return pixels

    def preprocess(self, image: Any, height: int, width: int) -> Tensor:
        """By the pipeline's processor."""
        return self.pipe.image_processor.preprocess(image, height=height, width=width)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents in float32, as the network reads them: the mean of the autoencoder's distribution."""
        vae = self.pipe.vae
        out = vae.encode(pixels.to(self._vae_device, vae.dtype))
        found = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return self.normalized(found.float()).to(self.pipe._execution_device)

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """What the pipeline returns for such latents."""
        if output_type == "latent":
            return self.packed(latents)
        vae = self.pipe.vae
        latents = self.denormalized(latents.to(self._vae_device)).to(vae.dtype)
        return self.postprocess(vae.decode(latents, return_dict=False)[0], output_type)

    def normalized(self, latents: Tensor) -> Tensor:
        """Latents of the network from those of the autoencoder."""
        config = self.pipe.vae.config
        return (latents - config.shift_factor) * config.scaling_factor

    def denormalized(self, latents: Tensor) -> Tensor:
        """The way back."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def packed(self, latents: Tensor) -> Tensor:
        """In the shape that the pipeline returns and takes latents in."""
        return latents

    def postprocess(self, pixels: Tensor, output_type: str) -> Any:
        """By the pipeline's processor."""
        return self.pipe.image_processor.postprocess(pixels, output_type=output_type)

    @property
    def _vae_device(self) -> torch.device:
        try:
            from diffusers.utils.torch_utils import get_module_execution_device
        except ImportError:  # diffusers before 0.42, whose pipelines have one device
            return self.pipe._execution_device
        return get_module_execution_device(self.pipe.vae)

    # --- the grid ------------------------------------------------------------------------------

    def times(self, steps: int, latents: Tensor) -> tuple[float, ...]:
        """1 - sigma, ascending, of the run that the pipeline would make of so many steps.

        The scheduler of the pipeline is not touched; of one with several calls a step these are the
        steps.

        Raises:
            ValueError: the scheduler is not one of flows.
        """
        from rfkernels.integrations.diffusers.schedulers import RFEulerScheduler

        own = self.pipe.scheduler
        try:
            scheduler = RFEulerScheduler.from_config(own.config)
        except ValueError as error:
            raise ValueError(
                f"edit: pipe.scheduler must be one of flows; got {type(own).__name__} ({error})"
            ) from error
        if hasattr(type(own), "set_shift"):
            scheduler.set_shift(own.shift)
        scheduler.set_timesteps(steps, **self.schedule(steps, latents))
        # A grid may name its last level twice.
        return tuple(dict.fromkeys(1 - sigma for sigma in scheduler.sigmas.tolist()))

    def schedule(self, steps: int, latents: Tensor) -> dict[str, Any]:
        """What the pipeline passes to its scheduler's set_timesteps, besides the steps."""
        return {}


def _strings(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(one, str) for one in prompt)
    )


def _sides(image: object) -> tuple[int, int]:
    """Height and width of a picture, or of the first one of several."""
    from PIL import Image

    first = image
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, Image.Image):
        return first.height, first.width
    if isinstance(first, (np.ndarray, Tensor)):
        if first.ndim < 3:
            raise ValueError(
                "edit: image must have channels, (H, W, 3) in arrays and (3, H, W) in tensors; "
                f"got shape {tuple(first.shape)}"
            )
        sides = first.shape[-2:] if isinstance(first, Tensor) else first.shape[-3:-1]
        return int(sides[0]), int(sides[1])
    raise TypeError(
        "edit: image must be a PIL image, a NumPy array, a tensor, or a list of them; "
        f"got {'an empty list' if first == [] else type(first).__name__}"
    )
