"""A run folder: config.json, metrics.jsonl, checkpoints/, pairs/, samples/, one writer's lock."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfkernels.training.files import read_json, write_json
from rfkernels.training.processes import agreed, on_first

try:
    import fcntl
except ImportError:  # Windows: a run is not guarded against a second writer
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "read_config"]

FORMAT = 1
# Options that do not change the weights, so that a resumed run may have others.
FREE = frozenset(
    {
        "checkpoint_every",
        "holdout_every",
        "keep_checkpoints",
        "log_every",
        "num_threads",
        "parallel",
        "sample_every",
        "sample_steps",
        "tensorboard",
    }
)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: config.json cannot be read, or is of another format.
    """
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; the runs in it are {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"run: {folder} holds no run (no config.json){hint}")
    description = read_json(file)
    if description.get("format") != FORMAT:
        raise ValueError(f"{file}: must be of format {FORMAT}; got {description.get('format')!r}")
    missing = sorted({"kind", "model", "sample_shape", "config"} - description.keys())
    if missing:
        raise ValueError(f"{file}: must say {', '.join(missing)}; it does not")
    return description


def _difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first entry in which two descriptions differ, among those that change the weights."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if key in FREE:
                continue
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else f"{where} is {old!r} in the run and {new!r} now"


class RunFolder:
    """The folder of one run, locked for this process until `close`."""

    def __init__(self, folder: str | Path, description: Mapping[str, Any], *, resume: bool) -> None:
        """Opens the folder for a run that is described by `description` (JSON values).

        Of several processes that train together, the first one writes it and holds the lock.

        Raises:
            FileExistsError: it holds a run already and `resume` is false, or holds something else.
            ValueError: `resume`, and the run in it is described differently.
            BlockingIOError: another process is writing it.
            OSError: it cannot be written.
        """
        self.path = Path(folder)
        self.checkpoints = self.path / "checkpoints"
        self.pairs = self.path / "pairs"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"
        self._lock: int | None = None
        self.resumed = False
        on_first(lambda: self._open(description, resume))
        self.resumed = bool(agreed(int(self.resumed)))

    def _open(self, description: Mapping[str, Any], resume: bool) -> None:
        # As JSON gives it back (tuples become lists), so that it compares with what is on the disk.
        described = json.loads(json.dumps({"format": FORMAT, **description}))
        self.resumed = self._check(described, resume)
        self._lock = self._acquire()
        try:
            # Looked at again under the lock: another process may have begun a run in between.
            self.resumed = self._check(described, resume)
            if not self.resumed:
                write_json(self.path / "config.json", described)
        except BaseException:
            self.close()
            raise

    def _check(self, described: dict[str, Any], resume: bool) -> bool:
        """Whether there is a run to resume; refuses what must not be overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"run: {self.path} is a file, not a folder")
        if (self.path / "config.json").exists():
            if not resume:
                raise FileExistsError(
                    f"run: {self.path} holds a run already; give another folder, "
                    "or resume=True to go on with it"
                )
            found = _difference(read_config(self.path), described)
            if found:
                raise ValueError(f"resume: {self.path} was begun with other options: {found}")
            return True
        # A process killed before it wrote config.json leaves hidden files and nothing else.
        if self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise FileExistsError(
                f"run: {self.path} is not empty and holds no run; give another folder"
            )
        return False

    def _acquire(self) -> int | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return None
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise type(error)(
                error.errno, f"run: cannot write to {self.path} ({error.strerror})"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(f"run: another process is writing {self.path}") from None
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                return None  # a file system without locks
            raise
        return handle

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
