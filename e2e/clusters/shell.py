"""Running programs, and waiting for what they bring about."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class ClusterError(Exception):
    """Something outside this program failed; the text says what, and what to do where known."""


def run(
    program: str | Path,
    *arguments: str | Path,
    stdin: str | None = None,
    timeout_s: float = 60,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Standard output of a program; `environment` is added to this process's own, and
    its PATH decides which program runs.

    Raises ClusterError with the program's own words if it fails or takes too long.
    """
    command = [str(program), *map(str, arguments)]
    env = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise ClusterError(f"`{' '.join(command)}` took longer than {timeout_s:.0f} s") from e
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-4000:]
        raise ClusterError(f"`{' '.join(command)}` failed ({done.returncode}): {words}")
    return done.stdout


def wait_until(
    condition: Callable[[], bool], what: str, *, timeout_s: float, interval_s: float = 0.1
) -> None:
    """Return as soon as `condition` holds; ClusterError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(interval_s)
