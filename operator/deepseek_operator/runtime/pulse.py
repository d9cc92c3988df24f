"""Whether the event loop still turns: a blocked one is the typical disease of such a program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Pulse:
    """Calls `on_beat(lag_s)` every `every_s`; `late_s` may be asked from any thread."""

    def __init__(self, *, every_s: float, on_beat: Callable[[float], None]) -> None:
        self._every_s = every_s
        self._on_beat = on_beat
        self._due_s: float | None = None

    @property
    def late_s(self) -> float:
        """By how much the next beat is overdue."""
        return max(0.0, time.monotonic() - self._due_s) if self._due_s is not None else 0.0

    async def run(self) -> None:
        """Beat until cancelled."""
        try:
            while True:
                self._due_s = time.monotonic() + self._every_s
                await asyncio.sleep(self._every_s)
                self._on_beat(self.late_s)
        finally:
            self._due_s = None
