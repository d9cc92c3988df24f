"""Faults of the operator itself, and of what it depends on, with a real API server.

Operators are processes of this machine; there are no nodes, so that nothing but the operator
decides what happens. e2e/test_scenarios.py has the same on a whole cluster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.apiserver import ApiServer, api_server
from e2e.clusters import programs
from e2e.clusters.shell import wait_until
from e2e.operators import OperatorProcess, destinations, lease, prepare
from e2e.report import Report

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Times of this run; written to runs/operator-faults when it ends."""
    written = Report("operator-faults")
    yield written
    written.write(ROOT / "runs" / "operator-faults")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("api"), programs.ensure()) as made:
        prepare(made)
        yield made


@pytest.fixture
def start(server: ApiServer, tmp_path: Path) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts operators that are gone after the test."""
    started: list[OperatorProcess] = []

    def make(number: int = 0) -> OperatorProcess:
        made = OperatorProcess(server.kubeconfig, tmp_path, number)
        made.start()
        started.append(made)
        return made

    yield make
    for one in started:
        one.close()
    if started[0].name != "operator-0":
        server.kubectl("-n", "operators", "delete", "lease,endpointslice", "operator")


@pytest.fixture
def training(server: ApiServer) -> Iterator[str]:
    """A training that is gone after the test."""
    name = "mini"
    yield name
    server.kubectl("delete", "dst", name, "--ignore-not-found", "--wait=false")
    for kind in ("pods", "services", "secrets", "persistentvolumeclaims", "events"):
        server.kubectl("delete", kind, "--all", "--force", "--grace-period=0", "--wait=false")


def apply(server: ApiServer, name: str, **spec: Any) -> None:
    stored = {
        "apiVersion": "dstrain.dev/v1alpha1",
        "kind": "DeepSeekTraining",
        "metadata": {"name": name},
        "spec": {"entrypoint": {"module": "m"}, "workers": {"replicas": 2}, **spec},
    }
    server.kubectl("apply", "-f", "-", stdin=json.dumps(stored))


def pods(server: ApiServer) -> list[str]:
    return server.kubectl("get", "pods", "-o", "name").split()


def is_leader(one: OperatorProcess) -> Callable[[], bool]:
    return lambda: one.leads


def two(start: Callable[..., OperatorProcess]) -> tuple[OperatorProcess, OperatorProcess]:
    """A leader, and one that stands by and is ready."""
    leader, standby = start(1), start(2)
    wait_until(is_leader(leader), "a leader", timeout_s=10)
    wait_until(lambda: standby.probe("readyz").is_success, "a standby", timeout_s=10)
    wait_until(lambda: leader.probe("readyz").is_success, "its lists", timeout_s=10)
    return leader, standby


def followed(leader: OperatorProcess, began_s: float, limit_s: float) -> float:
    """Seconds until it leads and has all its lists."""
    wait_until(
        lambda: leader.leads and leader.probe("readyz").is_success,
        "the next leader",
        timeout_s=limit_s,
        interval_s=0.02,
    )
    return time.monotonic() - began_s


def test_one_of_two_leads_and_the_service_leads_to_it(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str
) -> None:
    leader, standby = two(start)
    assert not standby.leads
    assert lease(server)["holderIdentity"] == leader.name
    wait_until(lambda: destinations(server) == [leader.address], "the route", timeout_s=5)
    apply(server, training)
    wait_until(lambda: len(pods(server)) == 2, "two pods", timeout_s=10)
    refused = httpx.post(f"{standby.url}/v1/trainings/x/beat", json={})
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert "nothing" not in standby.log
    assert httpx.post(f"{leader.url}/v1/trainings/x/beat", json={}).status_code == 404


def test_a_leader_killed_without_a_word_is_followed_within_20_seconds(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str, report: Report
) -> None:
    leader, standby = two(start)
    apply(server, training)
    wait_until(lambda: len(pods(server)) == 2, "two pods", timeout_s=10)
    before = pods(server)
    leader.kill()
    took_s = followed(standby, time.monotonic(), 20)
    report.time("operator killed: to the next leader", took_s)
    assert took_s <= 20
    wait_until(lambda: destinations(server) == [standby.address], "the route", timeout_s=5)
    assert pods(server) == before
    server.kubectl("patch", "dst", training, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    wait_until(lambda: pods(server) == [], "no pods", timeout_s=10)


def test_a_leader_told_to_stop_is_followed_within_3_seconds(
    server: ApiServer, start: Callable[..., OperatorProcess], report: Report
) -> None:
    leader, standby = two(start)
    began_s = time.monotonic()
    leader.process.terminate()
    took_s = followed(standby, began_s, 20)
    report.time("operator told to stop: to the next leader", took_s)
    assert took_s <= 3
    assert leader.process.wait(timeout=20) == 0
    assert "the Lease is given back" in leader.log


def test_a_leader_that_stood_still_acts_no_more_and_starts_anew(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str
) -> None:
    leader, standby = two(start)
    leader.pause()
    followed(standby, time.monotonic(), 20)
    leader.resume()
    assert leader.process.wait(timeout=20) == 1
    assert "another replica may lead: this one starts anew" in leader.log
    assert lease(server)["holderIdentity"] == standby.name
    apply(server, training)
    wait_until(lambda: len(pods(server)) == 2, "two pods", timeout_s=10)
