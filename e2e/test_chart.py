"""Install, upgrade and uninstall of the chart on the real cluster, as its README says."""

from __future__ import annotations

from typing import Any

import yaml

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.conftest import MakeTraining


def values(cluster: Cluster) -> str:
    return install.helm(
        cluster, "get", "values", install.RELEASE, "-n", install.NAMESPACE, "-o", "yaml"
    )


def test_an_upgrade_rolls_the_operator_and_leaves_a_training_alone(
    make_training: MakeTraining, cluster: Cluster, operator: install.Release
) -> None:
    training = make_training("upgraded")
    training.apply()
    training.wait_step(3, 180)
    before, uids = operator.pod(), {p["metadata"]["uid"] for p in training.live_pods()}
    arguments = ["upgrade", install.RELEASE, str(install.CHART), "-n", install.NAMESPACE, "--wait"]
    install.helm(cluster, *arguments, "--reuse-values", "--set", "podAnnotations.upgraded=yes")
    after = operator.pod()
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    generation = training.seen[-1].status["generation"]
    training.wait_step(training.seen[-1].step + 10, 120)
    assert training.seen[-1].status["generation"] == generation
    assert {p["metadata"]["uid"] for p in training.live_pods()} == uids


def test_trainings_survive_an_uninstall_and_go_on_after_a_new_install(
    make_training: MakeTraining, cluster: Cluster, operator: install.Release
) -> None:
    training = make_training("orphan", training={"total": {"tokens": 307_200}})
    training.apply()
    training.wait_step(3, 180)
    kept = cluster.kubectl("get", "crd", "deepseektrainings.dstrain.dev", "-o", "name")
    images = _images(cluster)
    install.helm(cluster, "uninstall", install.RELEASE, "-n", install.NAMESPACE, "--wait")
    try:
        assert cluster.kubectl("get", "crd", "deepseektrainings.dstrain.dev", "-o", "name") == kept
        assert training.kubectl("get", "dst", "orphan", "-o", "name").strip()
    finally:
        install.helm_install(cluster, images)
    training.wait_complete(300)


def _images(cluster: Cluster) -> dict[str, str]:
    found: dict[str, Any] = yaml.safe_load(values(cluster))
    operator, trainer = found["image"], found["trainer"]["image"]
    return {
        "operator": f"{operator['repository']}:{operator['tag']}",
        "trainer": f"{trainer['repository']}:{trainer['tag']}",
    }
