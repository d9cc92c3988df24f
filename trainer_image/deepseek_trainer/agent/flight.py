"""PyTorch's flight recorder: the last 2,000 NCCL collectives of a rank with their states, which
tell a rank that called another collective than its peers from one whose network stands still.

A rank with NCCL makes a fifo `<stem><rank>.pipe`; about a second after something is written to it,
a thread of torch writes what is recorded to `<stem><rank>` (torch 2.13, ProcessGroupNCCL.hpp:
DumpPipe). A rank without NCCL makes none, and nothing is asked of it.
`torchfrtrace --prefix` reads the files of all ranks in one folder.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

WRITTEN_S = 5.0
POLL_S = 0.05
NAME = "flight-"


def environment(folder: Path) -> dict[str, str]:
    """Variables for ranks that leave their records in this folder when asked to."""
    stem = str(folder / NAME)
    return {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": stem, "TORCH_FR_DUMP_TEMP_FILE": stem}


def ask(folder: Path, rank: int) -> bool:
    """Ask a rank for its record; False if it has none."""
    (folder / f"{NAME}{rank}").unlink(missing_ok=True)
    try:
        pipe = os.open(folder / f"{NAME}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):  # none was made, or nobody reads it
            return False
        raise
    try:
        os.write(pipe, b"1")
    finally:
        os.close(pipe)
    return True


def record(folder: Path, rank: int, *, deadline_s: float) -> bytes:
    """What a rank that was asked has written; empty if it has not by then, in seconds of
    `time.monotonic`. Raises OSError.
    """
    file = folder / f"{NAME}{rank}"
    last, size = -1, 0
    while not (size > 0 and last == size):
        if time.monotonic() > deadline_s:
            return b""
        time.sleep(POLL_S)
        last, size = size, file.stat().st_size if file.exists() else 0
    return file.read_bytes()
