"""What goes wrong when: written as YAML, or drawn at random.

faults:
  - {at: {step: 40}, kind: kill-process, slot: 1}
  - {at: {seconds: 60}, kind: power-off, slot: 0, lastsSeconds: 20}
  - {at: {event: NodeLost}, kind: kill-process, slot: 0}
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import yaml
from dstrain_api.base import ApiModel
from pydantic import Field, model_validator

Kind = Literal[
    "kill-process",  # SIGKILL of a training process
    "freeze-process",  # SIGSTOP of a training process: a hang
    "kill-pod",  # SIGKILL of a pod's first process and with it of the whole container
    "delete-pod",  # kubectl delete pod
    "power-off",  # the node of a slot, for `lastsSeconds`
    "partition",  # the network of a slot's node, for `lastsSeconds`
    "kill-operator",  # delete the operator's pod without grace
]


class Moment(ApiModel):
    """When a fault is injected: exactly one of the three."""

    step: int | None = Field(None, ge=0)  # as soon as this step is seen to be finished
    seconds: float | None = Field(None, ge=0)  # since the training was first seen to run
    event: str | None = None  # as soon as the history has an entry with this reason

    @model_validator(mode="after")
    def _one(self) -> Moment:
        given = [v for v in (self.step, self.seconds, self.event) if v is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of step, seconds and event")
        return self


class Fault(ApiModel):
    """One thing that goes wrong, on the pod in `slot` or on its node."""

    at: Moment
    kind: Kind
    slot: int = Field(0, ge=0)
    lasts_seconds: float = Field(20.0, gt=0)


class FaultPlan(ApiModel):
    """Faults in the order of their injection; one waits until those before it are injected."""

    faults: list[Fault]

    @classmethod
    def load(cls, path: Path) -> FaultPlan:
        """Read a plan. Raises ValueError with what to change."""
        return cls.model_validate(yaml.safe_load(path.read_text()))


def random_plan(
    seed: int, *, minutes: float, mean_seconds: float, slots: int, kinds: list[Kind]
) -> FaultPlan:
    """Faults of a Poisson process: exponential pauses, kinds and slots drawn evenly."""
    drawn = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    faults = []
    at_s = drawn.expovariate(1 / mean_seconds)
    while at_s < minutes * 60:
        faults.append(
            Fault(
                at=Moment(seconds=round(at_s, 1)),
                kind=drawn.choice(kinds),
                slot=drawn.randrange(slots),
                lasts_seconds=round(drawn.uniform(15, 45), 1),
            )
        )
        at_s += drawn.expovariate(1 / mean_seconds)
    return FaultPlan(faults=faults)
