"""One real cluster for the whole run, with the real images and the real chart."""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import install, soak
from e2e.clusters.interface import Cluster
from e2e.clusters.providers import choose
from e2e.report import Report
from e2e.training import Training
from e2e.undisturbed import Losses, begun

ROOT = Path(__file__).resolve().parent.parent
UNDISTURBED_STEPS = 600  # three minutes of a cluster on two cores
NODES = 4  # two workers, a spare for a lost node, and one where the operator can stay


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    """Times of this run; written to runs/e2e when it ends, however it ends."""
    written = Report("e2e")
    yield written
    written.write(ROOT / "runs" / "e2e")


@pytest.fixture(scope="session")
def cluster(report: Report) -> Iterator[Cluster]:
    """A cluster of this run's own.

    E2E_KEEP=1 leaves it up for a look afterwards; E2E_CLUSTER names one that is up already.
    """
    name = os.environ.get("E2E_CLUSTER", "e2e")
    made = choose(name)
    if not made.is_up():
        with report.phase("cluster up"):
            made.up(NODES)
    yield made
    if not os.environ.get("E2E_KEEP"):
        made.down()


@pytest.fixture(scope="session")
def operator(cluster: Cluster, report: Report) -> install.Release:
    """The chart, installed with images built from this checkout."""
    with report.phase("images"):
        images = install.build_and_load(cluster)
    with report.phase("helm install"):
        return install.helm_install(cluster, images)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    with a_namespace(cluster) as name:
        yield name


@contextmanager
def a_namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of a new name for the block."""
    name = f"test-{uuid.uuid4().hex[:6]}"
    cluster.kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


UndisturbedRun = Future[Losses]


@pytest.fixture(scope="session", autouse=True)
def background(request: pytest.FixtureRequest) -> Iterator[UndisturbedRun | None]:
    """The undisturbed run begins with the session, in what time the first tests leave."""
    if not any("undisturbed" in getattr(i, "fixturenames", ()) for i in request.session.items):
        yield None
        return
    with begun(soak.manifest("undisturbed", UNDISTURBED_STEPS)) as losses:
        yield losses


@pytest.fixture
def undisturbed(background: UndisturbedRun) -> UndisturbedRun:
    """Losses of the training of `e2e.soak` that nothing happens to, of UNDISTURBED_STEPS; perhaps
    not at its end yet.
    """
    return background


MakeTraining = Callable[..., Training]


@pytest.fixture
def make_training(
    cluster: Cluster, operator: install.Release, namespace: str
) -> Iterator[MakeTraining]:
    """Make trainings from examples/mini.yaml, partly replaced; they are gone after the test."""
    with trainings(cluster, namespace) as make:
        yield make


@contextmanager
def trainings(cluster: Cluster, namespace: str) -> Iterator[MakeTraining]:
    """What `make_training` gives, for the block."""
    made: list[Training] = []

    def make(name: str, **spec: Any) -> Training:
        manifest = yaml.safe_load((ROOT / "examples" / "mini.yaml").read_text())
        manifest["metadata"] = {"name": name}
        manifest["spec"] = merged(manifest["spec"], spec)
        training = Training(cluster, manifest, namespace)
        made.append(training)
        return training

    try:
        yield make
    finally:
        for training in made:
            training.delete()
            training.close()


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; None removes a field."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]
