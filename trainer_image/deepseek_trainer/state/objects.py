"""Checkpoints below a prefix of an S3 bucket, where nothing can be renamed.

    step-40.g3-5f1c0a9e/             files of a save by generation 3; no other save writes there
    step-40/manifest.json            its commit: written only where there is none
    step-40.g3-5f1c0a9e.verified     it was read back and is whole
    step-40.g3-5f1c0a9e.bad          it was committed but is damaged; its files stay for a person
    LATEST                           the newest checkpoint, and the generation that may commit

Whoever begins writes its generation into LATEST, each write over the very version it knows. So a
writer that was replaced finds another version there and commits nothing.
"""

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan

from deepseek_trainer.bucket import Bucket, Conflict
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.manifest import CheckpointManifest
from deepseek_trainer.state.store import LATEST, CommitRefused, kept_steps

_COMMITTED: Final = re.compile(r"step-(\d+)/")
_DRAFT: Final = re.compile(r"(step-(\d+)\.g(\d+)-[0-9a-f]+)/")
_MARK: Final = re.compile(r"(step-(\d+)\.g\d+-[0-9a-f]+)\.(bad|verified)")


class CheckpointBucket:
    """All checkpoints of one training, below a prefix.

    Args:
        bucket: the prefix.
        staging: folder of this machine where files wait for their upload, and where a load puts
            what it reads; room for this machine's part of one checkpoint.
        training: its uid; generations of one training are compared, those of two are not.
    """

    def __init__(self, bucket: Bucket, staging: Path, *, training: str) -> None:
        self._bucket = bucket
        self._staging = staging
        self._training = training
        self._writer = uuid.uuid4().hex[:8]
        self._generation = 0
        self._tag = ""  # of LATEST, as this writer knows it

    @property
    def where(self) -> str:
        """The URI."""
        return self._bucket.uri

    def claim(self, generation: int) -> None:
        """Delete what earlier generations left unfinished; from now on they cannot commit."""
        self._generation = generation
        try:
            found = self._bucket.get(LATEST)
        except FileNotFoundError:
            self._tag = self._bucket.put_new(LATEST, self._latest())
        else:
            there = json.loads(found.content)
            if there["training"] == self._training and there["generation"] > generation:
                raise OSError(
                    f"{self.where} belongs to generation {there['generation']} by now, and this is "
                    f"{generation}"
                )
            self._tag = self._bucket.put_over(LATEST, self._latest(), found.tag)
        self._clear()

    def draft(self, step: int, generation: int) -> str:
        """A name that no other save has or will have."""
        return f"step-{step}.g{generation}-{uuid.uuid4().hex[:8]}"

    def folder(self, draft: str) -> Path:
        """Where a rank writes its files before they are uploaded."""
        return self._staging / draft

    def upload(self, draft: str, files: Sequence[str]) -> None:
        """Send files of this rank, and drop them here."""
        for name in files:
            self._bucket.upload(f"{draft}/{name}", self.folder(draft) / name)
            (self.folder(draft) / name).unlink()
        with suppress(OSError):  # another rank of this machine is not done
            self.folder(draft).rmdir()

    def seal(self, draft: str, manifest: CheckpointManifest) -> None:
        """Write the manifest beside the files."""
        sealed = replace(manifest, folder=draft).to_json()
        self._bucket.put(f"{draft}/{manifests.NAME}", sealed.encode())

    def forget(self, draft: str) -> None:
        """Delete what waits here for its upload."""
        shutil.rmtree(self.folder(draft), ignore_errors=True)

    def discard(self, draft: str) -> None:
        """Delete a draft."""
        self._bucket.delete([name for name, _ in self._bucket.below(draft)])

    def commit(self, draft: str, step: int) -> None:
        """Make a complete draft a checkpoint, unless another generation has begun, or this step is
        committed already.
        """
        self._still_current()
        manifest = self._bucket.get(f"{draft}/{manifests.NAME}").content
        try:
            self._bucket.put_new(_commit(step), manifest)
        except Conflict as conflict:
            raise CommitRefused(f"step {step} is committed already: {conflict}") from conflict
        try:
            self._tag = self._bucket.put_over(LATEST, self._latest(step), self._tag)
        except Conflict as conflict:
            self._bucket.delete([_commit(step)])
            raise CommitRefused(f"another generation has begun: {conflict}") from conflict

    def committed(self) -> list[int]:
        """Steps of the committed checkpoints, newest first."""
        return _steps(self._bucket.names())

    def has_history(self) -> bool:
        """Whether a checkpoint was ever committed here."""
        names = self._bucket.names()
        if _steps(names) or _marked(names, "bad"):
            return True
        return LATEST in names and bool(
            json.loads(self._bucket.get(LATEST).content).get("checkpoint")
        )

    def manifest(self, step: int) -> CheckpointManifest:
        """Raises ValueError if it is missing or damaged."""
        try:
            content = self._bucket.get(_commit(step)).content
        except FileNotFoundError as error:
            raise ValueError(f"{self.where}/{_commit(step)} is missing") from error
        return manifests.parse(content, f"{self.where}/{_commit(step)}")

    def damage(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Any]],
        names: Iterable[str],
        *,
        fresh: bool = False,  # nothing is read from anywhere but the bucket
    ) -> list[str]:
        """What is wrong with the named files of a checkpoint, one sentence each."""
        folder = self.manifest(step).folder
        return manifests.damage(
            files,
            names,
            size_of=lambda name: self._bucket.size(f"{folder}/{name}"),
            sha256_of=lambda name: self._bucket.sha256(
                f"{folder}/{name}", int(files[name]["sizeBytes"])
            ),
        )

    @contextmanager
    def reader(self, step: int) -> Iterator[FileSystemReader]:
        """Each rank downloads the files that it needs, for as long as it reads."""
        saved = self.manifest(step)
        self._staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="load-", dir=self._staging) as folder:

            def fetch(name: str) -> None:
                size_bytes = int(saved.files[name]["sizeBytes"])
                with (Path(folder) / name).open("xb") as file:
                    file.writelines(self._bucket.parts(f"{saved.folder}/{name}", size_bytes))

            yield _Downloading(Path(folder), fetch)

    def quarantine(self, step: int) -> None:
        """Take back the commit of a damaged checkpoint and mark its files."""
        for folder in self._folders(step):
            self._bucket.put(f"{folder}.bad", b"")
            self._bucket.delete([f"{folder}.verified"])
        self._bucket.delete([_commit(step)])
        newest = next(iter(self.committed()), None)
        with suppress(Conflict):  # then LATEST is another generation's to write
            self._tag = self._bucket.put_over(LATEST, self._latest(newest), self._tag)

    def mark_verified(self, step: int) -> None:
        """A committed checkpoint was read back and is whole."""
        self._bucket.put(f"{self.manifest(step).folder}.verified", b"")

    def unverified(self) -> int | None:
        """The newest committed checkpoint, if it is not verified yet."""
        names = self._bucket.names()
        newest = next(iter(_steps(names)), None)
        return None if newest is None or newest in _marked(names, "verified") else newest

    def prune(self, *, keep_last: int, keep_every_steps: int) -> None:
        """Delete committed checkpoints but those that `kept_steps` names."""
        names = self._bucket.names()
        committed = _steps(names)
        verified = _marked(names, "verified")
        kept = kept_steps(
            committed,
            [step for step in committed if step in verified],
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )
        for step in committed:
            if step not in kept:
                folders = self._folders(step)
                self._bucket.delete([_commit(step)])  # first: what has no commit is a draft
                for folder in folders:
                    self._bucket.delete([f"{folder}.verified"])
                    self.discard(folder)

    def newest_size(self) -> int:
        """Bytes of the newest checkpoint; 0 where there is none."""
        for step in self.committed():
            return sum(int(facts["sizeBytes"]) for facts in self.manifest(step).files.values())
        return 0

    def free(self) -> float:
        """A bucket does not say."""
        return float("inf")

    def _still_current(self) -> None:
        """Raises CommitRefused when another writer has claimed the prefix."""
        found = self._bucket.get(LATEST)
        if found.tag != self._tag:
            said = json.loads(found.content)
            raise CommitRefused(
                f"{self.where} belongs to generation {said['generation']} of training "
                f"{said['training']!r} (writer {said['writer']}), which has begun after this one; "
                "give each training a prefix of its own"
            )

    def _latest(self, step: int | None = None) -> bytes:
        """What LATEST says from now on; without a step what is committed."""
        newest = next(iter(self.committed()), None) if step is None else step
        record = {
            "checkpoint": "" if newest is None else f"step-{newest}",
            "training": self._training,
            "generation": self._generation,
            "writer": self._writer,
        }
        return json.dumps(record).encode()

    def _clear(self) -> None:
        names = self._bucket.names()
        committed = set(_steps(names))
        drafts = [found for name in names if (found := _DRAFT.fullmatch(name))]
        of_step = [int(found[2]) for found in drafts]
        for found in drafts:
            name, step = found[1], int(found[2])
            if f"{name}.bad" in names or (step in committed and of_step.count(step) == 1):
                continue
            if step not in committed or name not in self._folders(step):
                self._bucket.delete([f"{name}.verified"])
                self.discard(name)

    def _folders(self, step: int) -> list[str]:
        """The folder of a committed checkpoint; all of its step, if its manifest is damaged."""
        try:
            return [self.manifest(step).folder]
        except ValueError:
            found = (_DRAFT.fullmatch(name) for name in self._bucket.names())
            return [match[1] for match in found if match and int(match[2]) == step]


class _Downloading(FileSystemReader):
    """Reads a folder that fills with the files this rank asks for."""

    def __init__(self, folder: Path, fetch: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._fetch = fetch

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of all files."""
        self._fetch(".metadata")
        return super().read_metadata(*args, **kwargs)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """What this rank is going to read."""
        stored = (self.storage_data[item.storage_index] for item in plan.items)
        for name in sorted({info.relative_path for info in stored}):
            self._fetch(name)
        return super().prepare_local_plan(plan)


def _commit(step: int) -> str:
    return f"step-{step}/{manifests.NAME}"


def _steps(names: Sequence[str]) -> list[int]:
    found = (_COMMITTED.fullmatch(name) for name in names)
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _marked(names: Sequence[str], mark: str) -> set[int]:
    found = (_MARK.fullmatch(name) for name in names)
    return {int(match[2]) for match in found if match and match[3] == mark}
