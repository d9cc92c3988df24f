"""Saving and restoring the state of a training. Every rank calls both at the same step.

Save: draft folder -> shards and .metadata (distributed checkpoint) -> manifest.json -> commit in
the background.
Restore: the newest committed checkpoint whose every file has the size and sha256 of its manifest;
each rank checks a part.
"""

import hashlib
import logging
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from dstrain_api.config import TrainerConfig
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from deepseek_trainer.data.sampler import DataState, Stream
from deepseek_trainer.model.deepseek import DeepSeek
from deepseek_trainer.optim.adamw import ShardedAdamW
from deepseek_trainer.optim.scale import LossScale
from deepseek_trainer.parallel.mesh import Mesh
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.commit import Committer
from deepseek_trainer.state.folder import CheckpointFolder, NoUsableCheckpoint
from deepseek_trainer.state.manifest import CheckpointManifest

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a training is. `position` counts samples read since its beginning."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores one training.

    `committer` lives on rank 0 only; the other ranks have none.
    """

    config: TrainerConfig
    folder: CheckpointFolder
    generation: int
    mesh: Mesh
    model: DeepSeek
    optimizer: ShardedAdamW
    stream: Stream
    committer: Committer | None

    def save(self, progress: Progress, *, required: bool) -> bool:
        """Write a draft and hand it to the committer; whether the storage took it.

        Args:
            progress: what the tensors have reached.
            required: whether a failure ends the training. Without it, training goes on and the
                next save tries again.

        Raises:
            OSError: the storage is full or away, and this save is required.
        """
        begin = time.monotonic()
        draft = self.folder.draft(progress.step, self.generation)
        try:
            save(self._tensors(), storage_writer=FileSystemWriter(draft, overwrite=False))
        except CheckpointException as error:  # raised by every rank if it is by one
            reasons = {str(wrapped[0]) for wrapped in error.failures.values()}
            # torch hides the system's error behind one of its own archive format.
            message = (
                f"step {progress.step} cannot be saved in {self.folder.root}, which may be full or "
                f"away: {'; '.join(sorted(reasons))}"
            )
            if required:
                raise OSError(message) from error
            if self.mesh.rank == 0:
                _log.error("%s; training goes on with the checkpoint before", message)
                shutil.rmtree(draft)
            return False
        own = {
            path.name: manifests.describe(path)
            for path in draft.glob(f"__{self.mesh.rank}_*.distcp")
        }
        parts: list[dict[str, dict[str, object]]] = [{} for _ in range(self.mesh.world)]
        dist.gather_object(own, parts if self.mesh.rank == 0 else None)
        if self.committer:
            files = {name: facts for part in parts for name, facts in part.items()}
            files[".metadata"] = manifests.describe(draft / ".metadata")
            manifests.write(draft, self._manifest(progress, files))
            self.committer.submit(progress.step, draft, began_s=begin)
        return True

    def settle(self) -> bool:
        """Wait on every rank until the last draft is committed; false when the coordinator refused
        it.
        """
        accepted = [self.committer.wait().accepted if self.committer else None]
        dist.broadcast_object_list(accepted)
        return bool(accepted[0])

    def restore(self) -> Progress:
        """Load the newest checkpoint that is whole; a fresh start where there never was one.

        Raises:
            NoUsableCheckpoint: there were checkpoints, and none of them can be used.
            ValueError: the checkpoint is of another model, seed or corpus.
        """
        if self.mesh.rank == 0:
            self.folder.root.mkdir(parents=True, exist_ok=True)
            self.folder.clear(self.generation)
        names = [self._history() if self.mesh.rank == 0 else None]
        dist.broadcast_object_list(names)
        if names[0] is None:
            return Progress(loss_scale=LossScale.start(self.config.precision.compute))
        for name in names[0]:
            path = self.folder.root / name
            if problems := self._problems(path):
                _log.error("checkpoint %s is damaged: %s", path, "; ".join(problems))
                if self.mesh.rank == 0:
                    self.folder.quarantine(path)
                continue
            return self._load(path)
        raise NoUsableCheckpoint(
            f"{self.folder.root} had checkpoints, but none is whole. Restore "
            "one from a backup, or empty the folder to start again at step 0"
        )

    def _history(self) -> list[str] | None:
        """Names of the committed checkpoints, newest first; none where there never was one."""
        if not self.folder.has_history():
            return None
        return [path.name for _, path in self.folder.committed()]

    def _problems(self, path: Path) -> list[str]:
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

    def _load(self, path: Path) -> Progress:
        saved = manifests.read(path)
        if saved.architecture != self.config.architecture.model_dump(mode="json"):
            raise ValueError(
                f"{path} holds another model: restore spec.model, or point checkpoint.uri to an "
                "empty folder"
            )
        position = self.stream.position(DataState(**saved.data))
        load(self._tensors(), storage_reader=FileSystemReader(path))
        self.optimizer.updates = saved.updates
        return Progress(
            step=saved.step,
            tokens=saved.tokens,
            position=position,
            loss_scale=LossScale(saved.loss_scale["scale"], int(saved.loss_scale["finite_steps"])),
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        named: dict[str, list[tuple[str, torch.Tensor]]] = {
            "model": [*self.model.named_parameters(), *self.model.named_buffers()],
            "optimizer": [*self.optimizer.moments().items()],
        }
        return {
            f"{part}.{name}": tensor.detach()
            for part, tensors in named.items()
            for name, tensor in tensors
        }

    def _manifest(
        self, progress: Progress, files: dict[str, dict[str, object]]
    ) -> CheckpointManifest:
        config = self.config.model_dump_json()
        return CheckpointManifest(
            step=progress.step,
            tokens=progress.tokens,
            updates=self.optimizer.updates,
            generation=self.generation,
            world=self.mesh.world,
            layout=self.mesh.layout.to_json(),
            data=self.stream.state(progress.position).to_json(),
            rng={"seed": self.config.training.seed},
            loss_scale=asdict(progress.loss_scale),
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
