"""What the images hold, asked of the nodes and of containers that run from them."""

from __future__ import annotations

import json

import pytest

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.conftest import MakeTraining

LARGEST_OPERATOR_BYTES = 350_000_000
WHICH = "import importlib.util as u; print(*(m for m in {!r} if u.find_spec(m)))"


def modules(cluster: Cluster, namespace: str, pod: str, names: tuple[str, ...]) -> list[str]:
    """Those of the modules that the pod's image has."""
    command = ("-n", namespace, "exec", pod, "--", "python3", "-c", WHICH.format(names))
    return cluster.kubectl(*command).split()


def test_the_operator_image_is_small_and_has_no_torch(
    cluster: Cluster, operator: install.Release
) -> None:
    pod = operator.pod()
    name, image = pod["metadata"]["name"], pod["spec"]["containers"][0]["image"]
    asked = ("torch", "pip", "hatchling", "kopf")
    assert modules(cluster, operator.namespace, name, asked) == ["kopf"]
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    sizes = [i["sizeBytes"] for n in nodes for i in n["status"]["images"] if image in i["names"]]
    assert sizes
    assert max(sizes) < LARGEST_OPERATOR_BYTES


def test_the_trainer_image_has_no_client_of_kubernetes(
    make_training: MakeTraining, cluster: Cluster, namespace: str
) -> None:
    training = make_training("inside")
    training.apply()
    training.wait("pods", lambda s: s.is_true("Running"), 120)
    pod = training.live_pods()[0]["metadata"]["name"]
    asked = ("kopf", "kubernetes", "fastapi", "pip", "torch")
    assert modules(cluster, namespace, pod, asked) == ["torch"]
    user = cluster.kubectl("-n", namespace, "exec", pod, "--", "id", "-u").strip()
    assert user != "0"


@pytest.mark.parametrize("program", ["gcc", "make", "pip"])
def test_the_operator_image_has_no_tool_to_build_with(
    program: str, cluster: Cluster, operator: install.Release
) -> None:
    name = operator.pod()["metadata"]["name"]
    which = f"import shutil; print(shutil.which({program!r}))"
    found = cluster.kubectl("-n", operator.namespace, "exec", name, "--", "python3", "-c", which)
    assert found.strip() == "None"
