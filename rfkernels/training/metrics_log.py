"""metrics.jsonl: one JSON object a line, each with its `step`; TensorBoard events where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rfkernels.training.files import write_lines

__all__ = ["MetricsLog", "read_metrics", "tensorboard_wanted"]


def read_metrics(file: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file; a line that a killed process left unfinished ends it.

    Args:
        file: metrics.jsonl; a missing one has no lines.
        up_to: leave out lines of later steps.
    """
    entries: list[dict[str, Any]] = []
    if not file.is_file():
        return entries
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(entry, dict) or "step" not in entry:
            break
        if up_to is None or entry["step"] <= up_to:
            entries.append(entry)
    return entries


def tensorboard_wanted(asked: bool | None) -> bool:
    """What was asked for, or, where nothing was, whether tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None if asked is None else asked


def _tensorboard_writer(folder: Path, resume_at: int) -> Any:
    """A SummaryWriter into `folder` that hides what a resumed run will write again."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_at + 1)


class MetricsLog:
    """Keeps metrics in `entries` and, unless it is None, in `file`.

    Lines of steps after `resume_at` are dropped: the resumed run writes them again.
    """

    def __init__(
        self, file: Path | None, *, resume_at: int = 0, tensorboard: Path | None = None
    ) -> None:
        self.entries = [] if file is None else read_metrics(file, up_to=resume_at)
        if file is not None and file.exists():
            write_lines(file, [json.dumps(entry) + "\n" for entry in self.entries])
        self._stream = None if file is None else file.open("a", encoding="utf-8")
        self._writer = None if tensorboard is None else _tensorboard_writer(tensorboard, resume_at)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step."""
        entry: dict[str, Any] = {"step": step, **values}
        self.entries.append(entry)
        if self._stream is not None:
            try:
                self._stream.write(json.dumps(entry) + "\n")
                self._stream.flush()
            except OSError as error:
                raise OSError(
                    error.errno, f"cannot write {self._stream.name} ({error.strerror})"
                ) from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._writer is not None:
            self._writer.close()
