"""The local tier: copies of a rank's state in its pod's memory, which outlive worker processes.

One file per process of the pod, mapped into memory, with room for two copies: one stays whole while
the other is written. A copy counts when its label, written last, is in place and its checksum fits;
a training resumes from one only if every rank holds the same.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from deepseek_trainer.state.host import HostCopy, size_of

_log = logging.getLogger(__name__)
_LABEL_BYTES: Final = 65_536
_HEAD_BYTES: Final = 16  # length and checksum of the label, in hexadecimal
_SPARE: Final = 0.1  # share of the memory that stays free for the training itself
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, order=True)
class CopyId:
    """Which copy it is. Two timelines of a training may pass the same step: a generation that went
    back to an older checkpoint, or one that was rolled back, makes other copies of it.
    """

    step: int
    generation: int
    rollbacks: int


@dataclass(frozen=True)
class LocalCopy:
    """A copy that was completed."""

    id: CopyId
    progress: dict[str, Any]
    updates: int
    half: int
    checksum: int


class LocalCopies:
    """This process's two copies. Use `open_copies`.

    Args:
        file: of `file_size(tensors)` bytes; anything may be in it.
        tensors: the state.
        identity: of state and place: ranks, layout, configuration. Copies of another identity do
            not count.
    """

    def __init__(self, file: Path, tensors: Mapping[str, torch.Tensor], identity: str) -> None:
        self._identity = identity
        self._payload_bytes = size_of(tensors)
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 0)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        if any(tensor.is_cuda for tensor in tensors.values()):
            _pin(whole)
        self._halves = []
        for half in range(2):
            begin = self._begin(half) + _LABEL_BYTES
            memory = whole[begin : begin + self._payload_bytes]
            self._halves.append(HostCopy(tensors, memory))
        self._newest = max(self.held(), key=lambda copy: copy.id, default=None)

    def held(self) -> list[LocalCopy]:
        """Copies that were completed, their content unchecked."""
        return [copy for half in range(2) if (copy := self._label(half))]

    def is_whole(self, copy: LocalCopy) -> bool:
        """Whether the content is what was written."""
        return self._checksum(copy.half) == copy.checksum

    def load(self, copy: LocalCopy) -> None:
        """Copy it into the training's tensors."""
        self._halves[copy.half].put_back()

    def keep_only(self, copy: LocalCopy | None) -> None:
        """Forget the others: training goes on from this one, or from a checkpoint."""
        for half in range(2):
            if copy is None or half != copy.half:
                self._forget(half)
        self._newest = copy

    def begin(self) -> HostCopy:
        """Where the next copy goes; the newest stays."""
        half = self._next_half()
        self._forget(half)
        return self._halves[half]

    def complete(self, copy_id: CopyId, *, progress: dict[str, Any], updates: int) -> None:
        """The copy at the place that `begin` gave is there: from now on it counts."""
        half = self._next_half()
        copy = LocalCopy(copy_id, progress, updates, half, self._checksum(half))
        label = json.dumps(asdict(copy) | {"identity": self._identity}).encode()
        head = b"%08x%08x" % (len(label), zlib.crc32(label))
        begin = self._begin(half)
        self._map[begin + _HEAD_BYTES : begin + _HEAD_BYTES + len(label)] = label
        self._map[begin : begin + _HEAD_BYTES] = head
        self._newest = copy

    def _next_half(self) -> int:
        return 1 - self._newest.half if self._newest else 0

    def _begin(self, half: int) -> int:
        return half * (_LABEL_BYTES + self._payload_bytes)

    def _forget(self, half: int) -> None:
        begin = self._begin(half)
        self._map[begin : begin + _HEAD_BYTES] = bytes(_HEAD_BYTES)

    def _checksum(self, half: int) -> int:
        return zlib.crc32(self._halves[half].memory.numpy().data)

    def _label(self, half: int) -> LocalCopy | None:
        begin = self._begin(half)
        try:
            head = self._map[begin : begin + _HEAD_BYTES]
            length, checksum = int(head[:8], 16), int(head[8:], 16)
            label = self._map[begin + _HEAD_BYTES : begin + _HEAD_BYTES + length]
            if zlib.crc32(label) != checksum:
                return None
            record = json.loads(label)
        except ValueError:  # nothing there yet, or another process was killed while writing it
            return None
        if record.pop("identity") != self._identity:
            return None
        return LocalCopy(**record | {"id": CopyId(**record["id"])})


def open_copies(
    folder: Path, tensors: Mapping[str, torch.Tensor], identity: str
) -> LocalCopies | None:
    """This process's copies in a folder of the pod's memory; none, with a line in the log, when two
    copies of every process of the pod do not fit.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    file = folder / f"process-{os.environ.get('LOCAL_RANK', '0')}"
    size_bytes = file_size(tensors)
    if file.exists() and file.stat().st_size == size_bytes:
        return LocalCopies(file, tensors, identity)
    file.unlink(missing_ok=True)
    free_bytes = min(shutil.disk_usage(folder).free, free_memory())
    needed_bytes = size_bytes * processes
    if needed_bytes > free_bytes * (1 - _SPARE):
        _log.warning(
            "no local copies: two of %d processes need %.1f MiB, and %s has %.1f MiB; raise "
            "workers.sharedMemory and the memory limit to lose fewer steps when a process fails",
            processes,
            needed_bytes / 2**20,
            folder,
            free_bytes / 2**20,
        )
        return None
    with file.open("xb") as opened:
        # Without it, a full memory ends the process at its first write into the map.
        os.posix_fallocate(opened.fileno(), 0, size_bytes)
    return LocalCopies(file, tensors, identity)


def file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a file with two copies."""
    return 2 * (_LABEL_BYTES + size_of(tensors))


def free_memory(group: Path = _CGROUP) -> float:
    """Bytes that this container may still use: its limit less its working set (cgroup v2);
    infinite without a limit.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):  # no cgroup v2, or "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        figures = {name: int(value) for name, value in lines}
        return limit - (used - figures["inactive_file"])
    return math.inf


def _pin(memory: torch.Tensor) -> None:
    """Let a GPU copy into mapped memory without a detour."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    torch.cuda.check_error(result.value)
