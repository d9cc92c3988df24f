"""What the operator keeps of trainings that are gone: nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from deepseek_operator.runtime.coordinator import RETIRED_SILENCE_S

from benchmarks.soak_operator import Fleet

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LIVES = 200
AT_ONCE = 10


def test_after_200_trainings_that_came_and_went_every_table_is_as_it_was(
    run_in_fake_time: Run,
) -> None:
    async def main() -> None:
        fleet = Fleet(random.Random(7), clock=asyncio.get_running_loop().time)
        working = asyncio.create_task(fleet.controller.run())
        await asyncio.sleep(5)
        before = fleet.tables()

        async def live(first: int) -> None:
            for number in range(first, LIVES, AT_ONCE):
                await fleet.live(f"t{number}")

        await asyncio.gather(*(live(first) for first in range(AT_ONCE)))
        assert fleet.ended.total() == LIVES
        assert len(fleet.ended) == 4, "every kind of life was lived"
        await asyncio.sleep(2 * RETIRED_SILENCE_S)  # until no pod can still want to save
        assert fleet.tables() == before
        fleet.controller.stop()
        await working

    run_in_fake_time(main())
