"""`edit` on pipelines of small random networks: its results are the method's, with features shared or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose pipelines these are"
)
pytest.importorskip("transformers", reason="the pipelines' text encoders")

from diffusers_edits import (
    HEIGHT,
    NAMES,
    WIDTH,
    WORDS,
    Nothing,
    edit,
    found,
    image_for,
    kept,
    latents,
    made,
    picture,
)

from rfkernels.editing import Features, FlowEdit, RFInversion, UniEdit
from rfkernels.editing import edit as edit_samples
from rfkernels.integrations.diffusers import allow_exchange, velocity_from_pretrained

# --- the methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True])
def test_equal_prompts_and_scales_give_the_round_trip_to_the_bit(name, half):
    pipe, image = made(name) if half else kept(name), image_for(name)
    if half:
        pipe.transformer.to(torch.bfloat16)
    options = {"steps": 3, "source_guidance_scale": 2.0, "target_guidance_scale": 2.0}
    result = edit(pipe, image, "a cat", "a cat", **options, output_type="latent")
    expected = found(edit(pipe, image, "a cat", "a cat", method=Nothing(), output_type="latent"))
    assert found(result).dtype == torch.float32
    assert torch.equal(found(result), expected)
    result = edit(pipe, image, "a cat", "a cat", **options, output_type="pt")
    expected = edit(pipe, image, "a cat", "a cat", method=Nothing(), output_type="pt")
    assert torch.equal(found(result), found(expected))
    other = edit(pipe, image, "a cat", "a dog", **options, output_type="pt")
    assert (found(other) - found(expected)).abs().max() > 1e-4


def test_the_round_trip_is_the_autoencoders():
    pipe = kept("flux")
    pixels = pipe.image_processor.preprocess(picture())
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    result = edit(pipe, picture(), "a cat", "a cat", method=Nothing(), output_type="np")
    np.testing.assert_allclose(result.images, expected, atol=1e-5)


def test_flowedit_of_flux_by_hand():
    """The network told 1.5 on the source's side and 5.5 on the target's, on the pipeline's grid."""
    pipe, method = kept("flux"), Nothing()
    edit(pipe, picture(), "a cat", "a dog", method=method)
    times = method.setting.times
    conditions = []
    for prompt, guidance in (("a cat", 1.5), ("a dog", 5.5)):
        words, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=WORDS)
        conditions.append(
            {
                "encoder_hidden_states": words,
                "pooled_projections": pooled,
                "guidance": torch.tensor([guidance]),
            }
        )
    expected = edit_samples(
        velocity_from_pretrained(pipe.transformer), method.setting.x1, seed=7,
        source=conditions[0], target=conditions[1], method=FlowEdit(n_max=24), grid=times,
    )  # fmt: skip
    result = edit(pipe, picture(), "a cat", "a dog", seed=7, output_type="latent")
    assert len(times) == 29
    assert result.nfe == expected.nfe == 48
    assert torch.equal(result.images, pipe._pack_latents(expected.x, 1, 4, 4, 6))


DEFAULTS = [  # evaluations: twice those of a guided side
    ("sd3", "flowedit", 33 * 4),
    ("sd3", "rf-inversion", 28 + 2 * 28),
    ("flux", "rf-inversion", 2 * 28),
    ("flux", "uniedit", 28),
    ("flux2", "rf-edit", 4 * 30),
    ("flux", "fireflow", 2 * 9),
    ("wan", "fireflow", 9 + 2 * 9),
]


@pytest.mark.parametrize(("name", "method", "nfe"), DEFAULTS)
def test_published_defaults(name, method, nfe):
    result = edit(kept(name), image_for(name), "a cat", "a dog", method=method)
    assert result.nfe == nfe
    assert result.bank_bytes == result.bank_missed == 0
    first = found(result)[0]
    assert (first[0] if name == "wan" else first).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(("name", "patch"), [("flux", 2), ("sd3", 1)])
def test_tokens_of_uni_edit(name, patch):
    make = lambda method: found(  # noqa: E731
        edit(kept(name), picture(), "a cat", "a dog", method=method, steps=4, output_type="latent")
    )
    by_name = make("uniedit")
    assert torch.equal(by_name, make(UniEdit(patch=patch)))
    assert not torch.equal(by_name, make(UniEdit(patch=3 - patch)))


