"""Configs of other schedulers, read into ours: which grid they lay, which solver they run, and what cannot be carried over.

A config is a dict of constructor arguments, as in ``pipe.scheduler.config``. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
# Fields of a diffusion schedule; with none of them a config is taken for one of the FlowMatch family.
_DIFFUSION = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "sigma_data",
    "snr_shift_scale",
)
FINAL_SIGMAS = ("zero", "sigma_min")


def _refuse(name: str, rule: str, got: object) -> None:
    raise ValueError(f"{name}: {rule}; got {got!r}")


def adapted(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the fields of our schedulers filled in from those of the scheduler it comes from.

    A config that has ``grid`` is one of ours and comes back as it is. The shift of a multistep scheduler is its
    ``flow_shift``; its own fields stay in the result, so that the way back is open.

    Args:
        name: who asks, for the messages.
        config: as in ``pipe.scheduler.config``; not changed.

    Raises:
        ValueError: the config of a scheduler that is not one of flows, or of a flow in a form that is not here.
    """
    config = dict(config)
    # Values that the other constructor filled in are as good as given ones here, where the defaults differ.
    used_defaults = config.pop("_use_default_values", [])
    if "grid" in config:
        return {**config, "_use_default_values": used_defaults}
    if config.get("scale_factors") is not None:
        _refuse(
            name,
            "config.scale_factors must be None (levels of several sizes)",
            config["scale_factors"],
        )
    if "flow_shift" not in config and "use_flow_sigmas" not in config:
        found = [key for key in _DIFFUSION if key in config]
        if found:
            rule = "config must be of a flow-matching scheduler, not of a diffusion schedule"
            _refuse(name, rule, f"{config.get('_class_name', 'a config')} with {', '.join(found)}")
        return config
    return _multistep(name, config)


def _multistep(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """UniPC, DPM-Solver++ and their relatives in flow form."""
    origin = config.get("_class_name", "the config")
    if not config.get("use_flow_sigmas"):
        _refuse(
            name, f"config.use_flow_sigmas must be True ({origin})", config.get("use_flow_sigmas")
        )
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        rule = f"config.prediction_type must be 'flow_prediction' ({origin})"
        _refuse(name, rule, config["prediction_type"])
    if "Inverse" in str(origin):
        _refuse(name, "config must be of a scheduler from noise to data", origin)
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
    """Whether a multistep config is UniPC's; it alone has these fields."""
    return (
        config.get("_class_name") == "UniPCMultistepScheduler"
        or "predict_x0" in config
        or "solver_p" in config
    )


def solver(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RFMultistepScheduler's solver in a multistep config of diffusers; DEIS and SA-Solver become "dpm++"."""
    unipc = _is_unipc(config)
    known = ("bh2", "bh1") if unipc else ("midpoint", "heun")
    kind = config.get("solver_type")
    return {
        "algorithm": "unipc" if unipc else "dpm++",
        "solver_order": config.get("solver_order", config.get("predictor_order", 2)),
        # Another family's means the default to diffusers, too.
        "solver_type": kind if kind in known else known[0],
    }
