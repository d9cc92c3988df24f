"""Five minutes of random faults: the training completes with the loss of the undisturbed run."""

from __future__ import annotations

import time

import pytest

from e2e import install, soak
from e2e.clusters.interface import Cluster
from e2e.report import Report

OPTIONS = soak.Options(minutes=5.0, mean_seconds=45.0, seed=int(time.time()))


@pytest.mark.timeout(2400)
def test_random_faults_do_not_change_the_result(
    cluster: Cluster, operator: install.Release, namespace: str, report: Report
) -> None:
    result = soak.run(cluster, operator, namespace, OPTIONS)
    report.text(f"soak, seed {OPTIONS.seed}", result.text())
    assert result.passed, f"seed {OPTIONS.seed}\n{result.text()}"
