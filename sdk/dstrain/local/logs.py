"""Logs of a local run's pods: the counterpart of `kubectl logs`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dstrain.local.terminal import Terminal

POLL_S = 0.2


class NoSuchLog(ValueError):
    """There is no log of that run or worker; the text says which there are."""


def find_log(folder: Path, worker: str) -> Path:
    """The log of a pod by its name, or of a worker by its number: then its newest pod's.

    Raises NoSuchLog.
    """
    pods = _pods(folder)
    if not pods:
        raise NoSuchLog(f"{folder} holds no logs; name the folder of a run with --dir")
    mine = [pod for pod in pods if pod == worker or pod.rsplit("-", 2)[1:2] == [worker]]
    if not mine:
        raise NoSuchLog(f"no pod or worker {worker!r} in {folder}; there are {', '.join(pods)}")
    return folder / "pods" / mine[-1] / "log"


def newest_run(runs: Path) -> Path:
    """The folder below `runs` that was written last. Raises NoSuchLog."""
    found = sorted(runs.glob("*/training.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise NoSuchLog(f"no runs in {runs}; name the folder of a run with --dir")
    return found[-1].parent


async def follow_logs(folder: Path, terminal: Terminal) -> None:
    """Print what pods write from now on, each line behind its pod's name, until cancelled."""
    places = {pod: _log(folder, pod).stat().st_size for pod in _pods(folder)}
    while True:
        for pod in _pods(folder):
            with _log(folder, pod).open("rb") as log:
                log.seek(places.get(pod, 0))
                whole = log.read().rpartition(b"\n")
            places[pod] = places.get(pod, 0) + len(whole[0]) + len(whole[1])
            for line in whole[0].decode(errors="replace").splitlines():
                terminal.say(f"[{pod}] {line}")
        await asyncio.sleep(POLL_S)


def _log(folder: Path, pod: str) -> Path:
    return folder / "pods" / pod / "log"


def _pods(folder: Path) -> list[str]:
    """Pods that have a log, the newest last."""
    logs = sorted((folder / "pods").glob("*/log"), key=lambda log: log.stat().st_mtime)
    return [log.parent.name for log in logs]
