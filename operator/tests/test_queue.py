"""The keyed queue, in fake time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from deepseek_operator.runtime.queue import KeyedQueue

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def make() -> KeyedQueue[str]:
    return KeyedQueue(jitter=lambda: 1.0)


def test_key_added_twice_is_given_once(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        for key in ("a", "b", "a"):
            queue.add(key)
        assert len(queue) == 2
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert len(queue) == 0

    run_in_fake_time(main())


def test_key_added_while_worked_on_comes_back_after_that(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        queue.add("a")
        await queue.get()
        queue.add("a")
        assert len(queue) == 0, "no two workers hold one key"
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert len(queue) == 0

    run_in_fake_time(main())


def test_waiting_worker_wakes_for_a_new_key(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        workers = [asyncio.create_task(queue.get()) for _ in range(2)]
        await asyncio.sleep(1)
        queue.add("a")
        queue.add("b")
        assert sorted(str(k) for k in await asyncio.gather(*workers)) == ["a", "b"]

    run_in_fake_time(main())


def test_of_several_delays_the_earliest_counts(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        started_s = asyncio.get_running_loop().time()
        for delay_s in (5, 2, 9):
            queue.add_after("a", delay_s)
        await queue.get()
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(2)
        queue.done("a")
        await asyncio.sleep(20)
        assert len(queue) == 0

    run_in_fake_time(main())


def test_backoff_doubles_from_half_a_second_to_five_minutes_and_begins_anew(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        queue = make()
        delays_s = []
        for _ in range(12):
            delays_s.append(queue.retry("a"))
            await queue.get()
            queue.done("a")
        assert delays_s[:4] == [0.5, 1, 2, 4]
        assert delays_s[-1] == 300
        queue.succeeded("a")
        assert queue.retry("a") == 0.5

    run_in_fake_time(main())


def test_jitter_shortens_a_backoff_to_no_less_than_half(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue: KeyedQueue[str] = KeyedQueue(jitter=lambda: 0.0)
        assert queue.retry("a") == 0.25

    run_in_fake_time(main())


def test_discarded_key_does_not_come_back_by_its_timer(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        queue.add_after("a", 1)
        queue.discard("a")
        await asyncio.sleep(5)
        assert len(queue) == 0

    run_in_fake_time(main())


def test_closed_queue_lets_workers_go_and_takes_nothing(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        worker = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.close()
        queue.add("a")
        assert await worker is None
        assert await queue.get() is None

    run_in_fake_time(main())


def test_age_is_that_of_the_oldest_key_waiting_or_worked_on(run_in_fake_time: Run) -> None:
    async def main() -> None:
        queue = make()
        assert queue.age_s == 0
        queue.add("a")
        await asyncio.sleep(3)
        assert queue.age_s == pytest.approx(3)
        await queue.get()
        await asyncio.sleep(2)
        assert queue.age_s == pytest.approx(2)

    run_in_fake_time(main())
