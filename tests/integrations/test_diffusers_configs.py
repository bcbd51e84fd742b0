"""Configs of diffusers' schedulers of flows, taken or refused, and kept through folders and other classes."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose rules these are"
)

import diffusers
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from rfkernels.integrations import diffusers as rfd

# diffusers' own DPM-Solver++ on NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ALL = ["Euler", "Heun", "Midpoint", "FireFlow", "Multistep"]


def cls_of(name):
    return getattr(rfd, f"RF{name}Scheduler")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "other",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, max_shift=1.16
        ),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchLCMScheduler(shift=3.0),
        UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0, solver_order=3),
        diffusers.DPMSolverSinglestepScheduler(**FLOW, flow_shift=3.0),
        diffusers.DEISMultistepScheduler(**FLOW, flow_shift=3.0),
    ],
    ids=lambda s: type(s).__name__.removesuffix("Scheduler"),
)
def test_configs_of_flow_schedulers_are_taken(name, other, tmp_path, caplog):
    ours = cls_of(name).from_config(other.config)
    assert ours.config.shift == ours.shift == 3.0
    grid = {"UniPCMultistepScheduler": "unipc"}.get(type(other).__name__, "dpm++")
    grid = "flow-match" if type(other).__name__.startswith("FlowMatch") else grid
    assert ours.config.grid == grid
    if name == "Euler":
        for scheduler in (other, ours):
            scheduler.set_timesteps(
                5, **({"mu": 0.7} if other.config.get("use_dynamic_shifting") else {})
            )
        if "Heun" not in type(other).__name__:
            assert torch.equal(ours.sigmas[:-1], other.sigmas[:-1])
            assert torch.equal(ours.timesteps.to(other.timesteps.dtype), other.timesteps)
    # to a folder and back, through our other classes and back
    ours.save_pretrained(tmp_path)
    again = cls_of(name).from_pretrained(tmp_path)
    kept, expected = dict(again.config), dict(ours.config)
    for private in ("_use_default_values", "_diffusers_version"):
        kept.pop(private, None)
        expected.pop(private, None)
    assert kept == json.loads(json.dumps(expected))
    assert (
        json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"]
        == f"RF{name}Scheduler"
    )
    through = cls_of(name).from_config(rfd.RFMidpointScheduler.from_config(ours.config).config)
    for key in ("grid", "shift", "final_sigmas_type"):
        assert through.config[key] == ours.config[key]
    if name == "Multistep" and grid != "flow-match":
        for made_of in (ours, through, again):
            assert made_of.config.algorithm == grid.replace("unipc", "unipc")
            assert made_of.config.solver_order == other.config.solver_order
    back = type(other).from_config(ours.config)
    assert back.config.get("flow_shift", back.config.get("shift")) == 3.0
    assert not [r for r in caplog.records if "RF" in r.getMessage()]


def test_the_shift_by_either_name():
    wan = UniPCMultistepScheduler(**FLOW, flow_shift=5.0).config
    ours = rfd.RFMidpointScheduler.from_config(wan, flow_shift=8.0)
    assert ours.shift == 8.0
    assert UniPCMultistepScheduler.from_config(ours.config).config.flow_shift == 8.0
    assert rfd.RFMidpointScheduler.from_config(wan, shift=2.0).shift == 2.0
    with pytest.raises(ValueError, match="shift and flow_shift are one value"):
        rfd.RFMidpointScheduler.from_config(wan, shift=2.0, flow_shift=3.0)
    again = rfd.RFMultistepScheduler.from_config(wan, algorithm="ab2")
    assert (again.config.algorithm, again.config.grid, again.shift) == ("ab2", "unipc", 5.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (diffusers.DDIMScheduler().config, "not of a diffusion schedule"),
        (diffusers.EulerDiscreteScheduler().config, "not of a diffusion schedule"),
        (diffusers.EDMEulerScheduler().config, "not of a diffusion schedule"),
        (UniPCMultistepScheduler().config, "use_flow_sigmas must be True"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True).config,
            "prediction_type must be 'flow_prediction'",
        ),
        (UniPCMultistepScheduler(**FLOW, thresholding=True).config, "thresholding must be False"),
        (
            UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True).config,
            "needs sigma_min and sigma_max",
        ),
        (
            UniPCMultistepScheduler(**FLOW, use_beta_sigmas=True).config,
            "use_beta_sigmas must be False",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True).config,
            "use_lu_lambdas must be False",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min").config,
            "must be 'zero'",
        ),
        (diffusers.FlowMatchLCMScheduler(scale_factors=[0.5]).config, "scale_factors must be None"),
        ({"_class_name": "DPMSolverMultistepInverseScheduler", **FLOW}, "from noise to data"),
    ],
)
def test_other_configs_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        cls_of(name).from_config(config)


def test_solvers_that_are_not_here_are_refused():
    for config, field in (
        (UniPCMultistepScheduler(**FLOW, predict_x0=False).config, "predict_x0"),
        (
            DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++").config,
            "algorithm_type",
        ),
    ):
        with pytest.raises(ValueError, match=field):
            rfd.RFMultistepScheduler.from_config(config)
        assert (
            rfd.RFMultistepScheduler.from_config(config, algorithm="ab2").config.algorithm == "ab2"
        )
        rfd.RFMidpointScheduler.from_config(config)
    for options, message in (
        ({"algorithm": "rk4"}, "algorithm must be one of"),
        ({"solver_order": 4}, "solver_order must be 1 to 3"),
        ({"algorithm": "dpm++", "solver_type": "bh2"}, "solver_type of 'dpm"),
        ({"algorithm": "unipc", "invert_sigmas": True}, "invert_sigmas needs algorithm='ab2'"),
        ({"grid": "karras"}, "grid must be one of"),
        ({"grid": "unipc", "algorithm": "ab2", "invert_sigmas": True}, "invert_sigmas needs grid"),
        ({"explicit_timesteps": "drop"}, "explicit_timesteps must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            rfd.RFMultistepScheduler(**options)


def test_multistep_has_what_multistep_schedulers_have():
    scheduler = rfd.RFMultistepScheduler(shift=2.0)
    x, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(x, 3) is x
    t = scheduler.timesteps[[3, 500]]
    assert torch.equal(scheduler.add_noise(x, noise, t), scheduler.scale_noise(x, t, noise))
