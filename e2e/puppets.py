"""Nodes and worker pods that are only played: scheduler, kubelets and agents, without processes.

They do what the API server and the coordinator see of real ones: pods are bound, run and end;
agents join, beat and leave. What the operator must never do is noted in `broken`.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from deepseek_operator.runtime.coordinator import training_token

from e2e.apiserver import ApiServer
from e2e.operators import TOKEN_KEY

TICK_S = 0.1
BEAT_S = 0.5
NODES = ("node-0", "node-1")
PODS = "/api/v1/namespaces/default/pods"
BACKGROUND = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}

Object = dict[str, Any]


class Agent:
    """The agent of one pod, as the coordinator knows it."""

    def __init__(self, pod: Object, coordinator: str) -> None:
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
        self._client = httpx.AsyncClient(
            base_url=f"{coordinator}/v1/trainings/{owner}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )

    @property
    def generation(self) -> int:
        """The one it runs, or comes from."""
        return int(self._place["generation"])

    async def run(self) -> None:
        """Join, run, join again, until told to stop."""
        joined = False
        async with self._client:
            while not self.stopped:
                with suppress(httpx.HTTPError, asyncio.TimeoutError):
                    joined = await (self._beat() if joined else self._join())
                await asyncio.sleep(BEAT_S)

    async def leave(self) -> None:
        """Say goodbye, as on SIGTERM."""
        with suppress(httpx.HTTPError, RuntimeError):
            await self._client.post("/beat", json=self._says("leaving"), timeout=1)

    async def _join(self) -> bool:
        body = {
            **self._who(),
            "address": f"10.0.0.{self.slot}",
            "port": 29500,
            "generation": self.generation,
        }
        answer = await self._client.post("/join", json=body)
        if answer.status_code != 200:
            return False
        self._place = answer.json()
        return True

    async def _beat(self) -> bool:
        """Whether its generation goes on."""
        answer = await self._client.post("/beat", json=self._says("running"), timeout=2)
        self.codes[answer.status_code] += 1
        if answer.status_code != 200:
            return True
        orders = answer.json()
        self.stopped = orders["stop"]
        return bool(orders["generation"] == self.generation)

    def _who(self) -> Object:
        return {"pod": self.name, "podUid": self.uid, "slot": self.slot, "node": self.node}

    def _says(self, state: str) -> Object:
        place = {k: v for k, v in self._place.items() if k != "failureIntervalS"}
        return {"groupRank": 0, "groupWorldSize": 0} | place | self._who() | {"state": state}


class Puppets:
    """Plays everything in namespace `default`. `coordinator` says where agents go, at each start
    of a pod.
    """

    def __init__(self, server: ApiServer, coordinator: Callable[[], str]) -> None:
        self.made: dict[str, list[str]] = defaultdict(list)  # uids of all pods of a training
        self.broken: list[str] = []
        self.agents: dict[str, Agent] = {}  # of running pods, by name
        self._coordinator = coordinator
        self._failing: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        tls = ssl.create_default_context(cafile=str(server.certificate))
        self._api = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{server.port}",
            headers={"Authorization": f"Bearer {server.token}"},
            verify=tls,
        )

    def fail(self, training: str, slot: int) -> None:
        """Let the pod in this slot end with exit code 1."""
        self._failing |= {a.name for a in self.of(training) if a.slot == slot}

    def of(self, training: str) -> list[Agent]:
        """The agents of a training."""
        return [a for a in list(self.agents.values()) if a.training == training]

    async def play(self, ended: asyncio.Event) -> None:
        """Play until `ended`."""
        async with self._api:
            await self._make_nodes()
            while not ended.is_set():
                with suppress(httpx.HTTPError, KeyError):  # the API server may be away
                    await self._round()
                await asyncio.sleep(TICK_S)
            for task in self._tasks.values():
                task.cancel()

    async def _make_nodes(self) -> None:
        for name in NODES:
            made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            await self._api.post("/api/v1/nodes", json=made)
            ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            await self._patch(f"/api/v1/nodes/{name}/status", ready)

    async def _round(self) -> None:
        pods = (await self._api.get(PODS)).json()["items"]
        self._look(pods)
        for pod in pods:
            await self._serve(pod)
        present = {pod["metadata"]["name"] for pod in pods}
        for name in [name for name in self.agents if name not in present]:
            self._end(name)

    def _look(self, pods: list[Object]) -> None:
        """Never two live pods in one slot."""
        live: Counter[tuple[str, str]] = Counter()
        for pod in pods:
            meta = pod["metadata"]
            training = meta["labels"]["dstrain.dev/training"]
            if meta["uid"] not in self.made[training]:
                self.made[training].append(meta["uid"])
            if "deletionTimestamp" not in meta and pod["status"]["phase"] in ("Pending", "Running"):
                live[training, meta["labels"]["dstrain.dev/slot"]] += 1
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
            await self._bind(name, NODES[int(meta["labels"]["dstrain.dev/slot"]) % len(NODES)])
        elif phase == "Pending":
            await self._set_phase(name, "Running", {"running": {}})
            self.agents[name] = made = Agent(pod, self._coordinator())
            self._tasks[name] = asyncio.create_task(made.run())
        elif phase == "Running" and name in self._failing:
            self._end(name)
            await self._set_phase(name, "Failed", {"terminated": {"exitCode": 1}})
        elif phase == "Running" and agent and agent.stopped:
            await agent.leave()
            self._end(name)
            await self._set_phase(name, "Succeeded", {"terminated": {"exitCode": 0}})

    async def _bind(self, name: str, node: str) -> None:
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
        if answer.is_error:
            self.broken.append(f"the puppets are wrong: {answer.text}")

    def _end(self, name: str) -> None:
        self.agents.pop(name, None)
        task = self._tasks.pop(name, None)
        if task:
            task.cancel()


@contextmanager
def puppets(server: ApiServer, coordinator: Callable[[], str]) -> Iterator[Puppets]:
    """Puppets in a thread of their own, until the end."""
    made: list[Puppets] = []
    ready = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        made.append(Puppets(server, coordinator))
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
