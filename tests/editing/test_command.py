"""`rfkernels edit` on a tiny conditional transformer: files, pictures, equality with Python, refusals."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rfkernels import derive_seed, training
from rfkernels.cli.main import main
from rfkernels.data import digits
from rfkernels.editing import Features, FlowEdit, edit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "run"
    assert main([
        "train", "--dataset", "digits", "--run", str(folder), "--conditional", "--steps", "60",
        "--learning-rate", "0.02", "--model", "dit", "--model-option", "width=16", "--model-option", "depth=2",
        "--batch-size", "16", "--quiet",
    ]) == 0  # fmt: skip
    return str(folder)


def test_arrays_are_what_python_edits(run, tmp_path):
    out = tmp_path / "x.safetensors"
    arguments = [
        "--in",
        "digits",
        "--n",
        "5",
        "--target-label",
        "8",
        "--steps",
        "6",
        "--batch",
        "2",
    ]
    more = ["--set", "n_max=4", "--target-guidance", "2", "--seed", "3", "--out", str(out), "-q"]
    assert main(["edit", run, *arguments, *more]) == 0
    written = load_file(out)
    rows = digits().rows(torch.arange(5))
    expected = edit(
        training.load(run).model, rows.x, source={"y": rows.labels}, target={"y": torch.full((5,), 8)},
        method=FlowEdit(n_max=4), steps=6, target_guidance_scale=2.0, uncondition={},
        seed=torch.arange(5) + derive_seed(3, "edit") // 2,
    )  # fmt: skip
    torch.testing.assert_close(written["x"], expected.x, rtol=1e-5, atol=1e-5)
    assert torch.equal(written["source"], rows.x)
    assert written["labels"].tolist() == [8] * 5
    assert (written["x"] - rows.x).abs().max() > 1e-3


def test_shared_features_and_what_is_said(run, tmp_path, capsys):
    x = digits().rows(torch.arange(3)).x
    save_file({"x": x}, tmp_path / "in.safetensors")
    arguments = ["edit", run, "--in", str(tmp_path / "in.safetensors"), "--method", "fireflow"]
    labels = ["--source-label", "0", "--target-label", "1", "--steps", "4"]
    out = tmp_path / "x.npz"
    assert main([*arguments, *labels, "--share", "2", "--out", str(out)]) == 0
    assert (
        "3 images, network evaluations for each: 10. Features kept: 0.0 MB."
        in capsys.readouterr().out
    )
    expected = edit(
        training.load(run).model, x, source={"y": torch.zeros(3, dtype=torch.int64)},
        target={"y": torch.ones(3, dtype=torch.int64)}, method="fireflow", steps=4,
        features=Features(2),
    )  # fmt: skip
    with np.load(out) as written:
        np.testing.assert_allclose(written["x"], expected.x.numpy(), rtol=1e-5, atol=1e-5)


def test_an_image_in_and_a_picture_out(run, tmp_path):
    Image.new("RGB", (20, 12), (200, 100, 0)).save(tmp_path / "in.bmp")
    out = tmp_path / "out.png"
    arguments = ["edit", run, "--in", str(tmp_path / "in.bmp"), "--source-label", "0"]
    options = [
        "--target-label",
        "1",
        "--steps",
        "3",
        "--method",
        "uniedit",
        "--out",
        str(out),
        "-q",
    ]
    assert main([*arguments, *options]) == 0
    picture = Image.open(io.BytesIO(out.read_bytes())).convert("L")
    grey = round(0.299 * 200 + 0.587 * 100)
    image, edit = picture.crop((118, 43, 166, 91)), picture.crop((118, 95, 166, 143))
    assert image.getextrema() == (grey, grey)  # the image above its edit, eight times eight pixels
    assert {picture.getpixel((117, y)) for y in range(43, 143)} == {255}
    for top in range(0, 48, 6):
        lines = {edit.crop((0, y, 48, y + 1)).tobytes() for y in range(top, top + 6)}
        assert len(lines) == 1
    assert edit.getextrema() != (255, 255)
    assert main([*arguments, *options]) == 2
    assert main([*arguments, *options, "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "sdedit"], "method: must be one of flowedit"),
        (["--set", "gamma=1"], "set: flowedit has the options n_max, n_min, n_avg; got 'gamma'"),
        (["--target-label", "10"], "label: must be from 0 to 9"),
        (["--source-label", "10"], "label: must be from 0 to 9"),
        (["--n", "0"], "n: must be at least 1"),
        (["--in", "moons"], "in: samples must have the run's shape"),
        (["--in", "nothing.png"], "nothing.png: not a readable image ([Errno 2] No such file"),
        (["--share", "1"], "method 'flowedit' shares none"),
        (["--set", "n_max=9", "--steps", "3"], "n_min <= n_max <= steps"),
    ],
)
def test_refusals(run, tmp_path, capsys, options, words):
    arguments = ["edit", run, "--in", "digits", "--n", "2", "--target-label", "1"]
    assert main([*arguments, "--out", str(tmp_path / "x.npz"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({}, "without labels; got None"),
        (
            {"labels": torch.tensor([3, 10])},
            "with labels beyond the run's, 0 to 9; got the label 10",
        ),
    ],
)
def test_images_without_labels_of_the_run_need_one(run, tmp_path, capsys, labels, words):
    save_file({"x": torch.zeros(2, 1, 8, 8), **labels}, tmp_path / "in.safetensors")
    arguments = [run, "--in", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "x.npz")]
    assert main(["edit", *arguments, "--target-label", "1"]) == 2
    assert f"source-label: must be given for images {words}" in capsys.readouterr().err
    assert main(["invert", *arguments]) == 2
    assert f"label: must be given for images {words}" in capsys.readouterr().err
    if labels:  # the first has one of the run's
        assert main(["invert", *arguments, "-n", "1", "--steps", "1", "-q"]) == 0
