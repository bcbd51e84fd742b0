"""Which samples meet: the coupling of held-out samples, and of mirrored images."""

import numpy as np
import pytest
import torch

from rfkernels.data import Prefetch, as_dataset, load_image_folder
from rfkernels.training import TrainConfig
from rfkernels.training.checks import check_coupling
from rfkernels.training.sources import DataSource

X = torch.arange(400.0).reshape(200, 2)


class Numbers:
    """An endless stream whose sample i is i."""

    name, size, sample_shape, has_labels = "numbers", None, (1,), False

    def rows(self, index):
        # The difference of neighbours is lost in float32 far out; what counts is how far.
        return torch.stack([index.to(torch.float32)], 1), None


def source(data, coupling):
    return DataSource(
        as_dataset(data),
        x0=as_dataset(data),
        coupling=coupling,
        seed=3,
        holdout=0.2,
        conditional=False,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_held_out_rows_of_two_sets_do_not_correspond(coupling):
    """The set coupled with itself: a given coupling would have every row meet itself."""
    held = source(X, coupling).held_out()
    assert sorted(held.x0[:, 0].tolist()) == sorted(held.x1[:, 0].tolist())  # the same, held out
    assert (held.x0 == held.x1).all(1).sum() <= 4
    again = source(X, coupling).held_out()
    assert torch.equal(held.x0, again.x0)


def test_held_out_rows_of_a_given_coupling_correspond():
    held = source(X, "given").held_out()
    assert torch.equal(held.x0, held.x1)


def test_held_out_samples_of_two_streams_are_apart():
    held = source(Numbers(), "independent").held_out()
    assert (held.x0 - held.x1).abs().min() > 2**60
    held = source(Numbers(), "given").held_out()
    assert torch.equal(held.x0, held.x1)


def test_read_ahead_mirrored_images_are_no_given_coupling_of_others(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in ("a", "b"):
        image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mirrored = load_image_folder(tmp_path, image_size=8, mirror=True)
    plain = load_image_folder(tmp_path, image_size=8)
    config = TrainConfig(coupling="given")
    with Prefetch(mirrored, workers=1) as ahead:
        with pytest.raises(ValueError, match="mirrors both sides or neither"):
            check_coupling(config, ahead, plain)
        check_coupling(config, mirrored, ahead)
