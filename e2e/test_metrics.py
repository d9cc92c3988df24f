"""What a training tells a real Prometheus while it runs on the cluster."""

from __future__ import annotations

from pathlib import Path

from dstrain_api.constants import COORDINATOR_PORT, METRICS_PORT
from dstrain_api.metrics import GPU_NAMES

from dashboards.training import TRAINING
from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.shell import ClusterError, wait_until
from e2e.conftest import MakeTraining
from e2e.discovery import cluster_jobs
from e2e.prometheus import Prometheus, check_metrics
from e2e.questions import Question, ask, questions

INTERVAL_S = 1.0
# These nodes have no GPU, and nothing fails in this run.
SILENT = {"MFU", "Mean recovery time", "Rendezvous time"}


def answers_here(question: Question) -> bool:
    of_gpus = any(name in question.query.expression for name in GPU_NAMES)
    return not of_gpus and question.panel.title not in SILENT


def exposed(cluster: Cluster, namespace: str, pod: str, port: int) -> str:
    """What a pod answers on /metrics."""
    return cluster.kubectl(
        "get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/metrics"
    )


def test_every_panel_has_data_while_a_training_runs(
    cluster: Cluster,
    operator: install.Release,
    namespace: str,
    make_training: MakeTraining,
    tmp_path: Path,
) -> None:
    training = make_training("metered")
    chosen = {"namespace": namespace, "training": training.name}
    open_questions = [q for q in questions(TRAINING) if answers_here(q)]

    with cluster_jobs(cluster) as jobs, Prometheus(tmp_path, jobs, interval_s=INTERVAL_S) as server:
        training.apply()
        training.wait_step(1, 120)

        def all_answered() -> bool:
            open_questions[:] = [
                q
                for q in open_questions
                if not ask(server, q, chosen, window_s=120, interval_s=INTERVAL_S)
            ]
            return not open_questions

        try:
            wait_until(all_answered, "data in every panel", timeout_s=120, interval_s=1)
        except ClusterError as e:
            silent = "\n".join(map(str, open_questions))
            raise AssertionError(f"{e}; no answer to:\n{silent}\n{training.story()}") from e

        for pod in training.live_pods():
            check_metrics(exposed(cluster, namespace, pod["metadata"]["name"], METRICS_PORT))
        name = operator.pod()["metadata"]["name"]
        check_metrics(exposed(cluster, operator.namespace, name, COORDINATOR_PORT))
