"""Files that are whole or absent, whoever else writes the same one: written beside their place, flushed, renamed into it.

`read_json_kept` and `write_json_whole` are for what can be made again and is kept because that takes long: the index of
a data set, the grid of a model.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

__all__ = ["read_json_kept", "write_json_whole", "write_whole"]


def write_whole(file: Path, content: bytes) -> None:
    """Replaces a file atomically.

    The temporary name is drawn at random: processes on several machines may have the same number.

    Raises:
        OSError: it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_json_kept(file: Path | None, key: str, value: Any) -> dict[str, Any] | None:
    """The object in a file if its entry `key` is `value`; None where the file is absent, torn, or
    kept for something else."""
    if file is None or not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return kept if isinstance(kept, dict) and kept.get(key) == value else None


def write_json_whole(file: Path, value: Any) -> None:
    """Replaces a JSON file atomically; a number that is not finite is refused.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(file, json.dumps(value, separators=(",", ":"), allow_nan=False).encode())
