"""The worker's side of the coordinator's HTTP protocol (`dstrain_api.protocol`).

One client holds one kept-alive connection and belongs to one thread. It says once what happened
and never repeats a request by itself, except over a connection that the server had closed between
two requests: whether to ask again is the caller's.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from typing import TypeVar
from urllib.parse import urlsplit

from dstrain_api.base import ApiModel
from dstrain_api.constants import ENV_CA_FILE, ENV_COORDINATOR, ENV_TOKEN, ENV_TRAINING_UID
from dstrain_api.protocol import Assignment, Beat, Commit, Join, Orders, Report, Verdict

LONG_POLL_S = 20.0  # the coordinator answers a join after this long at the latest
# A coordinator whose node is gone breaks no connection. One that acknowledges nothing for so long
# is asked again on a new connection, which leads to whoever has taken its place.
DEAD_AFTER_S = 2.0
CONNECT_S = 3.0

Answer = TypeVar("Answer", bound=ApiModel)


class Unreachable(Exception):
    """No useful answer (no connection, a timeout, 404, 401, 5xx): ask again later."""


class Fenced(Exception):
    """This pod was replaced and will never be a member again: exit."""


class CoordinatorClient:
    """Speaks for one training.

    Args:
        url: http(s)://host:port of the coordinator.
        uid: uid of the training.
        token: bearer token of the training.
        ca_file: PEM file that signs the coordinator's certificate; the system's store if empty.
    """

    def __init__(self, url: str, uid: str, token: str, *, ca_file: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the coordinator is given as http(s)://host:port, not as {url!r}")
        self._host, self._port = parts.hostname, parts.port
        self._tls = ssl.create_default_context(cafile=ca_file or None)
        self._secure = parts.scheme == "https"
        self._path = f"{parts.path.rstrip('/')}/v1/trainings/{uid}"
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None

    @classmethod
    def from_environment(cls) -> CoordinatorClient:
        """The client of the training that this pod belongs to. Raises KeyError outside of a pod."""
        return cls(
            os.environ[ENV_COORDINATOR],
            os.environ[ENV_TRAINING_UID],
            os.environ[ENV_TOKEN],
            ca_file=os.environ.get(ENV_CA_FILE, ""),
        )

    def join(self, join: Join, *, timeout_s: float = LONG_POLL_S + 5) -> Assignment:
        """Ask for the next generation. Generation 0 in the answer: not formed yet, ask again."""
        return self._post("join", join, Assignment, timeout_s)

    def beat(self, beat: Beat, *, timeout_s: float = 2.0) -> Orders:
        """Say that this pod is alive."""
        return self._post("beat", beat, Orders, timeout_s)

    def commit(self, commit: Commit, *, timeout_s: float = 10.0) -> Verdict:
        """Ask whether a complete checkpoint may become the one to resume from."""
        return self._post("commit", commit, Verdict, timeout_s)

    def report(self, report: Report, *, timeout_s: float = 5.0) -> None:
        """Pass on progress, an error or the end."""
        self._exchange("report", report, timeout_s)

    def close(self) -> None:
        """Drop the connection; the next request makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, verb: str, body: ApiModel, kind: type[Answer], timeout_s: float) -> Answer:
        answer = self._exchange(verb, body, timeout_s)
        try:
            return kind.model_validate_json(answer)
        except ValueError as error:
            raise Unreachable(f"{verb}: not an answer of a coordinator: {error}") from error

    def _exchange(self, verb: str, body: ApiModel, timeout_s: float) -> bytes:
        fresh = self._connection is None
        try:
            status, answer = self._request(verb, body, timeout_s)
        except (ConnectionError, http.client.RemoteDisconnected) as error:
            self.close()
            if fresh:
                raise Unreachable(f"{verb}: {error}") from error
            return self._exchange(verb, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{verb}: {error or type(error).__name__}") from error
        if status == http.HTTPStatus.GONE:
            raise Fenced(answer.decode(errors="replace") or "replaced")
        if status >= http.HTTPStatus.MULTIPLE_CHOICES:
            raise Unreachable(f"{verb}: HTTP {status} {answer[:200].decode(errors='replace')}")
        return answer

    def _request(self, verb: str, body: ApiModel, timeout_s: float) -> tuple[int, bytes]:
        connection = self._connection
        if connection is None or connection.sock is None:
            connection = self._connection = self._connected(min(CONNECT_S, timeout_s))
        connection.sock.settimeout(timeout_s)
        connection.request("POST", f"{self._path}/{verb}", body.model_dump_json(), self._headers)
        response = connection.getresponse()
        return response.status, response.read()

    def _connected(self, timeout_s: float) -> http.client.HTTPConnection:
        to, port = self._host, self._port
        connection = (
            http.client.HTTPSConnection(to, port, context=self._tls, timeout=timeout_s)
            if self._secure
            else http.client.HTTPConnection(to, port, timeout=timeout_s)
        )
        connection.connect()
        _break_when_dead(connection.sock)
        return connection


def _break_when_dead(connection: socket.socket) -> None:
    """Let the kernel give up a peer that acknowledges neither data nor, in a pause, a probe."""
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_AFTER_S * 1000)),
    ):
        connection.setsockopt(level, option, value)
