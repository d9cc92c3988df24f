"""Time as the operator uses it."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch that never run backwards, whatever happens to the system's clock."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s


def backoff_s(failures: int, *, first_s: float, last_s: float, jitter: float) -> float:
    """How long to wait after so many failures in a row, from 1: doubling, from first to last.

    `jitter`, in [0, 1), lets 50 to 100 % of it be waited for.
    """
    full_s = min(last_s, first_s * 2.0 ** min(failures - 1, 32))
    return full_s * (0.5 + 0.5 * jitter)
