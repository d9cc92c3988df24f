"""Injects a plan's faults at their moments. The same on every stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from e2e.faults.plan import Fault, FaultPlan, Kind, Moment

POLL_S = 0.05
Status = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """The training's status as it was seen at `at_s` of its stage's clock."""

    at_s: float
    status: Status


@dataclass(frozen=True)
class Injection:
    """A fault as it happened, and the newest generation at that time."""

    fault: Fault
    at_s: float
    generation: int


class Stage(Protocol):
    """Where a training runs and can be disturbed."""

    def now_s(self) -> float:
        """Its clock."""

    def wait(self) -> None:
        """Let a little time pass."""

    def versions(self) -> list[Version]:
        """Every status seen so far, oldest first."""

    def inject(self, fault: Fault) -> float:
        """Do it; when it happened."""

    def repair(self, fault: Fault, node: str) -> None:
        """End a fault that lasts."""

    def node_of(self, slot: int) -> str:
        """Node of the living pod in a slot; empty if there is none now."""


class RealTime:
    """For a stage whose training runs by itself: this machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wait(self) -> None:
        time.sleep(POLL_S)


def injected(stage: Stage, fault: Fault) -> Injection:
    """Inject a fault now, whatever its moment."""
    generation = int(stage.versions()[-1].status.get("generation", 0))
    return Injection(fault, stage.inject(fault), generation)


LASTING: frozenset[Kind] = frozenset({"power-off", "partition"})


def drive(plan: FaultPlan, stage: Stage) -> list[Injection]:
    """Inject every fault, in order, until the training has finished; what was injected.

    A fault whose slot has no living pod waits for one. Nodes are repaired after their time, all of
    them before this returns.
    """
    done: list[Injection] = []
    repairs: list[tuple[float, Fault, str]] = []
    began_s: float | None = None
    try:
        for fault in plan.faults:
            while not _due(fault.at, stage, began_s) or not stage.node_of(fault.slot):
                if _finished(stage.versions()):
                    return done
                if began_s is None and _running(stage.versions()):
                    began_s = stage.now_s()
                _repair(stage, repairs)
                stage.wait()
            node = stage.node_of(fault.slot)
            done.append(injected(stage, fault))
            if fault.kind in LASTING:
                repairs.append((done[-1].at_s + fault.lasts_seconds, fault, node))
    finally:
        while repairs:
            stage.wait()
            _repair(stage, repairs)
    return done


def _repair(stage: Stage, repairs: list[tuple[float, Fault, str]]) -> None:
    """What has lasted for long enough."""
    for due in [r for r in repairs if r[0] <= stage.now_s()]:
        stage.repair(*due[1:])
        repairs.remove(due)


def _due(at: Moment, stage: Stage, began_s: float | None) -> bool:
    if began_s is None:
        return False
    if at.seconds is not None:
        return stage.now_s() >= began_s + at.seconds
    status = stage.versions()[-1].status
    if at.step is not None:
        return int(status.get("progress", {}).get("step", 0)) >= at.step
    return any(entry["reason"] == at.event for entry in status.get("history", []))


def _running(versions: list[Version]) -> bool:
    return any(v.status.get("phase") == "Running" for v in versions[-3:])


def _finished(versions: list[Version]) -> bool:
    return bool(versions) and versions[-1].status.get("phase") in ("Complete", "Failed")
