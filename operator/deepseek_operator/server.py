"""The coordinator over HTTP, for the agents of worker pods; and what Prometheus and the kubelet
ask of the operator.

    POST /v1/trainings/{uid}/join     body Join    200 Assignment, when its generation is formed;
                                                   202 generation 0 after 20 s: ask again at once
    POST /v1/trainings/{uid}/beat     body Beat    200 Orders; those to go on after `patienceS`
    POST /v1/trainings/{uid}/report   body Report  204
    POST /v1/trainings/{uid}/commit   body Commit  200 Verdict
    GET  /metrics                     Prometheus text
    GET  /healthz, /readyz            200 "ok", or 503 and a line per problem

Every POST carries `Authorization: Bearer <token of the training>` and a JSON body of at most 64
KiB, all within 10 s; unknown fields in it are ignored, and what counts is when it arrived, not what
time the pod thinks it is. A join is no sign of life while it waits: beats go on beside it. Joins,
beats, reports and commits may be repeated when the answer was lost. Refusals have a JSON body
`{"detail": "..."}`:

    401  wrong or missing token
    404  the training, or all members of its generation, are not known yet: ask again
    410  this pod was replaced and will never be a member again: exit
    413  body too large
    422  body is not what the protocol says: a bug of the sender, do not repeat
    429  too many pods: ask again after `Retry-After` seconds
    503  this replica does not lead, or is stopping: ask again on a new connection

An agent that gets no answer, 404, 429 or 5xx goes on as it is and asks again with back-off and
jitter.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import uvicorn
from dstrain_api.protocol import Assignment, Beat, Commit, Join, Orders, Report
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError

from deepseek_operator.connections import REQUEST_S, affordable_connections, bounded
from deepseek_operator.runtime.coordinator import Coordinator, Crowded, Fenced, UnknownTraining

BODY_LIMIT_BYTES: Final = 64 * 1024
JOIN_WAIT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 5  # for requests that are being answered when the server stops
KEEP_ALIVE_S: Final = 75  # longer than any beat interval, so that beats reuse their connection

Message = TypeVar("Message", bound=BaseModel)
Problems = Callable[[], Sequence[str]]


class Waiters:
    """Joins that wait for a generation, and beats that wait for other orders. `wake` may be called
    from any thread.
    """

    def __init__(self) -> None:
        self.closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: dict[str, asyncio.Event] = {}

    def attach(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Take the loop in which they wait; None when it ends."""
        self._loop = loop

    def event(self, uid: str) -> asyncio.Event:
        """Is set at the next news for this training. Take it before looking."""
        return self._events.setdefault(uid, asyncio.Event())

    def wake(self, uid: str) -> None:
        """Let those who wait for a training look again."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._set, uid)

    def close(self) -> None:
        """Send all away."""
        self.closed = True
        if self._loop:
            self._loop.call_soon_threadsafe(self._set_all)

    def _set(self, uid: str) -> None:
        event = self._events.pop(uid, None)
        if event:
            event.set()

    def _set_all(self) -> None:
        for uid in list(self._events):
            self._set(uid)


def _none() -> Sequence[str]:
    return ()


def _no_metrics() -> bytes:
    return b""


def make_app(
    coordinator: Coordinator,
    *,
    metrics: Callable[[], bytes] = _no_metrics,
    unhealthy: Problems = _none,
    unready: Problems = _none,
    leads: Callable[[], bool] = lambda: True,
    join_wait_s: float = JOIN_WAIT_S,
) -> FastAPI:
    """The application described above.

    `metrics` gives the exposition text; `unhealthy` and `unready` give one sentence per problem;
    `leads` says whether this replica may answer for trainings. All are called in the server's
    thread.
    """
    waiters = Waiters()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        waiters.attach(asyncio.get_running_loop())
        coordinator.on_orders = waiters.wake
        yield
        waiters.attach(None)

    app = FastAPI(
        title="dstrain coordinator",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.waiters = waiters
    for error, status, headers in (
        (UnknownTraining, 404, {"Connection": "close"}),
        (Fenced, 410, None),
        (Crowded, 429, {"Retry-After": "5"}),
    ):
        app.add_exception_handler(error, _refusal(status, headers))

    app.include_router(_workers(coordinator, waiters, leads, join_wait_s))
    app.include_router(_watchers(metrics, unhealthy, unready))
    return app


def _workers(
    coordinator: Coordinator, waiters: Waiters, leads: Callable[[], bool], join_wait_s: float
) -> APIRouter:
    """What agents call."""
    routes = APIRouter(prefix="/v1/trainings/{uid}")

    def refuse_unless_leading() -> None:
        if waiters.closed or not leads():
            # A connection that is kept would lead here again, wherever the Service points to.
            raise HTTPException(
                503, "this replica does not lead: ask again", headers={"Connection": "close"}
            )

    async def message(request: Request, uid: str, kind: type[Message]) -> Message:
        refuse_unless_leading()
        _authenticate(coordinator, uid, request)
        body = await _body(request)
        refuse_unless_leading()  # a body may take its time
        return _parse(kind, body)

    @routes.post("/join")
    async def join(uid: str, request: Request) -> Response:
        asked = await message(request, uid, Join)
        deadline_s = asyncio.get_running_loop().time() + join_wait_s
        while True:
            refuse_unless_leading()
            news = waiters.event(uid)
            place = coordinator.join(uid, asked)
            if place.generation:
                return _json(place)
            if not await _set(news, deadline_s):
                return _json(Assignment(), status=202)
            if await request.is_disconnected():
                return Response(status_code=499)  # a pod that has gone must not join once more

    @routes.post("/beat")
    async def beat(uid: str, request: Request) -> Response:
        said = await message(request, uid, Beat)
        deadline_s = asyncio.get_running_loop().time() + said.patience_s
        news = waiters.event(uid)
        orders = coordinator.beat(uid, said)
        while orders == Orders(generation=said.generation) and await _set(news, deadline_s):
            refuse_unless_leading()
            news = waiters.event(uid)
            orders = coordinator.orders(uid, said)
        return _json(orders)

    @routes.post("/report")
    async def report(uid: str, request: Request) -> Response:
        coordinator.report(uid, await message(request, uid, Report))
        return Response(status_code=204)

    @routes.post("/commit")
    async def commit(uid: str, request: Request) -> Response:
        return _json(coordinator.commit(uid, await message(request, uid, Commit)))

    return routes


async def _set(event: asyncio.Event, deadline_s: float) -> bool:
    """Wait until it is set; False if it is not by the deadline, in the loop's time."""
    try:
        async with asyncio.timeout_at(deadline_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _watchers(metrics: Callable[[], bytes], unhealthy: Problems, unready: Problems) -> APIRouter:
    """What Prometheus and the kubelet call."""
    routes = APIRouter()

    @routes.get("/metrics")
    async def expose() -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/healthz")
    async def healthz() -> Response:
        return _probe(unhealthy())

    @routes.get("/readyz")
    async def readyz() -> Response:
        return _probe(unready())

    return routes


def _refusal(
    status: int, headers: dict[str, str] | None
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=status, headers=headers)

    return answer


def _authenticate(coordinator: Coordinator, uid: str, request: Request) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not coordinator.authenticate(uid, token.strip()) or scheme.lower() != "bearer":
        raise HTTPException(
            401,
            f"wrong or missing token of training {uid}",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )


async def _body(request: Request) -> bytes:
    """The whole body, read no further than the limit."""
    too_large = HTTPException(
        413, f"the body exceeds {BODY_LIMIT_BYTES} bytes", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > BODY_LIMIT_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT_BYTES:
            raise too_large
    return bytes(body)


def _parse(kind: type[Message], body: bytes) -> Message:
    try:
        return kind.model_validate_json(body, extra="ignore")
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise HTTPException(422, f"not a {kind.__name__}: {found}") from error


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _probe(problems: Sequence[str]) -> Response:
    return PlainTextResponse("\n".join(problems) or "ok", 503 if problems else 200)


class ServerThread:
    """An application served by uvicorn in its own thread and event loop."""

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        request_s: float = REQUEST_S,
        most_connections: int | None = None,
    ) -> None:
        """Bind the port at once; 0 takes any free one.

        A connection whose request has not arrived after `request_s` is broken, and so is one that
        comes when there are `most_connections`, by default what the limit of open files allows.
        Raises OSError if the port is taken.
        """
        self._app = app
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server(
            (host, port), family=family, backlog=4096, dualstack_ipv6=host == "::"
        )
        # asyncio does this only for sockets that name TCP; without it each answer takes 40 ms more.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=bounded(request_s, most_connections or affordable_connections()),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=tls_cert,
                ssl_keyfile=tls_key,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
            )
        )
        self._thread = threading.Thread(target=self._run, name="coordinator-http", daemon=True)

    def start(self) -> None:
        """Serve from now on. The port has been accepting since construction."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it still serves; False after `stop` or a crash."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Accept nothing more, answer what is being asked, end the thread."""
        self._app.state.waiters.close()
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])
