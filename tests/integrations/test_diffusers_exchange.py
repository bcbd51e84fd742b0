"""`allow_exchange` on networks that other packages have worked on: hooks of offloading and caching, compiled blocks,
pickles, texts of other lengths."""

import io
import warnings

import pytest
import torch
from diffusers_direct import FAMILIES
from diffusers_family import build, images, text

from rfkernels.editing import Features, edit
from rfkernels.integrations.diffusers import allow_exchange, velocity_from_pretrained

OPTIONS = {"method": "rf-edit", "steps": 3}


@pytest.fixture
def velocity():
    network = build(FAMILIES["SD3"])[0]
    return velocity_from_pretrained(network, prediction="velocity")


@pytest.fixture(scope="module")
def arguments():
    torch.manual_seed(2)
    x1, conditions = images(), []
    for _ in range(2):
        pooled = torch.randn(2, 32)
        conditions.append({"encoder_hidden_states": text(), "pooled_projections": pooled})
    return x1, {"source": conditions[0], "target": conditions[1], **OPTIONS}


@pytest.fixture(scope="module")
def expected(arguments):
    x1, options = arguments
    velocity = velocity_from_pretrained(build(FAMILIES["SD3"])[0], prediction="velocity")
    allow_exchange(velocity)
    result = edit(velocity, x1, **options, features=Features(2))
    assert result.bank_bytes > 0
    assert not torch.equal(result.x, edit(velocity, x1, **options).x)
    return result


def hook_of_accelerate(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def hook_of_diffusers(layer):
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(layer).register_hook(ModelHook(), "a")


def hook_that_was_removed(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    hooks.remove_hook_from_module(layer)


@pytest.mark.parametrize("hook", [hook_of_accelerate, hook_of_diffusers, hook_that_was_removed])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_the_layers(velocity, arguments, expected, hook, before):
    """They replace `forward` of single layers, as offloading does."""
    x1, options = arguments
    names = [name for name, module in velocity.named_modules() if hasattr(module, "processor")]
    if not before:
        assert allow_exchange(velocity) == names
    for name in names:
        hook(velocity.get_submodule(name))
    if before:
        assert allow_exchange(velocity) == names
    found = edit(velocity, x1, **options, features=Features(2))
    assert torch.equal(found.x, expected.x)
    assert found.bank_bytes == expected.bank_bytes


def test_compiled_blocks(velocity, arguments, expected):
    x1, options = arguments
    allow_exchange(velocity)
    torch.compiler.reset()
    network = next(m for m in velocity.modules() if hasattr(m, "transformer_blocks"))
    for block in network.transformer_blocks:
        block.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        found = edit(velocity, x1, **options, features=Features(2))
    torch.compiler.reset()
    torch.testing.assert_close(found.x, expected.x, rtol=1e-5, atol=1e-5)
    assert found.bank_bytes == expected.bank_bytes


def test_saved_and_loaded(velocity, arguments, expected):
    x1, options = arguments
    allow_exchange(velocity)
    file = io.BytesIO()
    torch.save(velocity, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    found = edit(loaded, x1, **options, features=Features(2))
    assert torch.equal(found.x, expected.x)


def test_joint_attention_needs_texts_of_one_length(velocity, arguments):
    x1, options = arguments
    allow_exchange(velocity)
    target = {**options["target"], "encoder_hidden_states": text(5)}
    with pytest.raises(ValueError, match="all conditions must have as many tokens"):
        edit(velocity, x1, **{**options, "target": target}, features=Features(1))
    assert torch.isfinite(edit(velocity, x1, **{**options, "target": target}).x).all()
