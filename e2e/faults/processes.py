"""Training processes among others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def ranks(processes: Iterable[int]) -> list[int]:
    """Those that train; the agent gives them a name of their own."""
    return [process for process in processes if _name(process).startswith("dstrain-rank")]


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return ""  # it has just ended
