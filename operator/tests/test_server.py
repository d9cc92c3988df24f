"""The coordinator over real HTTP."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from deepseek_operator.core.model import Membership
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.server import BODY_LIMIT_BYTES, ServerThread, make_app

UID = "11111111-2222"
TOKEN = "secret"


class Served:
    """A coordinator behind a real port."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(clock=time.time)
        self.coordinator.register(UID, generation=0, token=TOKEN)
        self.problems: list[str] = []
        self.leads = True
        app = make_app(
            self.coordinator,
            metrics=lambda: b"dstrain_up 1\n",
            unhealthy=lambda: self.problems,
            leads=lambda: self.leads,
            join_wait_s=0.5,
        )
        self.server = ServerThread(app)
        self.server.start()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.server.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=10,
        )

    def post(self, what: str, body: dict[str, object], uid: str = UID) -> httpx.Response:
        return self.client.post(f"/v1/trainings/{uid}/{what}", json=body)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.client.close()
    served.server.stop()


def join_body(slot: int = 0) -> dict[str, object]:
    return {
        "pod": f"mini-{slot}-1",
        "podUid": f"uid-{slot}",
        "slot": slot,
        "address": "10.0.0.1",
        "port": 29500,
        "generation": 0,
    }


def beat_body(generation: int = 1) -> dict[str, object]:
    return {
        "pod": "mini-0-1",
        "podUid": "uid-0",
        "slot": 0,
        "generation": generation,
        "groupRank": 0,
        "groupWorldSize": 1,
        "masterAddress": "10.0.0.1",
        "masterPort": 29500,
        "state": "running",
    }


def test_join_waits_and_is_answered_when_its_generation_is_published(served: Served) -> None:
    joined = threading.Event()
    served.coordinator.on_transition = lambda _uid: joined.set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, "join", join_body())
        assert joined.wait(5)
        started_s = time.monotonic()
        served.coordinator.publish(
            UID,
            Membership(
                generation=1, pod_uids=("uid-0",), master_address="10.0.0.1", master_port=29500
            ),
        )
        response = answer.result(5)
    assert time.monotonic() - started_s < 0.4, "it did not wait for its time limit"
    assert response.status_code == 200
    assert response.json() == {
        "generation": 1,
        "groupRank": 0,
        "groupWorldSize": 1,
        "masterAddress": "10.0.0.1",
        "masterPort": 29500,
        "failureIntervalS": 0.0,
        "preflight": False,
    }


def test_join_without_a_generation_is_answered_202_after_the_time_limit(served: Served) -> None:
    response = served.post("join", join_body())
    assert response.status_code == 202
    assert response.json()["generation"] == 0


def test_beat_is_answered_with_orders_and_ignores_fields_it_does_not_know(served: Served) -> None:
    served.coordinator.register(UID, generation=2, token=TOKEN)
    response = served.post("beat", {**beat_body(generation=1), "fieldOfALaterVersion": 1})
    assert response.status_code == 200
    assert response.json() == {"generation": 0, "stop": False}


@pytest.mark.parametrize(
    ("give", "status", "answer"),
    [
        (lambda c: c.end(UID, 1), 200, {"generation": 0, "stop": False}),
        (lambda c: c.order_stop(UID, True), 200, {"generation": 1, "stop": True}),
        (lambda c: c.fence(UID, ("uid-0",)), 410, {"detail": "this pod was replaced"}),
    ],
    ids=["over", "stop", "fenced"],
)
def test_beat_with_patience_is_answered_once_its_orders_change(
    served: Served, give: Callable[[Coordinator], None], status: int, answer: dict[str, object]
) -> None:
    served.coordinator.register(UID, generation=1, token=TOKEN)
    heard = threading.Event()
    served.coordinator.on_transition = lambda _uid: heard.set()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, "beat", {**beat_body(), "patienceS": 10})
        assert heard.wait(5)
        time.sleep(0.1)
        assert not waiting.done()
        give(served.coordinator)
        response = waiting.result(5)
    assert (response.status_code, response.json()) == (status, answer)


def test_beat_is_told_to_go_on_when_its_patience_ends(served: Served) -> None:
    served.coordinator.register(UID, generation=1, token=TOKEN)
    response = served.post("beat", {**beat_body(), "patienceS": 0.2})
    assert response.json() == {"generation": 1, "stop": False}
    assert response.elapsed.total_seconds() >= 0.2


def test_answers_do_not_wait_for_acknowledgements(served: Served) -> None:
    served.post("beat", beat_body())
    started_s = time.monotonic()
    for _ in range(50):
        served.post("beat", beat_body())
    assert time.monotonic() - started_s < 50 * 0.04, "40 ms each is Nagle's algorithm"


