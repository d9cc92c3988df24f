"""The real cluster: the seven verbs on a Kubernetes API server, on plain dictionaries.

`kubernetes.aio` gives configuration, credentials and connections; its models are not used, they
cost ten times as much.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import urlencode

import aiohttp
from dstrain_api.constants import MANAGER
from kubernetes.aio import client, config

from deepseek_operator.kube.port import (
    BY_KIND,
    TRAININGS,
    AlreadyExists,
    ClusterError,
    Conflict,
    Gone,
    Manifest,
    NotFound,
    Page,
    Refused,
    Resource,
    WatchEvent,
)

PAGE_SIZE: Final = 500
CALL_TIMEOUT: Final = aiohttp.ClientTimeout(total=30, sock_connect=5)
# A bookmark comes every 45 to 75 s (the server's watch cache), so a watch silent for longer is
# dead.
WATCH_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=100)
WATCH_S: Final = (300, 600)  # a watch is ended by the server after a random time between these
THROTTLED_TRIES: Final = 4
LONGEST_RETRY_AFTER_S: Final = 10.0

Object = dict[str, Any]


class ApiCluster:
    """`kube.port.Cluster` over HTTP.

    `on_call(method, code)` is told of every answer; code "<error>" is no answer, as in client-go's
    metrics.
    """

    def __init__(
        self, api: client.ApiClient, *, on_call: Callable[[str, str], None] = lambda _m, _c: None
    ) -> None:
        self._api = api
        self._on_call = on_call

    @classmethod
    async def connect(cls, *, on_call: Callable[[str, str], None]) -> ApiCluster:
        """The cluster of KUBECONFIG, or the one this pod runs in.

        Raises:
            kubernetes.aio.config.ConfigException: neither is there.
        """
        configuration = client.Configuration()
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                client_configuration=configuration
            )
        return cls(client.ApiClient(configuration), on_call=on_call)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()  # type: ignore[no-untyped-call]

    async def create(self, manifest: Manifest) -> Object:
        """Create an object as stored. Raises AlreadyExists, Refused, ClusterError."""
        resource, namespace, _ = _named(manifest)
        query = {"fieldManager": MANAGER}
        return await self._call("POST", _path(resource, namespace), query, body=manifest)

    async def read(self, resource: Resource, namespace: str, name: str) -> Object:
        """An object as stored now. Raises NotFound, ClusterError."""
        return await self._call("GET", _path(resource, namespace, name))

    async def replace(self, manifest: Manifest) -> Object:
        """Store an object whole, if it is still at the resourceVersion that the manifest names.

        Raises Conflict, NotFound, Refused, ClusterError.
        """
        query = {"fieldManager": MANAGER}
        return await self._call("PUT", _path(*_named(manifest)), query, body=manifest)

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_s: int | None = None
    ) -> None:
        """Delete the object with that uid. Raises NotFound (also for another uid), ClusterError."""
        options: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
        }
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            await self._call("DELETE", _path(resource, namespace, name), body=options)
        except Conflict as error:
            raise NotFound(str(error)) from error

    async def replace_status(
        self, namespace: str, name: str, *, resource_version: str, status: Mapping[str, Any]
    ) -> str:
        """Write a training's status whole. Raises Conflict, NotFound, Refused, ClusterError."""
        stored = await self._call(
            "PUT",
            _path(TRAININGS, namespace, name) + "/status",
            {"fieldManager": MANAGER},
            body={
                "apiVersion": TRAININGS.api_version,
                "kind": TRAININGS.kind,
                "metadata": {
                    "namespace": namespace,
                    "name": name,
                    "resourceVersion": resource_version,
                },
                "status": status,
            },
        )
        return str(stored["metadata"]["resourceVersion"])

    async def list_pages(
        self, resource: Resource, *, namespace: str = "", label_selector: str = ""
    ) -> AsyncIterator[Page]:
        """All objects, a page at a time. Raises Gone if it took too long, ClusterError."""
        query = {"limit": str(PAGE_SIZE), "labelSelector": label_selector}
        while True:
            page = await self._call("GET", _path(resource, namespace), query)
            meta = page["metadata"]
            yield Page(page["items"], meta["resourceVersion"])
            if not meta.get("continue"):
                return
            query = {**query, "continue": meta["continue"]}

    async def watch(
        self,
        resource: Resource,
        *,
        resource_version: str,
        namespace: str = "",
        label_selector: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """Changes since `resource_version`, after a bookmark that says that the server answers."""
        query = {
            "watch": "true",
            "resourceVersion": resource_version,
            "labelSelector": label_selector,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_S)),  # noqa: S311 - spreads load only
        }
        try:
            response = await self._request(
                "GET", _path(resource, namespace), query, timeout=WATCH_TIMEOUT
            )
            async with response:
                if response.status != 200:
                    await asyncio.sleep(_retry_after_s(response) or 0.0)
                    raise _failure(response.status, await response.read())
                yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": resource_version}})
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _failed(event["object"])
                    yield WatchEvent(event["type"], event["object"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(f"watch of {resource.plural}: {_told(error)}") from error

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Manifest | None = None,
    ) -> Object:
        """One answer; when the server is too busy, ask again after the time it names."""
        try:
            for _ in range(THROTTLED_TRIES):
                response = await self._request(method, path, query, body=body)
                async with response:
                    answer = await response.read()
                if response.status < 400:
                    return cast(Object, json.loads(answer))
                wait_s = _retry_after_s(response)
                if wait_s is None:
                    break
                await asyncio.sleep(wait_s)  # after the last try too: the next call comes here
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(f"{method} {path}: {_told(error)}") from error
        raise _failure(response.status, answer)

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        *,
        body: Manifest | None = None,
        timeout: aiohttp.ClientTimeout = CALL_TIMEOUT,  # noqa: ASYNC109 - per-phase limits
    ) -> aiohttp.ClientResponse:
        given = {key: value for key, value in (query or {}).items() if value}
        url = f"{self._api.configuration.host}{path}?{urlencode(given)}"
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": MANAGER,
        }
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            answer = await self._api.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=timeout
            )
        except BaseException:
            self._on_call(method, "<error>")
            raise
        self._on_call(method, str(answer.status))
        return cast(aiohttp.ClientResponse, answer.response)


