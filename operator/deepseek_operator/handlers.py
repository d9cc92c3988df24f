"""kopf as the host of the watch of trainings. A handler only passes on what it sees.

kopf's change handlers, indices and daemons are not used: they write to the objects, or miss
deletions. With none of them, what kopf keeps for them need not be computed either: that halves its
cost per event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf
from dstrain_api.constants import GROUP, PLURAL, VERSION

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
