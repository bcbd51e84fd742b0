"""diffusers' networks as velocity fields of this library: velocity(x, t, **condition), t = 0 noise, 1 data,
trainable.

diffusers' flow networks are asked at sigma = 1 - t and answer with noise - data; here time and sign are
this library's, latents are packed and unpacked, guidance embeddings and position ids are filled in.
Networks that predict noise or v on a schedule become a `rfkernels.models.NoisePrediction`.

    velocity = velocity_from_pretrained("a/local/folder")
    x1 = rf.sample(velocity, x0, steps=28, condition={"encoder_hidden_states": ..., ...})

What is served: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel,
FluxTransformer2DModel, Flux2Transformer2DModel, WanTransformer3DModel, LTXVideoTransformer3DModel, and
subclasses of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.flow.schedules import NoiseSchedule, get_schedule
from rfkernels.integrations.compiled import uncompiled
from rfkernels.integrations.diffusers.folders import load_network, read_scheduler
from rfkernels.models.noise_prediction import PREDICTIONS, NoisePrediction

__all__ = ["DiffusersNetwork", "DiffusersVelocity", "velocity_from_pretrained"]


class DiffusersNetwork(nn.Module):
    """A diffusers network called as ``network(x, timestep, y=None, **condition)``: a tensor like x.

    Args:
        network: an object of one of the classes that the module's text lists.
        prompts: named tensors of equally many rows, such as the text embeddings of some prompts
            under the names of the network's arguments. With them ``y`` (B,) int64 picks a row for
            each sample; without y the last row is taken, which should be that of the empty prompt.
            They stay out of the state dict. SDXL's ``text_embeds`` and ``time_ids`` count as
            arguments.
        guidance: what a FLUX or FLUX.2 network with a guidance embedding is told; None for the default of
            its pipeline, 3.5 for FLUX and 4 for FLUX.2.
        null_label: of a class-conditional network, the label for no condition; None for DiT's own,
            the one after its classes.
        sample_shape: shape of one sample; None for that of the network's config, where it has one.

    `forward`: x (B, C, H, W), for Wan and LTX (B, C, frames, H, W); timestep (B,) in the network's own
    units. FLUX latents are those of its autoencoder. FLUX.2's are what its pipeline takes as ``latents``:
    patches of 2 x 2 in the channels, normalized, as many channels as the network has. Condition tensors
    have the batch first. With class labels, ``y`` is them. LTX takes ``rope_interpolation_scale``, seconds
    and pixels of one latent place along (frames, H, W); without it, a video of 25 frames per second.

    Raises:
        TypeError: for a network that is not served. ValueError: prompts that do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        prompts: Mapping[str, Tensor] | None = None,
        guidance: float | None = None,
        null_label: int | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.family = _family_of(network)
        self.network = network
        self.guidance = self.family.guidance if guidance is None else float(guidance)
        self.sample_shape = _sample_shape(network) if sample_shape is None else tuple(sample_shape)
        self._prompts = _checked_prompts(prompts)
        for name, value in (prompts or {}).items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)
        self.null_label = null_label
        if null_label is None and self._prompts and self._rows > 1:
            self.null_label = self._rows - 1
        elif null_label is None and self.family is _FAMILIES["DiTTransformer2DModel"]:
            self.null_label = int(network.config.num_embeds_ada_norm)

    @property
    def _rows(self) -> int:
        return len(getattr(self, f"prompt_{self._prompts[0]}"))

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor | None = None, **condition: Any
    ) -> Tensor:
        condition = self._condition(len(x), x.device, y, condition)
        out = self.family.call(self, x, timestep, condition)
        # Learned variances come as further channels.
        return out[:, : x.shape[1]] if out.shape[1] == 2 * x.shape[1] else out

    def _condition(
        self, count: int, device: torch.device, y: Tensor | None, condition: dict[str, Any]
    ) -> dict[str, Any]:
        """The network's keyword arguments, of those given, the prompts and the label."""
        if self._prompts:
            if y is None:
                y = torch.full((count,), self._rows - 1, dtype=torch.int64, device=device)
            rows = {name: getattr(self, f"prompt_{name}")[y] for name in self._prompts}
            return {**rows, **condition}
        if not _takes_labels(self.network):
            if y is not None:
                raise ValueError(
                    f"y: a {type(self.network).__name__} takes no labels; give prompts, whose rows "
                    "labels pick, or the condition itself"
                )
            return condition
        if y is None and "class_labels" not in condition:
            if self.null_label is None:
                raise ValueError(
                    f"y: this {type(self.network).__name__} needs labels, or a null_label; got None"
                )
            y = torch.full((count,), self.null_label, dtype=torch.int64, device=device)
        return condition if y is None else {"class_labels": y, **condition}


