"""The simulated worker pods: what torchrun's agent and its workers do, without the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deepseek_operator.runtime.coordinator import (
    Coordinator,
    Fenced,
    UnknownTraining,
)
from dstrain_api.constants import EXIT_RESTART, LABEL_SLOT
from dstrain_api.protocol import (
    PEER_LOST,
    Beat,
    Commit,
    ErrorReport,
    Join,
    ProgressReport,
    Report,
)
from sim_cluster import exit_status

COMMIT_EVERY = 8  # steps


def _peer_lost() -> ErrorReport:
    return ErrorReport(local_rank=0, exit_code=1, message="reset by peer", fingerprint=PEER_LOST)


def _restart() -> ErrorReport:
    return ErrorReport(local_rank=0, exit_code=EXIT_RESTART)


@dataclass
class Agent:
    """A pod's process."""

    pod: str
    uid: str
    training_uid: str
    slot: int
    node: str
    state: str = "joining"  # joining, running, done
    generation: int = 0  # it is in, or comes from
    rank: int = 0
    world: int = 0
    master: str = ""
    broken: ErrorReport | None = None  # how its workers have ended
    terminating: bool = False
    ended: dict[str, Any] | None = None  # the pod's status once its container has ended
    port: int = 1000


@dataclass
class Agents:
    """All worker pods that run anywhere, reachable or not."""

    coordinator: Callable[[], Coordinator | None]
    reachable: Callable[[str], bool]
    total_steps: int = 10**9
    frozen: bool = False  # nobody makes a step
    by_uid: dict[str, Agent] = field(default_factory=dict)
    steps: dict[tuple[str, int], int] = field(default_factory=dict)  # by training and generation
    committed: dict[str, int] = field(default_factory=dict)
    accepted: Callable[[str, int, str], None] = lambda *_: None

    def start(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        self.by_uid[meta["uid"]] = Agent(
            pod=meta["name"],
            uid=meta["uid"],
            training_uid=meta["ownerReferences"][0]["uid"],
            slot=int(meta["labels"][LABEL_SLOT]),
            node=pod["spec"]["nodeName"],
        )

    def running(self, node: str) -> list[str]:
        return [a.uid for a in self.by_uid.values() if a.node == node]

    def kill(self, uid: str) -> None:
        """The pod's processes are gone, without a word."""
        agent = self.by_uid.pop(uid, None)
        if agent and agent.state == "running":
            self._break_peers(agent, _peer_lost())

    def end(self, uid: str, status: dict[str, Any]) -> None:
        """The pod's container ends by itself, with this pod status."""
        agent = self.by_uid[uid]
        if agent.ended is None:
            agent.ended = status
            if agent.state == "running":
                self._break_peers(agent, _peer_lost())

    def terminate(self, uid: str) -> None:
        """SIGTERM: all workers save at one step, and this pod leaves."""
        agent = self.by_uid.get(uid)
        if agent is None or agent.terminating:
            return
        agent.terminating = True
        if agent.state == "running":
            self._break_peers(agent, _restart())

    def exit_of(self, uid: str) -> dict[str, Any] | None:
        agent = self.by_uid.get(uid)
        if agent is None:  # the node was without power meanwhile
            return exit_status(137, why="ContainerStatusUnknown")
        return agent.ended

    def fail_worker(self, uid: str, error: ErrorReport) -> bool:
        """A training process of the pod dies; False if none runs."""
        agent = self.by_uid[uid]
        if agent.state != "running" or agent.ended is not None or agent.broken is not None:
            return False
        step = self.steps.get((agent.training_uid, agent.generation), 0)
        agent.broken = error.model_copy(update={"step": step})
        self._break_peers(agent, _peer_lost())
        return True

    def tick(self) -> None:
        for agent in list(self.by_uid.values()):
            if agent.ended is None:
                self._live(agent)

    def _break_peers(self, agent: Agent, error: ErrorReport) -> None:
        """Whoever can notice that a peer is gone sees its connections break."""
        if not self.reachable(agent.node):
            return
        for peer in self._peers(agent):
            if peer is not agent and self.reachable(peer.node) and peer.broken is None:
                peer.broken = error

    def _peers(self, agent: Agent) -> list[Agent]:
        return [
            a
            for a in self.by_uid.values()
            if a.training_uid == agent.training_uid
            and a.generation == agent.generation
            and a.state == "running"
            and a.ended is None
        ]

    def _live(self, agent: Agent) -> None:
        coordinator = self.coordinator()
        if coordinator and self.reachable(agent.node):
            try:
                self._speak(agent, coordinator)
            except Fenced:
                self.end(agent.uid, exit_status(1))
            except UnknownTraining:
                pass
        if agent.terminating:
            agent.ended = exit_status(143)

    def _speak(self, agent: Agent, coordinator: Coordinator) -> None:
        if agent.terminating:
            coordinator.beat(agent.training_uid, self._beat(agent, "leaving"))
            return
        if agent.broken is not None:
            report = Report(pod_uid=agent.uid, generation=agent.generation, error=agent.broken)
            coordinator.report(agent.training_uid, report)
            agent.broken = None
            agent.state = "joining"
        if agent.state == "joining":
            self._join(agent, coordinator)
        orders = coordinator.beat(agent.training_uid, self._beat(agent, agent.state))
        if orders.stop:
            coordinator.beat(agent.training_uid, self._beat(agent, "leaving"))
            agent.ended = exit_status(0)
        elif agent.state == "running" and orders.generation != agent.generation:
            agent.state = "joining"
            self._break_peers(agent, _restart())
        elif agent.state == "running":
            self._step(agent, coordinator)
        elif agent.state == "done":
            agent.ended = exit_status(0)

    def _join(self, agent: Agent, coordinator: Coordinator) -> None:
        agent.port += 1
        place = coordinator.join(
            agent.training_uid,
            Join(
                pod=agent.pod,
                pod_uid=agent.uid,
                slot=agent.slot,
                node=agent.node,
                address="10.0.0.1",
                port=agent.port,
                generation=agent.generation,
            ),
        )
        if place.generation:
            assert place.generation > agent.generation
            agent.generation, agent.rank = place.generation, place.group_rank
            agent.world, agent.master = place.group_world_size, place.master_address
            agent.state = "running"

    def _beat(self, agent: Agent, state: Any) -> Beat:
        return Beat(
            pod=agent.pod,
            pod_uid=agent.uid,
            slot=agent.slot,
            node=agent.node,
            generation=agent.generation,
            group_rank=agent.rank,
            group_world_size=agent.world,
            master_address=agent.master,
            master_port=1,
            state=state,
        )

    def _step(self, agent: Agent, coordinator: Coordinator) -> None:
        """One step when all peers take part; rank 0 reports and commits."""
        peers = self._peers(agent)
        together = len(peers) == agent.world and all(
            self.reachable(p.node) and p.broken is None for p in peers
        )
        if self.frozen or agent.rank != 0 or not together:
            return
        key = (agent.training_uid, agent.generation)
        resumed = self.committed.get(agent.training_uid, 0)
        step = self.steps.setdefault(key, resumed) + 1
        self.steps[key] = step
        progress = ProgressReport(
            step=step, total_steps=self.total_steps, tokens=step * 10, resumed_step=resumed
        )
        done = step >= self.total_steps
        report = Report(
            pod_uid=agent.uid, generation=agent.generation, progress=progress, done=done
        )
        coordinator.report(agent.training_uid, report)
        if step % COMMIT_EVERY == 0:
            self.try_commit(agent, step, coordinator)
        if done:
            for peer in peers:
                peer.state = "done"

    def try_commit(self, agent: Agent, step: int, coordinator: Coordinator) -> None:
        commit = Commit(pod_uid=agent.uid, generation=agent.generation, step=step, uri="file:///c")
        if coordinator.commit(agent.training_uid, commit).accepted:
            self.committed[agent.training_uid] = step
            self.accepted(agent.training_uid, agent.generation, agent.uid)
