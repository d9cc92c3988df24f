"""kopf as the host of the watch of trainings. A handler only passes on what it sees.

kopf's change handlers, indices and daemons are not used: they write to the objects, or miss
deletions. With none of them, what kopf keeps for them need not be computed either: that halves its
cost per event.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import kopf
from dstrain_api.constants import GROUP, PLURAL, VERSION

STOP_TIMEOUT_S: Final = 2.0

log = logging.getLogger(__name__)

Sink = Callable[[dict[str, Any]], None]


class _NoDiffs(kopf.DiffBaseStorage):
    """There are no handlers of differences."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        return


class _NoProgress(kopf.ProgressStorage):
    """There are no handlers that go on after a restart."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return

    def purge(self, **_: Any) -> None:
        return

    def touch(self, **_: Any) -> None:
        return

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def registry(*, changed: Sink, deleted: Sink) -> kopf.OperatorRegistry:
    """The handlers: `changed` and `deleted` get the object of each event."""
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made)
    def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_via_client(**kwargs)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=made)
    async def pass_on(event: kopf.RawEvent, **_: Any) -> None:
        sink = deleted if event["type"] == "DELETED" else changed
        sink(dict(event["object"]))

    return made


def settings() -> kopf.OperatorSettings:
    """How kopf runs: it lists and watches one resource, and writes nothing."""
    made = kopf.OperatorSettings()
    made.scanning.disabled = True
    made.peering.standalone = True
    made.posting.enabled = False
    made.networking.request_timeout = 30
    made.networking.connect_timeout = 5
    made.networking.error_backoffs = (1, 2, 3, *[5] * 100)  # after an outage, soon back
    made.watching.chunk_size = 500
    made.persistence.diffbase_storage = _NoDiffs()
    made.persistence.progress_storage = _NoProgress()
    return made


class KopfThread:
    """kopf in its own thread and loop, so that what it cancels at its end is only its own."""

    def __init__(self, namespaces: Sequence[str], registry: kopf.OperatorRegistry) -> None:
        self._ended = asyncio.Event()
        self._namespaces = namespaces
        self._registry = registry
        self._owner = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        # kopf would wait for a threading.Event in a thread of its own, and that for ever.
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    async def ended_within(self, limit_s: float) -> bool:
        """Wait for its end, but not for longer than this; whether it has ended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), limit_s)
        return self._ended.is_set()

    async def stop(self) -> None:
        """Stop watching. It has nothing to lose, so it is not waited for long."""
        with suppress(RuntimeError):  # its loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        await self.ended_within(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._host())
        except Exception:
            log.exception("the watch of trainings ended")
        with suppress(RuntimeError):  # the owner's loop is closed: the process ends
            self._owner.call_soon_threadsafe(self._ended.set)

    async def _host(self) -> None:
        await kopf.operator(
            registry=self._registry,
            settings=settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
