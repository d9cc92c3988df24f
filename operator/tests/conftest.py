"""A clock that jumps: coroutines that wait for minutes run in no time, in the right order.

Makes the modules that tests share importable, too.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a time, makes it that time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1_000_000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing is ready and no timer runs: this waits for ever")
        if not ready:
            self.now_s += max(timeout or 0.0, 0.0)
        return ready


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


@pytest.fixture
def run_in_fake_time() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine in a loop whose time jumps to the next timer when nothing is ready."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
            return runner.run(main)

    return run
