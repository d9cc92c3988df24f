"""Slow ranks: found by their own work, and only when it lasts."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from deepseek_trainer import reporting, stragglers
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.stragglers import Straggler, Stragglers
from dstrain_api.constants import ENV_CHECKPOINT_DIR

from .examples import config
from .ranks import answers, start


def after(rounds: list[list[float]]) -> list[Straggler]:
    """What is found when each round has ten steps of these times by rank."""
    watch = Stragglers()
    watch.step([1.0] * len(rounds[0]), 0.0)
    for number, ranks_s in enumerate(rounds):
        for step in range(1, 11):
            watch.step(ranks_s, 10.0 * number + step)
    return watch.worst


EVEN, SLOW = [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 2.0, 1.0]


def test_a_rank_that_is_slow_in_five_rounds_is_named_with_its_ratio() -> None:
    assert after([SLOW] * 4) == []
    assert after([EVEN] * 3 + [SLOW] * 5) == [Straggler(rank=2, ratio=2.0)]


def test_of_two_ranks_the_slower_one_is_named() -> None:
    assert after([[1.6, 1.0]] * 5) == [Straggler(rank=0, ratio=1.6)]


def test_one_rank_alone_is_never_slow() -> None:
    assert after([[3.0]] * 9) == []


def test_a_round_without_work_says_nothing() -> None:
    assert after([[0.0, 0.0]] * 9) == []


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param([EVEN] * 20, id="even"),
        pytest.param([[1.0, 1.4, 0.9, 1.0]] * 20, id="a little"),
        pytest.param(([SLOW] * 4 + [EVEN]) * 4, id="not all the time"),
        pytest.param([[1.0, 1.1, 1.0, 9.0], [9.0, 1.1, 1.0, 1.0]] * 10, id="in turns"),
    ],
)
def test_noise_names_nobody(rounds: list[list[float]]) -> None:
    assert after(rounds) == []


def test_it_stays_named_until_five_rounds_are_good() -> None:
    assert after([SLOW] * 5 + [EVEN] * 2 + [SLOW] + [EVEN] * 4) == [Straggler(rank=2, ratio=0.9)]
    assert after([SLOW] * 5 + [EVEN] * 5) == []


def test_of_many_the_slowest_are_named() -> None:
    found = after([[1.0] * 13 + [2.0 + i for i in range(12)]] * 5)
    assert [slow.rank for slow in found] == [*range(24, 16, -1)]


HEALTHY_S = 6.0  # more than five short rounds
PATIENCE_S = 60.0


def train(folder: Path) -> list[tuple[float, list[int]]]:
    """Train with short rounds until a rank is named; when that was, and which one."""
    stragglers.ROUND_S = 1.0  # type: ignore[misc]
    os.environ[ENV_CHECKPOINT_DIR] = str(folder)
    stop, named, ends_s = StopFlag(), [], time.time() + PATIENCE_S

    def noted(**said: Any) -> None:
        if said["stragglers"]:
            named.append((time.time(), [*said["stragglers"]]))
        stop.raised = bool(named) or time.time() > ends_s

    reporting.report = noted
    Trainer(config(steps=100_000, every_steps=10_000), join_world(), stop).run()
    return named


@contextmanager
def stopped_most_of_the_time(pid: int) -> Iterator[None]:
    over = Event()

    def hold_up() -> None:
        while not over.wait(0.001):  # so often that every kind of work is held up in every round
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.006)
            os.kill(pid, signal.SIGCONT)

    thread = Thread(target=hold_up)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_rank_whose_process_is_held_up_is_named_and_nobody_before(tmp_path: Path) -> None:
    started = start(3, train, tmp_path)
    first, second = started[0][1], started[1][0]
    assert not first.poll(HEALTHY_S)
    began_s = time.time()
    with stopped_most_of_the_time(second.pid or 0):
        first.poll(PATIENCE_S)
    [(at_s, ranks), *_] = answers(started)[0]
    assert ranks == [1]
    assert at_s > began_s
