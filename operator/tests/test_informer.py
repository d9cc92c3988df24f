"""The informer against scripted lists and watches, in fake time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from deepseek_operator.kube.port import PODS, ClusterError, Gone, Page, WatchEvent
from deepseek_operator.runtime.informer import Informer

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Step = WatchEvent | Exception | float


def pod(name: str, version: int, phase: str = "Running") -> dict[str, Any]:
    return {
        "metadata": {"namespace": "ns", "name": name, "resourceVersion": str(version)},
        "phase": phase,
    }


def event(kind: Any, name: str, version: int, phase: str = "Running") -> WatchEvent:
    return WatchEvent(kind, pod(name, version, phase))


class ScriptedCluster:
    """Each list and watch follows the next line of its script; a further watch stays open."""

    def __init__(self) -> None:
        self.lists: list[list[Page] | Exception] = []
        self.watches: list[list[Step]] = []
        self.watched_from: list[str] = []

    async def list_pages(self, _resource: Any, **_where: Any) -> AsyncIterator[Page]:
        script = self.lists.pop(0)
        if isinstance(script, Exception):
            raise script
        for page in script:
            yield page

    async def watch(
        self, _resource: Any, *, resource_version: str, **_where: Any
    ) -> AsyncIterator[WatchEvent]:
        self.watched_from.append(resource_version)
        if not self.watches:
            await asyncio.sleep(1e6)
        for step in self.watches.pop(0):
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


class Watched:
    def __init__(self) -> None:
        self.cluster = ScriptedCluster()
        self.changes: list[tuple[str | None, str | None]] = []
        self.informer: Informer[str] = Informer(
            self.cluster,  # type: ignore[arg-type]
            PODS,
            narrow=lambda stored: None if stored["phase"] == "alien" else stored["phase"],
            on_change=lambda before, after: self.changes.append((before, after)),
            jitter=lambda: 1.0,
        )

    async def run_for(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.informer.run(), seconds)

    @property
    def held(self) -> dict[str, str]:
        return {name: view for (_ns, name), view in self.informer.items.items()}


def test_lists_all_pages_then_follows_changes(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1), pod("b", 2)], "0"), Page([pod("c", 3)], "7")]]
        w.cluster.watches = [
            [event("MODIFIED", "a", 8, "Failed"), event("DELETED", "b", 9), event("ADDED", "d", 10)]
        ]
        await w.run_for(0.1)
        assert w.held == {"a": "Failed", "c": "Running", "d": "Running"}
        assert w.informer.synced
        assert w.cluster.watched_from[0] == "7"
        assert w.changes[3:] == [("Running", "Failed"), ("Running", None), (None, "Running")]

    run_in_fake_time(main())


def test_change_that_the_view_does_not_show_is_no_change(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1)], "1")]]
        w.cluster.watches = [[event("MODIFIED", "a", 2), event("ADDED", "x", 3, "alien")]]
        await w.run_for(0.1)
        assert w.changes == [(None, "Running")]
        assert w.held == {"a": "Running"}

    run_in_fake_time(main())


def test_stream_that_ends_is_taken_up_where_it_ended_without_a_list(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1)], "1")]]
        bookmark = WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": "20"}})
        w.cluster.watches = [[event("ADDED", "b", 5), bookmark, 300.0]]
        await w.run_for(400)
        assert w.cluster.watched_from == ["1", "20"]

    run_in_fake_time(main())


def test_pod_deleted_while_nobody_watched_is_told_as_vanished(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [
            [Page([pod("a", 1), pod("b", 2)], "2")],
            [Page([pod("b", 2)], "50")],
        ]
        w.cluster.watches = [[Gone("too old")]]
        await w.run_for(10)
        assert w.changes[-1] == ("Running", None)
        assert w.held == {"b": "Running"}
        assert w.cluster.watched_from == ["2", "50"]

    run_in_fake_time(main())


def test_unreachable_server_is_asked_again_with_growing_pauses(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [ClusterError("refused")] * 40
        task = asyncio.create_task(w.informer.run())
        await asyncio.sleep(60)
        assert not w.informer.synced
        assert w.informer.lost_s > 59
        assert 5 < 40 - len(w.cluster.lists) < 12
        task.cancel()

    run_in_fake_time(main())


def test_contact_is_lost_only_until_the_next_event(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1)], "1")]]
        bookmark = WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": "2"}})
        w.cluster.watches = [[ClusterError("reset")], [ClusterError("reset")], [bookmark, 1000.0]]
        task = asyncio.create_task(w.informer.run())
        await asyncio.sleep(0.75)
        assert w.informer.lost_s > 0
        assert w.informer.synced
        await asyncio.sleep(2)
        assert w.informer.lost_s == 0
        assert w.cluster.watched_from == ["1", "1", "1"]
        task.cancel()

    run_in_fake_time(main())


def test_after_an_outage_all_is_listed_before_anything_is_believed(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1)], "1")], [Page([pod("a", 9, "Failed")], "9")]]
        w.cluster.watches = [[ClusterError("refused")] for _ in range(5)]
        task = asyncio.create_task(w.informer.run())
        await asyncio.sleep(7)  # 0.5 + 1 + 2 + 4 s between five tries
        assert w.informer.lost_s > 0
        await asyncio.sleep(9)
        assert (w.held, w.informer.lost_s) == ({"a": "Failed"}, 0)
        assert w.cluster.watched_from == ["1", "1", "1", "1", "1", "9"]
        task.cancel()

    run_in_fake_time(main())


def test_history_that_is_gone_is_made_up_for_at_once(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([pod("a", 1)], "1")], [Page([pod("a", 9, "Failed")], "9")]]
        w.cluster.watches = [[60.0, Gone("too old")]]
        task = asyncio.create_task(w.informer.run())
        await asyncio.sleep(60.01)
        assert w.held == {"a": "Failed"}
        task.cancel()

    run_in_fake_time(main())


def test_stream_that_ends_at_once_again_and_again_is_not_a_busy_loop(run_in_fake_time: Run) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([], "1")]]
        w.cluster.watches = [[] for _ in range(100)]
        await w.run_for(60)
        assert len(w.cluster.watched_from) < 12

    run_in_fake_time(main())


def test_created_object_is_known_before_its_event_but_not_after_its_deletion(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        w = Watched()
        w.cluster.lists = [[Page([], "10")]]
        w.cluster.watches = [[1.0, event("ADDED", "b", 20), event("DELETED", "b", 21), 1000.0]]
        task = asyncio.create_task(w.informer.run())
        await asyncio.sleep(0.5)
        w.informer.expect(pod("a", 11))
        assert w.held == {"a": "Running"}
        await asyncio.sleep(1)
        w.informer.expect(pod("b", 20))
        assert w.held == {"a": "Running"}, "the watch has told of its deletion already"
        task.cancel()

    run_in_fake_time(main())
