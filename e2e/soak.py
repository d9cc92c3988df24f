"""A training under random faults on a real cluster, and the same training undisturbed beside it.

`python -m e2e.soak --minutes 30` (`make soak`) brings up a cluster of its own, prints the seed, the
faults, the histogram of recoveries and both final losses, and exits with 1 if they differ.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.providers import choose
from e2e.faults.cluster import ClusterStage
from e2e.faults.drive import Injection, Version, drive
from e2e.faults.local import LocalStage
from e2e.faults.plan import FaultPlan, Kind, random_plan
from e2e.faults.recoveries import SLOW_S, histogram, recovery_s, story
from e2e.report import Report, this_machine
from e2e.training import Training
from e2e.undisturbed import Losses, begun

ROOT: Final = Path(__file__).resolve().parent.parent
NODES: Final = 5  # a worker each, a spare, and one more for the node that is off
WORKERS: Final = 3
KINDS: Final[list[Kind]] = [
    "kill-process",
    "freeze-process",
    "kill-pod",
    "delete-pod",
    "power-off",
    "partition",
    "kill-operator",
]
CALIBRATION_STEPS: Final = 150
PRODUCTIVE: Final = 0.7  # share of the time that the faults leave, when the steps are counted out
PATIENCE: Final = 3.0  # times the planned duration
LOSS_TOLERANCE: Final = 1e-3
UNLIMITED: Final = {"max": 1000, "window": "24h"}

# Every token visits all experts. A router that has to choose turns the last bit of a sum, which
# depends on who adds it up, into another expert: with a choice, four undisturbed workers differ by
# 0.01 from one after 33 steps; without, by 3e-6 after 300.
MODEL: Final = {"preset": "mini", "overrides": {"moe": {"topK": 4}}}
SPEC: Final[dict[str, Any]] = {
    "model": MODEL,
    "data": {"sources": [{"uri": "builtin://mini"}]},
    "training": {"globalBatch": 48, "microBatch": 4, "seed": 1},
    "optimizer": {"lr": 3.0e-3},
    "precision": {"compute": "fp32"},
    "workers": {"replicas": WORKERS, "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}},
    "checkpoint": {"everySteps": 25},
    "recovery": {
        "hangTimeout": "10s",
        "budgets": {"infrastructure": UNLIMITED, "application": UNLIMITED},
    },
}


@dataclass(frozen=True)
class Result:
    """What came of a soak."""

    injections: list[Injection]
    versions: list[Version]
    minutes: float
    undisturbed_loss: float

    @property
    def last(self) -> dict[str, Any]:
        """The status at the end."""
        return self.versions[-1].status

    @property
    def loss_difference(self) -> float:
        """Of the final losses, in nats per token."""
        return abs(float(self.last["progress"]["loss"]) - self.undisturbed_loss)

    @property
    def passed(self) -> bool:
        """Whether it completed with the loss of the undisturbed run."""
        return self.last["phase"] == "Complete" and self.loss_difference <= LOSS_TOLERANCE

    def text(self) -> str:
        """The faults, the histogram and the losses."""
        costs = [(i, recovery_s(i, self.versions)) for i in self.injections]
        lines = [
            f"{i.fault.kind:<16} slot {i.fault.slot}  "
            + ("no new generation" if cost is None else f"new step after {cost:.1f} s")
            for i, cost in costs
        ]
        slow = [
            f"\n{i.fault.kind} took {cost:.1f} s:\n{story(i, self.versions)}"
            for i, cost in costs
            if cost is not None and cost > SLOW_S
        ]
        noticed = [(i.fault.kind, cost) for i, cost in costs if i.fault.kind != "kill-operator"]
        return "\n".join(
            [
                *lines,
                *slow,
                "",
                histogram(noticed),
                "",
                f"{len(self.injections)} faults in {self.minutes:.1f} minutes; "
                f"{self.last['phase']} at step {self.last['progress']['step']}",
                f"final loss {self.last['progress']['loss']:.6f}, undisturbed "
                f"{self.undisturbed_loss:.6f}, difference {self.loss_difference:.1e}",
            ]
        )


def manifest(name: str, steps: int, **changes: Any) -> dict[str, Any]:
    """The training of the soak, for so many steps; `changes` replace parts of its spec."""
    spec = copy.deepcopy(SPEC) | changes
    tokens = steps * spec["training"]["globalBatch"] * 64
    spec["training"]["total"] = {"tokens": tokens}
    return {
        "apiVersion": "dstrain.dev/v1alpha1",
        "kind": "DeepSeekTraining",
        "metadata": {"name": name},
        "spec": spec,
    }


def steps_per_second(training: dict[str, Any]) -> float:
    """Of this machine, with all workers on it and nothing going wrong."""
    with tempfile.TemporaryDirectory() as folder:
        stage = LocalStage(training, Path(folder), nodes=1)
        with stage.running():
            pass
        versions = stage.versions()
    first = next(v for v in versions if v.status.get("progress", {}).get("step", 0) > 0)
    last = versions[-1]
    steps = last.status["progress"]["step"] - first.status["progress"]["step"]
    return float(steps / (last.at_s - first.at_s))


@dataclass(frozen=True)
class Options:
    """How long, how often, and which faults."""

    minutes: float
    mean_seconds: float
    seed: int


def plan(options: Options) -> FaultPlan:
    """The faults that these options mean."""
    return random_plan(
        options.seed,
        minutes=options.minutes,
        mean_seconds=options.mean_seconds,
        slots=WORKERS,
        kinds=KINDS,
    )


def soak(
    training: Training,
    operator: install.Release,
    faults: FaultPlan,
    beside: Future[Losses],
) -> Result:
    """Train under a plan's faults to the end; hold it against the losses `beside`."""
    began_s = time.monotonic()
    stage = ClusterStage(training.cluster, training, operator)
    minutes = max((f.at.seconds or 0.0 for f in faults.faults), default=0.0) / 60
    try:
        training.apply()
        training.wait_step(1, 180)
        injections = drive(faults, stage)
        training.wait("Finished", lambda s: s.is_true("Finished"), 300 + PATIENCE * 60 * minutes)
    finally:
        training.close()
    took_minutes = (time.monotonic() - began_s) / 60
    undisturbed = beside.result()
    return Result(injections, stage.versions(), took_minutes, undisturbed[max(undisturbed)])


