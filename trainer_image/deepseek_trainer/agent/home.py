"""The agent's folders, which go when the agent does: one for fifos, error files and the report
socket, and one in memory for what worker processes leave to those after them.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from dstrain_api.constants import ENV_LOCAL_DIR

MEMORY = Path("/dev/shm")  # noqa: S108 -- a pod's own; its size is workers.sharedMemory


@functools.cache
def agent_home() -> Path:
    """A short path under the temporary folder: unix sockets allow 107 characters."""
    return _made(None)


def local_folder() -> Path | None:
    """A folder in memory that outlives worker processes, of this pod alone.

    None where there is no shared memory. Whoever starts the pod may have made it (ENV_LOCAL_DIR).
    """
    if given := os.environ.get(ENV_LOCAL_DIR):
        return Path(given)
    return _made(MEMORY) if os.access(MEMORY, os.W_OK) else None


def _made(where: Path | None) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dstrain-", dir=where))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
