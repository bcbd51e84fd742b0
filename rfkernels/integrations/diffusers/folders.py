"""Local folders of diffusers: which network they hold, and what their scheduler says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfkernels.flow.schedules import CosineBetas, LinearBetas, NoiseSchedule, ScaledLinearBetas

__all__ = ["load_network", "read_scheduler"]

_COMPONENTS = ("transformer", "unet")
# In the names of schedulers that know flows only; our own have the field "grid".
_FLOWS = ("FlowMatch", "EulerAncestralRF")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error


def load_network(folder: Path, served: tuple[str, ...], dtype: torch.dtype | None) -> nn.Module:
    """The network of a folder, its own or its pipeline's, with the weights of its safetensors files.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `velocity_from_pretrained`.
    """
    try:
        import accelerate  # noqa: F401 (diffusers loads networks with mixed weights by it)
        import diffusers
    except ImportError as error:
        raise ImportError(
            "velocity_from_pretrained: needs diffusers and accelerate; install them with: pip "
            'install "rfkernels[diffusers]"'
        ) from error
    if not folder.is_dir():
        raise FileNotFoundError(f"source: {folder} is no folder")
    if (folder / "model_index.json").is_file():
        parts = [folder / name for name in _COMPONENTS if (folder / name / "config.json").is_file()]
        if not parts:
            raise FileNotFoundError(f"source: {folder} has neither {' nor '.join(_COMPONENTS)}")
        folder = parts[0]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"source: {folder} holds no network (no config.json)")
    name = _read(folder / "config.json").get("_class_name")
    if name not in served:
        raise TypeError(f"network: must be a diffusers {', '.join(served)}; got {name}")
    options = {} if dtype is None else {"torch_dtype": dtype}
    return getattr(diffusers, name).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, **options
    )


def read_scheduler(
    folder: Path, prediction: str | None, schedule: str | NoiseSchedule | None
) -> tuple[str | None, str | NoiseSchedule | None]:
    """(prediction, schedule): what is None by a pipeline's scheduler, where the folder has one; a velocity has no
    schedule.

    Raises:
        ValueError: a schedule or prediction that is asked for and has no counterpart here.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    said = prediction == "velocity" or None not in (prediction, schedule)
    if said or not file.is_file():
        return prediction, schedule
    config = _read(file)
    kind = config.get("prediction_type", "epsilon")
    name = config.get("_class_name", "")
    flow = any(word in name for word in _FLOWS) or config.get("use_flow_sigmas")
    if flow or "grid" in config or kind == "flow_prediction":
        return prediction or "velocity", schedule
    if "beta_schedule" not in config:  # EDM, consistency models: on levels of their own
        raise ValueError(f"{file}: {name} has no schedule of betas; give prediction and schedule")
    if prediction is None:
        kinds = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x1"}
        if kind not in kinds:
            raise ValueError(
                f"{file}: prediction_type must be one of {', '.join(kinds)}; got {kind!r}"
            )
        prediction = kinds[kind]
    return prediction, _schedule(config, file) if schedule is None else schedule


def _schedule(config: dict[str, Any], file: Path) -> NoiseSchedule:
    for option in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(option):
            raise ValueError(f"{file}: {option} has no counterpart here; give schedule")
    steps = config.get("num_train_timesteps", 1000)
    name = config["beta_schedule"]
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if name == "linear":
        return LinearBetas(*ends, steps=steps)
    if name == "scaled_linear":
        return ScaledLinearBetas(*ends, steps=steps)
    if name == "squaredcos_cap_v2":
        return CosineBetas(steps=steps)
    raise ValueError(
        f"{file}: beta_schedule must be linear, scaled_linear or squaredcos_cap_v2; got {name!r}"
    )
