"""Settings of the op tests: their helper modules are importable, and property tests draw the same examples every time."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests are imported one by one (importlib mode), so a folder's own helpers need its path.
sys.path.insert(0, str(Path(__file__).parent))

hypothesis.settings.register_profile(
    "ops",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("ops")


@pytest.fixture
def threads():
    """Sets torch's thread count for one test: ``threads(2)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_small_handover(monkeypatch):
    """The automatic choice without the rule that hands small calls, and slow machines' calls, over to PyTorch."""
    from rfkernels.ops import _attention_early as early
    from rfkernels.ops import _attention_handover as rule

    before = dict(rule.SMALL)
    monkeypatch.setattr(rule, "_slow_level", lambda scheme: None)
    rule.SMALL.clear()
    early.forget()
    yield
    rule.SMALL.update(before)
    early.forget()
