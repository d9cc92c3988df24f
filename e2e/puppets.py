"""Nodes and worker pods that are only played: scheduler, kubelets and agents, without processes.

They do what the API server and the coordinator see of real ones: pods are bound, run and end;
agents join, beat and leave. What the operator must never do is noted in `broken`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import httpx
from deepseek_operator.runtime.coordinator import training_token
from dstrain_api.constants import ANNOTATION_EXCLUDED_NODES

from e2e.apiserver import ApiServer
from e2e.operators import TOKEN_KEY

RETRY_S = 0.5
PODS = "/api/v1/namespaces/default/pods"
BACKGROUND = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}

Object = dict[str, Any]


class Agent:
    """The agent of one pod, as the coordinator knows it.

    Args:
        pod: its pod, bound to a node.
        coordinator: where it answers.
        client: for all that it asks.
        beat_s: seconds between two beats.
    """

    def __init__(
        self, pod: Object, coordinator: str, client: aiohttp.ClientSession, beat_s: float
    ) -> None:
        labels = pod["metadata"]["labels"]
        self.name = pod["metadata"]["name"]
        self.uid = pod["metadata"]["uid"]
        self.training = labels["dstrain.dev/training"]
        self.slot = int(labels["dstrain.dev/slot"])
        self.node = pod["spec"]["nodeName"]
        self.codes: Counter[int] = Counter()  # of the answers to its beats
        self.stopped = False
        owner = pod["metadata"]["ownerReferences"][0]["uid"]
        self._place: Object = {"generation": 0}
        token = training_token(TOKEN_KEY.encode(), owner)
        self._url = f"{coordinator}/v1/trainings/{owner}"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._client = client
        self._beat_s = beat_s

    @property
    def generation(self) -> int:
        """The one it runs, or comes from."""
        return int(self._place["generation"])

    async def run(self) -> None:
        """Join, run, join again, until told to stop."""
        joined = False
        while not self.stopped:
            with suppress(aiohttp.ClientError, TimeoutError):
                joined = await (self._beat() if joined else self._join())
            await asyncio.sleep(self._beat_s if joined else RETRY_S)

    async def leave(self) -> None:
        """Say goodbye, as on SIGTERM."""
        with suppress(aiohttp.ClientError, TimeoutError):
            await self._ask("beat", self._says("leaving"), timeout_s=1)

    async def _join(self) -> bool:
        body = {
            **self._who(),
            "address": f"10.0.0.{self.slot}",
            "port": 29500,
            "generation": self.generation,
        }
        code, place = await self._ask("join", body, timeout_s=30)
        if code != 200:
            return False
        self._place = place
        return True

    async def _beat(self) -> bool:
        """Whether its generation goes on."""
        code, orders = await self._ask("beat", self._says("running"), timeout_s=2)
        self.codes[code] += 1
        if code != 200:
            return True
        self.stopped = orders["stop"]
        return bool(orders["generation"] == self.generation)

    async def _ask(self, what: str, body: Object, *, timeout_s: float) -> tuple[int, Any]:
        """Status code and body of the answer."""
        limit = aiohttp.ClientTimeout(total=timeout_s)
        asked = self._client.post(
            f"{self._url}/{what}", json=body, headers=self._headers, timeout=limit
        )
        async with asked as answer:
            return answer.status, await answer.json()

    def _who(self) -> Object:
        return {"pod": self.name, "podUid": self.uid, "slot": self.slot, "node": self.node}

    def _says(self, state: str) -> Object:
        place = {k: v for k, v in self._place.items() if k != "failureIntervalS"}
        return {"groupRank": 0, "groupWorldSize": 0} | place | self._who() | {"state": state}


class Puppets:
    """Plays everything in namespace `default`.

    Args:
        server: where the pods are.
        coordinator: says where agents go, at each start of a pod.
        nodes: names of the nodes.
        tick_s: seconds between two looks at all pods.
        beat_s: seconds between two beats of an agent.
    """

    def __init__(
        self,
        server: ApiServer,
        coordinator: Callable[[], str],
        nodes: Sequence[str],
        tick_s: float,
        beat_s: float,
    ) -> None:
        self.made: dict[str, list[str]] = defaultdict(list)  # uids of all pods of a training
        self.broken: list[str] = []
        self.agents: dict[str, Agent] = {}  # of running pods, by name
        self._coordinator = coordinator
        self._nodes = dict.fromkeys(nodes, True)  # whether there is power
        self._shown: dict[str, bool] = {}  # whether Kubernetes calls them ready
        self._pods: dict[str, Object] = {}  # by name
        self._load: dict[str, int] = {}  # live pods on each node with power
        self._tick_s = tick_s
        self._beat_s = beat_s
        self._failing: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        tls = ssl.create_default_context(cafile=str(server.certificate))
        self._api = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{server.port}",
            headers={"Authorization": f"Bearer {server.token}"},
            verify=tls,
        )
        self._agency: aiohttp.ClientSession

    def fail(self, training: str, slot: int) -> None:
        """Let the pod in this slot end with exit code 1."""
        self._failing |= {a.name for a in self.of(training) if a.slot == slot}

    def power_off(self, nodes: Collection[str]) -> None:
        """Nobody hears of these nodes any more, and Kubernetes calls them not ready at once."""
        self._nodes |= dict.fromkeys(nodes, False)

    def of(self, training: str) -> list[Agent]:
        """The agents of a training."""
        return [a for a in list(self.agents.values()) if a.training == training]

    async def play(self, ended: asyncio.Event) -> None:
        """Play until `ended`."""
        unlimited = aiohttp.TCPConnector(limit=0)
        async with self._api, aiohttp.ClientSession(connector=unlimited) as self._agency:
            following = asyncio.create_task(self._follow())
            while not ended.is_set():
                if following.done():
                    following.result()
                with suppress(httpx.HTTPError):  # the API server may be away
                    await self._round()
                await asyncio.sleep(self._tick_s)
            for task in (following, *self._tasks.values()):
                task.cancel()

    async def _round(self) -> None:
        for node, powered in list(self._nodes.items()):
            if self._shown.get(node) != powered:
                await self._show(node, powered)
        pods = list(self._pods.values())
        self._look(pods)
        for pod in pods:
            if self._nodes.get(pod["spec"].get("nodeName"), True):
                await self._serve(pod)
        for name in self.agents.keys() - self._pods.keys():
            self._end(name)

    async def _follow(self) -> None:
        """Know all pods: a list, then what changes."""
        while True:
            with suppress(httpx.HTTPError, KeyError):
                listed = (await self._api.get(PODS)).json()
                self._pods = {pod["metadata"]["name"]: pod for pod in listed["items"]}
                await self._watch(listed["metadata"]["resourceVersion"])
            await asyncio.sleep(self._tick_s)

    async def _watch(self, version: str) -> None:
        # One that began while the API server was starting may never say anything.
        since = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "5"}
        async with self._api.stream("GET", PODS, params=since, timeout=10) as answer:
            async for line in answer.aiter_lines():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                name = event["object"]["metadata"]["name"]
                self._pods[name] = event["object"]
                if event["type"] == "DELETED":
                    del self._pods[name]

    async def _show(self, node: str, powered: bool) -> None:
        """Let Kubernetes know of a node; without power its agents are gone, too."""
        if node not in self._shown:
            made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
            await self._api.post("/api/v1/nodes", json=made)
        ready = {"type": "Ready", "status": "True" if powered else "Unknown"}
        await self._patch(f"/api/v1/nodes/{node}/status", {"status": {"conditions": [ready]}})
        self._shown[node] = powered
        for name in [a.name for a in self.agents.values() if a.node == node and not powered]:
            self._end(name)

    def _look(self, pods: list[Object]) -> None:
        """Never two live pods in one slot; and how full the nodes are."""
        live: Counter[tuple[str, str]] = Counter()
        self._load = dict.fromkeys((n for n, powered in self._nodes.items() if powered), 0)
        for pod in pods:
            meta = pod["metadata"]
            training = meta["labels"]["dstrain.dev/training"]
            if meta["uid"] not in self.made[training]:
                self.made[training].append(meta["uid"])
            if "deletionTimestamp" not in meta and pod["status"]["phase"] in ("Pending", "Running"):
                live[training, meta["labels"]["dstrain.dev/slot"]] += 1
                if pod["spec"].get("nodeName") in self._load:
                    self._load[pod["spec"]["nodeName"]] += 1
        self.broken += [f"{n} live pods in slot {slot}" for slot, n in live.items() if n > 1]

    async def _serve(self, pod: Object) -> None:
        meta, phase = pod["metadata"], pod["status"]["phase"]
        name = meta["name"]
        agent = self.agents.get(name)
        if "deletionTimestamp" in meta:
            if agent:
                await agent.leave()
            await self._api.request("DELETE", f"{PODS}/{name}", json=BACKGROUND)
        elif "nodeName" not in pod["spec"]:
            await self._bind(pod)
        elif phase == "Pending" and agent is None:
            await self._set_phase(name, "Running", {"running": {}})
            made = Agent(pod, self._coordinator(), self._agency, self._beat_s)
            self.agents[name] = made
            self._tasks[name] = asyncio.create_task(made.run())
        elif phase == "Running" and name in self._failing:
            self._end(name)
            await self._set_phase(name, "Failed", {"terminated": {"exitCode": 1}})
        elif phase == "Running" and agent and agent.stopped:
            await agent.leave()
            self._end(name)
            await self._set_phase(name, "Succeeded", {"terminated": {"exitCode": 0}})

    async def _bind(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        avoided = pod["metadata"].get("annotations", {}).get(ANNOTATION_EXCLUDED_NODES, "")
        best = self._load.keys() - set(avoided.split(",")) or self._load.keys()
        node = min(best, key=lambda n: (self._load[n], n))
        self._load[node] += 1
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": target,
        }
        await self._api.post(f"{PODS}/{name}/binding", json=binding)

    async def _set_phase(self, name: str, phase: str, state: Object) -> None:
        container = {
            "name": "trainer",
            "image": "i",
            "imageID": "i",
            "ready": phase == "Running",
            "restartCount": 0,
            "state": state,
        }
        status = {"phase": phase, "containerStatuses": [container]}
        await self._patch(f"{PODS}/{name}/status", {"status": status})

    async def _patch(self, path: str, change: Object) -> None:
        answer = await self._api.patch(
            path, json=change, headers={"Content-Type": "application/merge-patch+json"}
        )
        if answer.is_error and answer.status_code != 404:  # it has just gone
            self.broken.append(f"the puppets are wrong: {answer.text}")

    def _end(self, name: str) -> None:
        self.agents.pop(name, None)
        task = self._tasks.pop(name, None)
        if task:
            task.cancel()


@contextmanager
def puppets(
    server: ApiServer,
    coordinator: Callable[[], str],
    *,
    nodes: Sequence[str] = ("node-0", "node-1"),
    tick_s: float = 0.1,
    beat_s: float = 0.5,
) -> Iterator[Puppets]:
    """Puppets in a thread of their own, until the end; see there."""
    made: list[Puppets] = []
    ready = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        made.append(Puppets(server, coordinator, nodes, tick_s, beat_s))
        ready.set()
        await made[0].play(ended)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run, name="puppets", daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield made[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
