"""Pods of one training that talk to a coordinator, with a clock of our own."""

from __future__ import annotations

from deepseek_operator.core.model import Gathering, Membership, MemberView
from deepseek_operator.runtime.coordinator import Coordinator
from dstrain_api.protocol import Assignment, Beat, Commit, Join, Orders, Report

UID = "training-uid"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Gang:
    """Pods of one training that talk to a coordinator."""

    def __init__(self, generation: int = 0, size: int = 2) -> None:
        self.clock = Clock()
        self.size = size
        self.news: list[str] = []
        self.coordinator = Coordinator(clock=self.clock)
        self.coordinator.register(UID, generation=generation, token="t", silence_s=5.0)
        self.coordinator.on_transition = self.news.append

    def restart_operator(self, generation: int) -> None:
        self.coordinator = Coordinator(clock=self.clock)
        self.coordinator.register(UID, generation=generation, token="t", silence_s=5.0)
        self.coordinator.on_transition = self.news.append

    def join(self, slot: int, generation: int = 0, uid: str = "") -> Assignment:
        return self.coordinator.join(
            UID,
            Join(
                pod=f"mini-{slot}-1",
                pod_uid=uid or f"uid-{slot}",
                slot=slot,
                node=f"node-{slot}",
                address=f"10.0.0.{slot}",
                port=29500 + slot,
                generation=generation,
            ),
        )

    def beat(self, slot: int, generation: int, state: str = "running", uid: str = "") -> Orders:
        return self.coordinator.beat(
            UID,
            Beat(
                pod=f"mini-{slot}-1",
                pod_uid=uid or f"uid-{slot}",
                slot=slot,
                node=f"node-{slot}",
                generation=generation,
                group_rank=slot,
                group_world_size=self.size,
                master_address="10.0.0.0",
                master_port=29500,
                state=state,
            ),
        )

    def publish(self, generation: int, *uids: str) -> None:
        pod_uids = uids or tuple(f"uid-{slot}" for slot in range(self.size))
        self.coordinator.publish(
            UID,
            Membership(
                generation=generation,
                pod_uids=pod_uids,
                master_address="10.0.0.0",
                master_port=29500,
            ),
        )

    def form(self, generation: int) -> None:
        for slot in range(self.size):
            self.join(slot, generation - 1)
        self.publish(generation)
        for slot in range(self.size):
            self.beat(slot, generation)
        self.news.clear()

    def report(self, slot: int, generation: int, **what: object) -> None:
        self.coordinator.report(
            UID, Report.model_validate({"podUid": f"uid-{slot}", "generation": generation, **what})
        )

    def commit(self, slot: int, generation: int, step: int) -> bool:
        commit = Commit(
            pod_uid=f"uid-{slot}", generation=generation, step=step, uri=f"file:///c/step-{step}"
        )
        return self.coordinator.commit(UID, commit).accepted

    @property
    def seen(self) -> Gathering:
        return self.coordinator.snapshot(UID)

    def member(self, slot: int) -> MemberView:
        return next(m for m in self.seen.members if m.pod_uid == f"uid-{slot}")
