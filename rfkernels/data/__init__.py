"""Data sets for the training loop: real digits, emoji, 2-D toys, the user's files, folders and
shards, tensors.

A data set is anything with `name`, `size`, `sample_shape`, `has_labels` and `rows(index)`, the
protocol `Data`. Images are float32 in [-1, 1], shape (N, C, H, W). `load_dataset(name)` opens one by
name or path; docs/data.md tells formats, memory, order and faults.
"""

from rfkernels.data.captions import caption_conditioned, caption_vectors
from rfkernels.data.dataset import (
    Data,
    Dataset,
    OrderedData,
    Rows,
    Subset,
    as_dataset,
    epoch_order,
    part_order,
    split,
    split_rows,
)
from rfkernels.data.digits import digits, mnist
from rfkernels.data.emoji import emoji, find_emoji_font
from rfkernels.data.emoji_classes import EMOJI_CLASSES
from rfkernels.data.files import load_arrays
from rfkernels.data.huggingface import (
    HuggingFaceData,
    HuggingFaceStream,
    from_huggingface,
    load_huggingface,
)
from rfkernels.data.images import ImageFolder, load_image_folder
from rfkernels.data.load import DATASETS, load_dataset
from rfkernels.data.order import block_order
from rfkernels.data.prefetch import Prefetch
from rfkernels.data.shards import TarShards
from rfkernels.data.toys import ToyStream, toy

__all__ = [
    "DATASETS",
    "EMOJI_CLASSES",
    "Data",
    "Dataset",
    "HuggingFaceData",
    "HuggingFaceStream",
    "ImageFolder",
    "OrderedData",
    "Prefetch",
    "Rows",
    "Subset",
    "TarShards",
    "ToyStream",
    "as_dataset",
    "block_order",
    "caption_conditioned",
    "caption_vectors",
    "digits",
    "emoji",
    "epoch_order",
    "find_emoji_font",
    "from_huggingface",
    "load_arrays",
    "load_dataset",
    "load_huggingface",
    "load_image_folder",
    "mnist",
    "part_order",
    "split",
    "split_rows",
    "toy",
]
