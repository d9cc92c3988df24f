"""What a container is to its process, for a pod on this machine: `python podinit.py COMMAND ...`.

A process group would not do: torchrun starts each worker in a session of its own. So this program
stands above the pod's first process and adopts every orphan of it. It ends them all

- when the first process ends (as PID 1 of a container does), and exits as that one did;
- when its stdin is closed: the runner lets go of the pod, or has crashed and left nobody behind.

SIGTERM is passed to the first process. The pod's TMPDIR and its folder in memory are made and
removed here; the path of the first is short, because unix sockets are made in it. Runs without the
packages of this project, to start in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
KILL_INTERVAL_S = 0.02
MEMORY = "/dev/shm"  # noqa: S108 -- a folder of its own is made in it


def main(command: list[str]) -> int:
    """Run `command` until it ends or stdin closes; the exit code as a shell would give it."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # noticed by the wake-up pipe
    os.environ["TMPDIR"] = scratch = tempfile.mkdtemp(prefix="dstrain-pod-", dir="/tmp")
    folders = [scratch]
    if os.access(MEMORY, os.W_OK):
        # The agent's would stay behind when it is killed, and take memory of the machine.
        os.environ["DSTRAIN_LOCAL_DIR"] = memory = tempfile.mkdtemp(
            prefix="dstrain-pod-", dir=MEMORY
        )
        folders.append(memory)
    try:
        status = _run(command, wake_read)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _run(command: list[str], wake_read: int) -> int:
    first = _start(command)
    status: int | None = None
    while status is None:
        ready, _, _ = select.select([0, wake_read], [], [])
        if 0 in ready and not os.read(0, 1024):
            break
        if wake_read in ready and {*os.read(wake_read, 1024)} & {signal.SIGTERM, signal.SIGINT}:
            os.kill(first, signal.SIGTERM)
        status = _reap(first)
    return _kill_all(first, status)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            after_name = stat.read_text().rpartition(")")[2].split()
            if after_name[0] != "Z":
                children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, ())]
        found += frontier
    return found


def _start(command: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606 -- the pod's own command
    except OSError as error:
        print(f"cannot start {command[0]!r}: {error}", file=sys.stderr)
    finally:
        os._exit(127)


def _reap(first: int) -> int | None:
    """Collect ended children; the status of the first process if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == first:
                found = ended[1]
    return found


def _kill_all(first: int, status: int | None) -> int:
    while left := descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(KILL_INTERVAL_S)
        ended = _reap(first)
        status = ended if status is None else status
    if status is None:
        status = _reap(first)
    return signal.SIGKILL if status is None else status


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
