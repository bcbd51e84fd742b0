"""Settings of the solver tests: their helper module is importable, and they run on one thread, since their
tensors are tiny and threads would only wait for each other."""

import sys
from pathlib import Path

import pytest
import torch

# Tests are imported one by one (importlib mode), so a folder's own helpers need its path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def x0():
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
