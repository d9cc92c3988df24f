"""Seconds from a fault to the first new step, beside stock torchrun's dynamic rendezvous.

Both train the same mini model on as many agents of this machine, take the same checkpoints into a
folder of their own and get the same faults, one after the other and in turns. dstrain decides who
is a member outside of the workers and replaces pods by itself; stock torchrun (`--rdzv-backend=
c10d`, its defaults but for a short last call) has nobody who starts an agent again, so the
benchmark does that at once, as a Job would. The frozen agent is a node that went silent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepseek_operator.core.worker import trainer_config
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CONFIG, ENV_REPORT_SOCKET
from dstrain_api.spec import DeepSeekTrainingSpec

from e2e.faults.drive import Version, injected
from e2e.faults.local import LocalStage
from e2e.faults.plan import Fault, Kind, Moment
from e2e.faults.recoveries import recovery_s

AGENTS = 4
ROUNDS = 5
GIVE_UP_S = 120.0
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
    theirs = torchrun_times()
    head = f"{'fault':<32}{'dstrain s':>18}{'torchrun s':>18}{'ratio':>8}"
    print(f"{head}   median (worst) of {ROUNDS}; '-': not within {GIVE_UP_S:.0f} s")
    for name, kind in FAULTS.items():
        print(
            f"{name:<32}{_shown(ours[kind]):>18}{_shown(theirs[kind]):>18}"
            f"{_ratio(theirs[kind], ours[kind]):>8}"
        )


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


def torchrun_times() -> dict[Kind, list[float | None]]:
    """Recoveries of stock torchrun; after one that does not come, all is started afresh."""
    found: dict[Kind, list[float | None]] = {kind: [] for kind in FAULTS.values()}
    for kind in FAULTS.values():
        while len(found[kind]) < ROUNDS:
            with _Torchrun.running() as gang:
                while len(found[kind]) < ROUNDS:
                    time.sleep(SETTLE_S)
                    found[kind].append(gang.fault(kind, len(found[kind]) % AGENTS))
                    if found[kind][-1] is None:
                        break
            if found[kind] == [None, None]:
                found[kind] += [None] * (ROUNDS - 2)  # it does not recover from this
    return found


class _Torchrun:
    """A gang of stock agents, and the steps that rank 0 reports."""

    def __init__(self, folder: Path) -> None:
        spec = DeepSeekTrainingSpec.model_validate(SPEC)
        config = trainer_config("stock", spec)
        assert config is not None
        self._reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports.bind(str(folder / "reports"))
        self._environment = {
            **os.environ,
            ENV_CONFIG: config.model_dump_json(),
            ENV_CHECKPOINT_DIR: str(folder / "checkpoints"),
            ENV_REPORT_SOCKET: str(folder / "reports"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._log = (folder / "log").open("ab")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self._agents = [self._start() for _ in range(AGENTS)]

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[_Torchrun]:
        """Start, wait for the first step, and end everything afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            gang = cls(Path(folder))
            try:
                if gang.new_step(time.monotonic()) is None:
                    raise RuntimeError(f"stock torchrun does not start: {folder}/log")
                yield gang
            finally:
                for agent in gang._agents:
                    _end(agent)
                gang._log.close()
                gang._reports.close()

    def fault(self, kind: Kind, index: int) -> float | None:
        """Seconds until the next generation's first step; None if there is none in time."""
        agent = self._agents[index]
        workers = _children(agent.pid)
        at_s = time.monotonic()
        if kind == "kill-process":
            os.kill(workers[0], signal.SIGKILL)
        elif kind == "kill-pod":
            _end(agent)
            self._agents[index] = self._start()
        else:
            for process in (agent.pid, *workers):
                os.kill(process, signal.SIGSTOP)
            self._agents.append(self._start())
        return self.new_step(at_s)

    def new_step(self, since_s: float) -> float | None:
        """Seconds from `since_s` to the first step of a generation that began after it."""
        self._drain()
        self._reports.settimeout(1.0)
        while time.monotonic() < since_s + GIVE_UP_S:
            with suppress(TimeoutError):
                report = json.loads(self._reports.recv(65_536)).get("progress")
                if report and report["step"] > report.get("resumedStep", 0):
                    return time.monotonic() - since_s
        return None

    def _drain(self) -> None:
        """Forget what was reported by those who are ending."""
        self._reports.settimeout(0.3)
        with suppress(TimeoutError):
            while True:
                self._reports.recv(65_536)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{self._port}", "--rdzv-id=stock"]
        command += ["--rdzv-conf=last_call_timeout=1", f"--nnodes={AGENTS - 1}:{AGENTS}"]
        command += ["--max-restarts=1000", "--monitor-interval=0.1", "-m", "deepseek_trainer"]
        return subprocess.Popen(
            command,
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )


def _children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def _end(agent: subprocess.Popen[bytes]) -> None:
    with suppress(FileNotFoundError):
        for worker in _children(agent.pid):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    agent.kill()
    agent.wait()


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
