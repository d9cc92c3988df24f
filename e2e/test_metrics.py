"""A real Prometheus scrapes a real run; every panel of the dashboard has something to draw."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from dstrain_api.constants import COORDINATOR_PORT, METRICS_PORT

from dashboards.training import TRAINING
from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.netns import NetnsCluster
from e2e.clusters.shell import wait_until
from e2e.conftest import MakeTraining
from e2e.prometheus import Prometheus, check_metrics, operator_job, workers_job
from e2e.questions import unanswered

INTERVAL_S = 1.0
WINDOW_S = 60.0
OPERATOR_LABELS = {"app.kubernetes.io/name": "deepseek-operator"}


def test_every_panel_of_the_dashboard_has_data_of_a_real_run(
    make_training: MakeTraining,
    cluster: Cluster,
    operator: install.Release,
    namespace: str,
    tmp_path: Path,
) -> None:
    if not isinstance(cluster, NetnsCluster):
        pytest.skip("the pods of this cluster have no route from here")
    training = make_training("watched")
    kubeconfig = cluster.kubeconfig
    jobs = [workers_job(kubeconfig), operator_job(kubeconfig, OPERATOR_LABELS, COORDINATOR_PORT)]
    with Prometheus(tmp_path, jobs, interval_s=INTERVAL_S) as server:
        training.apply()
        training.wait("a commit", lambda s: bool(s.status.get("checkpoint")), 240)
        server.wait_scraped(3)
        choice = {"namespace": namespace, "training": "watched"}

        def silent() -> list[str]:
            found = unanswered(server, TRAINING, choice, window_s=WINDOW_S, interval_s=INTERVAL_S)
            return [str(question) for question in found if not question.may_be_empty]

        wait_until(lambda: not silent(), "data for every panel", timeout_s=60)
        for pod in training.live_pods():
            check_metrics(exposition(pod["status"]["podIP"], METRICS_PORT))
        check_metrics(exposition(operator.pod()["status"]["podIP"], COORDINATOR_PORT))


def exposition(address: str, port: int) -> str:
    return httpx.get(f"http://{address}:{port}/metrics", timeout=10).raise_for_status().text
