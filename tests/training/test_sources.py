"""Which samples meet: the coupling of held-out samples, and of mirrored images."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

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


class Mixed(TorchFunctionMode):
    """Counts look-ups by numbers that lie on another device than what they number."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            self.count += args[0].device != args[1].device
        return function(*args, **(kwargs or {}))


def test_a_step_on_a_set_on_the_accelerator_copies_no_numbers_there():
    """The host would wait for the copy, and so for all that the device has to do before."""
    found = DataSource(
        as_dataset((X, torch.arange(200))),
        x0=as_dataset(X),
        coupling="independent",
        seed=3,
        holdout=0.2,
        conditional=True,
        device=torch.device("meta"),
    )
    found.draw(0, 32)  # of every epoch the order is copied once
    with Mixed() as mixed:
        drawn = found.draw(32, 32)
    assert drawn.x1.is_meta
    assert mixed.count == 0


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
