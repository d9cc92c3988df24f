"""Install, upgrade and uninstall of the chart on the real cluster, as its README says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.shell import run
from e2e.conftest import MakeTraining, a_namespace, trainings
from e2e.training import Training


@pytest.fixture(scope="module")
def running(cluster: Cluster, operator: install.Release) -> Iterator[Training]:
    """A training that goes on for longer than these tests."""
    with a_namespace(cluster) as namespace, trainings(cluster, namespace) as make:
        training = make("running", training={"total": {"tokens": 10_000_000}})
        training.apply()
        training.wait_step(3, 180)
        yield training


def pod_uids(training: Training) -> set[str]:
    return {p["metadata"]["uid"] for p in training.live_pods()}


def values(cluster: Cluster) -> str:
    return install.helm(
        cluster, "get", "values", install.RELEASE, "-n", install.NAMESPACE, "-o", "yaml"
    )


def images_of(cluster: Cluster) -> dict[str, str]:
    found: dict[str, Any] = yaml.safe_load(values(cluster))
    operator, trainer = found["image"], found["trainer"]["image"]
    return {
        "operator": f"{operator['repository']}:{operator['tag']}",
        "trainer": f"{trainer['repository']}:{trainer['tag']}",
    }


def test_with_a_certificate_of_its_own_ca_workers_speak_tls_to_the_operator(
    make_training: MakeTraining, cluster: Cluster, operator: install.Release, tmp_path: Path
) -> None:
    service = f"{install.RELEASE}-deepseek-operator.{install.NAMESPACE}.svc"
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-subj", "/CN=dstrain", "-addext", f"subjectAltName=DNS:{service}"),
        *("-keyout", key, "-out", certificate),
    )
    secret = ["secret", "generic", "own-ca", f"--from-file=tls.crt={certificate}"]
    secret += [f"--from-file=tls.key={key}", f"--from-file=ca.crt={certificate}"]
    cluster.kubectl("-n", install.NAMESPACE, "create", *secret)
    images = images_of(cluster)
    try:
        values = ("--set", "tls.secretName=own-ca", "--set", "tls.caKey=ca.crt")
        install.helm_install(cluster, images, *values)
        training = make_training("secret", training={"total": {"tokens": 20_480}})
        training.apply()
        finished = training.wait_complete(300)
        assert finished.status["checkpoint"]["step"] == finished.status["progress"]["totalSteps"]
        url = ["--", "python3", "-c", "import os; print(os.environ['DSTRAIN_COORDINATOR_URL'])"]
        pod = operator.pod()["metadata"]["name"]
        assert cluster.kubectl("-n", install.NAMESPACE, "exec", pod, *url).startswith("https://")
    finally:
        install.helm_install(cluster, images)
        cluster.kubectl("-n", install.NAMESPACE, "delete", "secret", "own-ca")


def test_an_upgrade_rolls_the_operator_and_leaves_a_training_alone(
    running: Training, cluster: Cluster, operator: install.Release
) -> None:
    before, uids = operator.pod(), pod_uids(running)
    arguments = ["upgrade", install.RELEASE, str(install.CHART), "-n", install.NAMESPACE, "--wait"]
    install.helm(cluster, *arguments, "--reuse-values", "--set", "podAnnotations.upgraded=yes")
    after = operator.pod()
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    generation = running.seen[-1].status["generation"]
    running.wait_step(running.seen[-1].step + 10, 120)
    assert running.seen[-1].status["generation"] == generation
    assert pod_uids(running) == uids


def test_trainings_survive_an_uninstall_and_go_on_after_a_new_install(
    running: Training, cluster: Cluster
) -> None:
    uids = pod_uids(running)
    kept = cluster.kubectl("get", "crd", "deepseektrainings.dstrain.dev", "-o", "name")
    images = images_of(cluster)
    install.helm(cluster, "uninstall", install.RELEASE, "-n", install.NAMESPACE, "--wait")
    try:
        assert cluster.kubectl("get", "crd", "deepseektrainings.dstrain.dev", "-o", "name") == kept
        assert running.kubectl("get", "dst", "running", "-o", "name").strip()
    finally:
        install.helm_install(cluster, images)
    running.wait_step(running.seen[-1].step + 10, 120)
    assert pod_uids(running) == uids
