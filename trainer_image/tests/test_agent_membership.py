"""A pod and its coordinator over real HTTP, without torch: joins, beats, orders, absences."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deepseek_operator.core.model import Membership as Formed
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.server import ServerThread, make_app
from deepseek_trainer.agent.client import CoordinatorClient, Fenced, Unreachable
from deepseek_trainer.agent.hang import ended_by_another
from deepseek_trainer.agent.membership import Identity, Membership
from deepseek_trainer.agent.reports import Forwarder, ReportSocket, WorkerReport
from deepseek_trainer.reporting import report, report_done
from dstrain_api.constants import ENV_REPORT_SOCKET
from dstrain_api.protocol import Assignment, Beat, Commit, ErrorReport, ProgressReport

UID, TOKEN, POD = "training", "secret", "pod-0"
PATIENCE_S = 20.0


class Operator:
    """A coordinator behind HTTP that can go away and come back."""

    def __init__(self, **tls: Path) -> None:
        self.tls = tls
        self.port = 0
        self.up()

    def up(self, generation: int = 0) -> None:
        self.coordinator = Coordinator(clock=time.time)
        self.coordinator.register(UID, generation=generation, token=TOKEN)
        app = make_app(self.coordinator, join_wait_s=0.3)
        self.server = ServerThread(app, port=self.port, **self.tls)
        self.port = self.server.port
        self.server.start()

    def down(self) -> None:
        self.server.stop()

    def client(self, token: str = TOKEN, ca_file: str = "") -> CoordinatorClient:
        scheme = "https" if self.tls else "http"
        url = f"{scheme}://127.0.0.1:{self.port}"
        return CoordinatorClient(url, UID, token, ca_file=ca_file)

    def publish(self, generation: int) -> None:
        formed = Formed(
            generation=generation, pod_uids=(POD,), master_address="127.0.0.1", master_port=1234
        )
        self.coordinator.publish(UID, formed)

    def state(self) -> str:
        members = self.coordinator.snapshot(UID).members
        return members[0].state if members else ""


def until(holds: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def operator() -> Iterator[Operator]:
    made = Operator()
    yield made
    if made.server.running:
        made.down()


class Pod:
    """A membership whose joins run on a thread of their own."""

    def __init__(self, operator: Operator, beat_interval_s: float = 0.05) -> None:
        self.stops: list[str] = []
        self.step = 0
        identity = Identity(
            pod="mini-0-1", pod_uid=POD, slot=0, node="a", address="127.0.0.1", processes=1
        )
        self.membership = Membership(
            identity,
            operator.client,
            beat_interval_s=beat_interval_s,
            step=lambda: self.step,
            stop=self.stops.append,
        )
        self.outcome: Assignment | Fenced | None = None

    def join(self) -> None:
        self.outcome = None
        threading.Thread(target=self._join, daemon=True).start()

    def _join(self) -> None:
        try:
            self.outcome = self.membership.join(1234)
        except Fenced as error:
            self.outcome = error


@pytest.fixture
def pod(operator: Operator) -> Iterator[Pod]:
    made = Pod(operator)
    yield made
    made.membership.leave()


def running(pod: Pod, operator: Operator, generation: int = 1) -> None:
    pod.join()
    until(lambda: operator.state() == "joining")
    operator.publish(generation)
    until(lambda: pod.outcome is not None)
    until(lambda: operator.state() == "running")


def test_a_join_waits_until_its_generation_is_formed(pod: Pod, operator: Operator) -> None:
    pod.join()
    until(lambda: operator.state() == "joining")
    time.sleep(0.4)  # longer than one long poll: it asks again
    assert pod.outcome is None
    operator.publish(1)
    until(lambda: pod.outcome is not None)
    assert pod.outcome == Assignment(
        generation=1,
        group_rank=0,
        group_world_size=1,
        master_address="127.0.0.1",
        master_port=1234,
    )


def test_beats_carry_the_place_and_the_step(pod: Pod, operator: Operator) -> None:
    pod.step = 7
    running(pod, operator)
    (member,) = operator.coordinator.snapshot(UID).members
    assert (member.generation, member.group_world_size, member.node) == (1, 1, "a")


def test_a_generation_that_was_ended_is_over_until_the_next_join(
    pod: Pod, operator: Operator
) -> None:
    running(pod, operator)
    assert not pod.membership.over
    operator.coordinator.end(UID, 1)
    until(lambda: pod.membership.over)
    running(pod, operator, generation=2)
    assert not pod.membership.over


def test_the_end_of_a_generation_is_known_before_the_next_beat_is_due(operator: Operator) -> None:
    pod = Pod(operator, beat_interval_s=PATIENCE_S)
    running(pod, operator)
    told_s = time.monotonic()
    operator.coordinator.end(UID, 1)
    until(lambda: pod.membership.over)
    assert time.monotonic() - told_s < PATIENCE_S / 10
    pod.membership.leave()


def test_nobody_is_blamed_for_a_hang_before_the_operator_can_see_who_is_gone(
    pod: Pod, operator: Operator
) -> None:
    running(pod, operator)
    assert not ended_by_another(pod.membership, patience_s=0.2), "it sees everybody"
    operator.down()
    until(lambda: pod.membership.in_touch_s == 0)
    answers: list[bool] = []
    asking = threading.Thread(
        target=lambda: answers.append(ended_by_another(pod.membership, patience_s=2.0))
    )
    asking.start()
    asking.join(3.0)  # more than its patience
    assert asking.is_alive()
    operator.up(generation=1)
    until(lambda: operator.coordinator.snapshot(UID).membership)
    operator.coordinator.end(UID, 1)
    asking.join(PATIENCE_S)
    assert answers == [True]


def test_an_order_to_stop_is_told_once(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    operator.coordinator.order_stop(UID, True)
    until(lambda: pod.stops)
    time.sleep(0.2)  # several beats
    assert pod.stops == ["told to save and stop"]


def test_a_replaced_pod_stops_and_cannot_join(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    operator.coordinator.fence(UID, (POD,))
    until(lambda: pod.stops)
    assert "replaced" in pod.stops[0]
    pod.join()
    until(lambda: pod.outcome is not None)
    assert isinstance(pod.outcome, Fenced)


def test_an_absent_operator_ends_nothing_and_adopts_the_generation(
    pod: Pod, operator: Operator
) -> None:
    running(pod, operator)
    operator.down()
    time.sleep(0.3)  # beats fail meanwhile
    assert not pod.membership.over
    operator.up(generation=1)
    until(lambda: operator.coordinator.snapshot(UID).membership)
    assert not pod.membership.over
    assert pod.stops == []


def test_a_join_survives_an_absent_operator(pod: Pod, operator: Operator) -> None:
    operator.down()
    pod.join()
    time.sleep(0.3)
    operator.up()
    until(lambda: operator.state() == "joining")
    operator.publish(1)
    until(lambda: pod.outcome is not None)


def test_an_error_is_told_before_the_join(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    pod.membership.report_error(ErrorReport(local_rank=0, exit_code=1, message="ValueError: x"))
    (error,) = operator.coordinator.snapshot(UID).errors
    assert (error.message, error.generation, error.pod) == ("ValueError: x", 1, "mini-0-1")


def test_a_leaving_pod_says_so(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    pod.membership.leave()
    assert operator.coordinator.snapshot(UID).members == ()


def test_a_finished_pod_is_done_and_stays_so(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    pod.membership.finish()
    pod.membership.leave()
    assert operator.state() == "done"


def beat() -> Beat:
    return Beat(
        pod="mini-0-1",
        pod_uid=POD,
        slot=0,
        generation=0,
        group_rank=0,
        group_world_size=0,
        state="joining",
    )


def test_a_connection_that_the_server_has_closed_is_made_anew(operator: Operator) -> None:
    client = operator.client()
    client.beat(beat())
    operator.down()
    operator.up()
    assert client.beat(beat()).generation == 0


def test_a_wrong_token_is_an_answer_to_ask_again(operator: Operator) -> None:
    with pytest.raises(Unreachable, match="401"):
        operator.client(token="guess").beat(beat())


def test_an_answer_that_never_comes_ends_at_its_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = CoordinatorClient(f"http://127.0.0.1:{silent.getsockname()[1]}", UID, TOKEN)
        with pytest.raises(Unreachable, match="timed out"):
            client.beat(beat(), timeout_s=0.1)


def test_a_commit_gets_its_verdict(pod: Pod, operator: Operator) -> None:
    running(pod, operator)
    commit = Commit(pod_uid=POD, generation=1, step=5, uri="file:///x/step-5")
    assert operator.client().commit(commit).accepted
    late = Commit(pod_uid=POD, generation=0 + 1, step=4, uri="file:///x/step-4")
    verdict = operator.client().commit(late)
    assert (verdict.accepted, "step 5" in verdict.reason) == (False, True)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", ""])
def test_a_coordinator_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        CoordinatorClient(url, UID, TOKEN)


def test_tls_trusts_the_given_authority_and_no_other(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=operator", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )
    operator = Operator(tls_cert=cert, tls_key=key)
    try:
        assert operator.client(ca_file=str(cert)).beat(beat()).generation == 0
        with pytest.raises(Unreachable, match="certificate verify failed"):
            operator.client().beat(beat())
        with pytest.raises(ssl.SSLError):
            operator.client(ca_file=str(key))
    finally:
        operator.down()


def test_what_a_process_reports_reaches_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[WorkerReport] = []
    listening = ReportSocket(tmp_path / "reports", received.append)
    monkeypatch.setenv(ENV_REPORT_SOCKET, str(listening.path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    report(step=3, loss=2.0, tokens=300, total_steps=9, metrics={"dstrain_grad_norm": 1.0})
    report_done()
    until(lambda: len(received) == 2)
    assert received[0] == WorkerReport(
        local_rank=1,
        rank_step=3,
        progress=ProgressReport(step=3, total_steps=9, tokens=300, loss=2.0),
        metrics={"dstrain_grad_norm": 1.0},
    )
    assert received[1] == WorkerReport(local_rank=1, done=True)


def test_a_datagram_that_is_no_report_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[WorkerReport] = []
    listening = ReportSocket(tmp_path / "reports", received.append)
    monkeypatch.setenv(ENV_REPORT_SOCKET, str(listening.path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for datagram in (b"hello", b"{}x", b'{"localRank": -1}', b'{"done": "maybe"}'):
            sender.sendto(datagram, str(listening.path))
    report(step=1)
    until(lambda: received)
    assert received[0].rank_step == 1


def test_progress_and_the_end_are_kept_while_the_operator_is_away(
    pod: Pod, operator: Operator
) -> None:
    running(pod, operator)
    forwarder = Forwarder(POD, operator.client())
    operator.down()
    for step in range(1, 5):
        progress = ProgressReport(step=step, resumed_step=0 if step == 1 else None)
        forwarder.put(1, WorkerReport(progress=progress))
    forwarder.put(1, WorkerReport(done=True))
    assert not forwarder.flush(0.2)
    operator.up(generation=1)
    assert forwarder.flush(PATIENCE_S)
    until(lambda: operator.coordinator.snapshot(UID).done)
    kept = operator.coordinator.snapshot(UID).progress
    assert kept
    assert (kept.step, kept.resumed_step) == (4, 0)
