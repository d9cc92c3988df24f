"""One training in gangs of several sizes: the same samples, the same loss."""

from __future__ import annotations

import time

import pytest

from e2e import install, soak
from e2e.clusters.interface import Cluster
from e2e.conftest import Undisturbed
from e2e.faults.cluster import ClusterStage
from e2e.faults.drive import injected
from e2e.faults.plan import Fault, Moment
from e2e.report import Report
from e2e.training import Training

ELASTIC = {"minReplicas": 1, "maxReplicas": 4, "scaleUpSnooze": "1s"}
WORKERS = {"replicas": 4, "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}}
PATIENCE_S = 180.0


def test_the_size_of_the_gang_does_not_change_the_loss(
    cluster: Cluster,
    operator: install.Release,
    namespace: str,
    undisturbed: Undisturbed,
    report: Report,
) -> None:
    manifest = soak.manifest("elastic", undisturbed.steps, workers=WORKERS, elastic=ELASTIC)
    training = Training(cluster, manifest, namespace)
    stage = ClusterStage(cluster, training, operator)
    training.apply()
    training.wait("a commit by 4", lambda s: _size(s.status) == 4 and _committed(s.status), 180)

    for size in (2, 3, 4):
        training.kubectl("scale", "dst/elastic", f"--replicas={size}")
        at_s = time.monotonic()
        training.wait(f"{size} workers", lambda s, n=size: _size(s.status) == n, PATIENCE_S)  # type: ignore[misc]
        report.time(f"elastic: kubectl scale to {size}, all in", time.monotonic() - at_s)
        training.wait_step(training.seen[-1].step + 30, PATIENCE_S)

    node = stage.node_of(3)
    injection = injected(stage, Fault(at=Moment(seconds=0), kind="power-off", slot=3))
    seconds = stage.recovered(injection, "power-off", 120)
    report.time("elastic: power-off to first new step of a smaller gang", seconds)
    cluster.power_on(node)
    finished = training.wait_complete(300)
    training.close()
    assert finished.status["progress"]["loss"] == pytest.approx(undisturbed.loss, abs=1e-3)


def _size(status: dict[str, object]) -> int:
    """Workers in a generation that makes steps."""
    workers = status.get("workers")
    ready = int(workers["ready"]) if isinstance(workers, dict) else 0
    return ready if status.get("phase") == "Running" else 0


def _committed(status: dict[str, object]) -> bool:
    return bool(status.get("checkpoint"))
