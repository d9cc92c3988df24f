"""The checkpoint folder: drafts, committed checkpoints, quarantined ones, and LATEST. Files only.

    step-40.g3.tmp/          being written, or complete and waiting for its commit
    step-40/                 committed; appears by rename
    step-40.bad-1/           was committed but is damaged; kept for a person to look at
    LATEST                   name of the newest committed one, for people and tools

A folder is never written into twice, but for `verified`: an empty file that appears in a committed
one when all of it was read back and is whole.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.filesystem import FileSystemReader

from deepseek_trainer.data.corpus import sha256_of
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.manifest import CheckpointManifest, sync_folder
from deepseek_trainer.state.store import LATEST, kept_steps

VERIFIED: Final = "verified"
_COMMITTED: Final = re.compile(r"step-(\d+)")
_DRAFT: Final = re.compile(r"step-(\d+)\.g(\d+)\.tmp")
_BAD: Final = re.compile(r"step-(\d+)\.bad-\d+")


@dataclass(frozen=True)
class CheckpointFolder:
    """All checkpoints of one training, in a folder that all workers share."""

    root: Path

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, step: int) -> Path:
        """Folder of a committed checkpoint."""
        return self.root / f"step-{step}"

    def claim(self, generation: int) -> None:
        """Delete what earlier generations (or an earlier run outside a cluster) left unfinished."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self._entries():
            match = _DRAFT.fullmatch(path.name)
            if (match and int(match[2]) <= generation) or ".old-" in path.name:
                shutil.rmtree(path)

    def draft(self, step: int, generation: int) -> str:
        """Name of the folder that a generation writes a step into before it is committed."""
        return f"step-{step}.g{generation}.tmp"

    def folder(self, draft: str) -> Path:
        """Where a rank writes its files of a draft."""
        return self.root / draft

    def upload(self, draft: str, files: Sequence[str]) -> None:
        """They are there already."""

    def seal(self, draft: str, manifest: CheckpointManifest) -> None:
        """Write the manifest last, and make folder and file durable."""
        manifests.write(self.folder(draft), manifest)

    def forget(self, draft: str) -> None:
        """There is nothing outside the storage."""

    def discard(self, draft: str) -> None:
        """Delete a draft."""
        shutil.rmtree(self.folder(draft))

    def commit(self, draft: str, step: int) -> None:
        """Give a complete draft its final name and point LATEST to it.

        An earlier generation that was cut off between two renames may have left the same step; it
        gives way.
        """
        final = self.path(step)
        if final.exists():
            shutil.rmtree(self._aside(final, "old"))
        self.folder(draft).rename(final)
        self._point_to(final)

    def committed(self) -> list[int]:
        """Steps of the committed checkpoints, newest first."""
        matches = (_COMMITTED.fullmatch(path.name) for path in self._entries())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def has_history(self) -> bool:
        """Whether a checkpoint was ever committed here."""
        return any(
            path.name == LATEST or _COMMITTED.fullmatch(path.name) or _BAD.fullmatch(path.name)
            for path in self._entries()
        )

    def manifest(self, step: int) -> CheckpointManifest:
        """Raises ValueError if it is missing or damaged."""
        return manifests.read(self.path(step))

    def damage(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Any]],
        names: Iterable[str],
        *,
        fresh: bool = False,
    ) -> list[str]:
        """What is wrong with the named files of a checkpoint, one sentence each."""
        path = self.path(step)

        def sha256(name: str) -> str:
            if fresh:
                _forget_cached(path / name)
            return sha256_of(path / name)

        return manifests.damage(
            files, names, size_of=lambda name: (path / name).stat().st_size, sha256_of=sha256
        )

    @contextmanager
    def reader(self, step: int) -> Iterator[FileSystemReader]:
        """Each rank reads what it needs."""
        yield FileSystemReader(self.path(step))

    def quarantine(self, step: int) -> None:
        """Put a damaged checkpoint out of use."""
        self._aside(self.path(step), "bad")
        if committed := self.committed():
            self._point_to(self.path(committed[0]))

    def mark_verified(self, step: int) -> None:
        """A committed checkpoint was read back and is whole."""
        (self.path(step) / VERIFIED).touch()

    def unverified(self) -> int | None:
        """The newest committed checkpoint, if it is not verified yet."""
        newest = next(iter(self.committed()), None)
        return None if newest is None or self._is_verified(newest) else newest

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Delete committed checkpoints but those that `kept_steps` names."""
        committed = self.committed()
        kept = kept_steps(
            committed,
            [step for step in committed if self._is_verified(step)],
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )
        for step in committed:
            if step not in kept:
                shutil.rmtree(self._aside(self.path(step), "old"))

    def newest_size(self) -> int:
        """Bytes of the newest checkpoint; 0 where there is none."""
        committed = self.committed()
        files = self.path(committed[0]).iterdir() if committed else []
        return sum(file.stat().st_size for file in files)

    def free(self) -> float:
        """Bytes that are free on the storage."""
        return shutil.disk_usage(self.root).free

    def _is_verified(self, step: int) -> bool:
        return (self.path(step) / VERIFIED).exists()

    def _point_to(self, checkpoint: Path) -> None:
        pointer = self.root / f"{LATEST}.tmp"
        pointer.write_text(f"{checkpoint.name}\n")
        pointer.replace(self.root / LATEST)
        sync_folder(self.root)

    def _entries(self) -> list[Path]:
        return list(self.root.iterdir()) if self.root.is_dir() else []

    def _aside(self, path: Path, why: str) -> Path:
        free = next(
            target
            for number in count(1)
            if not (target := path.with_name(f"{path.name}.{why}-{number}")).exists()
        )
        return path.rename(free)


def _forget_cached(path: Path) -> None:
    """Let the next read come from the storage, not from what this machine has just written."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
