"""One pod in the coordinator's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_operator.core.model import MemberView

GAP_DECAY = 0.98  # per beat: half of a long gap is forgotten after 34 of them


@dataclass(kw_only=True)
class Member:
    """What one pod has said, and when it was heard last, by the coordinator's clock."""

    pod: str
    pod_uid: str
    slot: int
    node: str
    generation: int
    heard_at_s: float
    gap_s: float = 0.0
    state: Literal["joining", "running", "done", "leaving"] = "joining"
    silent: bool = False
    joined_from: int = -1  # generation its last join named; -1: it has not joined here yet
    waiting_since_s: float = 0.0
    joined_at_s: float = 0.0
    address: str = ""
    port: int = 0
    group_world_size: int = 0

    def hear(self, now_s: float) -> bool:
        """It has said something; whether it had been silent."""
        self.gap_s = max(now_s - self.heard_at_s, self.gap_s * GAP_DECAY)
        self.heard_at_s = now_s
        was, self.silent = self.silent, False
        return was

    def view(self, now_s: float) -> MemberView:
        """It as the plan sees it."""
        return MemberView(
            pod=self.pod,
            pod_uid=self.pod_uid,
            slot=self.slot,
            node=self.node,
            state=self.state,
            generation=self.generation,
            silent_s=max(0.0, now_s - self.heard_at_s),
            gap_s=self.gap_s,
            address=self.address,
            port=self.port,
            group_world_size=self.group_world_size,
            waiting_s=max(0.0, now_s - self.waiting_since_s) if self.state == "joining" else 0.0,
            joined_at_s=self.joined_at_s,
        )
