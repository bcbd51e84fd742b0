"""Files that are whole or absent, whoever else writes the same one: written beside their place, flushed, renamed into it.

`read_json_kept` and `write_json_whole` are for what can be made again and is kept because that takes long: the index of
a data set, the grid of a model.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json_kept", "replacing", "write_json_whole", "write_whole"]


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A place to write to, hidden beside the file, which takes the file's place if nothing is raised.

    Its name is drawn at random: processes on several machines may have the same number.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        handle = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(file)
    except OSError as error:
        # The hidden name means nothing to whoever asked for the file.
        if error.filename == str(temporary):
            error.filename = str(file)
            del error.filename2  # None would be told as a second name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Replaces a file atomically.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(file) as temporary:
        temporary.write_bytes(content)


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
