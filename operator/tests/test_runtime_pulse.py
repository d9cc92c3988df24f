"""The pulse of a real event loop."""

from __future__ import annotations

import asyncio
import threading
import time

from deepseek_operator.runtime.pulse import Pulse


def test_blocked_loop_is_seen_from_another_thread_while_it_is_blocked() -> None:
    pulse = Pulse(every_s=0.01, on_beat=lambda _lag_s: None)
    seen: list[float] = []
    blocked, observed = threading.Event(), threading.Event()

    def observe() -> None:
        assert blocked.wait(10)
        while pulse.late_s < 0.1:
            time.sleep(0.01)
        seen.append(pulse.late_s)
        observed.set()

    async def main() -> None:
        task = asyncio.create_task(pulse.run())
        await asyncio.sleep(0.05)
        blocked.set()
        observed.wait(10)  # blocks the loop on purpose
        task.cancel()

    watcher = threading.Thread(target=observe)
    watcher.start()
    asyncio.run(main())
    watcher.join()
    assert seen[0] >= 0.1


def test_each_beat_tells_its_lag_and_a_stopped_pulse_is_not_late() -> None:
    async def main() -> None:
        lag_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        pulse = Pulse(every_s=0.01, on_beat=lambda lag: lag_s.done() or lag_s.set_result(lag))
        task = asyncio.create_task(pulse.run())
        assert 0 <= await lag_s < 10
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert pulse.late_s == 0

    asyncio.run(main())
