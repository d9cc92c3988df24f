"""One updating line with events above it on a terminal; plain lines anywhere else."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

PLAIN_INTERVAL_S = 5.0
_CLEAR = "\r\x1b[2K"
_COLOURS = {"Running": 32, "Complete": 32, "Failed": 31, "Recovering": 33, "Warning": 33}


class Terminal:
    """Where a run is shown. Colours stay away with NO_COLOR (https://no-color.org)."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = self._live and not os.environ.get("NO_COLOR")
        self._line = ""
        self._next_plain_s = 0.0

    def progress(self, line: str, phase: str) -> None:
        """Show how far it is, in place of what was shown before."""
        if line == self._line:
            return
        changed = not self._line.startswith(phase)
        self._line = line
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write(_CLEAR + self._coloured(line[:width], phase))
        elif changed or time.monotonic() >= self._next_plain_s:
            self._next_plain_s = time.monotonic() + PLAIN_INTERVAL_S
            self._write(line + "\n")

    def say(self, text: str, tone: str = "") -> None:
        """Print lines that stay."""
        if not self._live:
            self._write(text + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        again = self._coloured(self._line[:width], self._line.split(" ")[0]) if self._line else ""
        self._write(f"{_CLEAR}{self._coloured(text, tone)}\n{again}")

    def finish(self) -> None:
        """Leave the progress line behind."""
        if self._live and self._line:
            self._write("\n")
        self._line = ""

    def _coloured(self, text: str, tone: str) -> str:
        colour = _COLOURS.get(tone)
        if not (colour and self._colours):
            return text
        head, rest = (tone, text[len(tone) :]) if text.startswith(tone) else (text, "")
        return f"\x1b[{colour}m{head}\x1b[0m{rest}"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
