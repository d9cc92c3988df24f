"""What is asked of the place where checkpoints are kept: a folder that all workers share, or a
prefix of an S3 bucket.

A save is a draft that every rank writes a part of, then commits: from then on its step is one to
resume from. What is committed is never written again.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

from torch.distributed.checkpoint.filesystem import FileSystemReader

from deepseek_trainer.state.manifest import CheckpointManifest

LATEST: Final = "LATEST"
LEAST: Final = 2  # verified checkpoints that are never deleted: one may turn out bad


class NoUsableCheckpoint(RuntimeError):
    """Checkpoints existed, and none can be used. Starting again at step 0 needs a person's
    decision.
    """


class CommitRefused(Exception):
    """Another generation has taken this one's place on the storage."""


class Store(Protocol):
    """All checkpoints of one training.

    Every method may raise OSError: the storage is full, away, or refuses.
    """

    @property
    def where(self) -> str:
        """Path or URI, for messages."""

    def claim(self, generation: int) -> None:
        """A generation begins: what earlier ones left unfinished is deleted."""

    def draft(self, step: int, generation: int) -> str:
        """Name of a new draft; asked on rank 0."""

    def folder(self, draft: str) -> Path:
        """Where a rank writes its files of a draft."""

    def upload(self, draft: str, files: Sequence[str]) -> None:
        """These files of this rank are complete; puts them where others find them."""

    def seal(self, draft: str, manifest: CheckpointManifest) -> None:
        """All files are there: write the manifest of the draft."""

    def forget(self, draft: str) -> None:
        """Delete what is left of a draft on this machine; called by every rank."""

    def discard(self, draft: str) -> None:
        """Delete a draft from the storage."""

    def commit(self, draft: str, step: int) -> None:
        """Make a complete draft a checkpoint. Raises CommitRefused."""

    def committed(self) -> list[int]:
        """Steps of the checkpoints, newest first."""

    def has_history(self) -> bool:
        """Whether a checkpoint was ever committed here."""

    def manifest(self, step: int) -> CheckpointManifest:
        """Raises ValueError if it is missing or damaged."""

    def damage(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Any]],
        names: Iterable[str],
        *,
        fresh: bool = False,
    ) -> list[str]:
        """What is wrong with the named files of a checkpoint, one sentence each; `fresh`: as they
        are on the storage, whatever this machine has just written.
        """

    def reader(self, step: int) -> AbstractContextManager[FileSystemReader]:
        """To load a checkpoint with; used on every rank."""

    def quarantine(self, step: int) -> None:
        """Put a damaged checkpoint out of use, but keep it for a person to look at."""

    def mark_verified(self, step: int) -> None:
        """A checkpoint was read back and is whole."""

    def unverified(self) -> int | None:
        """The newest checkpoint, if it is not verified yet."""

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Delete the checkpoints but those that `kept_steps` names."""

    def newest_size(self) -> int:
        """Bytes of the newest checkpoint; 0 where there is none."""

    def free(self) -> float:
        """Bytes that there is room for; infinite where that cannot be known."""


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
