"""Faults of the operator itself, and of what it depends on, with a real API server.

Operators are processes of this machine; there are no nodes, so that nothing but the operator
decides what happens. e2e/test_recovery.py has the same on a whole cluster.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.apiserver import ApiServer, api_server
from e2e.border import Asked, Border, border
from e2e.clusters import programs
from e2e.clusters.shell import ClusterError, wait_until
from e2e.operators import OperatorProcess, destinations, lease, prepare
from e2e.puppets import Puppets, puppets
from e2e.report import Report

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 60.0
LIFE_S = 240.0
LIVES = 36  # at least as many as a training needs writes, if nothing disturbs it
OWNED = ("pods", "services", "secrets", "persistentvolumeclaims")
AWAY_S = 12.0  # longer than a Lease lasts, and than an operator decides without contact


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
def between(server: ApiServer, tmp_path: Path) -> Iterator[Border]:
    """What operators of this test reach the API server through, if they are told to."""
    with border(server, tmp_path) as made:
        yield made


@pytest.fixture
def start(server: ApiServer, tmp_path: Path) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts operators that are gone after the test."""
    started: list[OperatorProcess] = []

    def make(number: int = 0, through: Border | None = None) -> OperatorProcess:
        kubeconfig = through.kubeconfig if through else server.kubeconfig
        made = OperatorProcess(kubeconfig, tmp_path, number)
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
    for kind in (*OWNED, "events"):
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


def status(server: ApiServer, name: str) -> dict[str, Any]:
    found = server.kubectl("get", "dst", name, "--ignore-not-found", "-o", "json")
    return dict(json.loads(found).get("status") or {}) if found else {}


def wait_running(server: ApiServer, name: str, played: Puppets, generation: int) -> None:
    """Wait until both agents run the generation and the status says so."""

    def runs() -> bool:
        now = status(server, name)
        return (
            now.get("generation") == generation
            and now["phase"] == "Running"
            and [a.generation for a in played.of(name)] == [generation] * 2
        )

    wait_until(runs, f"generation {generation}", timeout_s=WAIT_S)


def suspend(server: ApiServer, name: str, suspended: bool) -> None:
    patch = json.dumps({"spec": {"suspend": suspended}})
    server.kubectl("patch", "dst", name, "--type=merge", "-p", patch)


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


def test_an_api_server_that_is_away_changes_nothing(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str
) -> None:
    leader, standby = two(start)
    with puppets(server, lambda: leader.url) as played:
        apply(server, training)
        wait_running(server, training, played, 1)
        before = pods(server)
        agents = played.of(training)
        server.stop()
        away_s = time.monotonic()
        wait_until(lambda: not leader.leads, "the leader to hold back", timeout_s=12)
        for one in (leader, standby):
            assert one.probe("healthz").is_success, "a restart would not help"
            assert one.probe("readyz").is_success
        time.sleep(max(0.0, away_s + AWAY_S - time.monotonic()))
        assert {a.generation for a in agents} == {1}, "agents go on"
        assert all(a.codes[503] for a in agents), "the leader did not know whether it still led"
        server.start()
        wait_until(lambda: leader.leads, "the leader", timeout_s=10)
        heard = [a.codes[200] for a in agents]
        wait_until(
            lambda: all(a.codes[200] > n for a, n in zip(agents, heard, strict=True)),
            "beats to be heard",
            timeout_s=5,
        )
        # It looks at everything again, and finds nothing to do.
        wait_until(lambda: "all can be seen" in leader.log, "its caches", timeout_s=30)
        assert pods(server) == before
        assert status(server, training)["generation"] == 1
        assert not status(server, training).get("history")
        played.fail(training, 1)
        wait_running(server, training, played, 2)
        # From the pod itself, and not from its silence: what came after the outage is seen, too.
        assert status(server, training)["history"][-1]["reason"] == "PodFailed"
        assert played.broken == []
    assert lease(server)["leaseTransitions"] == 0


def test_an_api_server_that_is_too_busy_is_left_in_peace_for_as_long_as_it_asks(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str, between: Border
) -> None:
    operator = start(0, between)
    with puppets(server, lambda: operator.url) as played:
        apply(server, training)
        wait_running(server, training, played, 1)
        between.throttled = True
        played.fail(training, 0)
        asked = len(between.asked)
        wait_until(lambda: len(between.asked) > asked, "a request", timeout_s=10)
        time.sleep(6)  # the time of throttling itself
        between.throttled = False
        refused = [a for a in between.asked[asked:] if a.code == 429 and a.is_write]
        # One training has one call under way at a time.
        gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(refused)]
        assert refused
        assert min(gaps) > 0.95, gaps
        wait_running(server, training, played, 2)
        assert played.broken == []


