"""A gang of stock torchrun agents (dynamic rendezvous, `c10d`) that faults happen to.

Nobody starts such an agent again, so that is done here at once, as a Job would. As shipped, the
first agent holds the rendezvous store, and the workers' process group uses it too. Tuned is the
best that was found: the store has a process of its own that nothing happens to, the workers make
one of theirs, and an agent is given up after three seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from deepseek_operator.core.worker import trainer_config
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CONFIG, ENV_REPORT_SOCKET
from dstrain_api.spec import DeepSeekTrainingSpec
from torch._C._distributed_c10d import TCPStore

from e2e.faults.plan import Kind

GIVE_UP_S: Final = 60.0
TUNED: Final = "is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3"


class StockGang:
    """Agents with a worker each, and the steps that rank 0 reports."""

    def __init__(
        self, spec: DeepSeekTrainingSpec, folder: Path, *, agents: int, tuned: bool
    ) -> None:
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
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1" if tuned else "0",
        }
        self._log = (folder / "log").open("ab")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._store = TCPStore("127.0.0.1", port, is_master=True) if tuned else None
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=stock", f"--nnodes={agents}"),
            *([f"--rdzv-conf={TUNED}"] if tuned else []),
            *("--max-restarts=1000", "--monitor-interval=0.1", "-m", "benchmarks.stock_worker"),
        ]
        self._agents = [self._start() for _ in range(agents)]

    @classmethod
    @contextmanager
    def running(
        cls, spec: DeepSeekTrainingSpec, *, agents: int, tuned: bool
    ) -> Iterator[StockGang]:
        """Start, wait for the first step, and end everything afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            gang = cls(spec, Path(folder), agents=agents, tuned=tuned)
            try:
                if gang._new_step(time.monotonic()) is None:
                    raise RuntimeError(
                        f"stock torchrun does not start: {(Path(folder) / 'log').read_text()}"
                    )
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
            self._agents[index] = self._start()
            self._agents.append(agent)  # it is ended with the others
        return self._new_step(at_s)

    def _new_step(self, since_s: float) -> float | None:
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
        return subprocess.Popen(
            self._command,
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