def _named(manifest: Manifest) -> tuple[Resource, str, str]:
    meta = manifest["metadata"]
    return BY_KIND[manifest["kind"]], meta.get("namespace", ""), meta.get("name", "")


def _path(resource: Resource, namespace: str, name: str = "") -> str:
    root = "/apis/" if "/" in resource.api_version else "/api/"
    within = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{resource.api_version}{within}/{resource.plural}" + (f"/{name}" if name else "")


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """How long to wait before the same call is worth another try; None if it is not."""
    if response.status not in (429, 503):
        return None
    named = response.headers.get("Retry-After", "")
    if not named.isdigit():
        return 1.0 if response.status == 429 else None
    return min(float(named), LONGEST_RETRY_AFTER_S)


def _failure(status: int, answer: bytes) -> ClusterError:
    try:
        told = json.loads(answer)
    except ValueError:
        told = {}
    if not isinstance(told, dict) or told.get("kind") != "Status":
        told = {"message": answer[:500].decode(errors="replace").strip()}
    return _failed({"code": status, **told})


def _failed(status: Mapping[str, Any]) -> ClusterError:
    """The error that a Status object stands for."""
    code, reason = status.get("code"), status.get("reason")
    message = str(status.get("message") or reason or f"HTTP {code}")
    if code == 409 and reason == "AlreadyExists":
        return AlreadyExists(message)
    kinds: dict[object, type[ClusterError]] = {
        400: Refused,
        403: Refused,
        404: NotFound,
        409: Conflict,
        410: Gone,
        413: Refused,
        422: Refused,
    }
    return kinds.get(code, ClusterError)(message)


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
