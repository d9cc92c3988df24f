"""Reading committed checkpoints back while training goes on: better to learn of a bad disk now than
on the day a checkpoint is needed.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.background import Background
from deepseek_trainer.state.folder import CheckpointFolder

_log = logging.getLogger(__name__)


class Verifier:
    """Verifies the newest checkpoint, one at a time; where saves are faster than that, not all.

    Args:
        folder: of the training.
        verified: called in the background when the newest is whole.
        damaged: called in the background when it is not, and was put aside.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        verified: Callable[[], None],
        damaged: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._verified = verified
        self._damaged = damaged
        self._background = Background("verifier")
        self.last_step = 0  # newest checkpoint that was found whole; 0: none yet

    def committed(self) -> None:
        """There is a new checkpoint."""
        if not self._background.busy:
            self._background.start(self._verify_newest)

    def wait(self) -> None:
        """Wait until what is under way is done."""
        self._background.wait()

    def _verify_newest(self) -> None:
        try:
            while newest := self._folder.unverified():
                self._verify(*newest)
        except OSError as error:  # says nothing about the checkpoint; the next one tries again
            _log.warning("a checkpoint could not be verified: %s", error)

    def _verify(self, step: int, path: Path) -> None:
        problems = problems_of(path)
        if not path.exists():
            return  # retention was faster
        if problems:
            _log.error("checkpoint %s is damaged: %s", path, "; ".join(problems))
            self._folder.quarantine(path)
            self._damaged()
        else:
            self._folder.mark_verified(path)
            self.last_step = step
            self._verified()


def problems_of(path: Path) -> list[str]:
    """What is wrong with a checkpoint on its storage; empty when it is whole.

    Raises:
        OSError: the storage is away.
    """
    try:
        files = manifests.read(path).files
    except ValueError as error:
        return [str(error)]
    names = sorted({*files, ".metadata"})
    for name in names:
        _forget_cached(path / name)
    return manifests.damage(path, files, names)


def _forget_cached(path: Path) -> None:
    """Let the next read come from the storage, not from what this machine has just written."""
    if path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
