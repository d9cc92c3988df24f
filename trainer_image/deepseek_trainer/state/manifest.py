"""manifest.json of a checkpoint: what the state is, and the size and sha256 of every file.

PyTorch's distributed checkpoint loads flipped bits, zeroed regions and shards of two saves without
an error; the manifest is what a load trusts.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from deepseek_trainer.data.corpus import sha256_of

NAME: Final = "manifest.json"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """One checkpoint.

    All random numbers are functions of the seed and a position (weights by name, samples by index),
    so `rng` is the seed.
    """

    step: int
    tokens: int
    updates: int
    generation: int
    world: int
    layout: dict[str, int]
    data: dict[str, Any]
    rng: dict[str, int]
    loss_scale: dict[str, float]
    left_out: list[list[int]] = field(default_factory=list)
    skipped_steps: int = 0
    rollbacks: int = 0
    config: str
    architecture: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: str = ""  # where the files lie, if not beside the manifest
    format: int = FORMAT

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), indent=2)


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of one file."""
    return {"sizeBytes": path.stat().st_size, "sha256": sha256_of(path)}


def write(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest last and make folder and file durable."""
    path = folder / NAME
    with path.open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, no manifest, or of another format.
        OSError: the storage is away; that says nothing about the checkpoint.
    """
    path = folder / NAME
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(content: bytes, where: str) -> CheckpointManifest:
    """The manifest from its stored form. Raises ValueError if it is none, or of another format."""
    try:
        manifest = CheckpointManifest(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"{where}: format {manifest.format} is not {FORMAT}")
    return manifest


def damage(
    files: Mapping[str, Mapping[str, Any]],
    names: Iterable[str],
    *,
    size_of: Callable[[str], int],
    sha256_of: Callable[[str], str],
) -> list[str]:
    """What is wrong with the named files, one sentence each; empty when all are as the manifest
    says.

    Args:
        files: of the manifest.
        names: those to look at.
        size_of: bytes of a file as it is stored; FileNotFoundError if it is not.
        sha256_of: of its content, as it is stored.
    """
    found = []
    for name in names:
        try:
            size_bytes = size_of(name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        if size_bytes != files[name]["sizeBytes"]:
            found.append(f"{name} has {size_bytes} bytes, not {files[name]['sizeBytes']}")
        elif sha256_of(name) != files[name]["sha256"]:
            found.append(f"{name} has another sha256")
    return found


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
