"""Seconds from a fault to the first new step, beside stock torchrun's dynamic rendezvous.

All train the same mini model on as many agents of this machine, take the same checkpoints into a
folder of their own and get the same faults, in turns. A frozen agent is a node that went silent.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from dstrain_api.spec import DeepSeekTrainingSpec

from benchmarks.stock import GIVE_UP_S, StockGang
from e2e.faults.drive import Version, injected
from e2e.faults.local import LocalStage
from e2e.faults.plan import Fault, Kind, Moment
from e2e.faults.recoveries import recovery_s

AGENTS = 4
ROUNDS = 5
SETTLE_S = 4.0  # of training between two faults
FAULTS: dict[str, Kind] = {
    "SIGKILL of a training process": "kill-process",
    "SIGKILL of agent and process": "kill-pod",
    "node goes silent": "power-off",
}
SPEC: dict[str, Any] = {
    "model": {"preset": "mini"},
    "data": {"sources": [{"uri": "builtin://mini"}]},
    "training": {"total": {"tokens": 10**9}, "globalBatch": 32, "microBatch": 8},
    "checkpoint": {"everySteps": 20},
    "workers": {"replicas": AGENTS},
    "recovery": {
        "budgets": {
            "application": {"max": 1000, "window": "1h"},
            "infrastructure": {"max": 1000, "window": "1h"},
        }
    },
}


def main() -> None:
    """Print median and worst of every fault, and the ratio of the medians."""
    ours = dstrain_times()
    tuned, shipped = torchrun_times(tuned=True), torchrun_times(tuned=False)
    print(f"median (worst) of {ROUNDS}, in seconds; '-': twice not within {GIVE_UP_S:.0f} s")
    columns = ("dstrain", "torchrun, tuned", "ratio", "torchrun, as shipped")
    print(f"{'fault':<32}" + "".join(f"{column:>22}" for column in columns))
    for name, kind in FAULTS.items():
        cells = (
            _shown(ours[kind]),
            _shown(tuned[kind]),
            _ratio(tuned[kind], ours[kind]),
            _shown(shipped[kind]),
        )
        print(f"{name:<32}" + "".join(f"{cell:>22}" for cell in cells))


def dstrain_times() -> dict[Kind, list[float | None]]:
    """Recoveries of one `dstrain run` through all rounds."""
    manifest = {
        "apiVersion": "dstrain.dev/v1alpha1",
        "kind": "DeepSeekTraining",
        "metadata": {"name": "recovery"},
        "spec": SPEC,
    }
    found: dict[Kind, list[float | None]] = {kind: [] for kind in FAULTS.values()}
    with tempfile.TemporaryDirectory() as folder:
        stage = LocalStage(manifest, Path(folder), nodes=2 * AGENTS)
        with stage.running():
            _wait(lambda: _step(stage.versions()) > 0)
            for number in range(ROUNDS):
                for kind in FAULTS.values():
                    time.sleep(SETTLE_S)
                    found[kind].append(_one(stage, kind, slot=number % AGENTS))
            stage.stop()
    return found


def _one(stage: LocalStage, kind: Kind, *, slot: int) -> float | None:
    _wait(lambda: bool(stage.node_of(slot)))
    injection = injected(stage, Fault(at=Moment(seconds=0), kind=kind, slot=slot))
    _wait(lambda: recovery_s(injection, stage.versions()) is not None)
    return recovery_s(injection, stage.versions())


def _step(versions: list[Version]) -> int:
    return int(versions[-1].status.get("progress", {}).get("step", 0)) if versions else 0


def torchrun_times(*, tuned: bool) -> dict[Kind, list[float | None]]:
    """Recoveries of stock torchrun; after one that does not come, all is started afresh."""
    spec = DeepSeekTrainingSpec.model_validate(SPEC)
    found: dict[Kind, list[float | None]] = {kind: [] for kind in FAULTS.values()}
    for kind, times in found.items():
        while len(times) < ROUNDS and times != [None, None]:
            with StockGang.running(spec, agents=AGENTS, tuned=tuned) as gang:
                while len(times) < ROUNDS:
                    time.sleep(SETTLE_S)
                    times.append(gang.fault(kind, len(times) % AGENTS))
                    if times[-1] is None:
                        break
    return found


def _wait(holds: Any) -> None:
    deadline_s = time.monotonic() + GIVE_UP_S
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _shown(times: list[float | None]) -> str:
    known = [t for t in times if t is not None]
    if not known:
        return "-"
    missing = len(times) - len(known)
    middle = f"{statistics.median(known):.1f} ({max(known):.1f})"
    return middle + (f", {missing} -" if missing else "")


def _ratio(theirs: list[float | None], ours: list[float | None]) -> str:
    known, own = [t for t in theirs if t is not None], [t for t in ours if t is not None]
    if not known or not own:
        return "-"
    return f"{statistics.median(known) / statistics.median(own):.1f}"


if __name__ == "__main__":
    main()
