"""Where processes stand that make no progress, and which of them keeps the others waiting.

Each rank writes the stacks of its threads to a file of its pod when it gets
`preload.STACKS_SIGNAL`; Python's own handler does that without the interpreter's lock. The agents
put them together (`agent.dumps`), and each judges by all of them.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek_trainer.preload import STACKS_SIGNAL

WRITTEN_S = 2.0  # a process that has not written its stacks by then cannot
POLL_S = 0.05
STOPPED = "T"
_HEAD = re.compile(r"rank (\d+) .*, state (\S)")
_FRAME = re.compile(r'^  File "([^"]+)", line (\d+) in (\S+)', re.MULTILINE)
_MAIN = "Current thread "  # the one that took the signal: the main thread, unless it blocks it
# What stands above a wait in torch.distributed.
_CALLERS = ("/torch/_ops.py", "/torch/autograd/")
_COLLECTIVES = "/torch/distributed/"


@dataclass(frozen=True, kw_only=True)
class Dump:
    """One rank: its number in the training, its state in the kernel's letters, its stacks."""

    rank: int
    state: str
    stacks: str

    @property
    def main_thread(self) -> str:
        """The main thread's stack, innermost frame first; empty if it could not be had."""
        _, found, rest = self.stacks.partition(_MAIN)
        return rest.partition("\n")[2].partition("\n\n")[0] if found else ""

    @property
    def frames(self) -> list[tuple[str, str, str]]:
        """(file, line, function) of the main thread, innermost first."""
        return _FRAME.findall(self.main_thread)

    @property
    def waits(self) -> bool:
        """Whether the main thread waits in torch.distributed."""
        own = (frame for frame in self.frames if not any(part in frame[0] for part in _CALLERS))
        return _COLLECTIVES in next(own, ("", "", ""))[0]


def suspects(dumps: Sequence[Dump], *, world: int) -> list[Dump]:
    """The ranks that keep the others waiting; none if none stands out.

    Args:
        dumps: those that are there, of `world` ranks.
    """
    if stopped := [dump for dump in dumps if dump.state == STOPPED]:
        return stopped
    outside = [dump for dump in dumps if not dump.waits]
    if outside and (len(outside) < len(dumps) or len(dumps) < world):
        return outside
    # A wait for a device has no frame of its own: then the place that most share is the wait.
    places = Counter(tuple(dump.frames[:3]) for dump in dumps)
    place, number = places.most_common(1)[0]
    return [d for d in dumps if tuple(d.frames[:3]) != place] if number > len(dumps) / 2 else []


def take(rank: int, pid: int, file: Path) -> Dump:
    """The stacks of a process that writes them to `file`, as far as it can."""
    state = _state(pid)
    before = file.stat().st_size if file.exists() else 0
    if state != STOPPED and _handles_signal(pid):
        os.kill(pid, STACKS_SIGNAL)
        _until_written(file, before)
    text = file.read_text(errors="replace")[before:] if file.exists() else ""
    return Dump(rank=rank, state=state, stacks=text)


def written(dump: Dump, head: str) -> str:
    """A dump as it is kept."""
    return f"rank {dump.rank} {head}, state {dump.state}\n\n{dump.stacks}"


def read(texts: Iterable[str]) -> list[Dump]:
    """Dumps as they are kept, in the order of ranks."""
    found = []
    for text in texts:
        head, _, stacks = text.partition("\n\n")
        if match := _HEAD.match(head):
            found.append(Dump(rank=int(match[1]), state=match[2], stacks=stacks))
    return sorted(found, key=lambda dump: dump.rank)


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"  # it has ended


def _handles_signal(pid: int) -> bool:
    """Whether the signal would be heard; a process without a handler would die of it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _until_written(file: Path, before: int) -> None:
    deadline_s = time.monotonic() + WRITTEN_S
    size = before
    while time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        last, size = size, file.stat().st_size
        if last == size > before:
            return
