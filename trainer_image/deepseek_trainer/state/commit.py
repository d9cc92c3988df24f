"""Asking the coordinator whether a complete checkpoint may become the one to resume from, without
holding up training.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dstrain_api.constants import ENV_COORDINATOR, ENV_GENERATION, ENV_POD_UID
from dstrain_api.protocol import Commit, Verdict

from deepseek_trainer.agent.client import CoordinatorClient, Fenced, Unreachable
from deepseek_trainer.state.store import CommitRefused, Store

_log = logging.getLogger(__name__)
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)


def generation() -> int:
    """The generation this process belongs to; 0 outside a cluster."""
    return int(os.environ.get(ENV_GENERATION, "0"))


def ask_coordinator(step: int, uri: str) -> Verdict:
    """Ask once. Without a coordinator (plain torchrun) every commit is accepted.

    Raises:
        Unreachable: no answer; ask again.
    """
    if not os.environ.get(ENV_COORDINATOR):
        return Verdict(accepted=True)
    commit = Commit(pod_uid=os.environ[ENV_POD_UID], generation=generation(), step=step, uri=uri)
    client = CoordinatorClient.from_environment()
    try:
        return client.commit(commit)
    except Fenced as error:
        return Verdict(accepted=False, reason=f"this pod was replaced: {error}")
    finally:
        client.close()


@dataclass(frozen=True)
class _Draft:
    step: int
    name: str
    began_s: float


class Committer:
    """Commits complete drafts in the background; a newer draft takes the place of one that still
    waits.

    Args:
        store: of the training.
        ask: question to the coordinator; Unreachable means: ask again.
        uri: of the store, for the coordinator's status.
        committed: called after each commit, in the background thread, with the step and the seconds
            since its save began.
    """

    def __init__(
        self,
        store: Store,
        *,
        ask: Callable[[int, str], Verdict],
        uri: str,
        committed: Callable[[int, float], None],
    ) -> None:
        self._store = store
        self._ask = ask
        self._uri = uri.rstrip("/")
        self._committed = committed
        self._changed = threading.Condition()
        self._waiting: _Draft | None = None
        self._busy = False
        self._verdict = Verdict(accepted=True)
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="committer", daemon=True).start()

    def submit(self, step: int, draft: str, *, began_s: float) -> None:
        """Commit a complete draft as soon as the coordinator agrees.

        Args:
            step: of the draft.
            draft: its name.
            began_s: when its save began, in monotonic time.
        """
        with self._changed:
            replaced, self._waiting = self._waiting, _Draft(step, draft, began_s)
            self._failure = None
            self._changed.notify_all()
        if replaced:
            self._discard(replaced)

    def drain(self) -> None:
        """Wait until nothing is left to commit."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy))

    def wait(self) -> Verdict:
        """Wait until nothing is left to commit; the last answer.

        Raises:
            OSError: the last commit could not be written.
        """
        self.drain()
        if self._failure:
            raise self._failure
        return self._verdict

    def _run(self) -> None:
        while True:
            with self._changed:
                while (draft := self._waiting) is None:
                    self._changed.wait()
                self._waiting, self._busy = None, True
            try:
                self._settle(draft)
            except Exception as error:  # noqa: BLE001  (told to who waits; the next may succeed)
                _log.error("step %d cannot be committed: %s", draft.step, error)
                self._failure = error
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _settle(self, draft: _Draft) -> None:
        verdict = self._answer(draft)
        if verdict and verdict.accepted:
            verdict = self._commit(draft)
        if verdict is None:
            _log.warning("checkpoint of step %d is replaced before it was committed", draft.step)
        elif not verdict.accepted:
            _log.error("commit of step %d was refused: %s", draft.step, verdict.reason)
        if verdict is None or not verdict.accepted:
            self._discard(draft)
        if verdict is not None:
            self._verdict = verdict

    def _discard(self, draft: _Draft) -> None:
        try:
            self._store.discard(draft.name)
        except OSError as error:  # the next generation clears it
            _log.warning("what is left of step %d cannot be deleted: %s", draft.step, error)

    def _commit(self, draft: _Draft) -> Verdict:
        """The storage's own answer."""
        try:
            self._store.commit(draft.name, draft.step)
        except CommitRefused as error:
            return Verdict(accepted=False, reason=str(error))
        self._committed(draft.step, time.monotonic() - draft.began_s)
        return Verdict(accepted=True)

    def _answer(self, draft: _Draft) -> Verdict | None:
        """The coordinator's answer; none when a newer draft came while it was away."""
        for attempt in range(1 << 62):
            try:
                return self._ask(draft.step, f"{self._uri}/step-{draft.step}")
            except Unreachable as error:
                pause_s = _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
                _log.warning("no answer to the commit of step %d: %s", draft.step, error)
                with self._changed:
                    if self._changed.wait_for(lambda: self._waiting, timeout=pause_s):
                        return None
        raise AssertionError
