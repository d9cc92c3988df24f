"""One training in gangs of several sizes: the same samples, the same loss."""

from __future__ import annotations

import pytest

from e2e import install, soak
from e2e.clusters.interface import Cluster
from e2e.conftest import UNDISTURBED_STEPS, UndisturbedRun
from e2e.faults.cluster import ClusterStage
from e2e.faults.drive import Version, injected
from e2e.faults.plan import Fault, Moment
from e2e.report import Report
from e2e.training import Training
from e2e.undisturbed import Losses

ELASTIC = {"minReplicas": 1, "maxReplicas": 4, "scaleUpSnooze": "1s"}
WORKERS = {"replicas": 4, "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
PATIENCE_S = 180.0


def test_the_size_of_the_gang_does_not_change_the_loss(
    cluster: Cluster,
    operator: install.Release,
    namespace: str,
    undisturbed: UndisturbedRun,
    report: Report,
) -> None:
    manifest = soak.manifest("elastic", UNDISTURBED_STEPS, workers=WORKERS, elastic=ELASTIC)
    training = Training(cluster, manifest, namespace)
    stage = ClusterStage(cluster, training, operator)
    training.apply()
    training.wait("a commit by 4", lambda s: _size(s.status) == 4 and _committed(s.status), 180)

    for size in (2, 3, 4):
        scaled = stage.begun()
        training.kubectl("scale", "dst/elastic", f"--replicas={size}")
        seconds = stage.recovered(scaled, f"kubectl scale to {size}", PATIENCE_S)
        report.time(f"elastic: kubectl scale to {size}, first new step", seconds)
        assert _size(training.seen[-1].status) == size
        _steps_on(training)

    slot = stage.slot_away_from_the_operator()
    node = stage.node_of(slot)
    injection = injected(stage, Fault(at=Moment(seconds=0), kind="power-off", slot=slot))
    seconds = stage.recovered(injection, "power-off", 120)
    report.time("elastic: power-off to first new step of a smaller gang", seconds)
    _steps_on(training)
    training.delete()
    training.close()
    cluster.power_on(node)
    cluster.wait_ready(node)

    told, expected = _told(stage.versions()), undisturbed.result()
    assert len(told) >= 8, "a curve, not a point"
    sizes = {_size(version.status) for version in stage.versions()}
    assert sizes >= {2, 3, 4}, "every size has its part of the curve"
    assert told == pytest.approx({step: expected[step] for step in told}, abs=1e-3)


def _told(versions: list[Version]) -> Losses:
    """Nats per token by step, for those steps that the status has told of."""
    told = [v.status.get("progress", {}) for v in versions]
    return {p["step"]: float(p["loss"]) for p in told if p.get("loss") is not None}


def _steps_on(training: Training) -> None:
    training.wait_step(training.seen[-1].step + 20, PATIENCE_S)


def _size(status: dict[str, object]) -> int:
    """Workers in a generation that makes steps."""
    workers = status.get("workers")
    ready = int(workers["ready"]) if isinstance(workers, dict) else 0
    return ready if status.get("phase") == "Running" else 0


def _committed(status: dict[str, object]) -> bool:
    return bool(status.get("checkpoint"))
