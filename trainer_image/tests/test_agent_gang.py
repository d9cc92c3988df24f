"""Three pods' agents as torchrun starts them, a real coordinator on loopback, and faults."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepseek_trainer.agent.handler import EXIT_FENCED

from .gang import PATIENCE_S, UID, Gang, wait_for


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    made = Gang(tmp_path_factory.mktemp("gang"), slots=3)
    yield made
    made.close()


def test_three_pods_form_a_generation_in_the_order_of_their_slots(gang: Gang) -> None:
    gang.steps(generation=1)
    said = [gang.last(slot) for slot in range(3)]
    assert [(s["rank"], s["world"], s["sum"]) for s in said] == [(0, 3, 3), (1, 3, 3), (2, 3, 3)]


def test_progress_of_rank_zero_reaches_the_coordinator(gang: Gang) -> None:
    gang.steps(generation=1)
    wait_for(lambda: gang.coordinator.snapshot(UID).progress, lambda: gang.log(0))
    progress = gang.coordinator.snapshot(UID).progress
    assert progress
    assert (progress.tokens, progress.resumed_step) == (progress.step * 100, 0)


def test_worker_processes_have_a_folder_of_their_pod_and_know_how_often_it_fails(
    gang: Gang,
) -> None:
    gang.steps(generation=1)
    folders = {Path(gang.last(slot)["local"]) for slot in range(3)}
    assert len([folder for folder in folders if folder.is_dir()]) == 3
    assert gang.last(0)["failures"] == "0"
    assert gang.last(0)["preflight"] == "1"


def test_a_killed_worker_costs_a_generation_and_no_pod(gang: Gang) -> None:
    gang.steps(generation=1)
    before, pods = gang.former.generation, [a.pid for a in gang.agents.values()]
    folder = gang.last(1)["local"]
    os.kill(int(gang.last(1)["pid"]), signal.SIGKILL)
    wait_for(lambda: gang.coordinator.snapshot(UID).errors, lambda: gang.log(1))
    errors = gang.coordinator.snapshot(UID).errors
    gang.steps(before + 1)
    assert [(e.pod, e.exit_code) for e in errors] == [("gang-1-2", -signal.SIGKILL)]
    assert gang.last(1)["local"] == folder
    assert [a.pid for a in gang.agents.values()] == pods


def test_a_script_that_raises_is_reported_with_its_traceback_and_its_peers_are_not(
    gang: Gang,
) -> None:
    gang.steps(generation=1)
    before = gang.former.generation
    (gang.folder / "raise-2").touch()
    wait_for(
        lambda: [e for e in gang.coordinator.snapshot(UID).errors if e.generation == before],
        lambda: gang.log(2),
    )
    errors = gang.coordinator.snapshot(UID).errors
    gang.steps(before + 1)
    assert [e.pod for e in errors] == ["gang-2-3"]
    assert errors[0].message.startswith("Traceback (most recent call last):")
    assert errors[0].message.endswith("ValueError: slot 2 met a bad sample")
    assert "ValueError: slot 2 met a bad sample" in gang.log(2)  # it is in the pod's log as well


def test_a_coordinator_that_starts_anew_stops_no_step(gang: Gang) -> None:
    gang.steps(generation=1)
    before = gang.former.generation
    gang.down()
    paused = gang.last(0)["step"]
    wait_for(lambda: gang.last(0)["step"] > paused + 20, lambda: gang.log(0))
    gang.up(wanted=3, generation=before)
    wait_for(lambda: gang.coordinator.snapshot(UID).membership, lambda: gang.log(0))
    wait_for(lambda: gang.coordinator.snapshot(UID).progress, lambda: gang.log(0))
    resumed = gang.last(0)
    assert (resumed["generation"], resumed["step"] > paused) == (before, True)


def test_a_lost_pod_is_replaced_and_the_others_stay(gang: Gang) -> None:
    gang.steps(generation=1)
    before, pods = gang.former.generation, [gang.agents[slot].pid for slot in (1, 2)]
    gang.former.wanted = 2
    gang.kill_pod(0)
    gang.steps(before + 1, slots=(1, 2))
    smaller = gang.last(1)
    gang.start(0)
    gang.former.wanted = 3
    gang.steps(int(smaller["generation"]) + 1)
    assert (smaller["rank"], smaller["world"]) == (0, 2)
    assert gang.last(0)["world"] == 3
    assert [gang.agents[slot].pid for slot in (1, 2)] == pods


def test_a_replaced_pod_kills_its_worker_and_exits(gang: Gang) -> None:
    gang.steps(generation=1)
    before, worker = gang.former.generation, int(gang.last(1)["pid"])
    gang.former.wanted = 2
    gang.coordinator.fence(UID, ("pod-1-2",))
    code = gang.agents.pop(1).wait(PATIENCE_S)
    gang.steps(before + 1, slots=(0, 2))
    assert code == EXIT_FENCED, gang.log(1)
    assert not Path(f"/proc/{worker}").exists()


def test_a_finished_gang_exits_with_zero_and_says_so(gang: Gang) -> None:
    gang.steps(generation=1, slots=(0, 2))
    (gang.folder / "finish").touch()
    codes = [agent.wait(PATIENCE_S) for agent in gang.agents.values()]
    seen = gang.coordinator.snapshot(UID)
    assert codes == [0, 0], gang.log(0)
    assert not Path(gang.last(0)["local"]).exists()
    assert seen.done
    assert {m.state for m in seen.members if not m.pod.endswith("-0-1")} == {"done"}
