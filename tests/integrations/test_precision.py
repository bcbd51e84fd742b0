"""set_precision on the package's own DiT; diffusers and transformers have theirs in their own files."""

from __future__ import annotations

import pytest
import torch

from rfkernels import models
from rfkernels.integrations import set_precision


def dit(**options):
    model = models.build("dit", sample_shape=(1, 8, 8), width=32, depth=3, heads=2, **options)
    return model.eval().requires_grad_(False)


def evaluate(model):
    return model(torch.randn(2, 1, 8, 8), torch.rand(2))


def test_layer_by_layer(kernel):
    model = dit()
    found = set_precision(model, {"blocks.*": "int8", "blocks.1": "bf16"})
    assert found == {"blocks.0": "int8", "blocks.1": "bf16", "blocks.2": "int8"}
    evaluate(model)
    assert kernel.calls("int8") == 2
    evaluate(model)
    assert kernel.calls("bf16") == 1
    assert set(set_precision(model, {"*": "sdpa"}).values()) == {"sdpa"}
    evaluate(model)
    assert kernel.calls() == 0
    # The choice belongs to this object: what is saved is what the network was built with.
    assert models.describe(model)["options"]["attention"] == "sdpa"


def test_compiled_models_keep_their_names():
    model = dit()
    compiled = torch.compile(model, backend="eager")  # whose modules are _orig_mod.blocks...
    assert set_precision(compiled, {"blocks.0": "bf16"})["blocks.0"] == "bf16"
    assert model.blocks[0].attention == "bf16"


@pytest.mark.parametrize(
    ("precisions", "error", "message"),
    [
        ({"layers.*": "int8"}, ValueError, r"pattern 'layers\.\*' must match .* blocks\.0, blocks"),
        ({"blocks.0": "bf16", "blocks.7": "bf16"}, ValueError, r"pattern 'blocks\.7' must match"),
        ({"*": "int4"}, ValueError, "precision must be one of sdpa, int8, .*; got 'int4'"),
        ({}, ValueError, "precisions must have at least one pattern; got none"),
        ("int8", TypeError, "precisions must be a mapping from patterns to precisions; got str"),
    ],
)
def test_what_is_refused_changes_nothing(precisions, error, message):
    model = dit()
    with pytest.raises(error, match=f"set_precision: {message}"):
        set_precision(model, precisions)
    assert {block.attention for block in model.blocks} == {"sdpa"}


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match="its layers are none whose precision can be set"):
        set_precision(torch.nn.Linear(2, 2), {"*": "int8"})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
        set_precision({}, {"*": "int8"})
