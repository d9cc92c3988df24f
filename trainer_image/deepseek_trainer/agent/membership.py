"""This pod as the coordinator knows it: joins, beats, errors. Outlives every worker restart.

Two threads share it: torchrun's main thread joins and waits, a daemon thread beats. Each has its
own connection. The coordinator may be away for hours: beats fail silently and joins ask again for
ever, so training never stops with it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from dstrain_api.protocol import Assignment, Beat, ErrorReport, Join, Report

from deepseek_trainer.agent.client import CoordinatorClient, Fenced, Unreachable

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # between two tries while the coordinator is away
SHORT_ANSWER_S = 0.2  # an empty answer faster than this came from a server that does not wait
LEAVE_TIMEOUT_S = 2.0

State = Literal["joining", "running", "done", "leaving"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The pod, as its environment describes it."""

    pod: str
    pod_uid: str
    slot: int
    node: str
    address: str
    processes: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """A pod's place in the gang, as beats say it; replaced whole, so that nothing ever mixes two
    generations.
    """

    generation: int = 0
    group_rank: int = 0
    group_world_size: int = 0
    master_address: str = ""
    master_port: int = 0
    state: State = "joining"


class Membership:
    """A pod's part in the gang.

    Args:
        identity: who it is.
        connect: makes a client; called once per thread.
        beat_interval_s: seconds between two beats.
        step: last finished step of this pod's processes, for the beats.
        stop: called once, on the beat thread, when the coordinator orders to save and exit, or
            refuses this pod for good; the argument says why.
    """

    def __init__(
        self,
        identity: Identity,
        connect: Callable[[], CoordinatorClient],
        *,
        beat_interval_s: float,
        step: Callable[[], int],
        stop: Callable[[str], None],
    ) -> None:
        self.identity = identity
        self._connect = connect
        self._client = connect()
        self._beat_interval_s = beat_interval_s
        self._step = step
        self._stop = stop
        self._place = Place()
        self._over = threading.Condition()
        self._is_over = False
        self._soon = threading.Event()
        self._beats: threading.Thread | None = None
        self._left = False
        self._told_to_stop = False
        self._in_touch_since_s: float | None = None
        self.fenced = False  # the coordinator refuses this pod for good

    @property
    def place(self) -> Place:
        """All of it as it is now."""
        return self._place

    @property
    def generation(self) -> int:
        """The generation that this pod is in, or comes from while it joins; 0 before the first."""
        return self._place.generation

    @property
    def group_rank(self) -> int:
        """This pod's rank in its generation."""
        return self._place.group_rank

    @property
    def over(self) -> bool:
        """Whether the coordinator has ended the generation that this pod is in."""
        return self._is_over

    @property
    def in_touch_s(self) -> float:
        """Seconds for which the coordinator has answered every beat; 0 while it does not."""
        since_s = self._in_touch_since_s
        return time.monotonic() - since_s if since_s is not None else 0.0

    def join(self, port: int) -> Assignment:
        """Block until this pod has a place in the next generation, for as long as that takes.

        Raises Fenced when it never will.
        """
        join = Join(
            pod=self.identity.pod,
            pod_uid=self.identity.pod_uid,
            slot=self.identity.slot,
            node=self.identity.node,
            address=self.identity.address,
            port=port,
            generation=self.generation,
        )
        self._place = replace(self._place, state="joining")
        self._start_beats()
        assignment = self._until_answered(lambda: self._ask_for_place(join))
        with self._over:
            self._is_over = False
            self._place = Place(
                generation=assignment.generation,
                group_rank=assignment.group_rank,
                group_world_size=assignment.group_world_size,
                master_address=assignment.master_address,
                master_port=assignment.master_port,
                state="running",
            )
        self._soon.set()
        return assignment

    def report_error(self, error: ErrorReport) -> None:
        """Tell of a failed worker process of the current generation. Raises Fenced."""
        report = Report(pod_uid=self.identity.pod_uid, generation=self.generation, error=error)

        def tell() -> bool:
            self._client.report(report)
            return True

        self._until_answered(tell)

    def wait_over(self, timeout_s: float) -> bool:
        """Whether this generation is ended within `timeout_s`."""
        with self._over:
            return self._over.wait_for(lambda: self._is_over, timeout_s)

    def finish(self) -> None:
        """All worker processes of this pod have ended well."""
        self._place = replace(self._place, state="done")
        self._soon.set()

    def leave(self) -> None:
        """Say a last word, so that peers need not wait for beats to stay away. Never raises."""
        self._left = True
        if self._place.state != "done":
            self._place = replace(self._place, state="leaving")
        if self._beats is None:
            return  # nobody knows this pod
        try:
            self._connect().beat(self._beat(self._place), timeout_s=LEAVE_TIMEOUT_S)
        except (Unreachable, Fenced) as error:
            log.info("left without a word: %s", error)

    def _ask_for_place(self, join: Join) -> Assignment | None:
        asked_at_s = time.monotonic()
        assignment = self._client.join(join)
        if assignment.generation > join.generation:
            return assignment
        if time.monotonic() - asked_at_s < SHORT_ANSWER_S:
            time.sleep(SHORT_ANSWER_S)
        return None

    def _until_answered(self, ask: Callable[[], T | None]) -> T:
        pause_s = FIRST_PAUSE_S
        told = False
        while True:
            try:
                answer = ask()
            except Unreachable as error:
                if pause_s == LONGEST_PAUSE_S and not told:
                    log.warning("the coordinator does not answer (%s); asking again", error)
                    told = True
                time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- spreads the load
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if answer is not None:
                return answer
            pause_s = FIRST_PAUSE_S

    def _start_beats(self) -> None:
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat_for_ever, name="beats", daemon=True)
            self._beats.start()

    def _beat_for_ever(self) -> None:
        client = self._connect()
        while not self._left:
            started_s = time.monotonic()
            self._soon.clear()
            try:
                self._beat_once(client)
                self._in_touch_since_s = self._in_touch_since_s or time.monotonic()
            except Unreachable as error:
                self._in_touch_since_s = None
                log.debug("beat: %s", error)
            except Fenced as error:
                self.fenced = True
                self._stop(f"this pod was replaced ({error}); leaving")
                return
            self._soon.wait(max(0.0, started_s + self._beat_interval_s - time.monotonic()))

    def _beat_once(self, client: CoordinatorClient) -> None:
        place = self._place
        # The answer to one that runs waits for the news that its generation is over: the sooner it
        # knows, the sooner the next one begins.
        patience_s = self._beat_interval_s if place.state == "running" else 0.0
        beat = self._beat(place, patience_s)
        orders = client.beat(beat, timeout_s=patience_s + max(1.0, self._beat_interval_s))
        if self._left:
            return
        if orders.stop and not self._told_to_stop:
            self._told_to_stop = True
            self._stop("told to save and stop")
        if place.state == "running" and orders.generation != place.generation:
            with self._over:
                # The main thread may have joined meanwhile: this answer is to another generation.
                self._is_over = self._is_over or self._place.generation == place.generation
                self._over.notify_all()

    def _beat(self, place: Place, patience_s: float = 0.0) -> Beat:
        return Beat(
            pod=self.identity.pod,
            pod_uid=self.identity.pod_uid,
            slot=self.identity.slot,
            node=self.identity.node,
            generation=place.generation,
            group_rank=place.group_rank,
            group_world_size=place.group_world_size,
            master_address=place.master_address,
            master_port=place.master_port,
            state=place.state,
            step=self._step(),
            patience_s=patience_s,
        )
