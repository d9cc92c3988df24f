"""Five minutes of random faults: the training completes with the loss of the undisturbed run."""

from __future__ import annotations

import time

from e2e import install, soak
from e2e.clusters.interface import Cluster
from e2e.conftest import UNDISTURBED_STEPS, UndisturbedRun
from e2e.report import Report
from e2e.training import Training

OPTIONS = soak.Options(minutes=5.0, mean_seconds=45.0, seed=int(time.time()))


def test_random_faults_do_not_change_the_result(
    cluster: Cluster,
    operator: install.Release,
    namespace: str,
    undisturbed: UndisturbedRun,
    report: Report,
) -> None:
    training = Training(cluster, soak.manifest("soak", UNDISTURBED_STEPS), namespace)
    result = soak.soak(training, operator, soak.plan(OPTIONS), undisturbed)
    report.text(f"soak, seed {OPTIONS.seed}", result.text())
    assert result.passed, f"seed {OPTIONS.seed}\n{result.text()}"