def test_a_method_object_keeps_its_options():
    pipe = kept("sd3")
    options = {"steps": 6, "source_guidance_scale": 1.0, "target_guidance_scale": 1.0}
    result = edit(pipe, picture(), "a cat", "a dog", method=FlowEdit(n_max=2, n_avg=2), **options)
    assert result.nfe == 8
    inverted = RFInversion(eta=1.0, stop=1.0)
    result = edit(
        pipe, picture(), "a cat", "a dog", method=inverted, **options, output_type="latent"
    )
    torch.testing.assert_close(result.images, latents(pipe, picture()))


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_a_sample_does_not_depend_on_the_others(name):
    pipe = kept(name)
    images = [image_for(name, 0), image_for(name, 10)]
    seeds = torch.tensor([5, 9])
    options = {"steps": 3, "output_type": "latent"}
    both = found(edit(pipe, images, ["a cat", "a dog"], "a dog on grass", seed=seeds, **options))
    for index, prompt in enumerate(("a cat", "a dog")):
        alone = edit(
            pipe, images[index], prompt, "a dog on grass", seed=seeds[index : index + 1], **options
        )
        torch.testing.assert_close(found(alone), both[index : index + 1], rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_one_picture_and_several_prompts():
    pipe, seeds = kept("flux"), torch.tensor([5, 5])
    options = {"steps": 3, "output_type": "latent"}
    both = edit(pipe, picture(), "a cat", ["a dog", "a cat on grass"], seed=seeds, **options).images
    assert both.shape == (2, 6, 16)
    for index, prompt in enumerate(("a dog", "a cat on grass")):
        alone = edit(pipe, picture(), "a cat", prompt, seed=seeds[:1], **options).images
        torch.testing.assert_close(alone, both[index : index + 1], rtol=1e-4, atol=1e-4)


def test_embeddings_stand_for_prompts():
    pipe = made("sd3")
    options = {"steps": 3, "output_type": "latent", "negative_prompt": "blurry"}
    expected = edit(pipe, picture(), "a cat", "a dog", **options).images
    embedded = {}
    for prompt in ("a cat", "a dog", "blurry"):
        words, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=WORDS
        )
        embedded[prompt] = {"prompt_embeds": words, "pooled_prompt_embeds": pooled}
    pipe.text_encoder = pipe.tokenizer = None
    options["negative_prompt"] = embedded["blurry"]
    result = edit(pipe, picture(), embedded["a cat"], embedded["a dog"], **options)
    assert torch.equal(result.images, expected)


def test_numbers_of_numpy():
    options = {"steps": np.int64(2), "target_guidance_scale": np.float32(2), "height": np.int64(16)}
    result, expected = (
        edit(kept("flux"), picture(), "a cat", "a dog", output_type="np", **given).images
        for given in (options, {name: int(value) for name, value in options.items()})
    )
    np.testing.assert_array_equal(result, expected)


def test_the_length_of_prompts():
    method, lengths = Nothing(), []
    for name in NAMES:
        for length in (None, 64):
            options = {"method": method, "steps": 2, "max_sequence_length": length}
            edit(kept(name), image_for(name), "a cat", "a dog", **options)
            lengths.append(method.setting.source["encoder_hidden_states"].shape[1])
    assert lengths == [512, 64, 512, 64, 8 + 256, 8 + 64, 512, 64]


# --- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_shared_and_classes_restored(name):
    pipe, image = kept(name), image_for(name)
    classes = [type(module) for module in pipe.transformer.modules()]
    options = {
        "method": "rf-edit", "steps": 3, "output_type": "latent",
        "source_guidance_scale": 1.0, "target_guidance_scale": 1.0,
    }  # fmt: skip
    plain = edit(pipe, image, "a cat", "a dog", **options)
    shared = edit(pipe, image, "a cat", "a dog", **options, features=Features(steps=2))
    assert plain.bank_bytes == 0
    assert shared.bank_bytes > 0
    assert shared.bank_missed == 0
    assert shared.nfe == plain.nfe == 12
    assert not torch.equal(found(shared), found(plain))
    quantized = Features(steps=2, store="int8")
    small = edit(pipe, image, "a cat", "a dog", **options, features=quantized)
    assert small.bank_bytes < 0.4 * shared.bank_bytes
    assert 0 < small.bank_error < 0.02
    assert [type(module) for module in pipe.transformer.modules()] == classes


def test_features_by_hand():
    pipe, method = kept("flux"), Nothing()
    options = {"steps": 3, "source_guidance_scale": 1.0, "target_guidance_scale": 2.0}
    layers, features = r"^transformer_blocks\.\d", Features(steps=2, blocks=[1], what="kv")
    edit(pipe, picture(), "a cat", "a dog", method=method, **options)
    setting = method.setting
    result = edit(
        pipe, picture(), "a cat", "a dog", method="rf-edit", output_type="latent", **options,
        features=features, layers=layers,
    )  # fmt: skip
    velocity = velocity_from_pretrained(pipe.transformer)
    assert len(allow_exchange(velocity, r"\.transformer_blocks\.\d")) == 2
    expected = edit_samples(
        velocity, setting.x1, source=setting.source, target=setting.target, method="rf-edit",
        grid=setting.times, features=features,
    )  # fmt: skip
    assert torch.equal(result.images, pipe._pack_latents(expected.x, 1, 4, 4, 6))
    assert result.bank_bytes == expected.bank_bytes


def test_the_published_layers_of_flux():
    """Single-stream blocks after number 19 of 38 for RF-Edit, all for FireFlow or where blocks are named."""
    pipe = made("flux", num_layers=1, num_single_layers=38, num_attention_heads=1)
    counts = []
    for method, blocks, layers in (
        ("rf-edit", None, None),
        ("fireflow", None, None),
        ("rf-edit", [0, 1], None),
        ("rf-edit", None, r"single_transformer_blocks\.(2\d|3[0-7])\.attn"),
    ):
        result = edit(
            pipe, picture(), "a cat", "a dog", method=method, steps=1, layers=layers,
            features=Features(steps=1, blocks=blocks), output_type="latent",
        )  # fmt: skip
        counts.append((result.bank_bytes, result.images))
    tokens, width = WORDS + 6, 16
    block = tokens * width * 4  # of one evaluation
    assert [count for count, _ in counts] == [
        2 * 18 * block,
        2 * 39 * block,
        2 * 2 * block,
        2 * 18 * block,
    ]
    assert torch.equal(counts[0][1], counts[3][1])
