"""Data sets for the training loop: real digits, 2-D toys, the user's files, tensors.

Images are float32 in [-1, 1], shape (N, C, H, W). `load_dataset(name)` opens one by name or path.
"""

from rfkernels.data.dataset import Data, Dataset, Rows, as_dataset, epoch_order, split, split_rows
from rfkernels.data.digits import digits, mnist
from rfkernels.data.files import load_arrays, load_image_folder
from rfkernels.data.load import DATASETS, load_dataset
from rfkernels.data.toys import ToyStream, toy

__all__ = [
    "DATASETS",
    "Data",
    "Dataset",
    "Rows",
    "ToyStream",
    "as_dataset",
    "digits",
    "epoch_order",
    "load_arrays",
    "load_dataset",
    "load_image_folder",
    "mnist",
    "split",
    "split_rows",
    "toy",
]
