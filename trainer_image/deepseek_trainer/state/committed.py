"""The committed tier: checkpoints in the folder that all workers share.

Write: draft folder -> shards and .metadata (distributed checkpoint) -> manifest.json -> commit.
Read: only what has the size and sha256 of its manifest, file by file; each rank checks a part.
"""

import hashlib
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from dstrain_api.config import TrainerConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from deepseek_trainer.data.sampler import DataState, Stream
from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.commit import Committer
from deepseek_trainer.state.folder import LEAST, CheckpointFolder
from deepseek_trainer.state.manifest import CheckpointManifest
from deepseek_trainer.state.progress import Progress
from deepseek_trainer.state.verify import Verifier

_log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
Answer = TypeVar("Answer")
ROOM: Final = 1.05  # of the size of the last checkpoint must be free before the next


@dataclass
class CommittedTier:
    """Writes and reads checkpoints. `committer` and `verifier` live on rank 0 only."""

    config: TrainerConfig
    folder: CheckpointFolder
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
        draft = self.folder.draft(progress.step, self.generation)
        try:
            self._write(draft, tensors, progress, updates)
        except OSError as error:
            self.error = f"step {progress.step} cannot be saved in {self.folder.root}: {error}"
            if self.committer:
                _log.error("%s; training goes on with the checkpoint before", self.error)
                shutil.rmtree(draft, ignore_errors=True)  # else the next generation clears it
        else:
            if self.committer:
                self.committer.submit(progress.step, draft, began_s=began_s)

    def _write(self, draft: Path, tensors: Tensors, progress: Progress, updates: int) -> None:
        """Write a complete draft. Raises OSError on every rank if it fails on one."""
        first = self.mesh.rank == 0
        self._together(lambda: self._make_room() if first else None)
        try:
            save(
                tensors,
                storage_writer=FileSystemWriter(draft, overwrite=False),
                process_group=self._group,
            )
        except CheckpointException as error:  # raised by every rank if it is by one
            # torch hides the system's error behind one of its own archive format.
            reasons = {str(wrapped[0]) for wrapped in error.failures.values()}
            raise OSError(f"it may be full or away: {'; '.join(sorted(reasons))}") from error
        own = [".metadata"] if first else []
        own += [path.name for path in draft.glob(f"__{self.mesh.rank}_*.distcp")]
        parts = self._together(lambda: {name: manifests.describe(draft / name) for name in own})
        files = {name: facts for part in parts for name, facts in part.items()}
        manifest = self._manifest(progress, updates, files)
        self._together(lambda: manifests.write(draft, manifest) if first else None)

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
        needed_bytes = self._newest_size() * ROOM
        if shutil.disk_usage(self.folder.root).free >= needed_bytes:
            return
        self.folder.prune(keep_last=LEAST, keep_every_steps=self.config.checkpoint.keep_every_steps)
        free_bytes = shutil.disk_usage(self.folder.root).free
        if free_bytes < needed_bytes:
            raise OSError(
                f"a checkpoint needs {needed_bytes / 2**20:.1f} MiB, and only "
                f"{free_bytes / 2**20:.1f} MiB are free; make room there"
            )

    def _newest_size(self) -> int:
        """Bytes of the newest checkpoint; 0 where there is none to go by."""
        for _, path in self.folder.committed():
            return sum(file.stat().st_size for file in path.iterdir())
        return 0

    def history(self) -> list[str] | None:
        """Names of the committed checkpoints, newest first; none where there never was one."""
        if not self.folder.has_history():
            return None
        return [path.name for _, path in self.folder.committed()]

    def problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, found by all ranks together."""
        try:
            files = manifests.read(path).files
        except ValueError as error:
            own = [str(error)]
        else:
            names = sorted({*files, ".metadata"})
            own = manifests.damage(path, files, names[self.mesh.rank :: self.mesh.world])
        found: list[list[str]] = [[] for _ in range(self.mesh.world)]
        dist.all_gather_object(found, own)
        return sorted({problem for problems in found for problem in problems})

    def load(self, path: Path, tensors: Tensors) -> tuple[Progress, int]:
        """Read a whole checkpoint into the tensors; where it is, and updates taken.

        Raises:
            ValueError: it is of another model, seed or corpus.
        """
        saved = manifests.read(path)
        if saved.architecture != self.config.architecture.model_dump(mode="json"):
            raise ValueError(
                f"{path} holds another model: restore spec.model, or point checkpoint.uri to an "
                "empty folder"
            )
        position = self.stream.position(DataState(**saved.data))
        load(tensors, storage_reader=FileSystemReader(path))
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
