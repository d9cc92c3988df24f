"""A prepared corpus: token ids in memory-mapped shards and a manifest that says what they are.

    <folder>/manifest.json
    <folder>/tokenizer.json        the tokenizer the ids belong to
    <folder>/shard-00000.bin       little-endian uint16 (vocabulary <= 65536) or uint32;
                                   every document ends with the end token

Every worker maps the same files; nothing is read before it is used.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlparse

import numpy as np
import numpy.typing as npt

MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"
FORMAT: Final = 1
BUILTIN: Final = Path(__file__).parent.parent / "corpus"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared corpus says about itself. `tokenizer` is the sha256 of its tokenizer.json."""

    dtype: str
    vocabulary: int
    end_token: int
    documents: int
    tokenizer: str
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def tokens(self) -> int:
        """Token ids in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the token stream: equal fingerprints mean equal samples."""
        parts = [self.tokenizer, self.dtype, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        record = asdict(self) | {"tokens": self.tokens, "fingerprint": self.fingerprint}
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: another format, or the fingerprint does not fit the shards.
        """
        record: dict[str, Any] = json.loads(text)
        if record.get("format") != FORMAT:
            raise ValueError(f"format {record.get('format')} is not {FORMAT}: prepare it again")
        record.pop("tokens")
        fingerprint = record.pop("fingerprint")
        record["shards"] = tuple(Shard(**shard) for shard in record["shards"])
        manifest = cls(**record)
        if manifest.fingerprint != fingerprint:
            raise ValueError("the fingerprint does not fit the shards: prepare it again")
        return manifest


class Corpus:
    """A prepared corpus cut into samples of `sequence_length` + 1 tokens; neighbours share one
    token.

    Raises:
        ValueError: no corpus in the folder, a shard of another size than the manifest says, or too
            few tokens.
    """

    def __init__(self, folder: Path, sequence_length: int) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.manifest = read_manifest(folder)
        for shard in self.manifest.shards:
            found = (folder / shard.file).stat().st_size
            if found != shard.size_bytes:
                raise ValueError(
                    f"{folder / shard.file} has {found} bytes, its manifest says "
                    f"{shard.size_bytes}: copy or prepare the corpus again"
                )
        self.samples = (self.manifest.tokens - 1) // sequence_length
        if self.samples < 1:
            raise ValueError(
                f"{folder} has {self.manifest.tokens} tokens, fewer than one sample: "
                f"give more text or a data.sequenceLength below {self.manifest.tokens}"
            )

    @cached_property
    def _maps(self) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
        return [
            np.memmap(self.folder / shard.file, dtype=np.dtype(self.manifest.dtype), mode="r")
            for shard in self.manifest.shards
        ]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)])

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens of sample `index`, shape [sequence_length + 1]."""
        begin = index * self.sequence_length
        end = begin + self.sequence_length + 1
        pieces = []
        while begin < end:
            shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
            offset = begin - int(self._starts[shard])
            piece = self._maps[shard][offset : offset + end - begin]
            pieces.append(piece.astype(np.int64))
            begin += len(piece)
        return np.concatenate(pieces)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared corpus.

    Raises:
        ValueError: the folder holds none, or one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no prepared corpus ({MANIFEST} is missing): run `dstrain data prepare` "
            "on its text"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def resolve(uri: str) -> Path:
    """Path of a `file:///` or `builtin://` URI.

    Raises:
        ValueError: another scheme (a `pvc://` is made a path by whoever starts the worker), or no
            such built-in corpus.
    """
    parts = urlparse(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.scheme == "builtin":
        path = BUILTIN / parts.netloc
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{uri}: there is no such built-in corpus; builtin://mini is one")
        return path
    raise ValueError(f"{uri}: a worker reads file:/// and builtin:// only")


def tokenizer_path(uri: str) -> Path:
    """Path of the tokenizer.json that a URI names: the file itself or the folder it is in."""
    path = resolve(uri)
    return path / TOKENIZER if path.is_dir() else path


def open_corpora(
    uris: Sequence[str], *, tokenizer: str, vocabulary: int, sequence_length: int
) -> list[Corpus]:
    """The corpora of a training, checked against its tokenizer and its model's vocabulary.

    Raises:
        ValueError: a corpus is missing, was made with another tokenizer, or has ids the model has
            no embedding for.
    """
    expected = sha256_of(tokenizer_path(tokenizer))
    corpora = [Corpus(resolve(uri), sequence_length) for uri in uris]
    for uri, corpus in zip(uris, corpora, strict=True):
        if corpus.manifest.tokenizer != expected:
            raise ValueError(
                f"data.sources: {uri} was prepared with another tokenizer than data.tokenizer "
                f"{tokenizer}"
            )
        if corpus.manifest.vocabulary > vocabulary:
            raise ValueError(
                f"data.sources: {uri} has a vocabulary of {corpus.manifest.vocabulary}; "
                f"set model.overrides.vocabulary (now {vocabulary}) to at least that"
            )
    return corpora


def sha256_of(path: Path) -> str:
    """Hex digest of a file.

    Raises:
        ValueError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
