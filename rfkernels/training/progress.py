"""Progress bars with loss and time to go, on the standard error stream."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar"]

# Seconds. An update costs some 20 us, a step of a small network not much more than a millisecond.
_REFRESH = 0.2


class Bar:
    """One bar, as a context; with `show=False` it does nothing."""

    def __init__(self, title: str, total: int, *, start: int = 0, show: bool = True) -> None:
        self._show, self._position, self._shown_at = show, start, 0.0
        if not show:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        if self._show:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._show:
            self._progress.update(self._task, completed=self._position)
            self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Moves the bar on."""
        self._position += count
        if self._show and time.monotonic() - self._shown_at > _REFRESH:
            self._shown_at = time.monotonic()
            self._progress.update(self._task, completed=self._position)

    def note(self, text: str) -> None:
        """The words beside the bar, such as the loss."""
        if self._show:
            self._progress.update(self._task, note=text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._show:
            self._progress.console.print(text, highlight=False)