class DiffusersVelocity(nn.Module):
    """The velocity field of a diffusers network trained on flows: velocity(x, t, **condition).

    The network is asked at sigma = 1 - t (times 1000 where it counts so), and its answer, noise -
    data, is negated.

    Args:
        network: a :class:`DiffusersNetwork`.
    """

    def __init__(self, network: DiffusersNetwork) -> None:
        super().__init__()
        self.network = network

    @property
    def null_label(self) -> int | None:
        """The label that stands for no condition; None without one."""
        return self.network.null_label

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample; None where the network does not say."""
        return self.network.sample_shape

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity at x (B, ...) and t (B,), 0 = noise; see :class:`DiffusersNetwork`."""
        return -self.network(x, (1 - t) * self.network.family.time_scale, **condition)


def velocity_from_pretrained(
    source: str | Path | nn.Module,
    *,
    prediction: str | None = None,
    schedule: str | NoiseSchedule | None = None,
    prompts: Mapping[str, Tensor] | None = None,
    guidance: float | None = None,
    null_label: int | None = None,
    sample_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusersVelocity | NoisePrediction:
    """The velocity field of a diffusers network, from a local folder or the network itself.

    Args:
        source: a folder that diffusers' ``save_pretrained`` wrote, of a network or of a whole
            pipeline; or a network. Nothing is downloaded, and only safetensors files are read.
        prediction: "velocity", or "epsilon", "v" or "x1" on a schedule. None for what the pipeline's
            scheduler says; without one, for "velocity" of SD3, FLUX, FLUX.2, Wan and LTX networks. Others
            must be told.
        schedule: the schedule of epsilon, v or x1; None for the pipeline's.
        prompts, guidance, null_label, sample_shape: as in :class:`DiffusersNetwork`.
        dtype: of the loaded weights; None for those of the files.

    Returns:
        A trainable module ``velocity(x, t, **condition)`` in evaluation mode.

    Raises:
        ImportError: diffusers is not installed. FileNotFoundError: no such folder. TypeError: a
        network that is not served. ValueError: a prediction or schedule that is unknown or not said.
    """
    if isinstance(source, (str, Path)):
        prediction, schedule = read_scheduler(Path(source), prediction, schedule)
        source = load_network(Path(source), tuple(_FAMILIES), dtype)
    elif dtype is not None:
        raise ValueError(f"dtype: is that of weights to be loaded; got {dtype} with a network")
    network = DiffusersNetwork(
        source,
        prompts=prompts,
        guidance=guidance,
        null_label=null_label,
        sample_shape=sample_shape,
    ).eval()
    if prediction is None:
        prediction = network.family.prediction
    if prediction is None:
        raise ValueError(
            f"prediction: a {type(source).__name__} may predict velocity, {', '.join(PREDICTIONS)}; "
            "say which; got None"
        )
    if prediction == "velocity":
        if schedule is not None:
            raise ValueError(f"schedule: a velocity has none; got {schedule!r}")
        return DiffusersVelocity(network).eval()
    if schedule is None:
        raise ValueError(f"schedule: must be given for prediction {prediction!r}; got None")
    return NoisePrediction(network, get_schedule(schedule), prediction).eval()


# --- how each family is called -------------------------------------------------------------------

# Seconds and pixels between latent places: 8 frames of 25 a second, 32 pixels, as LTX's pipelines have it.
_LTX_SCALE = (8 / 25, 32, 32)


def _call_labelled(owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
    return owner.network(x, timestep, **condition, return_dict=False)[0]


def _call_unet_condition(
    owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: dict[str, Any]
) -> Tensor:
    added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
    if added:
        condition = {name: v for name, v in condition.items() if name not in added}
        condition["added_cond_kwargs"] = {**condition.get("added_cond_kwargs", {}), **added}
    return owner.network(x, timestep, **condition, return_dict=False)[0]


def _call_latents(
    owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: dict[str, Any]
) -> Tensor:
    return owner.network(hidden_states=x, timestep=timestep, **condition, return_dict=False)[0]


def _call_flux(
    owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: dict[str, Any]
) -> Tensor:
    """Latents (B, C, H, W) as tokens of 2 x 2 pixels, channels first within a token."""
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x: FLUX latents must have even sides; got {height} x {width}")
    rows, columns = height // 2, width // 2
    tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = tokens.reshape(batch, rows * columns, channels * 4)
    condition = _with_ids(owner, tokens, condition, rows, columns, axes=3)
    out = owner.network(hidden_states=tokens, timestep=timestep, **condition, return_dict=False)[0]
    out = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, height, width)


def _call_flux2(
    owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: dict[str, Any]
) -> Tensor:
    """Latents (B, C, H, W), one token for each place; words have places along a fourth axis."""
    _require_latents(owner, x, "FLUX.2", ("H", "W"))
    tokens = x.flatten(2).transpose(1, 2)
    condition = _with_ids(owner, tokens, condition, *x.shape[2:], axes=4)
    out = owner.network(hidden_states=tokens, timestep=timestep, **condition, return_dict=False)[0]
    return out.transpose(1, 2).reshape(x.shape)


def _call_ltx(
    owner: DiffusersNetwork, x: Tensor, timestep: Tensor, condition: dict[str, Any]
) -> Tensor:
    """Latents (B, C, frames, H, W), one token for each place, with the sides of the video."""
    _require_latents(owner, x, "LTX", ("frames", "H", "W"))
    sides = dict(zip(("num_frames", "height", "width"), x.shape[2:], strict=True))
    usual = {"encoder_attention_mask": None, "rope_interpolation_scale": _LTX_SCALE, **sides}
    tokens = x.flatten(2).transpose(1, 2)
    out = _call_latents(owner, tokens, timestep, {**usual, **condition})
    return out.transpose(1, 2).reshape(x.shape)


def _require_latents(owner: DiffusersNetwork, x: Tensor, kind: str, sides: tuple[str, ...]) -> None:
    channels = owner.network.config.in_channels
    if x.dim() != 2 + len(sides) or x.shape[1] != channels:
        raise ValueError(
            f"x: {kind} latents must be (B, {channels}, {', '.join(sides)}); got {tuple(x.shape)}"
        )


def _with_ids(
    owner: DiffusersNetwork,
    tokens: Tensor,
    condition: dict[str, Any],
    rows: int,
    columns: int,
    axes: int,
) -> dict[str, Any]:
    """The condition with what a FLUX pipeline adds: places of the tokens, and the guidance that the
    network is told."""
    condition = dict(condition)
    if "img_ids" not in condition:
        ids = torch.zeros(rows, columns, axes, device=tokens.device)
        ids[..., 1] = torch.arange(rows, device=tokens.device)[:, None]
        ids[..., 2] = torch.arange(columns, device=tokens.device)
        condition["img_ids"] = ids.reshape(-1, axes)
    if "txt_ids" not in condition and "encoder_hidden_states" in condition:
        length = condition["encoder_hidden_states"].shape[1]
        ids = torch.zeros(length, axes, device=tokens.device)
        ids[:, 3:] = torch.arange(length, device=tokens.device)[:, None]
        condition["txt_ids"] = ids
    if owner.network.config.guidance_embeds and "guidance" not in condition:
        condition["guidance"] = torch.full((len(tokens),), owner.guidance, device=tokens.device)
    return condition


@dataclass(frozen=True)
class _Family:
    """How a class of networks is called, what it counts time in, what it predicts if that is fixed, and
    the guidance that it is told."""

    call: Callable[[DiffusersNetwork, Tensor, Tensor, dict[str, Any]], Tensor]
    time_scale: float = 1000.0
    prediction: str | None = None
    guidance: float | None = None


_FAMILIES = {
    "UNet2DModel": _Family(_call_labelled),
    "UNet2DConditionModel": _Family(_call_unet_condition),
    "DiTTransformer2DModel": _Family(_call_latents),
    "SD3Transformer2DModel": _Family(_call_latents, prediction="velocity"),
    "FluxTransformer2DModel": _Family(_call_flux, 1.0, "velocity", 3.5),
    "Flux2Transformer2DModel": _Family(_call_flux2, 1.0, "velocity", 4.0),
    "WanTransformer3DModel": _Family(_call_latents, prediction="velocity"),
    "LTXVideoTransformer3DModel": _Family(_call_ltx, prediction="velocity"),
}


def _family_of(network: object) -> _Family:
    for cls in type(uncompiled(network)).__mro__:
        if cls.__name__ in _FAMILIES and cls.__module__.startswith("diffusers."):
            return _FAMILIES[cls.__name__]
    raise TypeError(
        f"network: must be a diffusers {', '.join(_FAMILIES)}; got {type(network).__name__}"
    )


def _takes_labels(network: nn.Module) -> bool:
    """Whether the network has an embedding of class labels."""
    if getattr(network, "class_embedding", None) is not None:
        return True
    return getattr(network.config, "num_embeds_ada_norm", None) is not None


def _sample_shape(network: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) of a network whose config says so."""
    size = getattr(network.config, "sample_size", None)
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (int(network.config.in_channels), *sides)


def _checked_prompts(prompts: Mapping[str, Tensor] | None) -> tuple[str, ...]:
    """Their names."""
    counts = set()
    for name, value in (prompts or {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise TypeError(f"prompts: {name} must be a tensor with a first dimension of prompts")
        counts.add(len(value))
    if len(counts) > 1:
        raise ValueError(f"prompts: must have equally many rows; got {sorted(counts)}")
    return tuple(prompts or ())
