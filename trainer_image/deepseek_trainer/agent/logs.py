"""Workers' stderr passes through the agent, which keeps its end: that is where a traceback is.

torchrun can copy a worker's stderr to a file, but over weeks that fills the pod's disk, and a
script that is not decorated with `torch.distributed.elastic...record` leaves its traceback nowhere
else. So each local rank writes to a fifo; a thread copies it to the agent's own stderr (`kubectl
logs`) and remembers the last bytes.

`torchrun --logs-specs=dstrain` finds `WorkerLogs` by the entry point group `torchrun.logs_specs`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from deepseek_trainer.agent.home import agent_home

TAIL_BYTES = 16_384
PIPE_BYTES = 65_536


class StderrTail:
    """The fifo of one local rank: everything read is written to `sink`, the end is kept."""

    def __init__(self, path: Path, sink: int) -> None:
        os.mkfifo(path)
        self.path = path
        # Opened for writing too, so that the fifo has no end between two generations.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._sink = sink
        self._kept = bytearray()
        self._lock = threading.Lock()

    def drain(self) -> None:
        """Pass on what the worker has written so far."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.fd, PIPE_BYTES):
                with contextlib.suppress(OSError):  # nobody reads our stderr: keep the end anyway
                    _write_all(self._sink, chunk)
                self._kept += chunk
                del self._kept[:-TAIL_BYTES]

    def end(self) -> str:
        """The last bytes that the worker has written."""
        self.drain()
        with self._lock:
            return self._kept.decode(errors="replace")

    def forget(self) -> None:
        """A new process writes from here on."""
        self.drain()
        with self._lock:
            self._kept.clear()


class Tails:
    """The fifos of all local ranks and the thread that reads them."""

    def __init__(self) -> None:
        self._by_rank: dict[int, StderrTail] = {}
        self._selector = selectors.DefaultSelector()

    def path(self, local_rank: int) -> str:
        """Where a new process of this local rank shall write."""
        if local_rank not in self._by_rank:
            tail = StderrTail(agent_home() / f"stderr-{local_rank}", sys.stderr.fileno())
            self._by_rank[local_rank] = tail
            self._selector.register(tail.fd, selectors.EVENT_READ, tail)
            if len(self._by_rank) == 1:
                threading.Thread(target=self._pump, name="worker-stderr", daemon=True).start()
        self._by_rank[local_rank].forget()
        return str(self._by_rank[local_rank].path)

    def end(self, local_rank: int) -> str:
        """The end of what this local rank's process wrote; empty without `--logs-specs=dstrain`."""
        return self._by_rank[local_rank].end() if local_rank in self._by_rank else ""

    def _pump(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data.drain()


TAILS = Tails()  # one per agent: torchrun makes its LogsSpecs before the rendezvous handler


class WorkerLogs(LogsSpecs):
    """stdout as it is, stderr through the agent."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Where the next processes of each local rank write."""
        errors = {rank: agent_home() / f"error-{rank}.json" for rank in envs}
        for rank, path in errors.items():
            path.unlink(missing_ok=True)
            envs[rank]["TORCHELASTIC_ERROR_FILE"] = str(path)
        return LogsDest(
            stdouts=dict.fromkeys(envs, ""),
            stderrs={rank: TAILS.path(rank) for rank in envs},
            error_files={rank: str(path) for rank, path in errors.items()},
        )

    @property
    def root_log_dir(self) -> str:
        """Folder of the fifos."""
        return str(agent_home())


def _write_all(fd: int, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(fd, left) :]
