"""The networks of these tests are so small that a second thread only costs; one thread also fixes
their bits."""

import sys
from pathlib import Path

import pytest
import torch

# Tests are imported one by one (importlib mode), so a folder's own helpers need its path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
