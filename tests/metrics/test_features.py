"""Feature networks: known photographs, known sizes, fixed weights, files of weights, and refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rfkernels.metrics.features.classifier as classifier_module
from rfkernels.data import digits, split
from rfkernels.metrics.features import (
    Inception,
    Pixels,
    RandomConv,
    Vgg16,
    extract,
    load_features,
    train_classifier,
)


@pytest.fixture(autouse=True)
def _own_random_numbers_only():
    """No network draws from the caller's generator."""
    state = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), state)


def images(count=2, channels=3, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def inception():
    network = Inception(size=75)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=generator)
    return network


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(classifier_module, "_STEPS", 30)


def test_efficientnet_knows_photographs():
    """The temple and the flower that scikit-learn ships are the classes palace and daisy of ImageNet."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from sklearn.datasets import load_sample_images

    network = load_features("efficientnet-lite0")
    photographs = [
        torch.from_numpy(image[:, 106:-107].copy()).permute(2, 0, 1) / 127.5 - 1
        for image in load_sample_images().images
    ]
    features = network(torch.stack(photographs).float())
    assert features.shape == (2, 1280)
    assert network.logits(features).argmax(1).tolist() == [698, 985]


def test_efficientnet_layers_and_grey_images():
    pytest.importorskip("efficientnet_lite_pytorch")
    network = load_features("efficientnet-lite0:64")
    grey = images(2, 1, 20)
    shapes = [tuple(layer.shape) for layer in network.layers(grey)]
    assert shapes == [
        (2, 16, 32, 32), (2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4), (2, 320, 2, 2)
    ]  # fmt: skip
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="multiple of 32; got 100"):
        load_features("efficientnet-lite0:100")


def test_inception_is_of_the_published_size(inception):
    """Inception-v3 has 23 834 568 weights without its auxiliary head, of which the classifier 2 049 000."""
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568 - 2_049_000
    names = set(inception.state_dict())
    assert {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_6c.branch7x7dbl_5.bn.running_var",
        "Mixed_7c.branch_pool.bn.bias",
    } <= names
    channels = [layer.shape[1] for layer in inception.layers(images())]
    assert channels == [64, 192, 288, 768, 2048]
    features = inception(images())
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    assert torch.equal(features, inception(images()))


def test_inception_resizes_as_tensorflow_1_did(inception):
    """Output pixel i lies at i times (input side / output side); beyond the last pixel it repeats it."""
    x = images(1, 3, 40)
    ours = inception.resize(x)[0, 1].numpy()
    at = np.arange(75) * (40 / 75)
    rows = np.stack([np.interp(at, np.arange(40), row) for row in x[0, 1].numpy()])
    expected = np.stack([np.interp(at, np.arange(40), column) for column in rows.T]).T
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_inception_reads_both_kinds_of_file(inception, tmp_path):
    state = dict(inception.state_dict())
    state |= {"fc.weight": torch.zeros(1008, 2048), "AuxLogits.fc.weight": torch.zeros(1, 1)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pt")
    x = images(1)
    for name in ("w.safetensors", "w.pt"):
        loaded = Inception(tmp_path / name, size=75)
        assert torch.equal(loaded(x), inception(x))
    assert load_features(f"inception:{tmp_path / 'w.pt'}").size == 299


def test_vgg_is_of_the_published_size():
    """The convolutions of VGG-16 have 14 714 688 weights."""
    network = Vgg16()
    assert sum(p.numel() for p in network.parameters()) == 14_714_688
    sides = [tuple(layer.shape[1:3]) for layer in network.layers(images(1, 1, 35))]
    assert sides == [(64, 35), (128, 17), (256, 8), (512, 4), (512, 2)]


def test_files_that_are_no_weights_are_refused(tmp_path):
    torch.save({"layer": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Pixels(), tmp_path / "object.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, said in (
        ("other.pt", "another network's weights"),
        ("list.pt", "must hold a state dict"),
        ("object.pt", "is no file of weights"),
        ("text.safetensors", "is no file of weights"),
    ):
        with pytest.raises(ValueError, match=said):
            Inception(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        Inception(tmp_path / "nothing.pt")


def test_classifier_learns_its_labels_and_is_a_function_of_the_seed(monkeypatch):
    monkeypatch.setattr(classifier_module, "_STEPS", 150)
    train, held_out = split(digits(), 0.2, 0)
    model = train_classifier(train.x, train.labels)
    accuracy = (model.logits(held_out.x).argmax(1) == held_out.labels).float().mean()
    assert accuracy > 0.85
    assert model(held_out.x).shape == (len(held_out), 128)
    assert not model.training
    monkeypatch.setattr(classifier_module, "_STEPS", 5)
    first, again, other = (train_classifier(train.x, train.labels, seed=s) for s in (0, 0, 1))
    assert torch.equal(again.head.weight, first.head.weight)
    assert not torch.equal(other.head.weight, first.head.weight)


def test_classifier_is_kept_in_the_cache(quick, tmp_path, monkeypatch):
    data = digits()
    model = train_classifier(data.x, data.labels, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("classifier-")
    monkeypatch.setattr(classifier_module, "_fit", None)
    again = train_classifier(data.x, data.labels, cache=tmp_path / "cache")
    assert torch.equal(again(data.x[:3]), model(data.x[:3]))
    with pytest.raises(TypeError):  # other data, so trained anew
        train_classifier(data.x[:500], data.labels[:500], cache=tmp_path / "cache")


@pytest.mark.parametrize("side", [3, 5, 28, 100])
def test_classifier_takes_any_size(side, monkeypatch):
    monkeypatch.setattr(classifier_module, "_STEPS", 1)
    model = train_classifier(images(4, 3, side), torch.tensor([0, 1, 2, 1]))
    assert model(images(2, 3, side)).shape[1] in (64, 128)
    assert model.size == min(side, 64)


def test_random_filters_are_the_same_everywhere():
    x = images(2, 1, 8)
    network = RandomConv()
    assert torch.equal(network(x), RandomConv()(x))
    assert not torch.equal(network(x), RandomConv(seed=1)(x))
    assert [layer.shape[2] for layer in network.layers(x)] == [8, 4, 4]
    smooth, sharp = RandomConv(pooling="average"), RandomConv(pooling="max")
    assert torch.equal(smooth.layers(x)[0], sharp.layers(x)[0])
    assert not torch.equal(smooth.layers(x)[1], sharp.layers(x)[1])


def test_pixels_are_averaged_down_to_1024_numbers():
    small, points = images(3, 1, 8), images(1, 1, 4).reshape(8, 2)
    assert torch.equal(Pixels()(small), small.flatten(1))
    assert torch.equal(Pixels()(points), points)
    large = images(2, 3, 64)
    expected = large.reshape(2, 3, 16, 4, 16, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(Pixels()(large), expected)


def test_extract_works_in_batches():
    x, network = images(7, 1, 8), RandomConv()
    torch.testing.assert_close(extract(network, x, batch=3), network(x))
    with pytest.raises(ValueError, match="one row per sample"):
        extract(lambda x: x, x)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="features: must be one of pixels, classifier"):
        load_features("vgg")
    with pytest.raises(ValueError, match="must be one of"):
        load_features("inception:")
    with pytest.raises(ValueError, match="classifier needs data with class labels"):
        load_features("classifier", images=images())
    with pytest.raises(TypeError, match="a name or a callable; got int"):
        load_features(3)
    with pytest.raises(ValueError, match="pooling must be average or max"):
        RandomConv(pooling="sum")
    with pytest.raises(ValueError, match=r"must have the shape \(B, 1 or 3, H, W\)"):
        RandomConv()(torch.zeros(2, 2, 8, 8))
    with pytest.raises(TypeError, match="floating point"):
        RandomConv()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least two classes"):
        train_classifier(images(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one per image"):
        train_classifier(images(), torch.zeros(3, dtype=torch.int64))
