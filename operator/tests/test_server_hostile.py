"""The coordinator over real HTTP, against workers that are broken, and against strangers."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
from deepseek_operator.runtime.coordinator import (
    RETIRED_LIFETIME_S,
    RETIRED_SILENCE_S,
    Coordinator,
    training_token,
)
from deepseek_operator.server import ServerThread, make_app

KEY = b"the operator's"
MINE, OTHERS = "uid-of-mine", "uid-of-others"


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Served:
    """Two trainings behind a real port; time stands still unless a test moves it."""

    def __init__(self, **limits: Any) -> None:
        self.clock = Clock()
        self.coordinator = Coordinator(clock=self.clock)
        for uid in (MINE, OTHERS):
            self.register(uid)
        self.server = ServerThread(make_app(self.coordinator), **limits)
        self.server.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=10)

    def register(self, uid: str, generation: int = 1) -> None:
        self.coordinator.register(uid, generation=generation, token=training_token(KEY, uid))

    def post(
        self, what: str, body: dict[str, Any], *, uid: str = MINE, token_of: str = MINE
    ) -> httpx.Response:
        return self.client.post(
            f"/v1/trainings/{uid}/{what}",
            json=body,
            headers={"Authorization": f"Bearer {training_token(KEY, token_of)}"},
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=10)

    def head(self, what: str, *lines: str) -> bytes:
        """The head of a POST, up to before its end."""
        authorization = f"Authorization: Bearer {training_token(KEY, MINE)}"
        first = f"POST /v1/trainings/{MINE}/{what} HTTP/1.1"
        return "\r\n".join([first, "Host: x", authorization, *lines, ""]).encode()


@contextmanager
def serving(**limits: Any) -> Iterator[Served]:
    made = Served(**limits)
    try:
        yield made
    finally:
        made.client.close()
        made.server.stop()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


def beat(generation: int = 1, pod: str = "uid-0") -> dict[str, Any]:
    return {
        "pod": "mini-0-1",
        "podUid": pod,
        "slot": 0,
        "generation": generation,
        "groupRank": 0,
        "groupWorldSize": 1,
        "masterAddress": "10.0.0.1",
        "masterPort": 29500,
        "state": "running",
    }


def commit(generation: int, step: int = 10) -> dict[str, Any]:
    uri = f"file:///c/step-{step}"
    return {"podUid": "uid-0", "generation": generation, "step": step, "uri": uri}


def is_closed(connection: socket.socket) -> bool:
    """Waits until the other side has hung up."""
    with suppress(ConnectionError):
        while connection.recv(65_536):
            pass
    return True


def test_a_report_of_50_megabytes_is_refused_and_takes_no_memory(served: Served) -> None:
    megabyte = b"x" * 2**20
    chunk = b"100000\r\n" + megabyte + b"\r\n"
    tracemalloc.start()
    try:
        for lines, piece in (
            (("Transfer-Encoding: chunked",), chunk),
            ((f"Content-Length: {50 * 2**20}",), megabyte),
        ):
            with served.connect() as connection:
                connection.sendall(served.head("report", *lines) + b"\r\n")
                with suppress(ConnectionError):
                    for _ in range(50):
                        connection.sendall(piece)
                with suppress(ConnectionError):
                    assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20
    assert served.post("beat", beat()).is_success


def test_an_error_with_an_endless_text_is_kept_only_to_its_limit(served: Served) -> None:
    served.post("beat", beat())
    error = {"localRank": 0, "exitCode": 1, "message": "x" * 50_000 + "the end"}
    assert served.post("report", {"podUid": "uid-0", "generation": 1, "error": error}).is_success
    (kept,) = served.coordinator.snapshot(MINE).errors
    assert kept.message.endswith("the end")
    assert len(kept.message) < 3000


def test_errors_without_end_are_kept_only_to_their_limit(served: Served) -> None:
    served.post("beat", beat())
    error = {"localRank": 0, "exitCode": 1, "message": "again"}
    for _ in range(200):
        served.post("report", {"podUid": "uid-0", "generation": 1, "error": error})
    assert len(served.coordinator.snapshot(MINE).errors) <= 64


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"pod":' * 9_000, b"\xff\xfe", b"null", b""])
def test_a_body_made_to_confuse_a_parser_is_422(served: Served, body: bytes) -> None:
    answer = served.client.post(
        f"/v1/trainings/{MINE}/beat",
        content=body,
        headers={"Authorization": f"Bearer {training_token(KEY, MINE)}"},
    )
    assert answer.status_code == 422


def test_a_token_opens_only_its_own_training(served: Served) -> None:
    for what, body in (("join", {}), ("beat", beat()), ("report", {}), ("commit", commit(1))):
        answer = served.post(what, body, uid=OTHERS, token_of=MINE)
        assert answer.status_code == 401
        assert answer.headers["connection"] == "close"
    assert served.coordinator.snapshot(OTHERS).members == ()


def test_the_token_of_a_deleted_training_opens_neither_it_nor_its_successor(served: Served) -> None:
    served.post("beat", beat())
    served.coordinator.retire(MINE)
    assert served.post("beat", beat()).is_success, "its pods may still save"
    served.clock.now_s += RETIRED_SILENCE_S + 1
    served.coordinator.tick()
    assert served.post("beat", beat()).status_code == 404
    served.register("uid-of-its-successor")
    answer = served.post("beat", beat(), uid="uid-of-its-successor", token_of=MINE)
    assert answer.status_code == 401


def test_a_deleted_training_is_forgotten_however_long_somebody_goes_on_talking(
    served: Served,
) -> None:
    served.coordinator.retire(MINE)
    until_s = served.clock.now_s + RETIRED_LIFETIME_S
    while served.clock.now_s < until_s:
        assert served.post("beat", beat()).is_success
        served.clock.now_s += RETIRED_SILENCE_S * 0.9
        served.coordinator.tick()
    served.coordinator.tick()
    assert served.post("beat", beat()).status_code == 404


def test_the_commit_of_an_old_generation_is_refused(served: Served) -> None:
    served.post("beat", beat(generation=1))
    assert served.post("commit", commit(1)).json()["accepted"]
    served.register(MINE, generation=2)
    served.coordinator.end(MINE, 1)
    served.post("beat", beat(generation=2, pod="uid-1"))
    verdict = served.post("commit", commit(1, step=20)).json()
    assert not verdict["accepted"]
    assert "generation 1 is over" in verdict["reason"]


@pytest.mark.parametrize("skew_s", [-1e9, -3600.0, 3600.0, 1e9])
def test_what_time_a_pod_thinks_it_is_means_nothing(served: Served, skew_s: float) -> None:
    claims = {"time": served.clock.now_s + skew_s, "atS": served.clock.now_s + skew_s}
    served.post("beat", beat() | claims)
    served.post("commit", commit(1) | claims)
    progress = {"step": 10, "loss": 1.0}
    served.post("report", {"podUid": "uid-0", "generation": 1, "progress": progress} | claims)
    served.clock.now_s += 2.0
    seen = served.coordinator.snapshot(MINE)
    assert seen.commit
    assert seen.commit.at_s == seen.progress_at_s == served.clock.now_s - 2.0
    assert seen.members[0].silent_s == 2.0


def test_strangers_that_never_finish_a_request_are_hung_up_on() -> None:
    with serving(request_s=0.5) as served, ExitStack() as open_:
        mute = [open_.enter_context(served.connect()) for _ in range(100)]
        headless = [open_.enter_context(served.connect()) for _ in range(100)]
        bodiless = [open_.enter_context(served.connect()) for _ in range(100)]
        for connection in headless:
            connection.sendall(served.head("beat"))
        for connection in bodiless:
            connection.sendall(served.head("beat", "Content-Length: 200") + b"\r\n{")
        assert served.post("beat", beat()).is_success, "meanwhile others are served"
        assert all(is_closed(connection) for connection in (*mute, *headless, *bodiless))


def test_a_request_that_drips_byte_by_byte_does_not_begin_its_time_anew() -> None:
    with serving(request_s=0.5) as served, served.connect() as connection:
        began_s = time.monotonic()
        with suppress(ConnectionError):
            for byte in itertools.cycle(b"x"):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
                assert time.monotonic() - began_s < 5
        assert is_closed(connection)


def test_a_connection_in_use_is_not_hung_up_on() -> None:
    with serving(request_s=0.3) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=10)
        connection.connect()
        first = connection.sock
        headers = {"Authorization": f"Bearer {training_token(KEY, MINE)}"}
        for _ in range(3):
            path = f"/v1/trainings/{MINE}/beat"
            connection.request("POST", path, json.dumps(beat()), headers)
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
            time.sleep(0.4)
        assert connection.sock is first
        connection.close()


def test_more_connections_than_the_limit_are_broken_until_there_is_room_again() -> None:
    with serving(request_s=1.0, most_connections=50) as served, ExitStack() as open_:
        flood = [open_.enter_context(served.connect()) for _ in range(500)]
        assert is_closed(flood[-1])
        assert all(is_closed(connection) for connection in flood)
        assert served.post("beat", beat()).is_success


def test_headers_without_end_are_refused(served: Served) -> None:
    with served.connect() as connection:
        with suppress(ConnectionError):
            connection.sendall(served.head("beat", "X: " + "x" * 2**20))
        assert is_closed(connection)
