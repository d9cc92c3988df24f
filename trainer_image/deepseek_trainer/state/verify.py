"""Reading committed checkpoints back while training goes on: better to learn of a bad disk now than
on the day a checkpoint is needed.
"""

import logging
from collections.abc import Callable

from deepseek_trainer.state.background import Background
from deepseek_trainer.state.store import Store

_log = logging.getLogger(__name__)


class Verifier:
    """Verifies the newest checkpoint, one at a time; where saves are faster than that, not all.

    Args:
        store: of the training.
        verified: called in the background when the newest is whole.
        damaged: called in the background when it is not, and was put aside.
    """

    def __init__(
        self,
        store: Store,
        *,
        verified: Callable[[], None],
        damaged: Callable[[], None],
    ) -> None:
        self._store = store
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
            while (newest := self._store.unverified()) is not None:
                self._verify(newest)
        except OSError as error:  # says nothing about the checkpoint; the next one tries again
            _log.warning("a checkpoint could not be verified: %s", error)

    def _verify(self, step: int) -> None:
        problems = problems_of(self._store, step)
        if step not in self._store.committed():
            return  # retention was faster
        if problems:
            _log.error(
                "checkpoint %d in %s is damaged: %s", step, self._store.where, "; ".join(problems)
            )
            self._store.quarantine(step)
            self._damaged()
        else:
            self._store.mark_verified(step)
            self.last_step = step
            self._verified()


def problems_of(store: Store, step: int) -> list[str]:
    """What is wrong with a checkpoint on its storage; empty when it is whole.

    Raises:
        OSError: the storage is away.
    """
    try:
        files = store.manifest(step).files
    except ValueError as error:
        return [str(error)]
    return store.damage(step, files, sorted({*files, ".metadata"}), fresh=True)
