"""The client of the real cluster against a scripted HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from deepseek_operator.kube.api import ApiCluster
from deepseek_operator.kube.port import (
    NODES,
    PODS,
    AlreadyExists,
    ClusterError,
    Conflict,
    Gone,
    NotFound,
    Refused,
)
from kubernetes.aio import client

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "ns", "name": "p"}}


def status(code: int, reason: str, message: str = "told by the server") -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": message}


class Scripted:
    """Answers each request with the next step of its script and keeps what was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.calls: list[tuple[str, str]] = []

    def answer(self, code: int, body: Any, **headers: str) -> None:
        async def respond(_request: web.Request) -> web.StreamResponse:
            text = body if isinstance(body, str) else json.dumps(body)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(status=code, text=text, headers=named)

        self.script.append(respond)

    def stream(self, *events: dict[str, Any], cut: bool = False) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for event in events:
                await response.write(json.dumps(event).encode() + b"\n")
            if cut and request.transport:
                request.transport.abort()
            return response

        self.script.append(respond)

    def hang_up(self) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            assert request.transport
            request.transport.abort()
            return web.Response()

        self.script.append(respond)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.asked.append((request.method, request.path, dict(request.query), body))
        return await self.script.pop(0)(request)


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Scripted, ApiCluster]]:
    server = Scripted()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    api = client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}"))
    cluster = ApiCluster(api, on_call=lambda method, code: server.calls.append((method, code)))
    try:
        yield server, cluster
    finally:
        await cluster.close()
        await runner.cleanup()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_create_goes_to_the_collection_and_returns_what_was_stored() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(201, {**POD, "metadata": {"uid": "u"}})
            assert (await cluster.create(POD))["metadata"]["uid"] == "u"
            method, path, _, body = server.asked[0]
            assert (method, path, body) == ("POST", "/api/v1/namespaces/ns/pods", POD)
            assert server.calls == [("POST", "201")]

    run(main())


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),
        (404, "NotFound", NotFound),
        (403, "Forbidden", Refused),
        (422, "Invalid", Refused),
        (400, "BadRequest", Refused),
        (410, "Expired", Gone),
        (500, "InternalError", ClusterError),
        (401, "Unauthorized", ClusterError),
    ],
)
def test_refusals_are_told_apart(code: int, reason: str, error: type[ClusterError]) -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(code, status(code, reason))
            with pytest.raises(ClusterError, match="told by the server") as raised:
                await cluster.create(POD)
            assert raised.type is error

    run(main())


def test_throttled_call_waits_as_long_as_it_is_told_then_succeeds() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(429, status(429, "TooManyRequests"), Retry_After="1")
            server.answer(201, POD)
            started_s = asyncio.get_running_loop().time()
            await cluster.create(POD)
            assert asyncio.get_running_loop().time() - started_s >= 1
            assert server.calls == [("POST", "429"), ("POST", "201")]

    run(main())


def test_throttled_watch_is_not_asked_for_again_before_its_time() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(429, status(429, "TooManyRequests"), Retry_After="1")
            started_s = asyncio.get_running_loop().time()
            with pytest.raises(ClusterError):
                await anext(cluster.watch(PODS, resource_version="1"))
            assert asyncio.get_running_loop().time() - started_s >= 1

    run(main())


def test_call_that_stays_throttled_fails_in_the_end() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            for _ in range(4):
                server.answer(429, "busy", Retry_After="0")
            with pytest.raises(ClusterError, match="busy"):
                await cluster.create(POD)

    run(main())


def test_broken_connection_is_a_failure_to_be_tried_again() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.hang_up()
            with pytest.raises(ClusterError):
                await cluster.create(POD)
            assert server.calls == [("POST", "<error>")]

    run(main())


def test_delete_names_the_uid_and_another_uid_is_not_found() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(200, POD)
            server.answer(409, status(409, "Conflict"))
            await cluster.delete(PODS, "ns", "p", uid="u1", grace_s=0)
            options = server.asked[0][3]
            assert options["preconditions"] == {"uid": "u1"}
            assert options["gracePeriodSeconds"] == 0
            with pytest.raises(NotFound):
                await cluster.delete(PODS, "ns", "p", uid="u2")

    run(main())


def test_list_follows_the_pages() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(
                200, {"metadata": {"resourceVersion": "5", "continue": "c"}, "items": [POD]}
            )
            server.answer(200, {"metadata": {"resourceVersion": "5"}, "items": [POD, POD]})
            pages = [page async for page in cluster.list_pages(PODS, label_selector="a=b")]
            assert [len(page.items) for page in pages] == [1, 2]
            assert pages[-1].resource_version == "5"
            assert server.asked[0][2] == {"limit": "500", "labelSelector": "a=b"}
            assert server.asked[1][2]["continue"] == "c"
            assert server.asked[0][1] == "/api/v1/pods"

    run(main())


def test_list_that_took_too_long_is_gone() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(410, status(410, "Expired"))
            with pytest.raises(Gone):
                async for _ in cluster.list_pages(NODES):
                    pass

    run(main())


def test_watch_begins_with_a_bookmark_and_gives_the_events() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.stream({"type": "ADDED", "object": POD}, {"type": "DELETED", "object": POD})
            events = [e async for e in cluster.watch(PODS, resource_version="7", namespace="ns")]
            assert [e.type for e in events] == ["BOOKMARK", "ADDED", "DELETED"]
            assert events[0].object["metadata"]["resourceVersion"] == "7"
            asked = server.asked[0][2]
            assert asked["resourceVersion"] == "7"
            assert asked["allowWatchBookmarks"] == "true"
            assert 300 <= int(asked["timeoutSeconds"]) <= 600

    run(main())


def test_watch_of_a_history_that_is_gone() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.stream({"type": "ERROR", "object": status(410, "Expired")})
            with pytest.raises(Gone):
                async for _ in cluster.watch(PODS, resource_version="1"):
                    pass

    run(main())


def test_watch_that_is_cut_is_a_failure_after_the_events_so_far() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.stream({"type": "ADDED", "object": POD}, cut=True)
            watch = cluster.watch(PODS, resource_version="1")
            assert (await anext(watch)).type == "BOOKMARK"
            with pytest.raises(ClusterError):
                _ = [event async for event in watch]

    run(main())


def test_status_is_written_whole_with_its_precondition() -> None:
    async def main() -> None:
        async with scripted() as (server, cluster):
            server.answer(200, {"metadata": {"resourceVersion": "9"}})
            version = await cluster.replace_status(
                "ns", "t", resource_version="8", status={"attempt": 1}
            )
            assert version == "9"
            method, path, _, body = server.asked[0]
            assert method == "PUT"
            assert path == "/apis/dstrain.dev/v1alpha1/namespaces/ns/deepseektrainings/t/status"
            assert body["metadata"]["resourceVersion"] == "8"
            assert body["status"] == {"attempt": 1}

    run(main())
