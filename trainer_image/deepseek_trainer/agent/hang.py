"""Finds out that the ranks of this pod stand still, says which rank is the cause, ends them.

All ranks wait for the one that hangs, so all agents notice at about the same time. Each saves its
ranks' stacks; then those whose own rank is the cause say so and end it, and the others hear that
the generation is over.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dstrain_api.protocol import ERROR_TEXT_LIMIT, HANG, ErrorReport

from deepseek_trainer.agent import flight, stacks
from deepseek_trainer.agent.dumps import Dumps
from deepseek_trainer.agent.membership import Membership
from deepseek_trainer.agent.stacks import Dump
from deepseek_trainer.agent.standstill import RankProgress, Standstill
from deepseek_trainer.agent.workers import Process

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.5
PEERS_S = 5.0  # for the other agents to notice and write
PATIENCE_S = 20.0  # for the agent of the rank that is the cause to end the generation
FRAMES = 8  # of the main thread, in the report


@dataclass(frozen=True, kw_only=True)
class HangWatch:
    """Watches the worker processes of one pod.

    Args:
        progress: how far the ranks are.
        membership: this pod's place.
        expected: whether progress is expected now; not while the pod stops.
        processes: the running ones, by local rank.
        own_folder: where each writes its stacks, `stacks-<local rank>`.
        kept: where all pods put their stacks.
        found: called with the report before the processes are ended.
    """

    progress: RankProgress
    membership: Membership
    expected: Callable[[], bool]
    processes: Mapping[int, Process]
    own_folder: Path
    kept: Dumps
    found: Callable[[ErrorReport], None]

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="hang-watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_INTERVAL_S)
            standing = self.progress.standstills(time.monotonic())
            if standing and self.expected():
                self._settle(standing)

    def _settle(self, standing: list[Standstill]) -> None:
        place, processes = self.membership.place, dict(self.processes)
        log.warning(
            "no progress for %.0f s: looking where the processes stand", standing[0].seconds
        )
        first = place.group_rank * self.membership.identity.processes
        asked_s = time.monotonic()
        recording = [r for r in (first + local for local in processes) if self._asked(r)]
        own = [
            stacks.take(first + local, process.pid, self.own_folder / f"stacks-{local}")
            for local, process in sorted(processes.items())
        ]
        world = place.group_world_size * self.membership.identity.processes
        dumps = self._with_peers(own, place.generation, standing, world)
        self._collect(recording, place.generation, deadline_s=asked_s + flight.WRITTEN_S)
        cause = [dump for dump in stacks.suspects(dumps, world=world) if dump in own]
        if not cause and ended_by_another(self.membership):
            return
        if self.membership.place.generation == place.generation:
            self.found(self._report(standing, cause or own, place.generation, known=bool(cause)))
            for process in processes.values():
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def _asked(self, rank: int) -> bool:
        try:
            return flight.ask(self.own_folder, rank)
        except OSError as error:
            log.warning("rank %s is not asked for its collectives: %s", rank, error)
            return False

    def _collect(self, ranks: list[int], generation: int, *, deadline_s: float) -> None:
        for rank in ranks:
            try:
                if record := flight.record(self.own_folder, rank, deadline_s=deadline_s):
                    self.kept.put(generation, f"{flight.NAME}{rank}", record)
                else:
                    log.warning("rank %s does not tell its last collectives", rank)
            except OSError as error:
                log.warning("the collectives of rank %s cannot be kept: %s", rank, error)

    def _with_peers(
        self, own: list[Dump], generation: int, standing: list[Standstill], world: int
    ) -> list[Dump]:
        """All ranks' dumps, as far as they are there in time."""
        said = standing[0]
        identity = self.membership.identity
        head = (
            f"of pod {identity.pod} on node {identity.node}, in section {said.section} after step "
            f"{said.step} for {said.seconds:.0f} s"
        )
        deadline_s = time.monotonic() + PEERS_S
        try:
            for dump in own:
                name = f"{identity.pod}-{dump.rank}.txt"
                self.kept.put(generation, name, stacks.written(dump, head).encode())
            self.kept.prune()
            while (
                len(dumps := stacks.read(self.kept.texts(generation))) < world
                and time.monotonic() < deadline_s
            ):
                time.sleep(stacks.POLL_S)
        except OSError as error:
            log.warning("the stacks of this pod cannot be kept: %s", error)
            return own
        return dumps

    def _report(
        self, standing: list[Standstill], cause: list[Dump], generation: int, *, known: bool
    ) -> ErrorReport:
        said, dump, identity = standing[0], cause[0], self.membership.identity
        where = f"rank {dump.rank} (pod {identity.pod}, node {identity.node})"
        doing = "is stopped by a signal" if dump.state == stacks.STOPPED else "stands still"
        if not known:
            doing = "waits like all others, none of which stands out"
        frames = "\n".join(dump.main_thread.splitlines()[:FRAMES])
        text = (
            f"{where} {doing}: no progress for {said.seconds:.0f} s in section {said.section} "
            f"after step {said.step}"
        )
        return ErrorReport(
            local_rank=dump.rank % identity.processes,
            exit_code=-signal.SIGKILL,
            message=(f"{text}; innermost frame first:\n{frames}" if frames else text)[
                :ERROR_TEXT_LIMIT
            ],
            fingerprint=HANG,
            step=said.step,
            stacks=self.kept.place(generation),
        )


def ended_by_another(membership: Membership, patience_s: float = PATIENCE_S) -> bool:
    """Whether the agent of the rank that is the cause, or the coordinator, ends the generation.

    The coordinator may have been lost together with a peer that all wait for: nobody else is
    blamed before it, or whoever takes its place, has had the time to see that.
    """
    while not membership.wait_over(patience_s):
        if membership.in_touch_s >= patience_s:
            return False
    return True
