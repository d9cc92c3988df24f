"""Where the agents put the stacks of their ranks, so that each can judge by all of them: beside the
checkpoints, as `stacks/<generation>/<pod>-<rank>.txt`; and what else they know of a hang.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from deepseek_trainer.bucket import Bucket

KEPT_GENERATIONS = 5
FOLDER = "stacks"
PATIENCE_S = 5.0  # ranks that hang are not kept waiting for a bucket that is away


class Dumps(Protocol):
    """Files by generation. Every method may raise OSError."""

    def place(self, generation: int) -> str:
        """Where a person finds them."""

    def put(self, generation: int, name: str, content: bytes) -> None:
        """Let all agents find this one."""

    def texts(self, generation: int) -> list[str]:
        """The stacks that all agents have put there so far."""

    def prune(self) -> None:
        """Keep the newest generations'."""


class DumpFolder:
    """In a folder that all pods see."""

    def __init__(self, shared: Path) -> None:
        self._root = shared / FOLDER

    def place(self, generation: int) -> str:
        """The folder of a generation."""
        return str(self._root / str(generation))

    def put(self, generation: int, name: str, content: bytes) -> None:
        """Appears by rename."""
        folder = self._root / str(generation)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{name}.tmp"
        draft.write_bytes(content)
        draft.rename(folder / name)

    def texts(self, generation: int) -> list[str]:
        """The stacks that all agents have put there so far."""
        found = (self._root / str(generation)).glob("*.txt")
        return [path.read_text(errors="replace") for path in found]

    def prune(self) -> None:
        """Keep the newest generations'."""
        folders = [path for path in self._root.iterdir() if path.name.isdigit()]
        for old in sorted(folders, key=lambda path: int(path.name))[:-KEPT_GENERATIONS]:
            shutil.rmtree(old, ignore_errors=True)  # another agent does the same


class DumpBucket:
    """In a bucket."""

    def __init__(self, uri: str) -> None:
        self._bucket = Bucket(uri, patience_s=PATIENCE_S)

    def place(self, generation: int) -> str:
        """The URI of a generation's."""
        return f"{self._bucket.uri}/{FOLDER}/{generation}"

    def put(self, generation: int, name: str, content: bytes) -> None:
        """One object each."""
        self._bucket.put(f"{FOLDER}/{generation}/{name}", content)

    def texts(self, generation: int) -> list[str]:
        """The stacks that all agents have put there so far."""
        found = self._bucket.below(f"{FOLDER}/{generation}")
        names = [name for name, _ in found if name.endswith(".txt")]
        return [self._bucket.get(name).content.decode(errors="replace") for name in names]

    def prune(self) -> None:
        """Keep the newest generations'."""
        names = {name: int(name.split("/")[1]) for name, _ in self._bucket.below(FOLDER)}
        old = sorted(set(names.values()))[:-KEPT_GENERATIONS]
        self._bucket.delete([name for name, generation in names.items() if generation in old])
