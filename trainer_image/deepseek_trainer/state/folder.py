"""The checkpoint folder: drafts, committed checkpoints, quarantined ones, and LATEST. Files only,
no torch.

    step-40.g3.tmp/          being written, or complete and waiting for its commit
    step-40/                 committed; appears by rename
    step-40.bad-1/           was committed but is damaged; kept for a person to look at
    LATEST                   name of the newest committed one, for people and tools

A folder is never written into twice, but for `verified`: an empty file that appears in a committed
one when all of it was read back and is whole.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from deepseek_trainer.state.manifest import sync_folder

LATEST: Final = "LATEST"
VERIFIED: Final = "verified"
LEAST: Final = 2  # verified checkpoints that are never deleted: one may turn out bad
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
        self._point_to(final)
        return final

    def quarantine(self, checkpoint: Path) -> Path:
        """Put a damaged checkpoint out of use; its new path."""
        aside = self._aside(checkpoint, "bad")
        if committed := self.committed():
            self._point_to(committed[0][1])
        return aside

    def mark_verified(self, checkpoint: Path) -> None:
        """A committed checkpoint was read back and is whole."""
        (checkpoint / VERIFIED).touch()

    def unverified(self) -> tuple[int, Path] | None:
        """The newest committed checkpoint, if it is not verified yet."""
        newest = next(iter(self.committed()), None)
        return newest if newest and not (newest[1] / VERIFIED).exists() else None

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Delete committed checkpoints but those that `kept_steps` names."""
        committed = self.committed()
        kept = kept_steps(
            [step for step, _ in committed],
            [step for step, path in committed if (path / VERIFIED).exists()],
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )
        for step, path in committed:
            if step not in kept:
                shutil.rmtree(self._aside(path, "old"))

    def clear(self, generation: int) -> None:
        """Delete what earlier generations (or an earlier run outside a cluster) left unfinished."""
        for path in self._entries():
            match = _DRAFT.fullmatch(path.name)
            if (match and int(match[2]) <= generation) or ".old-" in path.name:
                shutil.rmtree(path)

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


def kept_steps(
    steps: Sequence[int], verified: Sequence[int], *, keep_last: int, keep_every_steps: int
) -> set[int]:
    """Steps of the checkpoints that stay: the newest `keep_last`, the newest two verified ones, and
    the first at or after each multiple of `keep_every_steps` (0: none).

    Args:
        steps: of all checkpoints, newest first.
        verified: those of them that were read back, newest first.
        keep_last: see above.
        keep_every_steps: see above.
    """
    kept = {*steps[:keep_last], *verified[:LEAST]}
    if keep_every_steps:
        first = {step // keep_every_steps: step for step in steps}  # the last one written wins
        kept |= {step for multiple, step in first.items() if multiple}
    return kept
