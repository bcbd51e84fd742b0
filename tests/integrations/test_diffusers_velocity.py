"""diffusers' networks as velocity fields: equal to calling them by hand, and trainable."""

import pytest
import torch
from diffusers_direct import FAMILIES as DIRECT
from diffusers_dispatched import FAMILIES as DISPATCHED
from diffusers_family import build, images, padding, text, video

import rfkernels as rf
from rfkernels.data import Dataset
from rfkernels.integrations.diffusers import (
    DiffusersNetwork,
    DiffusersVelocity,
    velocity_from_pretrained,
)
from rfkernels.models import NoisePrediction
from rfkernels.training import TrainConfig, train_flow, train_recipe
from rfkernels.training.recipes import RectifiedDiffusionPhased

FAMILIES = {**DIRECT, **DISPATCHED}
T = torch.tensor([0.25, 0.6])


def network(name, **options):
    family = FAMILIES[name]
    family = type(family)(family.cls, {**family.options, **options}, family.inputs, family.calls)
    return build(family)[0].requires_grad_(True)


def condition(name):
    torch.manual_seed(1)
    return {
        "SD3": {"encoder_hidden_states": text(), "pooled_projections": torch.randn(2, 32)},
        "Flux": {"encoder_hidden_states": text(), "pooled_projections": torch.randn(2, 32)},
        "Flux2": {"encoder_hidden_states": text()},
        "Wan": {"encoder_hidden_states": text()},
        "LTX": {"encoder_hidden_states": text(), "encoder_attention_mask": padding()},
        "UNet2DCondition": {"encoder_hidden_states": text()},
        "DiT": {"y": torch.tensor([1, 5])},
        "UNet2D": {},
    }[name]


FLUX = {"in_channels": 16}
SIZES = {"DiT": {"out_channels": 8}, "Flux": FLUX}


@pytest.mark.parametrize("name", ["UNet2D", "SD3", "Wan", "DiT", "UNet2DCondition"])
def test_flow_networks_by_hand(name):
    """sigma = 1 - t, 1000 sigma for the network, its answer negated; learned variances dropped."""
    inner, given = network(name, **SIZES.get(name, {})), condition(name)
    field = velocity_from_pretrained(inner, prediction="velocity")
    assert isinstance(field, DiffusersVelocity)
    x = video() if name == "Wan" else images()
    named = {"class_labels" if key == "y" else key: value for key, value in given.items()}
    with torch.no_grad():
        out = inner(x, timestep=1000 * (1 - T), **named).sample
        found = field(x, T, **given)
    assert out.shape[1] == (8 if name == "DiT" else 4)
    assert torch.equal(found, -out[:, :4])


def test_flux_by_the_pipelines_own_packing():
    from diffusers import FluxPipeline

    inner, given = network("Flux", **FLUX, guidance_embeds=True), condition("Flux")
    field = velocity_from_pretrained(inner, guidance=2.0)
    x = torch.randn(2, 4, 8, 12)
    tokens = FluxPipeline._pack_latents(x, 2, 4, 8, 12)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, x.device, x.dtype)
    with torch.no_grad():
        out = inner(
            hidden_states=tokens,
            timestep=1 - T,
            guidance=torch.full((2,), 2.0),
            img_ids=ids,
            txt_ids=torch.zeros(7, 3),
            **given,
        ).sample
        found = field(x, T, **given)
        told = field(x, T, **given, guidance=torch.tensor([2.0, 5.0]))
    assert torch.equal(found, -FluxPipeline._unpack_latents(out, 64, 96, 8))
    assert torch.equal(told[0], found[0])
    assert not torch.equal(told[1], found[1])
    with pytest.raises(ValueError, match="x: FLUX latents must have even sides; got 7 x 8"):
        field(torch.randn(2, 4, 7, 8), T, **given)


@pytest.mark.parametrize("guided", [True, False])
def test_flux2_by_the_pipelines_own_packing(guided):
    """Places with four axes, words along the last; a guidance embedding, or none, as in klein."""
    from diffusers import Flux2Pipeline

    inner, given = network("Flux2", guidance_embeds=guided), condition("Flux2")
    field = velocity_from_pretrained(inner, guidance=2.0)
    x = torch.randn(2, 4, 3, 5)
    places = Flux2Pipeline._prepare_latent_ids(x)
    arguments = {
        "hidden_states": Flux2Pipeline._pack_latents(x),
        "timestep": 1 - T,
        "img_ids": places,
        "txt_ids": Flux2Pipeline._prepare_text_ids(given["encoder_hidden_states"]),
        **given,
    }
    with torch.no_grad():
        out = inner(**arguments, guidance=torch.full((2,), 2.0)).sample
        usual = inner(**arguments, guidance=torch.full((2,), 4.0)).sample
        found = field(x, T, **given)
        told = field(x, T, **given, guidance=torch.tensor([2.0, 5.0]))
        default = velocity_from_pretrained(inner)(x, T, **given)
    assert torch.equal(found, -Flux2Pipeline._unpack_latents_with_ids(out, places))
    assert torch.equal(default, -Flux2Pipeline._unpack_latents_with_ids(usual, places))
    assert torch.equal(told[0], found[0])
    assert torch.equal(told[1], found[1]) is not guided
    order = velocity_from_pretrained(inner)(x, T, **given, txt_ids=torch.zeros(7, 4))
    assert not torch.equal(order, default)  # the words' places matter
    with pytest.raises(
        ValueError, match=r"x: FLUX.2 latents must be \(B, 4, H, W\); got \(2, 1, 6,"
    ):
        field(torch.randn(2, 1, 6, 10), T, **given)


