"""What worker pods say, by training. Thread-safe; no HTTP, no Kubernetes, no decisions.

The HTTP server calls it from its own thread, the controller from another; one lock is held for
microseconds. Deadlines are found by `tick`, to be called every 0.25 to 1 s.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dstrain_api.protocol import Assignment, Beat, Commit, Join, Orders, Report, Verdict

from deepseek_operator.core.model import Gathering, Membership
from deepseek_operator.runtime.roster import (
    Crowded,
    Fenced,
    Roster,
    UnknownTraining,
)

__all__ = ["Coordinator", "Crowded", "Fenced", "UnknownTraining", "training_token"]

DEFAULT_SILENCE_S = 5.0
RETIRED_SILENCE_S = 60.0  # the pods of a training that is gone have ended when silent for longer
RETIRED_LIFETIME_S = 3600.0  # and one that goes on talking is no pod any more


def training_token(operator_key: bytes, training_uid: str) -> str:
    """Bearer token of a training: nothing has to be stored or read back to know it."""
    return hmac.new(operator_key, training_uid.encode(), hashlib.sha256).hexdigest()


def _nobody(_uid: str) -> None:
    return


class Coordinator:
    """The tables of all trainings, each a `Roster`.

    `on_transition(uid)` is called, outside the lock and on the caller's thread, when something
    that decisions depend on has changed; never for a plain beat. `on_orders(uid)` is called
    likewise when pods that wait for an answer should look again. `clock` gives seconds since the
    epoch and must not run backwards.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self.on_transition: Callable[[str], None] = _nobody
        self.on_orders: Callable[[str], None] = _nobody
        self._clock = clock
        self._started_at_s = clock()
        self._lock = threading.Lock()
        self._rosters: dict[str, Roster] = {}
        self._retired: dict[str, float] = {}  # when, by uid

    # Called by the controller.

    def listen(self) -> None:
        """From now on pods can reach this coordinator: what was not heard before is unknown."""
        with self._lock:
            self._started_at_s = self._clock()

    def register(
        self, uid: str, *, generation: int, token: str, silence_s: float = DEFAULT_SILENCE_S
    ) -> None:
        """Make a training known. Idempotent: called at every reconcile.

        `generation` is that of the status: older ones are over. A member silent for longer than
        `silence_s` is a transition.
        """
        with self._lock:
            roster = self._rosters.get(uid)
            if roster is None:
                roster = Roster(token=token, floor=generation, silence_s=silence_s)
                self._rosters[uid] = roster
            roster.token = token
            roster.floor = max(roster.floor, generation)
            roster.silence_s = silence_s

    def retire(self, uid: str) -> None:
        """The training is gone. Its pods are answered until they have ended: they save, and want
        that save committed; after that they get `UnknownTraining`.
        """
        with self._lock:
            if uid in self._rosters:
                self._retired.setdefault(uid, self._clock())

    def publish(self, uid: str, membership: Membership) -> None:
        """Make a generation current. Its number must be in the training's status already."""
        with self._changing(uid) as roster:
            roster.publish(membership)
        self.on_orders(uid)

    def end(self, uid: str, generation: int) -> None:
        """Declare `generation` and older ones over, also while one is being adopted."""
        with self._changing(uid) as roster:
            roster.end(generation)
        self.on_orders(uid)

    def fence(self, uid: str, pod_uids: tuple[str, ...]) -> None:
        """Refuse these pods for good (`Fenced`)."""
        with self._changing(uid) as roster:
            roster.fence(pod_uids)
        self.on_orders(uid)

    def order_stop(self, uid: str, stop: bool) -> None:
        """Tell all members to save and exit, or take that back."""
        with self._changing(uid) as roster:
            news, roster.stop = roster.stop != stop, stop
        if news:
            self.on_orders(uid)

    def snapshot(self, uid: str) -> Gathering:
        """What is known of a training; an empty table for an unknown one."""
        with self._lock:
            now_s = self._clock()
            listening_s = now_s - self._started_at_s
            roster = self._rosters.get(uid)
            if roster is None:
                return Gathering(listening_s=listening_s)
            return roster.snapshot(now_s, listening_s=listening_s)

    def forgive(self, pause_s: float) -> None:
        """This process stood still for so long: nobody was silent, it was deaf."""
        with self._lock:
            now_s = self._clock()
            for roster in self._rosters.values():
                roster.forgive(pause_s, now_s)

    def tick(self) -> None:
        """Find the deadlines that have passed."""
        with self._lock:
            now_s = self._clock()
            changed, forgotten = [], []
            for uid, retired_at_s in list(self._retired.items()):
                roster = self._rosters[uid]
                if (
                    roster.deserted(now_s, RETIRED_SILENCE_S)
                    or now_s - retired_at_s > RETIRED_LIFETIME_S
                ):
                    del self._retired[uid], self._rosters[uid]
                    forgotten.append(uid)
            for uid, roster in self._rosters.items():
                roster.tick(now_s)
                if roster.changed:
                    roster.changed = False
                    changed.append(uid)
        for uid in changed:
            self.on_transition(uid)
        for uid in forgotten:
            self.on_orders(uid)

    # Called by the server, for the pods.

    def authenticate(self, uid: str, token: str) -> bool:
        """Whether this is the training's token. Raises UnknownTraining."""
        with self._lock:
            roster = self._rosters.get(uid)
        if roster is None:
            raise UnknownTraining(f"no training with uid {uid} is known here")
        return hmac.compare_digest(roster.token.encode(), token.encode())

    def join(self, uid: str, join: Join) -> Assignment:
        """A pod's place in the next generation; generation 0 while it is not formed: ask again.

        A join that names the current generation says that it is over.
        Raises UnknownTraining, Fenced, Crowded.
        """
        with self._saying(uid) as (roster, now_s):
            return roster.join(join, now_s)

    def beat(self, uid: str, beat: Beat) -> Orders:
        """Note that a pod is alive. Raises UnknownTraining, Fenced, Crowded."""
        with self._saying(uid) as (roster, now_s):
            return roster.beat(beat, now_s)

    def orders(self, uid: str, beat: Beat) -> Orders:
        """What the pod of a beat should do now; no news of it. Raises UnknownTraining, Fenced."""
        with self._saying(uid) as (roster, _):
            return roster.orders(beat)

    def report(self, uid: str, report: Report) -> None:
        """Note what worker processes say. Raises UnknownTraining, Fenced."""
        with self._saying(uid) as (roster, now_s):
            roster.report(report, now_s)

    def commit(self, uid: str, commit: Commit) -> Verdict:
        """Whether a checkpoint may become the one to resume from.

        Raises UnknownTraining (also while its generation is being adopted), Fenced.
        """
        with self._saying(uid) as (roster, now_s):
            return roster.commit(commit, now_s)

    @contextmanager
    def _saying(self, uid: str) -> Iterator[tuple[Roster, float]]:
        changed = False
        try:
            with self._lock:
                roster = self._rosters.get(uid)
                if roster is None:
                    raise UnknownTraining(f"no training with uid {uid} is known here")
                try:
                    yield roster, self._clock()
                finally:
                    changed, roster.changed = roster.changed, False
        finally:
            if changed:
                self.on_transition(uid)

    @contextmanager
    def _changing(self, uid: str) -> Iterator[Roster]:
        """The controller's own changes are no news to it; a forgotten training takes none."""
        with self._lock:
            roster = self._rosters.get(uid) or Roster(token="", floor=0, silence_s=0.0)
            yield roster
            roster.changed = False
