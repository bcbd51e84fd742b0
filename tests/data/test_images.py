"""Folders of images: lazy reading, labels, mirrored variants, corrupt files; orders of subsets."""

import numpy as np
import pytest
import torch

from rfkernels.data import (
    Dataset,
    ImageFolder,
    Subset,
    load_dataset,
    load_image_folder,
    part_order,
    split,
)

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes; image i is a ramp from i to i + 3 along the columns."""
    for i in range(12):
        file = tmp_path / ("ab"[i // 6]) / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        image.fromarray(np.tile(np.arange(i, i + 4, dtype=np.uint8), (4, 1))).save(file)
    return tmp_path


OPTIONS = {"image_size": 4, "channels": 1}


def pixels(rows):
    return ((rows.x[:, 0, 0] + 1) * 127.5).round().long()


def test_lazy_and_in_memory_are_the_same(folder):
    lazy = load_image_folder(folder, in_memory=False, **OPTIONS)
    assert isinstance(lazy, ImageFolder)
    assert (lazy.size, lazy.sample_shape, lazy.num_classes) == (12, (1, 4, 4), 2)
    assert lazy.classes == ("a", "b")
    whole = load_image_folder(folder, **OPTIONS)
    assert isinstance(whole, Dataset)
    index = torch.tensor([11, 2, 2])
    for data in (lazy, whole):
        assert torch.equal(pixels(data.rows(index)), index[:, None] + torch.arange(4))
        assert data.rows(index).labels.tolist() == [1, 0, 0]


def test_mirroring_is_a_function_of_seed_epoch_and_position(folder):
    data = load_dataset(folder, mirror=True, **OPTIONS)
    index = torch.tensor([3, 15])
    found = pixels(data.rows(index))
    assert torch.equal(found[1], found[0].flip(0))
    assert data.rows(index).labels.tolist() == [0, 0]
    rows = torch.arange(1, 12, 2)
    mirrored = torch.zeros(2)
    for epoch in range(200):
        order = data.order(rows, seed=1, epoch=epoch)
        assert torch.equal((order % 12).sort().values, rows)
        mirrored += torch.tensor([(order >= 12).sum(), (order < 12).sum()])
    # 1200 draws of probability 1/2: standard deviation 17.3.
    assert abs(mirrored[0] - 600) < 5 * 17.4
    assert torch.equal(data.order(rows, seed=1, epoch=199), order)
    plain = load_image_folder(folder, in_memory=False, **OPTIONS)
    assert plain.order(rows, seed=1, epoch=199).max() < 12
    with pytest.raises(ValueError, match="mirror: needs in_memory=False"):
        load_image_folder(folder, mirror=True, in_memory=True)


def test_corrupt_images_are_errors_or_counted(folder):
    (folder / "a/00.png").write_bytes((folder / "a/00.png").read_bytes()[:50])
    (folder / "b/zz.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    data = load_image_folder(folder, in_memory=False, **OPTIONS)
    assert data.size == 13
    assert data.rows(torch.tensor([5])).x.shape == (1, 1, 4, 4)
    for row, name in ((0, "00.png"), (12, "zz.jpg")):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            data.rows(torch.tensor([5, row]))
    with pytest.warns(
        UserWarning, match="2 of 13 images cannot be decoded and are left out, the fir"
    ):
        data = load_image_folder(folder, in_memory=False, on_corrupt="skip", **OPTIONS)
    assert data.size == 11
    assert [file.name for file, _ in data.skipped] == ["00.png", "zz.jpg"]
    assert "not a readable image" in data.skipped[0][1]
    assert pixels(data.rows(torch.arange(11)))[:, 0].tolist() == list(range(1, 12))
    assert data.rows(torch.arange(11)).labels.tolist() == [0] * 5 + [1] * 6
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match="none of 1 images can be decoded"):
        load_image_folder(folder, on_corrupt="skip")
    with pytest.raises(ValueError, match="on_corrupt: must be error or skip"):
        load_image_folder(folder, on_corrupt="ignore")


def test_orientation_transparency_and_depth(tmp_path):
    wide = np.zeros((2, 4), np.uint8)
    wide[0, 0] = 255
    exif = image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.fromarray(np.repeat(np.repeat(wide, 8, 0), 8, 1)[:, :16]).save(
        tmp_path / "a.jpg", exif=exif, quality=100
    )
    image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "c.png")
    x = load_image_folder(tmp_path, image_size=16, channels=1).x
    assert x[0, 0, 12, 12] > 0.9  # the bright corner, upper left in the file
    assert x[0, 0, 4, 4] < -0.9
    assert x[1].min() == 1.0
    torch.testing.assert_close(x[2], torch.full((1, 16, 16), 0x80 / 127.5 - 1))


def test_split_of_a_set_that_is_not_in_memory(folder):
    data = load_image_folder(folder, in_memory=False, **OPTIONS)
    train, held = split(data, 0.25, seed=2)
    assert isinstance(train, Subset)
    assert (train.size, held.size, train.sample_shape, train.num_classes) == (9, 3, (1, 4, 4), 2)
    assert (train.name, train.has_labels) == (data.name, True)
    found = [*pixels(train.rows(torch.arange(9)))[:, 0], *pixels(held.rows(torch.arange(3)))[:, 0]]
    assert sorted(int(i) for i in found) == list(range(12))
    in_memory = load_image_folder(folder, **OPTIONS)
    assert torch.equal(split(in_memory, 0.25, seed=2)[1].x, held.rows(torch.arange(3)).x)
    with pytest.raises(ValueError, match="ring is an endless stream"):
        split(load_dataset("ring"), 0.1)


def test_a_subset_has_the_order_of_its_whole(folder):
    data = load_image_folder(folder, mirror=True, **OPTIONS)
    part = Subset(data, torch.tensor([9, 2, 5, 11]))
    rows = torch.tensor([0, 1, 3])
    order = part_order(part, rows, seed=4, epoch=2)
    whole = data.order(part.index[rows], seed=4, epoch=2)
    assert torch.equal((order % 4).sort().values, rows)
    assert torch.equal(part.rows(order).x, data.rows(whole).x)
    seen = torch.cat([part_order(part, rows, seed=4, epoch=e) for e in range(9)])
    assert (seen >= 4).any()
    assert (seen < 4).any()


def test_part_order_without_an_order_of_its_own():
    data, rows = Dataset(torch.zeros(6, 2)), torch.tensor([1, 3, 4])
    orders = {tuple(part_order(data, rows, seed=0, epoch=e).tolist()) for e in range(20)}
    assert all(sorted(order) == [1, 3, 4] for order in orders)
    assert len(orders) == 6


def test_captions_must_fit():
    with pytest.raises(ValueError, match="captions: must have one per sample, 2; got 1"):
        Dataset(torch.zeros(2, 2), captions=("one",))