def test_watches_that_break_and_a_history_that_is_gone_cost_a_list_and_make_no_pod_twice(
    server: ApiServer, start: Callable[..., OperatorProcess], training: str, between: Border
) -> None:
    operator = start(0, between)
    with puppets(server, lambda: operator.url) as played:
        apply(server, training)
        wait_running(server, training, played, 1)
        for generation in (2, 3):
            between.forgetful = generation == 3
            between.cut_watches()
            lost = played.of(training)[0].name
            server.kubectl("delete", "pod", lost, "--force", "--grace-period=0", "--wait=false")
            time.sleep(2)  # in which nobody watches
            between.forgetful = False
            wait_running(server, training, played, generation)
        assert len(played.made[training]) == 4
        assert played.broken == []
    assert any(a.code == 410 for a in between.asked)


@pytest.mark.timeout(900)
def test_killed_after_any_write_of_a_life_the_operator_finishes_it_and_does_nothing_twice(
    server: ApiServer, start: Callable[..., OperatorProcess], between: Border, report: Report
) -> None:
    """The operator is killed after the first write for training t01, the second for t02, and so on.

    The write is stored, its answer is never seen. All trainings live through all kills.
    """
    names = [f"t{number:02}" for number in range(1, LIVES + 1)]
    operator = start(0, between)
    writes: Counter[str] = Counter()
    deaths: dict[str, str] = {}

    def count(asked: Asked) -> str:
        name = asked.name[:3]
        writes[name] += asked.code < 300
        return name

    def kill(asked: Asked) -> None:
        name = count(asked)
        if name in names and writes[name] == int(name[1:]) and name not in deaths:
            operator.process.kill()
            deaths[name] = f"{asked.method} {asked.name}"

    with puppets(server, lambda: operator.url) as played:
        between.after_write = count
        live(server, ["t00"], played)
    assert 20 < writes["t00"] <= LIVES, "every write of an undisturbed life has its turn"
    between.after_write = kill
    began_s = time.monotonic()
    with kept_up(operator), puppets(server, lambda: operator.url) as played:
        live(server, names, played)
    assert operator.log.count("listening on port") > len(deaths) / 2
    report.time(f"{len(names)} lives with {len(deaths)} kills", time.monotonic() - began_s)
    report.text("the writes after which the operator was killed", "\n".join(deaths.values()))


@contextmanager
def kept_up(operator: OperatorProcess) -> Iterator[None]:
    """What a kubelet does with a container that ended, be it before it answered."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(0.02):
            if operator.process.poll() is not None:
                operator.launch()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def live(server: ApiServer, names: list[str], played: Puppets) -> None:
    """Trainings are made, lose a pod each, are suspended, resumed and deleted."""

    def wait_all(what: str, holds: Callable[[str, dict[str, Any]], bool]) -> None:
        def all_hold() -> bool:
            found = json.loads(server.kubectl("get", "dst", "-o", "json"))["items"]
            now = {item["metadata"]["name"]: item.get("status") or {} for item in found}
            behind[:] = [name for name in names if not holds(name, now[name])]
            return not behind

        behind: list[str] = []
        try:
            wait_until(all_hold, what, timeout_s=LIFE_S, interval_s=0.5)
        except ClusterError as error:
            error.add_note(f"{behind}, {played.broken}")
            raise

    def runs(name: str, now: dict[str, Any]) -> bool:
        agents = [a.generation for a in played.of(name)]
        return now.get("phase") == "Running" and agents == [now["generation"]] * 2

    for name in names:
        apply(server, name, recovery={"heartbeatTimeout": "60s"})
    wait_all("the first generation", runs)
    for name in names:
        played.fail(name, 1)
    wait_all("a failure", lambda _name, now: bool(now.get("history")))
    wait_all("the next generation", runs)
    for name in names:
        suspend(server, name, True)
    wait_all("suspension", lambda _name, now: now["phase"] == "Suspended")
    wait_until(lambda: not pods(server), "no pods", timeout_s=WAIT_S)
    for name in names:
        suspend(server, name, False)
    wait_all("the generation after", runs)
    wait_all("one failure", lambda _name, now: sum(now["restarts"].values()) == 1)
    assert played.broken == []
    assert {name: len(played.made[name]) for name in names} == dict.fromkeys(names, 5)
    server.kubectl("delete", "dst", "--all", "--wait=false")
    for kind in OWNED:
        server.kubectl("delete", kind, "--all", "--force", "--grace-period=0", "--wait=false")
    wait_until(
        lambda: not server.kubectl("get", "dst", "-o", "name"), "their end", timeout_s=WAIT_S
    )
    time.sleep(1)  # in which something wrong could be made
    assert pods(server) == [], "nothing is made for what is gone"
