"""One training as its pods describe it: who joined, who runs, what was reported. A table, no
decisions, no lock.

Three numbers order everything. `floor` is the newest generation of the training's status: an older
one is over. `over_through` is the newest generation this table knows to be over. `membership` is
the current generation, if any. A table that has just started (floor known, no membership) adopts:
it believes the pods that say they run a generation that may still be current, and publishes it to
itself once all its ranks have spoken. Until then nobody is told to stop.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dstrain_api.protocol import (
    ERROR_TEXT_LIMIT,
    Assignment,
    Beat,
    Commit,
    ErrorReport,
    Join,
    Orders,
    ProgressReport,
    Report,
    Verdict,
)

from deepseek_operator.core.model import CommitView, Gathering, Membership, WorkerError
from deepseek_operator.runtime.member import Member

MEMBERS_LIMIT = 25_000  # pods remembered per training; the API allows 20,000 workers
FENCED_LIMIT = 50_000  # pod uids remembered as refused; the oldest are forgotten first
ERRORS_LIMIT = 64  # errors kept per generation: enough to find the one that came first
STRANGER_LIFETIME_S = 600.0  # a silent pod outside the membership is forgotten after this


class UnknownTraining(Exception):
    """The training is not known, or not yet: ask again."""


class Fenced(Exception):
    """The pod was replaced and will never be a member again: it should exit."""


class Crowded(Exception):
    """More pods than any training may have: ask again later."""


class Roster:
    """The table of one training; `changed` says that a decision may now differ."""

    def __init__(self, *, token: str, floor: int, silence_s: float) -> None:
        self.token = token
        self.floor = floor
        self.silence_s = silence_s
        self.stop = False
        self.changed = False
        self.over_through = 0
        self.over = False
        self.membership: Membership | None = None
        self.done = False
        self._members: dict[str, Member] = {}
        self._ranks: dict[str, int] = {}  # of the membership, by pod uid
        self._seats: dict[int, dict[int, str]] = {}  # while adopting: generation -> rank -> pod uid
        self._fenced: dict[str, None] = {}
        self._progress: ProgressReport | None = None
        self._progress_generation = 0
        self._progress_at_s = 0.0
        self._errors: list[WorkerError] = []
        self._commit: CommitView | None = None

    # What pods say.

    def join(self, join: Join, now_s: float) -> Assignment:
        """Enter a pod that waits for its next generation; return its place, if that is formed."""
        self._refuse_fenced(join.pod_uid)
        self._end_named(join)
        rank = self._ranks.get(join.pod_uid)
        current = self.membership
        if current and rank is not None and not self.over and join.generation < current.generation:
            # The answer to its join was lost, or it is only now picking it up.
            self._member(join, now_s).heard_at_s = now_s
            return Assignment(
                generation=current.generation,
                group_rank=rank,
                group_world_size=len(current.pod_uids),
                master_address=current.master_address,
                master_port=current.master_port,
                failure_interval_s=current.failure_interval_s,
                preflight=current.preflight,
            )
        member = self._member(join, now_s)
        if member.state != "joining" or member.joined_from != join.generation:
            self.changed = True
            member.waiting_since_s = now_s
        if join.generation == 0 and not member.joined_at_s:
            member.joined_at_s = now_s
        self._heard(member, now_s)
        member.state = "joining"
        member.generation = member.joined_from = join.generation
        member.slot, member.node = join.slot, join.node
        member.address, member.port = join.address, join.port
        return Assignment()

    def beat(self, beat: Beat, now_s: float) -> Orders:
        """Note that a pod is alive and what it runs; what it should do."""
        self._refuse_fenced(beat.pod_uid)
        if beat.state == "leaving":
            self._drop(beat.pod_uid)
        else:
            self._note(beat, now_s)
            self._adopt(beat)
        return self.orders(beat)

    def orders(self, beat: Beat) -> Orders:
        """What the pod of a beat should do now."""
        self._refuse_fenced(beat.pod_uid)
        return Orders(generation=self._generation_for(beat), stop=self.stop)

    def report(self, report: Report, now_s: float) -> None:
        """Keep progress, errors and the end of the program, if of the newest generation."""
        self._refuse_fenced(report.pod_uid)
        if report.error is not None and report.generation >= self._newest():
            self._keep_error(report, report.error, now_s)
        if not self._may_be_current(report.generation):
            return
        if report.progress is not None:
            self._keep_progress(report.generation, report.progress, now_s)
        if report.done and not self.done:
            self.done = self.changed = True

    def commit(self, commit: Commit, now_s: float) -> Verdict:
        """Whether this checkpoint may become the one to resume from.

        A step has to be newer only within its generation: a later generation may well commit a
        smaller one, when the last commit never became visible. Asking for the same commit again is
        answered as before.
        """
        self._refuse_fenced(commit.pod_uid)
        current = self.membership
        if current is None and self._may_be_current(commit.generation):
            raise UnknownTraining("the members of this generation are not all known yet")
        if current is None or commit.generation != current.generation:
            newest = current.generation if current else "being formed"
            return Verdict(
                accepted=False,
                reason=f"generation {commit.generation} is over; the next one is {newest}",
            )
        if commit.pod_uid not in self._ranks:
            return Verdict(
                accepted=False, reason=f"the pod is no member of generation {commit.generation}"
            )
        last = self._commit
        if last and last.generation == commit.generation and commit.step <= last.step:
            again = (commit.step, commit.uri) == (last.step, last.uri)
            reason = "" if again else f"step {last.step} is committed already"
            return Verdict(accepted=again, reason=reason)
        self._commit = CommitView(
            step=commit.step, uri=commit.uri, generation=commit.generation, at_s=now_s
        )
        self.changed = True
        return Verdict(accepted=True)

    # What the controller says.

    def publish(self, membership: Membership) -> None:
        """Make a generation current; its members get their places."""
        self.membership = membership
        self._ranks = {uid: rank for rank, uid in enumerate(membership.pod_uids)}
        for uid in self._ranks:
            if uid in self._members:  # so that it is known even of a member that fails at once
                self._members[uid].group_world_size = len(membership.pod_uids)
        self.floor = max(self.floor, membership.generation)
        self.over_through = max(self.over_through, membership.generation - 1)
        self.over = False
        self._seats.clear()
        self._errors = [e for e in self._errors if e.generation >= membership.generation]

    def end(self, generation: int) -> None:
        """Declare a generation and all before it over; its members are told to join again."""
        self.over_through = max(self.over_through, generation)
        self._seats.clear()
        if self.membership and self.membership.generation <= generation:
            self.membership = None
            self._ranks = {}
            self.over = False

    def fence(self, pod_uids: tuple[str, ...]) -> None:
        """Refuse these pods from now on."""
        for uid in pod_uids:
            self._drop(uid)
            self._fenced[uid] = None
        while len(self._fenced) > FENCED_LIMIT:
            del self._fenced[next(iter(self._fenced))]

    def forgive(self, pause_s: float, now_s: float) -> None:
        """Do not take for silence what nobody could hear."""
        for member in self._members.values():
            member.heard_at_s = min(now_s, member.heard_at_s + pause_s)

    def tick(self, now_s: float) -> None:
        """Notice members that have been silent too long, and forget strangers."""
        for member in list(self._members.values()):
            silent_s = now_s - member.heard_at_s
            if silent_s > self.silence_s and not member.silent:
                member.silent = self.changed = True
            if silent_s > STRANGER_LIFETIME_S and member.pod_uid not in self._ranks:
                del self._members[member.pod_uid]

    def deserted(self, now_s: float, silence_s: float) -> bool:
        """Whether no pod has spoken for so long."""
        return all(now_s - m.heard_at_s > silence_s for m in self._members.values())

    def snapshot(self, now_s: float, *, listening_s: float) -> Gathering:
        """All of it, frozen."""
        return Gathering(
            members=tuple(member.view(now_s) for member in self._members.values()),
            membership=self.membership,
            over=self.over,
            progress=self._progress,
            progress_generation=self._progress_generation,
            progress_at_s=self._progress_at_s,
            errors=tuple(self._errors),
            commit=self._commit,
            done=self.done,
            listening_s=listening_s,
        )

    # How.

    def _refuse_fenced(self, pod_uid: str) -> None:
        if pod_uid in self._fenced:
            raise Fenced("this pod was replaced")

    def _newest(self) -> int:
        """The generation that is current, or the last one that was."""
        return self.membership.generation if self.membership else max(self.over_through, self.floor)

    def _may_be_current(self, generation: int) -> bool:
        if self.membership:
            return generation == self.membership.generation
        return generation > 0 and generation > self.over_through and generation >= self.floor

    def _end_named(self, join: Join) -> None:
        """A member that asks for the next generation says that its own is over."""
        if self.membership:
            named_current = join.generation == self.membership.generation
            if named_current and join.pod_uid in self._ranks and not self.over:
                self.over = self.changed = True
        elif self._may_be_current(join.generation):
            self.end(join.generation)
            self.changed = True

    def _generation_for(self, beat: Beat) -> int:
        current = self.membership
        if current and (beat.generation != current.generation or beat.pod_uid in self._ranks):
            return current.generation
        if current is None and self._may_be_current(beat.generation):
            return beat.generation
        return 0

    def _member(self, said: Join | Beat, now_s: float) -> Member:
        member = self._members.get(said.pod_uid)
        if member is None:
            if len(self._members) >= MEMBERS_LIMIT:
                raise Crowded(f"more than {MEMBERS_LIMIT} pods speak for this training")
            member = Member(
                pod=said.pod,
                pod_uid=said.pod_uid,
                slot=said.slot,
                node=said.node,
                generation=said.generation,
                heard_at_s=now_s,
            )
            self._members[said.pod_uid] = member
            self.changed = True
        return member

    def _heard(self, member: Member, now_s: float) -> None:
        self.changed |= member.hear(now_s)

    def _note(self, beat: Beat, now_s: float) -> None:
        if beat.state == "joining":
            # Only a join carries the offer that a joining member needs: a beat alone makes nobody
            # joining.
            member = self._members.get(beat.pod_uid)
            if member is not None:
                self._heard(member, now_s)
            return
        member = self._member(beat, now_s)
        self._heard(member, now_s)
        if member.state == "joining" and beat.generation <= member.joined_from:
            return  # overtaken by its own join on another connection
        if (member.state, member.generation) != (beat.state, beat.generation):
            self.changed = True
        member.state, member.generation = beat.state, beat.generation
        member.slot, member.node = beat.slot, beat.node
        member.group_world_size = beat.group_world_size

    def _adopt(self, beat: Beat) -> None:
        """Count a rank of a generation formed before this table; take it over with the last."""
        if self.membership or beat.state == "joining" or not self._may_be_current(beat.generation):
            return
        if beat.group_rank >= beat.group_world_size:
            return
        seats = self._seats.setdefault(beat.generation, {})
        seats[beat.group_rank] = beat.pod_uid
        if all(rank in seats for rank in range(beat.group_world_size)):
            self.publish(
                Membership(
                    generation=beat.generation,
                    pod_uids=tuple(seats[rank] for rank in range(beat.group_world_size)),
                    master_address=beat.master_address,
                    master_port=beat.master_port,
                )
            )
            self.changed = True

    def _drop(self, pod_uid: str) -> None:
        if self._members.pop(pod_uid, None) is not None:
            self.changed = True
        for seats in self._seats.values():
            for rank in [rank for rank, uid in seats.items() if uid == pod_uid]:
                del seats[rank]

    def _keep_error(self, report: Report, error: ErrorReport, now_s: float) -> None:
        member = self._members.get(report.pod_uid)
        entry = WorkerError(
            pod=member.pod if member else "",
            pod_uid=report.pod_uid,
            node=member.node if member else "",
            generation=report.generation,
            exit_code=error.exit_code,
            message=_readable(error.message),
            fingerprint=_readable(error.fingerprint),
            at_s=now_s,
            failure_class=error.failure_class,
            step=error.step,
            stacks=_readable(error.stacks),
        )
        if any(replace(known, at_s=now_s) == entry for known in self._errors):
            return  # said again because the answer was lost
        if len(self._errors) >= ERRORS_LIMIT:
            # A signal names the cause; what follows it is broken connections, and those may be
            # reported first.
            if error.exit_code >= 0:
                return
            del self._errors[-1]
        self._errors.append(entry)
        self.changed = True

    def _keep_progress(self, generation: int, progress: ProgressReport, now_s: float) -> None:
        last = self._progress if self._progress_generation == generation else None
        if last and progress.step < last.step and progress.rollbacks <= last.rollbacks:
            return
        resumed_step = progress.resumed_step
        if resumed_step is None and last:
            resumed_step = last.resumed_step
        before = last.step if last else -1
        first_new = before <= (resumed_step or 0) < progress.step
        slow = {one.rank for one in last.stragglers} if last else set()
        news = slow != {one.rank for one in progress.stragglers}
        self.changed |= last is None or first_new or news
        self._progress = progress.model_copy(
            update={
                "resumed_step": resumed_step,
                "loss": _finite(progress.loss),
                "mfu": _finite(progress.mfu),
                "tokens_per_second": _finite(progress.tokens_per_second) or 0.0,
                "step_seconds": _finite(progress.step_seconds) or 0.0,
            }
        )
        self._progress_generation = generation
        self._progress_at_s = now_s


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _readable(text: str) -> str:
    """The end of a text, without the control characters that would disturb a terminal."""
    kept = "".join(c for c in text if c.isprintable() or c in "\n\t")
    return kept[-ERROR_TEXT_LIMIT:]
