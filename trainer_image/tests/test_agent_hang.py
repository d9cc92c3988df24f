"""Ranks that stand still are found, named with their stacks, and ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepseek_operator.core.model import WorkerError
from deepseek_trainer.agent.dumps import DumpFolder
from deepseek_trainer.agent.reports import WorkerReport
from deepseek_trainer.agent.stacks import Dump, suspects
from deepseek_trainer.agent.standstill import FLOOR_S, STEP_FLOOR_S, RankProgress
from dstrain_api import constants as names
from dstrain_api.protocol import HANG

from .gang import UID, Gang, wait_for

HANG_S = 3.0


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    folder = tmp_path_factory.mktemp("gang")
    made = Gang(
        folder,
        slots=3,
        **{names.ENV_HANG_TIMEOUT: str(HANG_S), names.ENV_CHECKPOINT_DIR: str(folder)},
    )
    yield made
    made.close()


def hung(gang: Gang, kind: str, slot: int) -> WorkerError:
    """The one report of a hang that this slot's process is made to have."""
    gang.steps(generation=1)
    before = gang.former.generation
    (gang.folder / f"{kind}-{slot}").touch()
    wait_for(lambda: gang.coordinator.snapshot(UID).errors, lambda: gang.log(slot))
    errors = gang.coordinator.snapshot(UID).errors  # gone with the next generation
    gang.steps(before + 1)
    assert [(e.generation, e.fingerprint) for e in errors] == [(before, HANG)]
    return errors[0]


def test_a_rank_that_never_comes_to_the_collective_is_named_with_its_place(gang: Gang) -> None:
    error = hung(gang, "sleep", 1)
    assert (error.pod, error.exit_code, error.step > 0) == ("gang-1-2", -signal.SIGKILL, True)
    first, *stack = error.message.splitlines()
    assert first.startswith("rank 1 (pod gang-1-2, node ) stands still: no progress for ")
    assert f"in section step after step {error.step}" in first
    assert stack[0].endswith(" in hang")
    assert error.message in gang.log(1)
    stacks = {path.name: path.read_text() for path in Path(error.stacks).iterdir()}
    assert sorted(stacks) == [f"gang-{slot}-{slot + 1}-{slot}.txt" for slot in range(3)]
    assert "all_reduce" in stacks["gang-0-1-0.txt"]
    assert " in hang" in stacks["gang-1-2-1.txt"]


def test_a_stopped_rank_is_named(gang: Gang) -> None:
    error = hung(gang, "stop", 2)
    assert error.message.startswith("rank 2 (pod gang-2-3, node ) is stopped by a signal")


def test_a_rank_that_holds_the_interpreters_lock_is_named_with_its_place(gang: Gang) -> None:
    error = hung(gang, "spin", 0)
    assert error.message.startswith("rank 0 (pod gang-0-1, node ) stands still")
    assert error.message.splitlines()[1].endswith(" in hang")


# How long is too long.


def stepping(every_s: float, steps: int = 10, *, sections: bool = True) -> RankProgress:
    progress = RankProgress()
    progress.begin(1, 0.0)
    if sections:
        progress.heard(WorkerReport(section="init"), 0.0)
    for step in range(steps):
        progress.heard(WorkerReport(rank_step=step + 1), step * every_s)
    return progress


@pytest.mark.parametrize(
    ("every_s", "sections", "limit_s"),
    [(0.1, True, STEP_FLOOR_S), (20.0, True, 100.0), (0.1, False, FLOOR_S), (200.0, False, 1000.0)],
)
def test_five_steps_time_is_too_long_but_never_less_than_a_floor(
    every_s: float, sections: bool, limit_s: float
) -> None:
    progress = stepping(every_s, sections=sections)
    last_s = 9 * every_s
    assert not progress.standstills(last_s + limit_s - 1)
    standing = progress.standstills(last_s + limit_s + 1)
    assert [(s.local_rank, s.section, s.step) for s in standing] == [(0, "step", 10)]


def test_the_first_step_and_other_sections_may_take_longer_and_are_learned() -> None:
    progress = RankProgress(hang_timeout_s=5.0)
    progress.begin(1, 0.0)
    progress.heard(WorkerReport(section="init"), 0.0)
    assert not progress.standstills(FLOOR_S - 1)
    progress.heard(WorkerReport(rank_step=1), 300.0)
    assert progress.limit_s("init") == 1500.0
    progress.heard(WorkerReport(section="evaluation"), 301.0)
    assert not progress.standstills(400.0)
    progress.heard(WorkerReport(section="step"), 401.0)
    assert progress.standstills(407.0)


def test_reports_of_several_steps_at_once_are_shared_among_them() -> None:
    progress = RankProgress()
    progress.begin(1, 0.0)
    progress.heard(WorkerReport(section="init"), 0.0)
    progress.heard(WorkerReport(rank_step=1), 1.0)
    progress.heard(WorkerReport(rank_step=11), 301.0)
    assert progress.limit_s("step") == 150.0


def test_a_program_that_says_nothing_never_hangs() -> None:
    progress = RankProgress(hang_timeout_s=1.0)
    progress.begin(2, 0.0)
    assert not progress.standstills(1e6)


def test_a_finished_rank_is_not_waited_for() -> None:
    progress = stepping(0.1)
    progress.heard(WorkerReport(done=True), 1.0)
    assert not progress.standstills(1e6)


# Who keeps the others waiting.


def dump(rank: int, *frames: str, state: str = "S") -> Dump:
    lines = "\n".join(f'  File "{file}", line 1 in f' for file in frames)
    other = 'Thread 0x1 (most recent call first):\n  File "other.py", line 1 in run\n\n'
    stacks = f"{other}Current thread 0x2 (most recent call first):\n{lines}\n"
    return Dump(rank=rank, state=state, stacks=stacks if frames else "")


WAIT = ("/lib/torch/_ops.py", "/lib/torch/distributed/distributed_c10d.py", "train.py")
ITEM = ("train.py", "loop.py")  # a wait for a device


@pytest.mark.parametrize(
    ("dumps", "world", "ranks"),
    [
        ([dump(0, *WAIT), dump(1, "data.py", "train.py"), dump(2, *WAIT)], 3, [1]),
        ([dump(0, *WAIT), dump(1, *WAIT, state="T")], 2, [1]),
        ([dump(0, "data.py")], 3, [0]),
        ([dump(0, *WAIT)], 3, []),
        ([dump(0, *WAIT), dump(1, *WAIT)], 2, []),
        ([dump(0, *ITEM), dump(1, *ITEM), dump(2, "data.py", "loop.py")], 3, [2]),
        ([dump(0, "a.py"), dump(1, "b.py")], 2, []),
        ([dump(0, *WAIT), dump(1)], 2, [1]),
    ],
)
def test_the_rank_that_does_not_wait_is_suspected(
    dumps: list[Dump], world: int, ranks: list[int]
) -> None:
    assert [d.rank for d in suspects(dumps, world=world)] == ranks


def test_the_stacks_of_the_newest_generations_are_kept(tmp_path: Path) -> None:
    dumps = DumpFolder(tmp_path)
    for generation in range(7, 13):
        dumps.put(generation, "a-0.txt", f"of {generation}".encode())
    dumps.prune()
    kept = sorted(int(path.name) for path in Path(dumps.place(7)).parent.iterdir())
    assert kept == [8, 9, 10, 11, 12]
    assert dumps.texts(8) == ["of 8"]
    assert dumps.texts(7) == []
