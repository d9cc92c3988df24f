"""The agent's own folder: fifos, error files and the report socket. It goes when the agent does."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


@functools.cache
def agent_home() -> Path:
    """A short path under the temporary folder: unix sockets allow 107 characters."""
    home = Path(tempfile.mkdtemp(prefix="dstrain-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(home, ignore_errors=True)

    atexit.register(remove)
    return home