def run(cluster: Cluster, operator: install.Release, namespace: str, options: Options) -> Result:
    """The whole of it: measure this machine, then the disturbed run and the undisturbed one."""
    rate = steps_per_second(manifest("calibration", CALIBRATION_STEPS))
    steps = int(PRODUCTIVE * rate * 60 * options.minutes)
    training = Training(cluster, manifest("soak", steps), namespace)
    with begun(training.manifest) as beside:
        return soak(training, operator, plan(options), beside)


def main() -> int:
    """Bring a cluster up, soak, take it down."""
    parser = argparse.ArgumentParser(prog="python -m e2e.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mean-seconds", type=float, default=60.0, help="between two faults")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = Options(**vars(parser.parse_args()))
    print(f"seed {options.seed}; the plan:")
    faults = plan(options).model_dump(by_alias=True, exclude_none=True, mode="json")
    print(yaml.safe_dump(faults), flush=True)
    report = Report("soak")
    cluster = choose("soak")
    cluster.up(NODES)
    try:
        operator = install.helm_install(cluster, install.build_and_load(cluster))
        cluster.kubectl("create", "namespace", "soak")
        result = run(cluster, operator, "soak", options)
    finally:
        cluster.down()
    report.text("soak", f"seed {options.seed}\n{result.text()}")
    report.write(ROOT / "runs" / "soak")
    machine = this_machine()
    print(f"{machine.cores} cores of {machine.cpu}, {machine.system}")
    print(result.text())
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
