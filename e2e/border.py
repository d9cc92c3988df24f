"""A proxy between operators and an API server that does to requests what a test asks for."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from e2e.apiserver import ApiServer, free_ports

WRITES = ("POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True)
class Asked:
    """A request that came to the border; `at_s` is this machine's monotonic clock."""

    at_s: float
    method: str
    path: str
    name: str  # of the object that a write is about
    code: int

    @property
    def is_write(self) -> bool:
        return self.method in WRITES


def _nothing(_asked: Asked) -> None:
    return


class Border:
    """Passes everything on, but for what is set here from any thread.

    `throttled`: every request is answered 429, with `Retry-After: 1`. `forgetful`: watches are
    answered 410, as if their resourceVersion were too old. `after_write` is called when a write is
    stored and not yet answered.
    """

    def __init__(self, server: ApiServer, folder: Path) -> None:
        (self._port,) = free_ports(1)
        self.kubeconfig = folder / "border-kubeconfig"
        config = json.loads(server.kubeconfig.read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._port}"}
        self.kubeconfig.write_text(json.dumps(config))
        self.throttled = False
        self.forgetful = False
        self.after_write: Callable[[Asked], object] = _nothing
        self.asked: list[Asked] = []
        self._server = server
        self._tls = ssl.create_default_context(cafile=str(server.certificate))
        self._watches: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()

    def cut_watches(self) -> None:
        """Break every watch that is running."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for watch in self._watches:
            watch.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        watching = request.query.get("watch") in ("true", "1")
        if self.throttled or (watching and self.forgetful):
            code, reason = (429, "TooManyRequests") if self.throttled else (410, "Expired")
            self._note(request, code)
            said = {"kind": "Status", "code": code, "reason": reason, "message": "by the test"}
            return web.json_response(said, status=code, headers={"Retry-After": "1"})
        headers = {
            "Authorization": f"Bearer {self._server.token}",
            **{k: v for k, v in request.headers.items() if k in ("Accept", "Content-Type")},
        }
        url = f"https://127.0.0.1:{self._server.port}{request.raw_path}"
        body = await request.read()
        try:
            async with self._session.request(
                request.method, url, data=body or None, headers=headers
            ) as answer:
                if watching:
                    return await self._stream(request, answer)
                content = await answer.read()
                asked = self._note(request, answer.status, body)
                if asked.is_write:
                    await asyncio.to_thread(self.after_write, asked)
                kind = answer.headers.get("Content-Type", "")
                return web.Response(
                    status=answer.status, body=content, headers={"Content-Type": kind}
                )
        except aiohttp.ClientError:
            if request.transport:
                request.transport.abort()
            raise

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        self._note(request, answer.status)
        response = web.StreamResponse(status=answer.status)
        await response.prepare(request)

        async def copy() -> None:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)

        watch = asyncio.create_task(copy())
        self._watches.add(watch)
        try:
            await asyncio.wait([watch])
        finally:
            watch.cancel()
            self._watches.discard(watch)
        if watch.cancelled() and request.transport:
            request.transport.abort()
        return response

    def _note(self, request: web.Request, code: int, body: bytes = b"") -> Asked:
        name = request.path.removesuffix("/status").rpartition("/")[2]
        if request.method == "POST" and body:
            name = json.loads(body)["metadata"]["name"]
        asked = Asked(time.monotonic(), request.method, request.path, name, code)
        self.asked.append(asked)
        return asked

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=4 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            runner = web.AppRunner(
                app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
            )
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self._port).start()
            ready.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await runner.cleanup()


@contextmanager
def border(server: ApiServer, folder: Path) -> Iterator[Border]:
    """A border in its own thread; gone at the end."""
    made = Border(server, folder)
    ready = threading.Event()
    task: list[asyncio.Task[None]] = []

    async def main() -> None:
        task.append(asyncio.ensure_future(made._serve(ready)))
        await asyncio.wait(task)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: made._loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run, name="border", daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield made
    finally:
        made._loop.call_soon_threadsafe(task[0].cancel)
        thread.join()
