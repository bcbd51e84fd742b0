"""The reference networks: shapes, conditions, registry, and what they must not do."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from rfkernels import models

IMAGE = (1, 8, 8)
NETWORKS = [
    ("mlp", {"sample_shape": (2,), "width": 16, "depth": 2}),
    ("mlp", {"sample_shape": IMAGE, "width": 16, "depth": 1, "dropout": 0.1}),
    ("dit", {"sample_shape": (3, 8, 4), "patch": 2, "width": 16, "depth": 2, "heads": 2}),
    ("unet", {"sample_shape": (3, 8, 8), "width": 8, "multipliers": (1, 2), "heads": 2}),
    ("unet", {"sample_shape": (1, 6, 10), "width": 12, "multipliers": (1, 2), "heads": 0}),
]


def randomised(model, seed=0):
    """The network with weights that are nowhere zero, so that every input can be felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(("name", "options"), NETWORKS)
@pytest.mark.parametrize("classes", [None, 4])
def test_shape_gradients_and_every_input_matters(name, options, classes):
    model = randomised(models.build(name, num_classes=classes, **options))
    x = torch.randn(3, *options["sample_shape"])
    t = torch.tensor([0.0, 0.5, 1.0])
    y = None if classes is None else torch.tensor([0, 3, 1])
    out = model(x, t, y)
    assert out.shape == x.shape
    out.square().mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused
    with torch.no_grad():
        assert not torch.equal(model(x + 0.1, t, y), out)
        assert not torch.equal(model(x, t * 0.9 + 0.01, y), out)
        # Samples do not see each other.
        torch.testing.assert_close(model(x[1:2], t[1:2], None if y is None else y[1:2]), out[1:2])
        if y is not None:
            assert not torch.equal(model(x, t, (y + 1) % 4), out)


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_no_label_is_the_null_label(name, options):
    model = randomised(models.build(name, num_classes=4, **options))
    x, t = torch.randn(2, *options["sample_shape"]), torch.rand(2)
    assert model.null_label == 4
    assert torch.equal(model(x, t), model(x, t, torch.full((2,), model.null_label)))
    assert models.build(name, **options).null_label is None


def test_dit_takes_condition_vectors():
    model = randomised(models.build("dit", sample_shape=IMAGE, width=16, depth=1, condition_dim=5))
    x, t, y = torch.randn(2, *IMAGE), torch.rand(2), torch.randn(2, 5)
    assert not torch.equal(model(x, t, y), model(x, t))
    assert torch.equal(model(x, t, y.new_full(y.shape, model.null_label)), model(x, t))
    with pytest.raises(ValueError, match=r"y: must be condition vectors of shape \(2, 5\)"):
        model(x, t, torch.randn(2, 4))
    with pytest.raises(ValueError, match="num_classes: give either"):
        models.build("dit", sample_shape=IMAGE, width=16, num_classes=3, condition_dim=5)


def test_dit_patches_round_trip():
    model = models.build("dit", sample_shape=(3, 8, 4), patch=2, width=16, depth=1, heads=2)
    x = torch.randn(2, 3, 8, 4)
    assert torch.equal(model._image(model._patches(x)), x)
    # The first token is the top left patch.
    assert torch.equal(model._patches(x)[0, 0].reshape(3, 2, 2), x[0, :, :2, :2])


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_new_network_is_the_zero_field(name, options):
    model = models.build(name, seed=0, **options)
    x = torch.randn(2, *options["sample_shape"])
    assert not model(x, torch.rand(2)).any()


def test_build_is_a_function_of_its_seed_and_leaves_the_global_state():
    state = torch.random.get_rng_state()
    first, second = (models.build("mlp", seed=3, sample_shape=(2,), width=8) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = models.build("mlp", seed=4, sample_shape=(2,), width=8)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.enter.weight, other.enter.weight)


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_describe_rebuilds_the_architecture(name, options):
    model = models.build(name, num_classes=2, **options)
    described = models.describe(model)
    assert described["name"] == name
    again = models.build(described["name"], **described["options"])
    again.load_state_dict(model.state_dict())
    assert models.describe(again) == described


def test_describe_knows_only_its_own():
    class Mine(models.MLPVelocity):
        pass

    assert models.describe(Mine((2,), width=8)) is None
    assert models.describe(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transformer", {}, "name: must be one of mlp, dit, unet"),
        ("mlp", {"sample_shape": (2,), "wdth": 3}, "wdth: mlp has no such option"),
        ("mlp", {}, "sample_shape: mlp needs it"),
        ("dit", {"sample_shape": (2,)}, "sample_shape: DiT takes"),
        ("dit", {"sample_shape": (1, 7, 8)}, "patch: must divide"),
        ("dit", {"sample_shape": IMAGE, "width": 30}, "width: must be a multiple"),
        ("unet", {"sample_shape": (1, 6, 6)}, "sample_shape: height and width must be multiples"),
        ("unet", {"sample_shape": IMAGE, "heads": 5}, "heads: must divide"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **options)


def test_bad_labels_are_refused():
    conditional = models.build("mlp", sample_shape=(2,), width=8, num_classes=3)
    x, t = torch.randn(2, 2), torch.rand(2)
    with pytest.raises(ValueError, match="y: must be integer class labels"):
        conditional(x, t, torch.rand(2))
    with pytest.raises(ValueError, match="y: this MLPVelocity was built without"):
        models.build("mlp", sample_shape=(2,), width=8)(x, t, torch.zeros(2, dtype=torch.int64))


def test_diffusers_is_not_imported_before_it_is_needed():
    code = "import sys, rfkernels.models; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is not None, reason="diffusers is installed"
)
def test_missing_diffusers_names_the_extra():
    with pytest.raises(ImportError, match=r"rfkernels\[diffusers\]"):
        models.build("diffusers-unet", sample_shape=IMAGE)


def test_diffusers_unet_is_a_velocity():
    pytest.importorskip("diffusers")
    model = models.build(
        "diffusers-unet",
        sample_shape=(1, 8, 8),
        num_classes=3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert model(x, t, torch.tensor([0, 2])).shape == x.shape
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
