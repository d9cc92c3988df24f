"""Half an hour of random faults, drawn as for the soak on a real cluster, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
from sim_promises import Promises
from sim_stage import WorldStage
from sim_world import HEARTBEAT_TIMEOUT_S, World

from e2e.faults.drive import drive
from e2e.faults.recoveries import recovery_s
from e2e.soak import UNLIMITED, WORKERS, Options, plan

SPEC: dict[str, Any] = {
    "entrypoint": {"module": "program"},
    "workers": {"replicas": WORKERS},
    "recovery": {
        "heartbeatTimeout": f"{HEARTBEAT_TIMEOUT_S:g}s",
        "budgets": {"infrastructure": UNLIMITED, "application": UNLIMITED},
    },
}
LIMIT_S = 20.0  # the contract's for a lost node; agents here start and load in no time
APART_S = 45.0  # as long as a node may be away: nearer faults are one trouble


@pytest.mark.parametrize("seed", range(10))
def test_every_fault_of_half_an_hour_is_recovered_from(seed: int) -> None:
    world = World(SPEC, nodes=5)
    promises = Promises(world)
    promises.faults.update(infrastructure=1000, application=1000)  # counted by the histories
    stage = WorldStage(world)
    faults = plan(Options(minutes=30, mean_seconds=60, seed=seed))
    injections = drive(faults, stage)
    assert len(injections) == len(faults.faults)
    for _ in range(200):
        stage.wait()
    promises.check()
    assert stage.versions()[-1].status["phase"] == "Running"
    for injection in injections:
        alone = all(i is injection or abs(i.at_s - injection.at_s) > APART_S for i in injections)
        cost_s = recovery_s(injection, stage.versions())
        if injection.fault.kind != "kill-operator":
            assert cost_s is not None, injection
            assert cost_s <= LIMIT_S or not alone, injection
        elif alone:
            soon = [v for v in stage.versions() if 0 <= v.at_s - injection.at_s <= LIMIT_S]
            assert {v.status["phase"] for v in soon} <= {"Running"}, injection
