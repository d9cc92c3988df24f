"""The checkpoint folder: drafts, committed checkpoints, quarantined ones, and LATEST. Files only,
no torch.

    step-40.g3.tmp/          being written, or complete and waiting for its commit
    step-40/                 committed; appears by rename
    step-40.bad-1/           was committed but is damaged; kept for a person to look at
    LATEST                   name of the newest committed one, for people and tools

A folder is never written into twice.
"""

import re
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from deepseek_trainer.state.manifest import sync_folder

LATEST: Final = "LATEST"
_COMMITTED: Final = re.compile(r"step-(\d+)")
_DRAFT: Final = re.compile(r"step-(\d+)\.g(\d+)\.tmp")
_BAD: Final = re.compile(r"step-(\d+)\.bad-\d+")


class NoUsableCheckpoint(RuntimeError):
    """Checkpoints existed, and none can be used. Starting again at step 0 needs a person's
    decision.
    """


@dataclass(frozen=True)
class CheckpointFolder:
    """All checkpoints of one training."""

    root: Path

    def draft(self, step: int, generation: int) -> Path:
        """Where a generation writes a step before it is committed."""
        return self.root / f"step-{step}.g{generation}.tmp"

    def committed(self) -> list[tuple[int, Path]]:
        """(step, folder) of the committed checkpoints, newest first."""
        found = [
            (int(match[1]), path)
            for path in self._entries()
            if (match := _COMMITTED.fullmatch(path.name))
        ]
        return sorted(found, reverse=True)

    def has_history(self) -> bool:
        """Whether a checkpoint was ever committed here."""
        return any(
            path.name == LATEST or _COMMITTED.fullmatch(path.name) or _BAD.fullmatch(path.name)
            for path in self._entries()
        )

    def commit(self, draft: Path, step: int) -> Path:
        """Give a complete draft its final name and point LATEST to it.

        An earlier generation that was cut off between two renames may have left the same step; it
        gives way.
        """
        final = self.root / f"step-{step}"
        if final.exists():
            shutil.rmtree(self._aside(final, "old"))
        draft.rename(final)
        pointer = self.root / f"{LATEST}.tmp"
        pointer.write_text(f"{final.name}\n")
        pointer.replace(self.root / LATEST)
        sync_folder(self.root)
        return final

    def quarantine(self, checkpoint: Path) -> Path:
        """Put a damaged checkpoint out of use; its new path."""
        return self._aside(checkpoint, "bad")

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Delete committed checkpoints beyond the newest `keep_last`, but those at multiples of
        `keep_every_steps`.
        """
        for step, path in self.committed()[keep_last:]:
            if not keep_every_steps or step % keep_every_steps:
                shutil.rmtree(self._aside(path, "old"))

    def clear(self, generation: int) -> None:
        """Delete what earlier generations (or an earlier run outside a cluster) left unfinished."""
        for path in self._entries():
            match = _DRAFT.fullmatch(path.name)
            if (match and int(match[2]) <= generation) or ".old-" in path.name:
                shutil.rmtree(path)

    def _entries(self) -> list[Path]:
        return list(self.root.iterdir()) if self.root.is_dir() else []

    def _aside(self, path: Path, why: str) -> Path:
        free = next(
            target
            for number in count(1)
            if not (target := path.with_name(f"{path.name}.{why}-{number}")).exists()
        )
        return path.rename(free)
