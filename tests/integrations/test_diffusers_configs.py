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
from schedulers_cases import CLASSES, cls_of

from rfkernels.integrations import diffusers as rfd

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("name", CLASSES)
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


def test_every_way_to_load(tmp_path):
    UniPCMultistepScheduler(**FLOW, flow_shift=5.0).save_pretrained(tmp_path / "scheduler")
    cls = rfd.RFMidpointScheduler
    for ours in (
        cls.from_pretrained(tmp_path, subfolder="scheduler"),
        cls.from_config(cls.load_config(tmp_path / "scheduler")),
        cls.from_config(tmp_path / "scheduler"),
        cls.from_config(pretrained_model_name_or_path=tmp_path / "scheduler"),
        cls.from_pretrained(tmp_path, subfolder="scheduler", return_unused_kwargs=True)[0],
    ):
        assert (ours.config.grid, ours.shift) == ("unipc", 5.0)
    for options in ({"shift": 2.0}, {"flow_shift": 2.0}):
        assert cls.from_pretrained(tmp_path, subfolder="scheduler", **options).shift == 2.0


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


@pytest.mark.parametrize("name", CLASSES)
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


@pytest.mark.parametrize("name", CLASSES)
def test_fields_that_a_pipeline_registers_are_kept(name):
    """Cosmos 2 writes three of them into the config of its FlowMatchEulerDiscreteScheduler, and resamples between them."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    fields = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0}
    theirs.register_to_config(**fields, final_sigmas_type="sigma_min")
    ours = cls_of(name).from_config(theirs.config)
    assert {key: ours.config[key] for key in fields} == fields
    if name == "Euler":
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 6, dtype=torch.float64))
        assert torch.equal(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize(
    "other",
    [
        # of flows, but of another kind
        {"_class_name": "MiniMaxH3Scheduler", "shift": 12.0},  # time and velocity reversed
        {"_class_name": "FlowMapEulerDiscreteScheduler", "shift": 1.0},  # steps of any length
        {"_class_name": "HeliosScheduler", **FLOW, "shift": 3.0, "stages": 3},
        {**FLOW, "shift": 3.0, "stages": 3},
        "LTXEulerAncestralRFScheduler",
        "PiflowScheduler",
        # of none
        "KarrasVeScheduler",
        "ScoreSdeVeScheduler",
        "UnCLIPScheduler",
        {"_class_name": "DDPMWuerstchenScheduler", "scaler": 1.0, "s": 0.008},
        {"_class_name": ["my_pipeline", "MyScheduler"], "shift": 3.0},
    ],
)
def test_configs_of_other_schedulers_are_refused(other):
    config = getattr(diffusers, other)().config if isinstance(other, str) else other
    with pytest.raises(ValueError, match="must be of a flow-matching scheduler"):
        rfd.RFEulerScheduler.from_config(config)


def run_of(scheduler):
    scheduler.set_timesteps(6, **({"mu": 0.8} if scheduler.config.use_dynamic_shifting else {}))
    return scheduler.sigmas, scheduler.timesteps


CHANGED = {  # every field, one at a time
    "UniPCMultistepScheduler": {
        "num_train_timesteps": 500,
        "beta_schedule": "scaled_linear",
        "solver_order": 3,
        "solver_type": "bh1",
        "lower_order_final": False,
        "disable_corrector": [0, 2],
        "flow_shift": 4.0,
        "timestep_spacing": "trailing",
        "steps_offset": 3,
        "final_sigmas_type": "sigma_min",
        "rescale_betas_zero_snr": True,
        "use_dynamic_shifting": True,
        "sigma_min": 0.02,
        "shift_terminal": 0.1,
    },
    "DPMSolverMultistepScheduler": {
        "num_train_timesteps": 500,
        "solver_order": 3,
        "solver_type": "heun",
        "lower_order_final": False,
        "euler_at_final": True,
        "flow_shift": 4.0,
        "lambda_min_clipped": -5.1,
        "variance_type": "learned",
        "timestep_spacing": "leading",
        "use_dynamic_shifting": True,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 500,
        "shift": 4.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.6,
        "max_shift": 1.3,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
        "invert_sigmas": True,
        "shift_terminal": 0.1,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
        "time_shift_type": "linear",
        "stochastic_sampling": True,
    },
}


@pytest.mark.parametrize(
    ("origin", "field"), [(origin, field) for origin, fields in CHANGED.items() for field in fields]
)
def test_every_field_arrives_and_returns(origin, field):
    flow = {} if origin.startswith("FlowMatch") else FLOW
    theirs = getattr(diffusers, origin)(**flow, **{field: CHANGED[origin][field]})
    name = "Multistep" if flow else "Euler"
    ours = cls_of(name).from_config(theirs.config, integer_timesteps=bool(flow))
    for found, expected in zip(run_of(ours), run_of(theirs), strict=True):
        assert torch.equal(found, expected)
    if field in ours.config:
        assert ours.config[field] == theirs.config[field]
    assert_returns(theirs, ours.config)


def assert_returns(theirs, config):
    """Every field of theirs comes back from a config of ours."""
    back = type(theirs).from_config(config)
    assert all(back.config[key] == value for key, value in theirs.config.items() if key[0] != "_")


@pytest.mark.parametrize("origin", CHANGED)
def test_all_fields_return_from_a_folder(origin, tmp_path):
    """All of them changed at once, but for those of which a config may have one."""
    flow = {} if origin.startswith("FlowMatch") else FLOW
    cls = cls_of("Multistep" if flow else "Euler")
    fields = dict(CHANGED[origin])
    apart = [
        {key: fields.pop(key)} for key in [*fields] if key.endswith("_sigmas") and key[:4] == "use_"
    ]
    for one in apart or [{}]:
        theirs = getattr(diffusers, origin)(**flow, **fields, **one)
        cls.from_config(theirs.config).save_pretrained(tmp_path)
        assert_returns(theirs, cls.from_pretrained(tmp_path).config)


@pytest.mark.parametrize("saved", [False, True])
def test_a_config_is_of_the_scheduler_it_was_last_of(saved, tmp_path):
    """A config carries along the fields of every scheduler that it went through; the last one's count."""

    def through(scheduler, cls, **options):
        if saved:
            scheduler.save_pretrained(tmp_path)
            scheduler = type(scheduler).from_pretrained(tmp_path)
        return cls.from_config(scheduler.config, **options)

    wan, euler = UniPCMultistepScheduler(**FLOW, flow_shift=3.0), rfd.RFEulerScheduler
    straight = through(wan, diffusers.FlowMatchEulerDiscreteScheduler, shift=5.0)
    ours = through(straight, euler)
    assert (ours.config.grid, ours.shift) == ("flow-match", 5.0)
    assert through(straight, rfd.RFMultistepScheduler).config.algorithm == "ab2"
    deis = through(
        diffusers.DEISMultistepScheduler(**FLOW), diffusers.FlowMatchEulerDiscreteScheduler
    )
    assert through(deis, rfd.RFMultistepScheduler).config.algorithm == "ab2"

    ours = through(wan, euler)
    again = through(through(ours, UniPCMultistepScheduler, flow_shift=8.0), euler)
    assert (again.config.grid, again.shift) == ("unipc", 8.0)
    other = through(ours, DPMSolverMultistepScheduler)
    again = through(other, rfd.RFMultistepScheduler)
    assert (again.config.grid, again.config.algorithm, again.shift) == ("dpm++", "dpm++", 3.0)
    made = through(rfd.RFEulerScheduler(shift=2.0), UniPCMultistepScheduler, **FLOW, flow_shift=4.0)
    assert through(made, euler).shift == 4.0


