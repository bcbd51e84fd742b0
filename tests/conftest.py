"""Settings for the whole suite: Triton's interpreter where there is no GPU, and one place that names the devices."""

from __future__ import annotations

import os

import torch

# Triton reads this once, at its import; without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
