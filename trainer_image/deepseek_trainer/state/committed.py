"""The committed tier: checkpoints in a store that all workers share.

Write: draft -> shards and .metadata (distributed checkpoint) -> manifest.json -> commit.
Read: only what has the size and sha256 of its manifest, file by file; each rank checks a part.
"""

import hashlib
import logging
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from dstrain_api.config import TrainerConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from deepseek_trainer.data.sampler import DataState, Stream
from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.commit import Committer
from deepseek_trainer.state.manifest import CheckpointManifest
from deepseek_trainer.state.progress import Progress
from deepseek_trainer.state.store import LEAST, Store
from deepseek_trainer.state.verify import Verifier

_log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
Answer = TypeVar("Answer")
ROOM: Final = 1.05  # of the size of the last checkpoint must be free before the next


@dataclass
class CommittedTier:
    """Writes and reads checkpoints. `committer` and `verifier` live on rank 0 only."""

    config: TrainerConfig
    store: Store
    generation: int
    mesh: Mesh
    stream: Stream
    committer: Committer | None
    verifier: Verifier | None
    error: str | None = field(default=None, init=False)  # of the last write, on every rank
    _group: dist.ProcessGroup | None = field(default=None, init=False)

    def open(self) -> None:
        """Make ready to write, on every rank at once: the background needs a group of its own, for
        collectives of two threads on one group get mixed up.
        """
        self._group = self._group or dist.new_group(backend="gloo")

    def write(self, tensors: Tensors, progress: Progress, updates: int, *, began_s: float) -> None:
        """Write a draft and hand it to the committer, in the background of every rank. If the
        storage does not take it, `error` says why.
        """
        self.error = None
        draft = ""
        try:
            draft = self._begin(progress.step)
            self._write(draft, tensors, progress, updates)
        except OSError as error:
            self.error = f"step {progress.step} cannot be saved in {self.store.where}: {error}"
            self._give_up(draft)
        else:
            if self.committer:
                self.committer.submit(progress.step, draft, began_s=began_s)

    def _begin(self, step: int) -> str:
        """Name of the draft, as all ranks know it."""

        def begin() -> str:
            if self.mesh.rank:
                return ""
            self._make_room()
            return self.store.draft(step, self.generation)

        return self._together(begin)[0]

    def _give_up(self, draft: str) -> None:
        """Remove what was written; what cannot be, the next generation clears."""
        if self.committer:
            _log.error("%s; training goes on with the checkpoint before", self.error)
        if draft:
            with suppress(OSError):
                self.store.forget(draft)
                if self.committer:
                    self.store.discard(draft)

    def _write(self, draft: str, tensors: Tensors, progress: Progress, updates: int) -> None:
        """Write a complete draft. Raises OSError on every rank if it fails on one."""
        first = self.mesh.rank == 0
        folder = self.store.folder(draft)
        try:
            save(
                tensors,
                storage_writer=FileSystemWriter(folder, overwrite=False),
                process_group=self._group,
            )
        except CheckpointException as error:  # raised by every rank if it is by one
            # torch hides the system's error behind one of its own archive format.
            reasons = {str(wrapped[0]) for wrapped in error.failures.values()}
            raise OSError(f"it may be full or away: {'; '.join(sorted(reasons))}") from error
        own = [".metadata"] if first else []
        own += [path.name for path in folder.glob(f"__{self.mesh.rank}_*.distcp")]

        def deliver() -> dict[str, dict[str, Any]]:
            described = {name: manifests.describe(folder / name) for name in own}
            self.store.upload(draft, own)
            return described

        parts = self._together(deliver)
        files = {name: facts for part in parts for name, facts in part.items()}
        manifest = self._manifest(progress, updates, files)
        self._together(lambda: self.store.seal(draft, manifest) if first else None)

    def _together(self, act: Callable[[], Answer]) -> list[Answer]:
        """What an action gives on each rank. Raises OSError on every rank if it does on one."""
        answers: list[tuple[Any, str]] = [(None, "")] * self.mesh.world
        own: tuple[Answer | None, str]
        try:
            own = act(), ""
        except OSError as error:
            own = None, str(error) or repr(error)
        dist.all_gather_object(answers, own, group=self._group)
        if reasons := sorted({reason for _, reason in answers if reason}):
            raise OSError("; ".join(reasons))
        return [answer for answer, _ in answers]

    def _make_room(self) -> None:
        needed_bytes = self.store.newest_size() * ROOM
        if self.store.free() >= needed_bytes:
            return
        self.store.prune(keep_last=LEAST, keep_every_steps=self.config.checkpoint.keep_every_steps)
        free_bytes = self.store.free()
        if free_bytes < needed_bytes:
            raise OSError(
                f"a checkpoint needs {needed_bytes / 2**20:.1f} MiB, and only "
                f"{free_bytes / 2**20:.1f} MiB are free; make room there"
            )

    def history(self) -> list[int] | None:
        """Steps of the committed checkpoints, newest first; none where there never was one."""
        return self.store.committed() if self.store.has_history() else None

    def problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, found by all ranks together."""
        try:
            files = self.store.manifest(step).files
        except ValueError as error:
            own = [str(error)]
        else:
            names = sorted({*files, ".metadata"})
            own = self.store.damage(step, files, names[self.mesh.rank :: self.mesh.world])
        found: list[list[str]] = [[] for _ in range(self.mesh.world)]
        dist.all_gather_object(found, own)
        return sorted({problem for problems in found for problem in problems})

    def load(self, step: int, tensors: Tensors) -> tuple[Progress, int]:
        """Read a whole checkpoint into the tensors; where it is, and updates taken.

        Raises:
            ValueError: it is of another model, seed or corpus.
        """
        saved = self.store.manifest(step)
        if saved.architecture != self.config.architecture.model_dump(mode="json"):
            raise ValueError(
                f"{self.store.where} holds another model: restore spec.model, or point "
                "checkpoint.uri to an empty place"
            )
        position = self.stream.position(DataState(**saved.data))
        with self.store.reader(step) as reader:
            load(tensors, storage_reader=reader)
        progress = Progress(
            step=saved.step,
            tokens=saved.tokens,
            position=position,
            loss_scale=LossScale(saved.loss_scale["scale"], int(saved.loss_scale["finite_steps"])),
            left_out=tuple((begin, end) for begin, end in saved.left_out),
            skipped_steps=saved.skipped_steps,
            rollbacks=saved.rollbacks,
        )
        return progress, saved.updates

    def _manifest(
        self, progress: Progress, updates: int, files: dict[str, dict[str, object]]
    ) -> CheckpointManifest:
        config = self.config.model_dump_json()
        return CheckpointManifest(
            step=progress.step,
            tokens=progress.tokens,
            updates=updates,
            generation=self.generation,
            world=self.mesh.world,
            layout=self.mesh.layout.to_json(),
            data=self.stream.state(progress.position).to_json(),
            rng={"seed": self.config.training.seed},
            loss_scale=asdict(progress.loss_scale),
            left_out=[list(span) for span in progress.left_out],
            skipped_steps=progress.skipped_steps,
            rollbacks=progress.rollbacks,
            config=hashlib.sha256(config.encode()).hexdigest(),
            architecture=self.config.architecture.model_dump(mode="json"),
            versions=versions(),
            files=files,
        )


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    try:
        own = version("dstrain")
    except PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {"dstrain": own, "torch": torch.__version__, "python": platform.python_version()}
