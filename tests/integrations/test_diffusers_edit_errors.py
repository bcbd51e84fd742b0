"""`edit` on pipelines of small random networks: what it leaves as it was, also after errors, and what it refuses."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose pipelines these are"
)
pytest.importorskip("transformers", reason="the pipelines' text encoders")

import diffusers
from diffusers_edits import (
    Given,
    Nothing,
    edit,
    found,
    image_for,
    kept,
    made,
    noise,
    picture,
    sampled,
)

from rfkernels.editing import Features, attention_blocks
from rfkernels.editing import edit as edit_samples
from rfkernels.integrations.diffusers import allow_exchange, velocity_from_pretrained
from rfkernels.sampling import ClassifierFree

# --- the pipeline afterwards -------------------------------------------------------------------------


def states(pipe):
    scheduler = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in vars(pipe.scheduler).items()
    }
    modules = [(type(module), module.training) for module in pipe.transformer.modules()]
    return scheduler, modules, pipe.transformer.dtype, pipe.vae.dtype


def assert_unchanged(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, after[0][name]), name


class Broken:
    name = "broken"
    shares_features = True

    def run(self, setting):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_pipeline_is_left_as_it_was(name, monkeypatch):
    pipe = made(name)
    pipe.vae.to(torch.bfloat16)
    pipe.transformer.train()
    allow_exchange(pipe.transformer, r"blocks\.0\.")
    sampled(pipe, name, noise(name), guidance_scale=1.0)  # leaves the scheduler amid its run
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(None))
    before = states(pipe)
    options = {"steps": 2, "features": Features(steps=1)}
    result = edit(pipe, image_for(name), "a cat", "a dog", method="fireflow", **options)
    assert result.bank_bytes > 0
    assert_unchanged(before, states(pipe))
    assert len(freed) == 1
    with pytest.raises(RuntimeError, match="broken on purpose"):
        edit(pipe, image_for(name), "a cat", "a dog", method=Broken(), **options)
    assert_unchanged(before, states(pipe))
    assert len(freed) == 2


def test_threads_share_a_network():
    pipe = kept("flux")
    classes = [type(module) for module in pipe.transformer.modules()]
    second_runs, first_ended = threading.Event(), threading.Event()

    class First(Broken):
        def run(self, setting):
            other.start()
            second_runs.wait(0.3)  # it should not, before this one ended
            return setting.x1

    class Second(Broken):
        def run(self, setting):
            second_runs.set()
            first_ended.wait(5)
            counts.append(len(attention_blocks(setting.velocity)))
            return setting.x1

    def shared(method):
        edit(pipe, picture(), "a cat", "a dog", method=method, features=Features(1), steps=1)

    counts = []
    other = threading.Thread(target=shared, args=(Second(),))
    shared(First())
    first_ended.set()
    other.join()
    assert len(counts) == 1
    assert [type(module) for module in pipe.transformer.modules()] == classes


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_half_precision_pipeline(name):
    """Every model runs in bfloat16; the state between evaluations is float32."""
    pipe, method = made(name).to(torch.bfloat16), Nothing()
    options = {"source_guidance_scale": 1.0, "target_guidance_scale": 1.0, "steps": 3}
    edit(pipe, image_for(name), "a cat", "a dog", method=method, **options)
    setting = method.setting
    assert setting.x1.dtype == torch.float32
    assert setting.source["encoder_hidden_states"].dtype == torch.bfloat16
    network = velocity_from_pretrained(pipe.transformer)
    expected = edit_samples(
        lambda x, t, **condition: network(x.bfloat16(), t, **condition).float(), setting.x1,
        source=setting.source, target=setting.target, grid=setting.times, method="rf-edit",
    ).x  # fmt: skip
    options |= {"output_type": "np"}
    result = edit(pipe, image_for(name), "a cat", "a dog", method="rf-edit", **options)
    decoded = edit(pipe, image_for(name), "", "", method=Given(expected), output_type="np")
    np.testing.assert_array_equal(found(result), found(decoded))
    assert float(found(result).std()) > 0.01


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_an_offloaded_pipeline(name):
    options = {"steps": 2, "method": "rf-edit", "features": Features(steps=1), "output_type": "np"}
    expected = edit(kept(name), image_for(name), "a cat", "a dog", **options)
    pipe = made(name)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = len(pipe._all_hooks)
    for _ in range(2):
        result = edit(pipe, image_for(name), "a cat", "a dog", **options)
        np.testing.assert_allclose(found(result), found(expected), atol=1e-5)
        assert result.bank_bytes == expected.bank_bytes
    assert len(pipe._all_hooks) == hooks > 0


@torch._dynamo.config.patch(disable=True)  # runs uncompiled, to be quick
def test_a_network_that_torch_compile_wraps():
    """Which is found in its wrapper; that compiled layers exchange features is tested elsewhere."""
    pipe = made("flux")
    options = {"steps": 2, "method": "rf-edit", "features": Features(steps=1), "output_type": "pt"}
    expected = edit(pipe, picture(), "a cat", "a dog", **options)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    result = edit(pipe, picture(), "a cat", "a dog", **options)
    assert torch.equal(result.images, expected.images)
    assert result.bank_bytes == expected.bank_bytes > 0


# --- refusals ----------------------------------------------------------------------------------------


def test_pipelines_that_are_not_served():
    kontext = diffusers.FluxKontextPipeline(**made("flux").components)
    served = "edit: pipe must be one of FluxPipeline, .*WanPipeline.*; got "
    for pipe, name in (
        (kontext, "FluxKontextPipeline"),
        (made("flux").transformer, "FluxTransformer"),
    ):
        with pytest.raises(TypeError, match=served + name):
            edit(pipe, picture(), "a cat", "a dog")


def test_caches():
    """This one would take the source's attention for the target's, and be silent about it."""
    pipe = made("flux")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="pipe must have networks without a cache"):
        edit(pipe, picture(), "a cat", "a dog", steps=2)
    pipe.transformer.disable_cache()
    assert edit(pipe, picture(), "a cat", "a dog", steps=2).nfe == 4


def test_schedulers_that_are_not_of_flows():
    for name in ("flux", "sd3"):
        pipe = made(name, diffusers.DDIMScheduler())
        with pytest.raises(ValueError, match=r"pipe\.scheduler must be one of flows; got DDIMSch"):
            edit(pipe, image_for(name), "a cat", "a dog")


REFUSED = [
    (
        {"output_type": "jpeg"},
        ValueError,
        "output_type must be one of pil, np, pt, latent; got 'jp",
    ),
    ({"method": "sdedit"}, ValueError, "method must be one of flowedit"),
    ({"method": 3}, TypeError, "method must be a name or an object"),
    ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer; got float"),
    ({"steps": True}, TypeError, "steps must be an integer; got bool"),
    ({"layers": "attn"}, ValueError, "layers must be left out without features; got 'attn'"),
    ({"features": 3, "method": "rf-edit"}, TypeError, "features must be a Features object"),
    ({"features": Features(1)}, ValueError, "must be left out, since method 'flowedit' shares"),
    (
        {"features": Features(1), "method": "rf-edit", "layers": "nowhere"},
        ValueError,
        "names like 'nowhere'; got none",
    ),
    (
        {"negative_prompt": "blurry"},
        ValueError,
        "negative_prompt must be left out .* embedded_guid",
    ),
    (
        {"negative_prompt": "blurry", "embedded_guidance": 3.5},
        ValueError,
        "negative_prompt must be left out .* a scale other than 1",
    ),
    ({"source_guidance_scale": "big"}, TypeError, "source_guidance_scale must be a number or a t"),
    ({"target_guidance_scale": True}, TypeError, "target_guidance_scale must be a number or a t"),
    (
        {"target_guidance_scale": ClassifierFree(2.0)},
        TypeError,
        "target_guidance_scale must be a number or a tensor, which the network is told; got Clas",
    ),
    (
        {"target_guidance_scale": torch.ones(3)},
        ValueError,
        r"target_guidance_scale must be a number, a 0-d or a \(1,\) tensor; got shape \(3,\)",
    ),
    (
        {"source_guidance_scale": math.nan},
        ValueError,
        "source_guidance_scale must be finite; got n",
    ),
    ({"embedded_guidance": "x"}, TypeError, "embedded_guidance must be a number or a tensor"),
    ({"height": 40}, ValueError, "height must be a multiple of 16; got 40"),
    ({"width": 0}, ValueError, "width must be a multiple of 16; got 0"),
    ({"width": 32.0}, TypeError, "width must be an integer; got float"),
    ({"seed": 1.5}, TypeError, "seed must be an int"),
    ({"source_prompt": 3}, TypeError, "source_prompt must be a string, a list of str.*; got 3"),
    ({"target_prompt": []}, TypeError, r"target_prompt must be a string, .*; got \[\]"),
    ({"target_prompt": ["a", 3]}, TypeError, "target_prompt must be a string"),
    (
        {"target_prompt": {"prompt_embeds": torch.ones(1, 7, 32)}},
        ValueError,
        "target_prompt must have the keys prompt_embeds, pooled_prompt_embeds; got 'prompt_embeds'",
    ),
    (
        {"target_prompt": {"prompt_embeds": 3, "pooled_prompt_embeds": torch.ones(1, 32)}},
        TypeError,
        r"target_prompt\['prompt_embeds'\] must be a tensor with the batch first; got int",
    ),
    (
        {"source_prompt": ["a"] * 2, "target_prompt": ["a"] * 3},
        ValueError,
        "must each be one or equally many; got image 1, source_prompt 2, target_prompt 3",
    ),
    ({"image": "cat.png"}, TypeError, "image must be a PIL image, a NumPy array.*; got str"),
    ({"image": []}, TypeError, "image must be a PIL .*; got an empty list"),
    (
        {"image": np.zeros((32, 32))},
        ValueError,
        r"image must have channels.*; got shape \(32, 32\)",
    ),
    ({"image": picture().convert("RGBA")}, ValueError, "image must have 3 channels.*; got 4"),
    ({"image": picture().convert("L")}, ValueError, "image must have 3 channels.*; got 1"),
    ({"image": torch.zeros(1, 4, 32, 32)}, ValueError, "image must have 3 channels.*; got 4"),
    (
        {"image": np.full((32, 32, 3), 255, np.uint8)},
        ValueError,
        r"image must lie in \[0, 1\]; got values from 255 to 255",
    ),
    (
        {"image": torch.full((3, 32, 32), math.nan)},
        ValueError,
        r"image must lie in \[0, 1\]; got .*nan",
    ),
    (
        {"image": picture(0, 8, 32)},
        ValueError,
        "height must be a multiple of 16; got a picture of 8",
    ),
]


@pytest.mark.parametrize(("changed", "error", "text"), REFUSED)
def test_refusals(changed, error, text):
    pipe = kept("flux")
    arguments = {"image": picture(), "source_prompt": "a cat", "target_prompt": "a dog", "steps": 2}
    with pytest.raises(error, match=text):
        edit(pipe, **{**arguments, **changed})


def test_more_refusals():
    with pytest.raises(
        ValueError, match="embedded_guidance must be left out for a network without"
    ):
        edit(made("sd3"), picture(), "a cat", "a dog", embedded_guidance=2.0)
    with pytest.raises(
        ValueError, match="prompt_embeds, pooled_prompt_embeds, since the pipeline has no"
    ):
        edit(made("flux", text=False), picture(), "a cat", "a dog")
    pipe = made("wan")
    with pytest.raises(ValueError, match=r"image must have 1 \+ 4 k frames.*; got 4"):
        edit(pipe, image_for("wan")[:4], "a cat", "a dog")
    with pytest.raises(ValueError, match="negative_prompt must be left out"):
        edit(
            pipe, image_for("wan"), "a", "a", negative_prompt="blurry",
            source_guidance_scale=1, target_guidance_scale=1.0,
        )  # fmt: skip
