"""Daemons that outlive this program, found again by what they are, not by a remembered number.

There are no pid files: a pid file lies after a crash, and its number may have been given to
another process. A daemon of a cluster is a process that runs one of our programs and has a path
below the cluster's folder in its command line; a container is a process in a node's cgroup.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from e2e.clusters.shell import ClusterError, wait_until

DAEMONS = frozenset(
    {
        "containerd",
        "containerd-shim-runc-v2",
        "coredns",
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-proxy",
        "kube-scheduler",
        "kubelet",
        # What daemons are called for a moment on their way, and what works on the folder for us:
        # it may go on after we were killed.
        "cp",
        "nsenter",
        "openssl",
        "setsid",
    }
)


def start(*command: str | Path, log: Path, namespace: str | None = None) -> None:
    """Start a daemon in its own session, adopted by init, inside a network namespace if named."""
    enter: list[str] = []
    if namespace is not None:
        # Not `ip netns exec`: that mounts a new /sys, which hides the cgroup hierarchies.
        enter = ["nsenter", f"--net=/run/netns/{namespace}"]
    with log.open("ab") as out:
        subprocess.run(
            ["setsid", "--fork", *enter, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            check=True,
        )


def command_line(pid: int) -> list[str]:
    """Arguments of a process; empty for one that has ended (also unreaped) or never was."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return raw.decode(errors="replace").rstrip("\0").split("\0") if raw else []


def runs(pid: int, program: str) -> bool:
    """Whether the process runs the program of that name."""
    arguments = command_line(pid)
    return bool(arguments) and Path(arguments[0]).name == program


def is_daemon(pid: int, folder: Path, program: str | None = None) -> bool:
    """Whether the process is one of the daemons (or the one named) that work below `folder`."""
    arguments = command_line(pid)
    if not arguments:
        return False
    name = Path(arguments[0]).name
    wanted = name in DAEMONS if program is None else name == program
    return wanted and any(f"{folder}/" in a for a in arguments[1:])


def in_cgroup(pid: int, cgroup: str) -> bool:
    """Whether the process is in `cgroup` (a name at the root, both versions) or below it."""
    if not command_line(pid):
        return False
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(f"{line.split(':', 2)[2]}/".startswith(f"/{cgroup}/") for line in lines)


def find(matches: Callable[[int], bool]) -> list[int]:
    """Numbers of the living processes that match."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if matches(pid)]


def kill_all(matches: Callable[[int], bool], *, timeout_s: float = 20) -> None:
    """SIGKILL every matching process, again and again until there is none."""

    def none_left() -> bool:
        pids = find(matches)
        for pid in pids:
            _kill_if(pid, matches)
        return not pids

    wait_until(none_left, "killed processes to end", timeout_s=timeout_s, interval_s=0.05)


def _kill_if(pid: int, matches: Callable[[int], bool]) -> None:
    """Kill the process only if it still matches once we hold it: its number may be reused."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if matches(pid):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def wait_ready(
    program: str, folder: Path, log: Path, ready: Callable[[], bool], *, timeout_s: float = 60
) -> None:
    """Wait for a daemon to answer; ClusterError with the end of its log if it does not."""
    try:
        wait_until(ready, f"{program} to answer", timeout_s=timeout_s)
    except ClusterError as e:
        alive = find(lambda pid: is_daemon(pid, folder, program))
        state = "is running" if alive else "has ended"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ClusterError(f"{e}; {program} {state}; the end of {log}:\n{end}") from e
