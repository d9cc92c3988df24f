"""The agent's worker processes, as torchrun runs them: how they ended, and how they are ended.

torchrun tells a rendezvous handler nothing of its workers: no event of a failed worker that will
be started again, no word of the end. So this module stands in two methods of torch's `PContext`
(the processes of one generation), and in the one that starts a process:

- `_popen`: a worker is a fork of the pod's fork server, where that can do it.

- `wait`: its result says which local ranks failed with which code, or that all have finished.
- `close`: torchrun sends SIGTERM and waits up to 30 s for the rest of a broken generation. A rank
  that hangs in a collective with a lost peer does not hear it, and a healthy one would begin to
  save. So they are killed at once, except when the pod was asked to stop: then SIGTERM means "save
  at one step and exit", as everywhere in Kubernetes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch.distributed.elastic.multiprocessing.api import PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from deepseek_trainer.agent.errors import WorkerFailure
from deepseek_trainer.agent.forks import ForkServer, RankProcess
from deepseek_trainer.agent.home import agent_home
from deepseek_trainer.agent.logs import TAILS

Process = subprocess.Popen[Any] | RankProcess


class Watcher(Protocol):
    """Who wants to know how workers end. All calls come from torchrun's main thread."""

    @property
    def saving(self) -> bool:
        """Whether the pod was asked to stop, so that its workers are to save."""

    def failed(self, failures: list[WorkerFailure]) -> None:
        """Processes of this pod ended badly; torchrun will ask for the next rendezvous."""

    def finished(self) -> None:
        """All processes of this pod ended well; torchrun will exit."""


def watch_workers(watcher: Watcher) -> None:
    """Tell `watcher` how worker processes end, from now on."""
    wait, close = PContext.wait, PContext.close
    killed: WeakKeyDictionary[PContext, set[int]] = WeakKeyDictionary()  # by us: no failures

    def watched_wait(
        self: PContext, timeout: float = -1, period: float = 1
    ) -> RunProcsResult | None:
        result = wait(self, timeout, period)
        if result is not None and result.is_failed():
            watcher.failed(_failures(result, killed.get(self, set())))
        elif result is not None:
            watcher.finished()
        return result

    def watched_close(
        self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30
    ) -> None:
        if not watcher.saving:
            killed.setdefault(self, set()).update(_kill(self))
        close(self, death_sig, timeout)

    PContext.wait = watched_wait  # type: ignore[method-assign]
    PContext.close = watched_close  # type: ignore[method-assign]


def fork_workers(server: ForkServer) -> Mapping[int, Process]:
    """Start worker processes as forks of `server`, from now on.

    Returns the newest process of each local rank, now and later.
    """
    start = SubprocessHandler._popen
    processes: dict[int, Process] = {}

    def forked(self: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Process:
        rank = server.fork(
            args,
            env,
            (
                0,
                self._stdout.fileno() if self._stdout else 1,
                self._stderr.fileno() if self._stderr else 2,
            ),
            title=f"dstrain-rank-{self.local_rank_id}",
            stacks=agent_home() / f"stacks-{self.local_rank_id}",
        )
        processes[self.local_rank_id] = process = rank or start(self, args, env)
        return process

    SubprocessHandler._popen = forked  # type: ignore[method-assign, assignment]
    return processes


def _failures(result: RunProcsResult, killed: set[int]) -> list[WorkerFailure]:
    return [
        WorkerFailure(local_rank=rank, exit_code=failure.exitcode, stderr=TAILS.end(rank))
        for rank, failure in result.failures.items()
        if rank not in killed
    ]


def _kill(processes: PContext) -> set[int]:
    """End the workers with all that they have started; each leads a session of its own.

    Returns the local ranks that were still running.
    """
    running = {
        rank: handler.proc
        for rank, handler in getattr(processes, "subprocess_handlers", {}).items()
        if handler.proc.poll() is None
    }
    for process in running.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return set(running)
