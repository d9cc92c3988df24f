"""Which training is looked at next: the semantics of client-go's work queue, in one event loop.

A key that is added while it waits is there once. A key that is added while it is being worked on
comes back when that is done, so no two workers ever hold the same key and no change is missed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from deepseek_operator.runtime.clock import backoff_s

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 300.0

K = TypeVar("K", bound=Hashable)


class KeyedQueue(Generic[K]):
    """Keys waiting for a worker, first come, first served.

    `jitter` gives a number in [0, 1): a retry waits for 50 to 100 % of its back-off.
    """

    def __init__(self, *, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._order: deque[K] = deque()
        self._dirty: dict[K, float] = {}  # to be worked on, since when (loop time)
        self._processing: dict[K, float] = {}  # being worked on, since when
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._news = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._order)

    @property
    def age_s(self) -> float:
        """How long the oldest key has been waiting or worked on."""
        now_s = asyncio.get_running_loop().time()
        since = [self._dirty[self._order[0]]] if self._order else []
        return now_s - min([*since, *self._processing.values()], default=now_s)

    def add(self, key: K) -> None:
        """Have the key worked on soon."""
        if self._closed or key in self._dirty:
            return
        self._dirty[key] = asyncio.get_running_loop().time()
        if key not in self._processing:
            self._enqueue(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Have the key worked on in `delay_s`; of several times the earliest counts."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + max(0.0, delay_s)
        pending = self._timers.get(key)
        if self._closed or (pending and pending.when() <= due_s):
            return
        if pending:
            pending.cancel()
        self._timers[key] = loop.call_at(due_s, self._fire, key)

    def retry(self, key: K) -> float:
        """Have a key that failed worked on again after its back-off; return that, in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay_s = backoff_s(
            failures, first_s=FIRST_RETRY_S, last_s=LAST_RETRY_S, jitter=self._jitter()
        )
        self.add_after(key, delay_s)
        return delay_s

    def succeeded(self, key: K) -> None:
        """Let the back-off of the key begin anew."""
        self._failures.pop(key, None)

    def discard(self, key: K) -> None:
        """Forget timers and failures of a key that is gone."""
        self._failures.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer:
            timer.cancel()

    async def get(self) -> K | None:
        """Take the next key, to be given to `done` afterwards; None once the queue is closed."""
        while not self._closed:
            if self._order:
                key = self._order.popleft()
                del self._dirty[key]
                self._processing[key] = asyncio.get_running_loop().time()
                return key
            self._news.clear()
            await self._news.wait()
        return None

    def done(self, key: K) -> None:
        """Say that the work on a key has ended."""
        del self._processing[key]
        if key in self._dirty:
            self._enqueue(key)

    def close(self) -> None:
        """Take nothing more and give nothing more out."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._news.set()

    def _enqueue(self, key: K) -> None:
        self._order.append(key)
        self._news.set()

    def _fire(self, key: K) -> None:
        del self._timers[key]
        self.add(key)