def test_ltx_by_the_pipelines_own_packing():
    from diffusers import LTXPipeline

    inner, given = network("LTX"), condition("LTX")
    field = velocity_from_pretrained(inner)
    x = torch.randn(2, 4, 2, 3, 5)

    def by_hand(frame_rate, mask):
        out = inner(
            hidden_states=LTXPipeline._pack_latents(x),
            encoder_hidden_states=given["encoder_hidden_states"],
            timestep=1000 * (1 - T),
            encoder_attention_mask=mask,
            num_frames=2,
            height=3,
            width=5,
            rope_interpolation_scale=(8 / frame_rate, 32, 32),
        ).sample
        return -LTXPipeline._unpack_latents(out, 2, 3, 5)

    with torch.no_grad():
        mask = given.pop("encoder_attention_mask")
        masked = field(x, T, **given, encoder_attention_mask=mask)
        assert torch.equal(masked, by_hand(25, mask))
        slow = field(x, T, **given, rope_interpolation_scale=(8 / 10, 32, 32))
        assert torch.equal(slow, by_hand(10, None))
        assert torch.equal(field(x, T, **given), by_hand(25, None))
        assert not torch.equal(slow, by_hand(25, None))
        assert not torch.equal(masked, by_hand(25, None))
    with pytest.raises(
        ValueError, match=r"x: LTX latents must be \(B, 4, frames, H, W\); got \(2, 4,"
    ):
        field(torch.randn(2, 4, 3, 5), T, **given)


def test_sampling_is_the_schedulers_loop():
    from diffusers import FlowMatchEulerDiscreteScheduler

    inner, given = network("SD3"), condition("SD3")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    noise = images()
    x = noise
    with torch.no_grad():
        for step in scheduler.timesteps:
            out = inner(x, timestep=step.expand(2), **given).sample
            x = scheduler.step(out, step, x).prev_sample
    found = rf.sample(velocity_from_pretrained(inner), noise, steps=4, condition=given)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_networks_take_ddim_steps(prediction):
    from diffusers import DDIMScheduler

    inner, given = network("UNet2DCondition"), condition("UNet2DCondition")
    field = velocity_from_pretrained(inner, prediction=prediction, schedule="scaled-linear")
    assert isinstance(field, NoisePrediction)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
    )
    scheduler.set_timesteps(4)
    noise = images()
    x = noise
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(inner(x, k, **given).sample, k, x).prev_sample
    found = rf.sampling.ddim(field, noise, steps=4, end="first-index", condition=given)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-3)


def prompts(name):
    torch.manual_seed(2)
    return {
        key: torch.randn(3, *value.shape[1:])
        if value.is_floating_point()
        else value[:1].repeat(3, 1)
        for key, value in condition(name).items()
    }


SHAPES = {
    "UNet2D": (4, 8, 8),
    "SD3": (4, 8, 8),
    "DiT": (4, 8, 8),
    "UNet2DCondition": (4, 8, 8),
    "Flux": (4, 8, 8),
    "Flux2": (4, 4, 4),
    "Wan": (4, 2, 8, 8),
    "LTX": (4, 2, 4, 4),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_saved_trained_and_sampled(name, tmp_path):
    inner = network(name, **({} if name == "DiT" else SIZES.get(name, {})))
    inner.save_pretrained(tmp_path / "net")
    noisy = name in ("UNet2DCondition", "DiT")
    options = {"prediction": "epsilon", "schedule": "linear"} if noisy else {}
    options = {"prediction": "velocity"} if name == "UNet2D" else options
    labelled = name not in ("UNet2D",)
    if labelled and name != "DiT":
        options["prompts"] = prompts(name)
    if name in ("Flux", "Flux2", "Wan", "LTX"):
        options["sample_shape"] = SHAPES[name]
    model = velocity_from_pretrained(tmp_path / "net", **options)
    assert not model.training
    assert model.sample_shape == SHAPES[name]
    assert model.null_label == {"UNet2D": None, "DiT": 1000}.get(name, 2)
    x, y = torch.randn(12, *SHAPES[name]), torch.arange(12) % 2
    before = velocity_from_pretrained(inner, **options)
    given = {"y": y[:2]} if labelled else {}
    with torch.no_grad():
        assert torch.equal(model(x[:2], T, **given), before(x[:2], T, **given))

    train = TrainConfig(
        steps=4, batch_size=4, warmup_steps=0, learning_rate=1e-3, holdout=0.0, log_every=1
    )
    if labelled:
        train = TrainConfig(**{**vars(train), "label_dropout": 0.25, "conditional": True})
    data = Dataset(x, y if labelled else None)
    result = train_flow(model, data, train, run=tmp_path / "run")
    weights = dict(before.named_parameters())
    moved = [n for n, p in result.model.named_parameters() if not torch.equal(p, weights[n])]
    assert len(moved) > 0.9 * len(weights)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in result.metrics)

    again = rf.load(tmp_path / "run", model=velocity_from_pretrained(inner, **options))
    arguments = {"steps": 2}
    if labelled:
        arguments.update(condition=given, uncondition={}, guidance_scale=2.0)
    found = rf.sample(again.model, x[:2], **arguments)
    assert found.isfinite().all()
    assert torch.equal(found, rf.sample(result.ema, x[:2], **arguments))


