"""Tar shards: order, resumption, faults; the archives are written by the standard library."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch

from rfkernels.data import TarShards, caption_vectors, load_dataset, part_order

image = pytest.importorskip("PIL.Image")


def png(grey):
    stream = io.BytesIO()
    image.new("L", (4, 4), grey).save(stream, "png")
    return stream.getvalue()


def write_tar(file, members):
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def sample(number, *, key=None):
    key = f"{number:04d}" if key is None else key
    text = f"grün 数 {number}"
    return [
        (f"{key}.png", png(number)),
        (f"{key}.cls", str(number % 3).encode()),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", json.dumps({"id": number, "words": text}).encode()),
    ]


SIZES = (5, 0, 7, 1, 6)  # one shard is empty


@pytest.fixture
def shards(tmp_path):
    number = 0
    for shard, size in enumerate(SIZES):
        members = [m for i in range(number, number + size) for m in sample(i)]
        write_tar(tmp_path / f"part-{shard}.tar", members)
        number += size
    return tmp_path


def read(data, index):
    """The numbers that the images of these indices show."""
    x = data.rows(index).x
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().long()


OPTIONS = {"image_size": 4, "channels": 1}


def test_samples_and_labels_are_those_written(shards):
    data = TarShards(shards, **OPTIONS)
    assert (data.size, data.sample_shape, data.num_classes) == (19, (1, 4, 4), 3)
    assert (data.name, data.has_labels) == (shards.name, True)
    index = torch.tensor([18, 0, 5, 4, 12, 5])
    assert torch.equal(read(data, index), index)
    assert torch.equal(data.rows(index).labels, index % 3)
    assert data.captions(index[:2]) == ["grün 数 18", "grün 数 0"]
    assert TarShards(shards, condition=None, **OPTIONS).rows(index).labels is None
    with pytest.raises(IndexError, match="must be from 0 to 18"):
        data.rows(torch.tensor([19]))


def test_captions_and_json_are_conditions(shards):
    index = torch.tensor([3, 17])
    expected = caption_vectors(["grün 数 3", "grün 数 17"], 16)
    for condition in ("txt", "json:words"):
        data = TarShards(shards, condition=condition, caption_dim=16, **OPTIONS)
        assert torch.equal(data.rows(index).labels, expected)
        assert data.num_classes is None
    data = TarShards(shards, condition="json:id", num_classes=19, **OPTIONS)
    assert torch.equal(data.rows(index).labels, index)
    assert data.num_classes == 19
    with pytest.raises(ValueError, match=r"0000\.json at byte \d+: has no key nothing"):
        TarShards(shards, condition="json:nothing", **OPTIONS)
    with pytest.raises(ValueError, match="condition: must be auto, cls, txt, json:KEY or None"):
        TarShards(shards, condition="label", **OPTIONS)


def test_arrays_are_samples(tmp_path):
    arrays = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)

    def npy(array):
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=True)
        return stream.getvalue()

    write_tar(tmp_path / "a.tar", [(f"{i}.latent.npy", npy(a)) for i, a in enumerate(arrays)])
    data = load_dataset(tmp_path / "a.tar")
    assert data.sample_shape == (2, 5)
    np.testing.assert_array_equal(data.rows(torch.tensor([2, 0])).x.numpy(), arrays[[2, 0]])

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("an object was unpickled",))

    bad = {
        "object": (np.array([Trap()], dtype=object), "not a readable .npy file"),
        "nan": (np.full((2, 5), np.nan), "not finite"),
        "int": (
            np.zeros((2, 5), np.int64),
            "must be an array of uint8 or floating point; got int64",
        ),
        "shape": (np.zeros((2, 6), np.float32), r"must be float32 \(2, 5\) as others are; got"),
    }
    for name, (array, message) in bad.items():
        members = [("0.npy", npy(arrays[0])), ("1.npy", npy(array))]
        data = TarShards(write_tar(tmp_path / f"{name}.tar", members))
        with pytest.raises(ValueError, match=message) as error:
            data.rows(torch.arange(2))
        assert f"{name}.tar: 1" in str(error.value)


def test_an_epoch_is_a_permutation_that_stays_within_a_few_shards(shards):
    data, rows = TarShards(shards, mix=2, **OPTIONS), torch.arange(19)
    orders = [part_order(data, rows, seed=3, epoch=e) for e in range(4)]
    for order in orders:
        assert torch.equal(order.sort().values, rows)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(part_order(data, rows, seed=3, epoch=2), orders[2])
    assert not torch.equal(part_order(data, rows, seed=4, epoch=2), orders[2])
    # Rows of a shard lie together but for those of the other shard of their buffer.
    shard_of = np.repeat(range(5), SIZES)
    for order in orders:
        visited = shard_of[order.numpy()]
        spans = {s: np.flatnonzero(visited == s) for s in range(5) if SIZES[s]}
        for shard, places in spans.items():
            between = set(visited[places[0] : places[-1] + 1].tolist()) - {shard}
            assert len(between) <= 1
    # Both levels of the shuffle happen: the shards come in more than one order, and rows are mixed.
    assert len({tuple(dict.fromkeys(shard_of[o.numpy()].tolist())) for o in orders}) > 1
    assert any((order.diff() < 0).sum() > 4 for order in orders)


def test_the_held_out_rows_never_come(shards):
    data = TarShards(shards, **OPTIONS)
    kept = torch.tensor([i for i in range(19) if i % 4])
    order = data.order(kept, seed=0, epoch=1)
    assert torch.equal(order.sort().values, kept)


def test_resumption_in_mid_epoch_reads_the_same_and_only_what_it_needs(shards, monkeypatch):
    import rfkernels.data.shards as module

    data = TarShards(shards, mix=2, **OPTIONS)
    order = data.order(torch.arange(19), seed=1, epoch=5)
    uninterrupted = read(data, order)
    again = TarShards(shards, mix=2, **OPTIONS)
    taken = []
    real = module.read_shard
    monkeypatch.setattr(
        module, "read_shard", lambda *a: taken.append(a[3]) or real(*a), raising=True
    )
    rest = read(again, again.order(torch.arange(19), seed=1, epoch=5)[11:])
    assert torch.equal(rest, uninterrupted[11:])
    assert {name.partition(".")[0] for name in taken} == {f"{i:04d}" for i in order[11:].tolist()}


def test_the_samples_do_not_depend_on_the_number_of_processes(shards):
    order = TarShards(shards, **OPTIONS).order(torch.arange(19), seed=1, epoch=0)
    whole = read(TarShards(shards, **OPTIONS), order)
    for world in (2, 3):
        ranks = [TarShards(shards, **OPTIONS) for _ in range(world)]
        parts = [read(data, order[rank::world]) for rank, data in enumerate(ranks)]
        merged = torch.empty_like(whole)
        for rank, part in enumerate(parts):
            merged[rank::world] = part
        assert torch.equal(merged, whole)


def test_the_index_is_kept_and_renewed_when_a_shard_changes(shards, monkeypatch, tmp_path):
    import rfkernels.data.shard_index as module

    scanned = []
    real = module.scan_shard
    monkeypatch.setattr(module, "scan_shard", lambda f, i: scanned.append(f.name) or real(f, i))
    cache = tmp_path / "cache"
    TarShards(shards, cache=cache, **OPTIONS)
    assert sorted(scanned) == [f"part-{i}.tar" for i in range(5)]
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]
    scanned.clear()
    assert TarShards(shards, cache=cache, **OPTIONS).size == 19
    assert scanned == []
    for file in cache.glob("set-*.json"):
        file.write_text('{"state": [')  # torn
    assert TarShards(shards, cache=cache, **OPTIONS).size == 19
    assert scanned == []
    opened = TarShards(shards, cache=cache, **OPTIONS)
    write_tar(shards / "part-3.tar", [m for i in (100, 101) for m in sample(i)])
    assert TarShards(shards, cache=cache, **OPTIONS).size == 20
    assert scanned == ["part-3.tar"]
    with pytest.raises(ValueError, match=r"part-3\.tar: has changed since the set was opened"):
        opened.rows(torch.tensor([12]))


def test_an_index_that_cannot_be_kept_is_told(shards, monkeypatch):
    import rfkernels.data.shard_index as module

    monkeypatch.setattr(module, "_writable", lambda folder: False)
    with pytest.warns(UserWarning, match="scanned anew at every start; name a folder in cache"):
        data = TarShards(shards, **OPTIONS)
    assert torch.equal(read(data, torch.tensor([17])), torch.tensor([17]))


def test_a_pickled_copy_reads_the_same(shards):
    data = TarShards(shards, **OPTIONS)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(read(copy, torch.arange(19)), torch.arange(19))


@pytest.mark.parametrize("name", ["0.pkl", "0.pickle", "0.pth", "0.pyd", "0.pt", "0", "0.png.gz"])
def test_members_without_a_decoder_are_refused(tmp_path, name):
    file = write_tar(tmp_path / "a.tar", [("0.png", png(1)), (name, b"\x80\x04.")])
    with pytest.raises(ValueError, match=r"a\.tar: 0.* at byte 1024: field .* is refused") as error:
        TarShards(file, **OPTIONS)
    assert "name the field in ignore" in str(error.value)
    field = name.partition(".")[2]
    assert TarShards(file, ignore=[field], **OPTIONS).size == 1


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match="must be a plain file; got a link"):
        TarShards(tmp_path / "a.tar")


def test_cut_and_damaged_shards_are_errors(tmp_path):
    members = [m for i in range(3) for m in sample(i)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    # 512-byte header and padded data per member; 12 members.
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [m.offset for m in archive]
        end = archive.offset
    cases = {
        "nothing": (b"", "not a whole uncompressed tar: empty file"),
        "in data": (whole[: starts[6] + 520], "not a whole uncompressed tar|the file is cut off"),
        "in the last data": (whole[: starts[-1] + 520], "cut off|unexpected end of data"),
        "in a header": (whole[: starts[8] + 100], f"cut off at byte {starts[8]}, after sample 2"),
        "between members": (whole[: starts[8]], f"cut off at byte {starts[8]}, after sample 2"),
        "before the end": (whole[:end], f"cut off at byte {end}, after sample 3"),
        "header": (
            whole[: starts[4]] + b"\xff" * 512 + whole[starts[4] + 512 :],
            f"a damaged header at byte {starts[4]}, after sample 1",
        ),
        "first header": (b"\xff" * 512 + whole[512:], "not a whole uncompressed tar"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            TarShards(tmp_path / "bad.tar", **OPTIONS)
        assert "bad.tar: " in str(error.value), name


def test_a_damaged_image_is_an_error_that_names_it(tmp_path):
    data = write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2)[:-20])])
    shards = TarShards(data, **OPTIONS)
    with pytest.raises(ValueError, match=r"a\.tar: 1\.png at byte \d+: not a readable image"):
        shards.rows(torch.arange(2))


def test_a_shard_cut_after_it_was_opened_is_an_error(shards):
    data = TarShards(shards, **OPTIONS)
    data.rows(torch.tensor([5]))
    file = shards / "part-2.tar"
    with file.open("r+b") as stream:
        stream.truncate(4 * 1024 * 3)
    with pytest.raises(ValueError, match=r"part-2\.tar: .* the file is cut off|has changed"):
        data.rows(torch.tensor([11]))


def test_duplicates_and_gaps_are_errors(tmp_path):
    def opened(members, **options):
        return TarShards(write_tar(tmp_path / "a.tar", members), **OPTIONS, **options)

    with pytest.raises(ValueError, match="key a comes a second time in this shard"):
        opened([("a.png", png(1)), ("b.png", png(2)), ("a.cls", b"1")])
    with pytest.raises(ValueError, match="sample a has the field png twice"):
        opened([("a.png", png(1)), ("a.png", png(2))])
    assert opened([("x/a.png", png(1)), ("y/a.png", png(2)), ("b.PNG", png(3))]).size == 3
    gap = [("a.png", png(1)), ("a.cls", b"1"), ("b.png", png(2))]
    assert not opened(gap).has_labels
    with pytest.raises(ValueError, match=r"a\.tar: sample b has no field cls"):
        opened(gap, condition="cls")
    with pytest.raises(ValueError, match="x: must name the field of the samples"):
        opened([("a.png", png(1)), ("a.jpg", png(1))])
    assert opened([("a.left.png", png(1)), ("a.png", png(9))], x="left.png").rows(
        torch.tensor([0])
    ).x.mean() == pytest.approx(1 / 127.5 - 1)
    for text in (b"-1", b"two", b"1.5", "٣".encode(), b"\xff"):
        with pytest.raises(ValueError, match=r"a\.cls at byte \d+: (must hold a whole|not valid)"):
            opened([("a.png", png(1)), ("a.cls", text)])


def test_sources(shards, tmp_path):
    assert TarShards(str(shards / "part-[02].tar"), **OPTIONS).size == 12
    assert TarShards([shards / "part-4.tar", shards / "part-0.tar"], **OPTIONS).size == 11
    assert TarShards(f"{shards}/part-{{1..3}}.tar", **OPTIONS).size == 8
    with pytest.raises(FileNotFoundError, match=r"part-5\.tar: no such file"):
        TarShards(f"{shards}/part-{{3..5}}.tar", **OPTIONS)
    assert load_dataset(shards, **OPTIONS).size == 19
    assert load_dataset(str(shards / "part-*.tar"), **OPTIONS).size == 19
    (tmp_path / "z").mkdir()
    (tmp_path / "z/a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="must be uncompressed and end in"):
        TarShards(tmp_path / "z")
    with pytest.raises(FileNotFoundError, match="tar shards there"):
        TarShards(tmp_path / "z/b-*.tar")
    with pytest.raises(FileNotFoundError, match="no such file"):
        TarShards([tmp_path / "absent.tar"])
    write_tar(tmp_path / "z/none.tar", [])
    with pytest.raises(ValueError, match="the 1 shards hold no samples"):
        TarShards(tmp_path / "z/none.tar")