def test_commit_and_report(served: Served) -> None:
    served.coordinator.register(UID, generation=1, token=TOKEN)
    served.post("beat", beat_body())
    commit = {"podUid": "uid-0", "generation": 1, "step": 3, "uri": "file:///c/step-3"}
    assert served.post("commit", commit).json() == {"accepted": True, "reason": ""}
    report = {"podUid": "uid-0", "generation": 1, "progress": {"step": 3, "loss": 4.5}}
    assert served.post("report", report).status_code == 204
    gathering = served.coordinator.snapshot(UID)
    assert gathering.commit is not None
    assert gathering.progress is not None
    assert (gathering.commit.step, gathering.progress.loss) == (3, 4.5)


def test_wrong_token_is_401_and_unknown_training_404(served: Served) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    path = f"/v1/trainings/{UID}/beat"
    assert served.client.post(path, json=beat_body(), headers=wrong).status_code == 401
    basic = {"Authorization": f"Basic {TOKEN}"}
    assert served.client.post(path, json=beat_body(), headers=basic).status_code == 401
    assert served.post("beat", beat_body(), uid="another").status_code == 404


def test_fenced_pod_is_410_also_while_its_join_waits(served: Served) -> None:
    joined = threading.Event()
    served.coordinator.on_transition = lambda _uid: joined.set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, "join", join_body())
        assert joined.wait(5)
        served.coordinator.fence(UID, ("uid-0",))
        assert answer.result(5).status_code == 410
    assert served.post("beat", beat_body()).status_code == 410


def test_body_that_is_not_the_protocol_is_422_and_says_which_field(served: Served) -> None:
    response = served.post("beat", {**beat_body(), "slot": -1})
    assert response.status_code == 422
    assert "slot" in response.json()["detail"]
    assert served.client.post(f"/v1/trainings/{UID}/beat", content=b"{").status_code == 422


def test_body_of_50_megabytes_is_413_whether_or_not_it_says_its_length(served: Served) -> None:
    path = f"/v1/trainings/{UID}/report"

    def megabytes() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    for content in (b"x" * 50_000_000, megabytes()):
        # The server may hang up in the middle, which is as good.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            assert served.client.post(path, content=content).status_code == 413
    assert served.post("beat", beat_body()).status_code == 200, "the server is well"


def test_declared_length_over_the_limit_is_413_before_the_body_is_sent(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as connection:
        connection.sendall(
            f"POST /v1/trainings/{UID}/report HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {TOKEN}\r\n"
            f"Content-Length: {BODY_LIMIT_BYTES + 1}\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_metrics_and_probes(served: Served) -> None:
    assert served.client.get("/metrics").text == "dstrain_up 1\n"
    assert served.client.get("/healthz").text == "ok"
    assert served.client.get("/readyz").status_code == 200
    served.problems.append("the event loop is blocked")
    response = served.client.get("/healthz")
    assert (response.status_code, response.text) == (503, "the event loop is blocked")


def test_who_does_not_lead_sends_pods_to_a_new_connection_and_hears_nothing(
    served: Served,
) -> None:
    served.leads = False
    for what, body in (("join", join_body()), ("beat", beat_body()), ("commit", {})):
        response = served.post(what, body)
        assert response.status_code == 503
        assert response.headers["connection"] == "close"
    assert served.coordinator.snapshot(UID).members == ()
    assert served.client.get("/healthz").text == "ok"
    assert served.client.get("/metrics").is_success


def test_join_that_waits_is_sent_away_when_this_replica_leads_no_more(served: Served) -> None:
    joined = threading.Event()
    served.coordinator.on_transition = lambda _uid: joined.set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, "join", join_body())
        assert joined.wait(5)
        served.leads = False
        served.coordinator.on_orders(UID)
        assert answer.result(5).status_code == 503


def test_stop_sends_waiting_joins_away_at_once() -> None:
    coordinator = Coordinator(clock=time.time)
    coordinator.register(UID, generation=0, token=TOKEN)
    server = ServerThread(make_app(coordinator, join_wait_s=60))
    server.start()
    joined = threading.Event()
    coordinator.on_transition = lambda _uid: joined.set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post,
            f"http://127.0.0.1:{server.port}/v1/trainings/{UID}/join",
            json=join_body(),
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )
        assert joined.wait(5)
        started_s = time.monotonic()
        server.stop()
        assert answer.result(5).status_code == 503
    assert time.monotonic() - started_s < 3
    assert not server.running


def test_taken_port_is_an_error_at_once(served: Served) -> None:
    with pytest.raises(OSError, match="in use"):
        ServerThread(make_app(served.coordinator), port=served.server.port)


def test_serves_tls_when_given_a_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    server = ServerThread(make_app(Coordinator(clock=time.time)), tls_cert=cert, tls_key=key)
    server.start()
    trust = ssl.create_default_context(cafile=str(cert))
    try:
        url = f"https://127.0.0.1:{server.port}/healthz"
        assert httpx.get(url, verify=trust).text == "ok"
    finally:
        server.stop()
