"""JSON files that are whole or absent, whoever else writes the same one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["write_json_whole"]


def write_json_whole(file: Path, value: Any) -> None:
    """Replaces a JSON file atomically.

    Unlike the run folder's writer it draws the temporary name: the processes of many machines, which
    may share process numbers, build the same index at once.

    Raises:
        OSError: it cannot be written.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, separators=(",", ":"), allow_nan=False)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    finally:
        Path(temporary).unlink(missing_ok=True)
