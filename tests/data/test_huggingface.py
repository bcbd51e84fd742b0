"""Hugging Face data sets, map-style and iterable, from memory and local files."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from rfkernels.data import caption_vectors, from_huggingface, load_dataset

datasets = pytest.importorskip("datasets")
image = pytest.importorskip("PIL.Image")

COUNT = 23
OPTIONS = {"image_size": 4, "channels": 1}


def png(grey):
    stream = io.BytesIO()
    image.new("L", (6, 4), grey).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def table():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "text": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "latent": datasets.Array2D((2, 3), "float32"),
            "odd": datasets.Value("float32"),
        }
    )
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in range(COUNT)],
        "label": [i % 3 for i in range(COUNT)],
        "text": [f"数 {i}" for i in range(COUNT)],
        "number": list(range(COUNT)),
        "latent": [np.full((2, 3), i, np.float32) for i in range(COUNT)],
        "odd": [float("nan")] * COUNT,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def numbers(data, index):
    return ((data.rows(index).x[:, 0, 0, 0] + 1) * 127.5).round().long()


def test_rows_of_a_map_style_set(table):
    data = from_huggingface(table, **OPTIONS)
    assert (data.size, data.sample_shape, data.num_classes) == (COUNT, (1, 4, 4), 3)
    index = torch.tensor([22, 0, 7, 7])
    assert torch.equal(numbers(data, index), index)
    assert torch.equal(data.rows(index).labels, index % 3)
    data = from_huggingface(table, condition="text", caption_dim=8, **OPTIONS)
    assert torch.equal(data.rows(index[:1]).labels, caption_vectors(["数 22"], 8))
    data = from_huggingface(table, condition="number", num_classes=COUNT, x="latent")
    assert (data.sample_shape, data.num_classes) == ((2, 3), COUNT)
    assert torch.equal(data.rows(index).x[:, 0, 0].long(), index)
    assert torch.equal(data.rows(index).labels, index)
    assert not from_huggingface(table, condition=None, **OPTIONS).has_labels


def test_files(table, tmp_path):
    table.save_to_disk(tmp_path / "disk")
    table.to_parquet(tmp_path / "a.parquet")
    arrow = next((tmp_path / "disk").glob("*.arrow"))
    index = torch.tensor([4, 21])
    for path in (tmp_path / "disk", arrow):
        assert torch.equal(numbers(load_dataset(path, **OPTIONS), index), index)
    data = load_dataset(tmp_path / "a.parquet", cache=tmp_path / "cache", **OPTIONS)
    assert torch.equal(numbers(data, index), index)
    assert data.name == "a"
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, part in (("cut.parquet", whole[:-50]), ("cut.arrow", arrow.read_bytes()[:300])):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(ValueError, match=r"cut\.(parquet|arrow): not a readable data set"):
            load_dataset(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dataset(tmp_path / "absent.parquet")


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_of_a_stream_do_not_depend_on_what_was_read(table, shards):
    data = from_huggingface(table.to_iterable_dataset(shards), block=4, mix=2, **OPTIONS)
    assert (data.size, data.num_classes) == (COUNT, 3)
    # The stream's own order: that of the table.
    index = torch.tensor([22, 0, 9, 8, 13, 0])
    assert torch.equal(numbers(data, index), index)
    assert torch.equal(data.rows(index).labels, index % 3)
    orders = [data.order(torch.arange(COUNT), seed=5, epoch=e) for e in (0, 1)]
    whole = numbers(data, orders[1])
    assert torch.equal(whole, orders[1])
    assert torch.equal(whole.sort().values, torch.arange(COUNT))
    assert not torch.equal(*orders)
    fresh = from_huggingface(table.to_iterable_dataset(shards), block=4, mix=2, **OPTIONS)
    order = fresh.order(torch.arange(COUNT), seed=5, epoch=1)
    assert torch.equal(numbers(fresh, order[15:]), whole[15:])
    copy = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(numbers(copy, order[3:9]), whole[3:9])
    with pytest.raises(IndexError, match="must be from 0 to 22"):
        data.rows(torch.tensor([23]))


def test_resuming_a_stream_reads_the_blocks_it_needs(table, tmp_path):
    read = []

    def note(example):
        read.append(example["number"])
        return example

    def opened():
        stream = table.to_iterable_dataset().map(note, features=table.features)
        return from_huggingface(
            stream, x="latent", condition="number", block=4, cache=tmp_path / "c.json"
        )

    assert opened().size == COUNT
    assert json.loads((tmp_path / "c.json").read_text())["size"] == COUNT
    read.clear()
    data = opened()
    assert set(read) == set(range(4))  # the probe's block
    read.clear()
    assert data.rows(torch.tensor([14])).labels.item() == 14
    assert set(read) == set(range(12, 16))
    (tmp_path / "c.json").write_text("{")
    assert opened().size == COUNT


def test_a_stream_that_does_not_repeat_is_an_error(table):
    start = [0]

    def generate():
        for i in range(12):
            yield {"number": start[0] + i, "x": [float(i)]}
        start[0] += 1

    features = datasets.Features(
        {"number": datasets.Value("int64"), "x": datasets.List(datasets.Value("float32"))}
    )
    stream = datasets.IterableDataset.from_generator(generate, features=features)
    with pytest.raises(ValueError, match="row 0: the stream gives other samples than when it was"):
        from_huggingface(stream, x="x", condition="number", block=4)


def test_faults(table):
    columns = {"image": [{"bytes": png(1), "path": None}, {"bytes": png(1)[:-26], "path": None}]}
    features = datasets.Features({"image": datasets.Image()})
    torn = datasets.Dataset.from_dict(columns, features=features)
    for form in (torn, torn.to_iterable_dataset()):
        data = from_huggingface(form, name="torn", **OPTIONS)
        with pytest.raises(ValueError, match="torn: row 1: image: not a readable image"):
            data.rows(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="x: must be one of image, label"):
        from_huggingface(table, x="picture")
    with pytest.raises(ValueError, match="x: must name the column of the samples"):
        from_huggingface(table.remove_columns("image"))
    with pytest.raises(ValueError, match="row 0: odd must be a string or a whole number"):
        from_huggingface(table, condition="odd", **OPTIONS)
    with pytest.raises(ValueError, match="data: must know its features"):
        from_huggingface(table.to_iterable_dataset().map(dict))
    with pytest.raises(TypeError, match="one split of a DatasetDict"):
        from_huggingface({"train": table})
    with pytest.raises(ValueError, match="holds no samples"):
        from_huggingface(table.select([]), **OPTIONS)