def test_a_recipe_for_diffusion_networks_trains_one():
    options = {"prediction": "epsilon", "schedule": "linear", "prompts": prompts("UNet2DCondition")}
    teacher = velocity_from_pretrained(network("UNet2DCondition"), **options)
    train = TrainConfig(steps=2, batch_size=2, holdout=0.0, conditional=True)
    recipe = RectifiedDiffusionPhased(grid_steps=4, guidance_scale=2.0, train=train)
    data = Dataset(torch.randn(4, 4, 8, 8), torch.arange(4) % 2)
    result = train_recipe(recipe, None, data, teacher=teacher)
    assert isinstance(result.ema, NoisePrediction)
    assert result.metrics[-1]["loss"] > 0


def test_prompts_are_rows():
    given = prompts("SD3")
    field = velocity_from_pretrained(network("SD3"), prompts=given)
    x, y = images(), torch.tensor([0, 2])
    with torch.no_grad():
        rows = {key: value[y] for key, value in given.items()}
        assert torch.equal(field(x, T, y=y), field(x, T, **rows))
        last = {key: value[[2, 2]] for key, value in given.items()}
        assert torch.equal(field(x, T), field(x, T, **last))
    assert not any("prompt" in key for key in field.state_dict())
    one = {key: value[:1] for key, value in given.items()}
    assert velocity_from_pretrained(network("SD3"), prompts=one).null_label is None


def test_a_class_conditional_unet_needs_its_labels():
    inner = network("UNet2D", num_class_embeds=4)
    x = images()
    field = velocity_from_pretrained(inner, prediction="velocity", null_label=3)
    with torch.no_grad():
        null = inner(x, 1000 * (1 - T), class_labels=torch.tensor([3, 3])).sample
        assert torch.equal(field(x, T), -null)
        own = inner(x, 1000 * (1 - T), class_labels=torch.tensor([0, 1])).sample
        assert torch.equal(field(x, T, y=torch.tensor([0, 1])), -own)
    with pytest.raises(ValueError, match="y: this UNet2DModel needs labels, or a null_label"):
        velocity_from_pretrained(inner, prediction="velocity")(x, T)


def test_sdxl_conditions_are_flat():
    inner = network(
        "UNet2DCondition",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    x, words, extra = (
        images(),
        text(),
        {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)},
    )
    k = torch.tensor([20.0, 700.0])
    found = DiffusersNetwork(inner)(x, k, encoder_hidden_states=words, **extra)
    assert torch.equal(found, inner(x, k, words, added_cond_kwargs=extra).sample)


def test_bad_requests():
    inner = network("UNet2D")
    field = velocity_from_pretrained
    unequal = {"a": torch.ones(2, 1), "b": torch.ones(3, 1)}
    for call, kind, message in (
        (lambda: field(torch.nn.Linear(2, 2)), TypeError, "network: must be a diff"),
        (lambda: field(inner), ValueError, "prediction: a UNet2DModel may predict"),
        (
            lambda: field(inner, prediction="epsilon"),
            ValueError,
            "schedule: must be given for prediction 'epsilon'",
        ),
        (
            lambda: field(inner, prediction="velocity", schedule="linear"),
            ValueError,
            "schedule: a velocity has none",
        ),
        (
            lambda: field(inner, prediction="noise", schedule="linear"),
            ValueError,
            "prediction: must be one of",
        ),
        (
            lambda: field(inner, dtype=torch.bfloat16),
            ValueError,
            "dtype: is that of weights to be loaded",
        ),
        (
            lambda: DiffusersNetwork(inner, prompts=unequal),
            ValueError,
            "prompts: must have equally many rows",
        ),
        (
            lambda: DiffusersNetwork(inner, prompts={"a": [1]}),
            TypeError,
            "prompts: a must be a tens",
        ),
        (
            lambda: field(network("SD3"))(images(), T, y=torch.tensor([0, 1])),
            ValueError,
            "y: a SD3Transformer2DModel takes no labels",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
