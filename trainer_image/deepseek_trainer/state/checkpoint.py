"""Saving and restoring the state of a training in two tiers. Every rank calls each method at the
same step.

The training thread only copies tensors to host memory. A background thread completes the local copy
and, for a save, writes the same memory to the shared store. One of either is under way at a time.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.optim.adamw import ShardedAdamW
from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.optim.totals import Flags
from deepseek_trainer.state.background import Background
from deepseek_trainer.state.committed import CommittedTier, Tensors
from deepseek_trainer.state.host import HostCopy, host_memory
from deepseek_trainer.state.local import CopyId, open_copies
from deepseek_trainer.state.pace import Pace
from deepseek_trainer.state.progress import Progress
from deepseek_trainer.state.store import NoUsableCheckpoint, Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """What one rank could resume from."""

    copies: list[CopyId] | None  # none: it has no room for copies
    committed: list[int] | None = None  # rank 0 only, as the next one
    newest: tuple[int, int] = (0, 0)  # step and generation


@dataclass(frozen=True)
class SavingFigures:
    """What saving costs and is worth: seconds by which it has held up this process since it began,
    and the newest step that was read back (on rank 0; 0: none).
    """

    stall_s: float
    verified_step: int


class Checkpointer:
    """Saves and restores one training.

    Args:
        tier: the shared store.
        model: after `parallel.shard.spread`.
        optimizer: of the model.
        local_dir: folder in the pod's memory; none: no local copies.
        pace: decides on rank 0 when something is due.
    """

    def __init__(
        self,
        tier: CommittedTier,
        model: DeepSeek,
        optimizer: ShardedAdamW,
        *,
        local_dir: Path | None,
        pace: Pace,
    ) -> None:
        self._tier = tier
        self._mesh = tier.mesh
        self._optimizer = optimizer
        self._tensors = _tensors(model, optimizer)
        self._pace = pace
        self._local = open_copies(local_dir, self._tensors, self._identity()) if local_dir else None
        self._copying = False  # whether every rank has room for local copies
        self._memory: HostCopy | None = None
        self._background = Background("checkpoints")
        self._saved_step = -1
        self._stall_s = 0.0

    def flags(self, step: int) -> Flags:
        """What this rank has to say to what is kept after a step that is under way."""
        first = self._mesh.rank == 0
        return Flags(
            save=first and self._pace.save_is_due(step),
            copy=first and self._copying and self._pace.copy_is_due(),
            busy=self._background.busy,
        )

    def keep(self, progress: Progress, flags: Flags) -> None:
        """Begin to save or copy the state after a step, as all ranks have agreed. While one of them
        is still busy with the last one, what is due waits for its turn.
        """
        if (flags.save or flags.copy) and not flags.busy:
            self._take(progress, save=flags.save)

    def save(self, progress: Progress) -> None:
        """Begin to save, after what is under way; `settle` tells how it ended."""
        self._take(progress, save=True)

    def holds(self, step: int) -> bool:
        """Whether the state after this step is committed, or its save has begun."""
        return step == self._saved_step

    def figures(self) -> SavingFigures:
        """What saving has cost so far."""
        verifier = self._tier.verifier
        return SavingFigures(self._stall_s, verifier.last_step if verifier else 0)

    def settle(self) -> bool:
        """Wait on every rank until the last save is committed; false when the coordinator refused
        it.

        Raises:
            OSError: the storage is full or away.
        """
        self._background.wait()
        outcome: list[bool | str] = [True]
        if self._tier.error:
            outcome = [self._tier.error]
        elif self._tier.committer:
            try:
                outcome = [self._tier.committer.wait().accepted]
            except OSError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], str):
            raise OSError(outcome[0])
        return outcome[0]

    def restore(self) -> Progress:
        """Load the newest state that is whole on every rank: a local copy, or else a checkpoint; a
        fresh start where there never was one.

        Raises:
            NoUsableCheckpoint: there were checkpoints, and none of them can be used.
            ValueError: the checkpoint is of another model, seed or corpus.
        """
        offers = self._offers()
        self._copying = all(offer.copies is not None for offer in offers)
        progress = self._from_copy(common_copies(offers))
        if progress is None:
            progress = self._from_store(offers[0].committed)
        return progress

    def roll_back(self) -> Progress | None:
        """Load the newest checkpoint that is whole, after what is under way; none where there never
        was one. Local copies belong to the timeline that ends here.

        Raises:
            NoUsableCheckpoint: as `restore`.
        """
        self._background.wait()
        if self._tier.committer:
            self._tier.committer.drain()
        if self._local:
            self._local.keep_only(None)
        steps = [self._tier.history() if self._mesh.rank == 0 else None]
        dist.broadcast_object_list(steps)
        self._pace.hurry()  # what is left out from now on must not be forgotten
        return self._from_store(steps[0]) if steps[0] is not None else None

    def _offers(self) -> list[Offer]:
        own = Offer([copy.id for copy in self._local.held()] if self._local else None)
        if self._mesh.rank == 0:
            self._tier.store.claim(self._tier.generation)
            committed = self._tier.history()
            newest = _newest(self._tier.store, committed or [])
            own = replace(own, committed=committed, newest=newest)
        offers = [own] * self._mesh.world
        dist.all_gather_object(offers, own)
        return offers

    def _from_copy(self, candidates: list[CopyId]) -> Progress | None:
        """The newest of these local copies that is whole on every rank; the others, which may come
        from a timeline that ends here, are forgotten.
        """
        if self._local is None:
            return None
        held = {copy.id: copy for copy in self._local.held()}
        for candidate in candidates:
            copy = held[candidate]
            whole = [self._local.is_whole(copy)] * self._mesh.world
            dist.all_gather_object(whole, whole[0])
            if all(whole):
                self._local.load(copy)
                self._local.keep_only(copy)
                self._optimizer.updates = copy.updates
                return Progress.from_json(copy.progress)
            _log.error("the local copy of step %d is damaged", candidate.step)
        self._local.keep_only(None)
        return None

    def _from_store(self, steps: list[int] | None) -> Progress:
        if steps is None:
            return Progress(loss_scale=LossScale.start(self._tier.config.precision.compute))
        store = self._tier.store
        for step in steps:
            if problems := self._tier.problems(step):
                _log.error("checkpoint %d in %s is damaged: %s", step, store.where, problems)
                if self._mesh.rank == 0:
                    store.quarantine(step)
                continue
            if self._mesh.rank == 0:
                store.mark_verified(step)
            progress, self._optimizer.updates = self._tier.load(step, self._tensors)
            self._saved_step = progress.step
            return progress
        raise NoUsableCheckpoint(
            f"{store.where} had checkpoints, but none is whole. Restore one from a backup, or "
            "empty it to start again at step 0"
        )

    def _take(self, progress: Progress, *, save: bool) -> None:
        begin_s = time.monotonic()
        self._background.wait()
        if save:
            self._tier.open()
            self._saved_step = progress.step
            self._pace.saved()
        self._pace.copied()
        copy = self._next_copy()
        copy.take()
        held_up_s = time.monotonic() - begin_s
        frozen, updates = replace(progress), self._optimizer.updates
        self._background.start(
            lambda: self._finish(
                copy, frozen, updates, save=save, began_s=begin_s, held_up_s=held_up_s
            )
        )

    def _next_copy(self) -> HostCopy:
        if self._local:
            return self._local.begin()
        self._memory = self._memory or HostCopy(self._tensors, host_memory(self._tensors))
        return self._memory

    def _finish(
        self,
        copy: HostCopy,
        progress: Progress,
        updates: int,
        *,
        save: bool,
        began_s: float,
        held_up_s: float,
    ) -> None:
        """In the background: complete the local copy, write the checkpoint."""
        cuda = self._mesh.device.type == "cuda"
        if cuda:
            copy.wait()
            held_up_s = time.monotonic() - began_s
        self._stall_s += held_up_s
        begin_s = time.thread_time()

        def cost_s() -> float:
            # Without a GPU the background takes its time from the same cores as the steps.
            return held_up_s + (0.0 if cuda else time.thread_time() - begin_s)

        if self._local:
            copy_id = CopyId(progress.step, self._tier.generation, progress.rollbacks)
            self._local.complete(copy_id, progress=progress.to_json(), updates=updates)
            self._pace.copy_took(cost_s())
        if save:
            self._tier.write(copy.tensors, progress, updates, began_s=began_s)
            self._pace.save_took(cost_s())

    def _identity(self) -> str:
        """What must be equal for a local copy to be of this training, in this place."""
        facts = {
            "config": self._tier.config.model_dump(mode="json"),
            "data": self._tier.stream.fingerprint,
            "layout": self._mesh.layout.to_json(),
            "rank": self._mesh.rank,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def common_copies(offers: Sequence[Offer]) -> list[CopyId]:
    """Local copies that every rank holds, newest first, and that no checkpoint has overtaken.

    A checkpoint of a later generation ends the timeline of an earlier one's copies, whatever their
    step.
    """
    step, generation = offers[0].newest
    common = set.intersection(*(set(offer.copies or []) for offer in offers))
    return sorted(
        (copy for copy in common if copy.step > step and copy.generation >= generation),
        reverse=True,
    )


def _newest(store: Store, steps: list[int]) -> tuple[int, int]:
    """Step and generation of the newest checkpoint whose manifest can be read."""
    for step in steps:
        try:
            return step, store.manifest(step).generation
        except ValueError:  # damaged: found and put aside when it is to be loaded
            continue
    return 0, 0


def _tensors(model: DeepSeek, optimizer: ShardedAdamW) -> Tensors:
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {
        "model": [*model.named_parameters(), *model.named_buffers()],
        "optimizer": [*optimizer.moments().items()],
    }
    return {
        f"{part}.{name}": tensor.detach()
        for part, tensors in parts.items()
        for name, tensor in tensors
    }