def test_fields_of_the_other_scheduler_by_keyword():
    plain = UniPCMultistepScheduler().config
    with pytest.raises(ValueError, match="use_flow_sigmas must be True"):
        rfd.RFMultistepScheduler.from_config(plain)
    ours = rfd.RFMultistepScheduler.from_config(plain, **FLOW, flow_shift=3.0)
    assert (ours.config.grid, ours.config.algorithm, ours.shift) == ("unipc", "unipc", 3.0)
    with pytest.raises(ValueError, match="predict_x0 must be one of"):
        rfd.RFMultistepScheduler.from_config(plain, **FLOW, predict_x0=False)
    karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    ours = rfd.RFEulerScheduler.from_config(plain, **FLOW, **karras, integer_timesteps=True)
    theirs = UniPCMultistepScheduler.from_config(plain, **FLOW, **karras)
    for found, expected in zip(run_of(ours), run_of(theirs), strict=True):
        assert torch.equal(found, expected)
    for name in ("UniPCMultistepScheduler", ["my_module", "UniPCMultistepScheduler"]):
        short = {"_class_name": name, **FLOW}  # as written by hand
        assert rfd.RFMultistepScheduler.from_config(short).config.algorithm == "unipc"


@pytest.mark.parametrize(
    "options",
    [
        {"grid": "unipc", "use_beta_sigmas": True},
        {"grid": "unipc", "use_exponential_sigmas": True},
        {"grid": "dpm++", "use_karras_sigmas": True},
        {"grid": "dpm++", "shift_terminal": 0.1},
        {"grid": "dpm++", "final_sigmas_type": "sigma_min"},
        {"grid": "dpm++", "use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
)
def test_what_a_grid_would_pass_over_is_refused(options):
    with pytest.raises(ValueError, match=r"grid='(flow-match|dpm\+\+)'"):
        rfd.RFEulerScheduler(**options)
    bare = rfd.RFEulerScheduler(grid="unipc", use_karras_sigmas=True)
    with pytest.raises(ValueError, match="needs sigma_max and sigma_min"):
        bare.set_timesteps(4)


def test_the_way_back_from_another_algorithm(tmp_path):
    """Their solver_type may not be None; ab2 keeps the one it came with."""
    wan = UniPCMultistepScheduler(**FLOW, solver_type="bh1").config
    for options, kind in (
        ({}, "bh1"),
        ({"algorithm": "ab2"}, "bh1"),
        ({"algorithm": "dpm++"}, "bh2"),
    ):
        ours = rfd.RFMultistepScheduler.from_config(wan, **options)
        assert UniPCMultistepScheduler.from_config(ours.config).config.solver_type == kind
    rfd.RFMultistepScheduler().save_pretrained(tmp_path)
    ours = rfd.RFMultistepScheduler.from_pretrained(tmp_path)
    assert UniPCMultistepScheduler.from_config(ours.config).config.solver_type == "bh2"
    assert (
        rfd.RFMultistepScheduler.from_config(ours.config, algorithm="unipc").config.solver_type
        == "bh2"
    )


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
