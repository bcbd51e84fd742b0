"""Settings of the benchmarks' tests: each test module imports from its FOLDERS, as the scripts do that lie there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def benchmarks(request: pytest.FixtureRequest) -> Iterator[None]:
    """The FOLDERS of the test module on the path; what was imported from them leaves with the test module.

    Names like `tables` and `rows` stand in several of these folders."""
    folders, before = request.module.FOLDERS, set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(str(folder))
        yield
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        # A folder without a file of its own is a module too: benchmarks/ops.
        places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
        if any(Path(place).is_relative_to(folder) for place in places for folder in folders):
            del sys.modules[name]
