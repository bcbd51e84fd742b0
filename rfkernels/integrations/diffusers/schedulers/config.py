"""Configs of other schedulers, read into ours: which grid they lay, which solver they run, and what cannot be carried over.

A config is a dict of constructor arguments, as in ``pipe.scheduler.config``. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

FLOW_MATCH, UNIPC, DPM = GRIDS = ("flow-match", "unipc", "dpm++")
COMPATIBLE = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
# The fields of the FlowMatch family. A config without a class name is theirs if it has base_shift, which no other family
# has, or no fields but these.
_FLOW_MATCH_FIELDS = {
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "time_shift_type",
    "stochastic_sampling",
    "scale_factors",
    "upscale_mode",
}
# Variants of the rules, their defaults first.
KINDS = {DPM: ("midpoint", "heun"), UNIPC: ("bh2", "bh1")}
OURS = ("grid", "algorithm")  # which say how a scheduler of ours reads the rest
FINAL_SIGMAS = ("zero", "sigma_min")


def _refuse(name: str, rule: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: {rule}; got {got!r}")


def _class_name(config: Mapping[str, Any]) -> str | None:
    """The scheduler's class; None for one that was made in code."""
    found = config.get("_class_name")
    return found[-1] if isinstance(found, (list, tuple)) else found


def _origin(name: str, config: Mapping[str, Any]) -> str:
    """Whose config it is: "ours", "multistep" or "flow-match".

    A config carries along the fields of every scheduler that it went through, so fields alone do not tell. The class name
    does. Schedulers that were made in code have none: their own fields stand first.

    Raises:
        ValueError: of a scheduler that is not one of these.
    """
    fields = [key for key in config if not key.startswith("_")]
    origin = _class_name(config)
    if origin is None:
        if "flow_shift" in fields and "shift" in fields:
            first = fields.index("shift") < fields.index("flow_shift")
            return "flow-match" if first else "multistep"
        if "flow_shift" in fields or ("use_flow_sigmas" in fields and "shift" not in fields):
            return "multistep"
        if "grid" in fields:
            return "ours"
        if "base_shift" in fields or _FLOW_MATCH_FIELDS.issuperset(fields):
            return "flow-match"
    elif origin in COMPATIBLE:
        return "flow-match" if origin.startswith("FlowMatch") else "multistep"
    elif "Inverse" in origin:
        _refuse(name, "config must be of a scheduler from noise to data", origin)
    elif "grid" in fields:
        return "ours"
    known, others = ", ".join(COMPATIBLE), sorted({*fields} - _FLOW_MATCH_FIELDS)
    rule = f"config must be of a flow-matching scheduler ({known}), not of a diffusion schedule"
    _refuse(name, rule, f"{origin or 'a config'} with {', '.join(others) or 'no other fields'}")


def adapted(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the fields of our schedulers filled in from those of the scheduler it comes from.

    One of ours comes back as it is. The shift of a multistep scheduler is its ``flow_shift``; its own fields stay in the
    result, so that the way back is open.

    Args:
        name: who asks, for the messages.
        config: as in ``pipe.scheduler.config``; not changed.

    Raises:
        ValueError: the config of a scheduler that is not one of flows, or of a flow in a form that is not here.
    """
    config = dict(config)
    # Values that the other constructor filled in are as good as given ones here, where the defaults differ.
    used_defaults = config.pop("_use_default_values", [])
    origin = _origin(name, config)
    if origin == "ours":
        return {**config, "_use_default_values": used_defaults}
    for field in OURS:  # left by one of ours that it went through
        config.pop(field, None)
    if origin == "multistep":
        return _multistep(name, config)
    if config.get("scale_factors"):
        rule = "config.scale_factors must be None (levels of several sizes)"
        _refuse(name, rule, config["scale_factors"])
    return {**config, "grid": FLOW_MATCH}


def _multistep(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """UniPC, DPM-Solver++ and their relatives in flow form."""
    origin = _class_name(config) or "the config"
    if not config.get("use_flow_sigmas"):
        _refuse(
            name, f"config.use_flow_sigmas must be True ({origin})", config.get("use_flow_sigmas")
        )
    if config.get("prediction_type") != "flow_prediction":
        rule = f"config.prediction_type must be 'flow_prediction' ({origin})"
        _refuse(name, rule, config.get("prediction_type"))
    if config.get("thresholding"):
        _refuse(name, f"config.thresholding must be False ({origin})", config["thresholding"])
    for flag in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(flag):
            _refuse(name, f"config.{flag} must be False beside use_flow_sigmas ({origin})", True)
    unipc = _is_unipc(config)
    # DEIS and SA-Solver, which have no such field, repeat the last sigma and so waste the last evaluation: end at 0 instead.
    final = config.get("final_sigmas_type", "zero")
    if config.get("use_karras_sigmas"):
        bounds = config.get("sigma_min"), config.get("sigma_max")
        if not unipc or None in bounds:
            rule = f"config.use_karras_sigmas needs sigma_min and sigma_max of a UniPC config ({origin})"
            _refuse(name, rule, bounds)
    if final not in FINAL_SIGMAS:
        _refuse(name, f"config.final_sigmas_type must be one of {', '.join(FINAL_SIGMAS)}", final)
    if final == "sigma_min" and not unipc:
        # diffusers ends such a run at the last sigma of a diffusion schedule, 0.01, which is no point of the flow's grid.
        _refuse(name, f"config.final_sigmas_type must be 'zero' ({origin})", final)
    return {
        **config,
        "shift": config.get("flow_shift", 1.0),
        "grid": UNIPC if unipc else DPM,
        "final_sigmas_type": final,
    }


def _is_unipc(config: Mapping[str, Any]) -> bool:
    """Whether a multistep config is UniPC's; the others have the second of these fields, and own fields stand first."""
    if (origin := _class_name(config)) is not None:
        return origin == "UniPCMultistepScheduler"
    fields = [field for field in config if field in ("predict_x0", "algorithm_type")]
    return fields[:1] == ["predict_x0"]


def solver(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RFMultistepScheduler's solver in a multistep config of diffusers, adapted; DEIS and SA-Solver become
    "dpm++"."""
    algorithm, kind = config["grid"], config.get("solver_type")
    known = KINDS[algorithm]
    return {
        "algorithm": algorithm,
        "solver_order": config.get("solver_order", config.get("predictor_order", 2)),
        # Another family's means the default to diffusers, too.
        "solver_type": kind if kind in known else known[0],
    }
