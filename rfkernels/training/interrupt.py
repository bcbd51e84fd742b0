"""Ctrl-C between steps: the first lets the loop finish its step, a second stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["InterruptGuard"]


class InterruptGuard:
    """Context in which SIGINT only sets `requested`, so that weights and their average are never
    half-updated.

    Outside the main thread, or where the program handles SIGINT itself, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._active = False

    def __enter__(self) -> InterruptGuard:
        ours = threading.current_thread() is threading.main_thread()
        self._active = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._active:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
