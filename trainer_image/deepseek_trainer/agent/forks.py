"""The agent's side of the fork server (`deepseek_trainer.preload`): starts it, starts it again when
it dies, and has it fork ranks.

No training waits for it or fails with it: where it is not there, or refuses, torchrun starts the
worker as always.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek_trainer import preload

log = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
READY_S = 120.0  # a fork server that needs longer to import is no help
REPLY_S = 30.0  # a fork takes milliseconds
RESTART_PAUSE_S = 1.0
FAILED_STARTS = 3  # in a row: no more are tried
POLL_S = 0.01
_SERVER = "import sys; from deepseek_trainer.preload import main; main(int(sys.argv[1]))"


class RankProcess:
    """A forked rank, a child of this process: what torchrun uses of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and end_s is not None and time.monotonic() > end_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_S)
        return code


class ForkServer:
    """One per agent; its process is replaced when it dies."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._connection: socket.socket | None = None  # of a server that is ready
        self._starting = True
        self._process: subprocess.Popen[bytes] | None = None
        self._ranks: list[RankProcess] = []
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        threading.Thread(target=self._keep, name="fork-server", daemon=True).start()

    def fork(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: tuple[int, int, int],
        *,
        title: str,
        stacks: Path,
    ) -> RankProcess | None:
        """A process that runs `command`; None if it has to be started as a fresh one.

        Waits for a server that is still importing: a fresh process would have to import the same.

        Args:
            command: of a Python program.
            environment: all of the process's variables.
            descriptors: its stdin, stdout and stderr.
            title: its name in `ps`, at most 15 characters.
            stacks: file for the stacks of its threads on `preload.STACKS_SIGNAL`.
        """
        self._reap()
        with self._ready:
            self._ready.wait_for(lambda: self._connection or not self._starting, READY_S)
            connection, self._starting = self._connection, False
        if connection is None:
            return None
        request = preload.Request(
            command=list(command),
            environment=dict(environment),
            title=title,
            stacks=str(stacks),
        )
        try:
            preload.send(connection, request, descriptors)
            reply: preload.Reply = preload.receive(connection)[0]
        except (OSError, EOFError) as error:
            log.warning("the fork server does not answer (%s)", error)
            self._lost(connection)
            return None
        if reply["refused"]:
            log.info("a worker is started without the fork server: %s", reply["refused"])
            return None
        rank = RankProcess(reply["pid"])
        self._ranks.append(rank)
        return rank

    @property
    def pid(self) -> int:
        """Process id of the newest server; 0 before the first."""
        return self._process.pid if self._process else 0

    def _reap(self) -> None:
        """Collect what ended ranks have left behind; the kernel made it ours."""
        for rank in [rank for rank in self._ranks if rank.returncode is not None]:
            try:
                while os.waitpid(-rank.pid, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:  # nobody is left of its process group
                self._ranks.remove(rank)

    def _keep(self) -> None:
        failed = 0
        while failed < FAILED_STARTS:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-u", "-c", _SERVER, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal is for the agent
                )
            failed = 0 if self._introduce(ours) else failed + 1
            code = self._process.wait()
            log.warning("the fork server has ended with code %s", code)
            self._lost(ours)
            time.sleep(RESTART_PAUSE_S)
        log.error("workers are started without a fork server: it failed %s times", failed)

    def _introduce(self, connection: socket.socket) -> bool:
        """Wait until the server has imported everything; False if it died over that."""
        try:
            preload.receive(connection)
        except (OSError, EOFError):
            return False
        connection.settimeout(REPLY_S)
        with self._ready:
            self._connection = connection
            self._ready.notify_all()
        return True

    def _lost(self, connection: socket.socket) -> None:
        """The server has died, or is to die because it does not answer."""
        connection.close()
        if self._process:
            self._process.kill()
        with self._ready:
            if self._connection is connection:
                self._connection = None
            self._starting = False
            self._ready.notify_all()
