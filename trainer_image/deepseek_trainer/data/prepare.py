"""From text to a prepared corpus: what `dstrain data prepare` does."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from deepseek_trainer.data.corpus import MANIFEST, TOKENIZER, Manifest, Shard, sha256_of

END_OF_TEXT: Final = "<|endoftext|>"
SHARD_TOKENS: Final = 1 << 28
_PIECE_BYTES: Final = 1 << 20  # text is encoded in pieces of about this size, cut at line ends
_BATCH_PIECES: Final = 16
_UINT16_VOCABULARY: Final = 1 << 16


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path | None = None,
    vocabulary: int = 32_768,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn text into a prepared corpus.

    Args:
        inputs: UTF-8 files (one document each; of a `.jsonl`, the field `text` of every line) or
            folders of such files.
        output: folder to make; it appears only when it is complete.
        tokenizer: a tokenizer.json to use; without one a byte-level BPE is trained on the inputs.
        vocabulary: entries of the tokenizer that is trained.
        shard_tokens: tokens per shard file.

    Returns:
        The manifest, as written to `output`.

    Raises:
        ValueError: no input, an output that exists, a tokenizer without an end-of-text token, text
            that is not UTF-8.
    """
    files = list(_files(inputs))
    if not files:
        raise ValueError(
            f"no .txt, .md or .jsonl file in {', '.join(map(str, inputs)) or 'nothing'}"
        )
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    model = Tokenizer.from_file(str(tokenizer)) if tokenizer else train(files, vocabulary)
    end_token = model.token_to_id(END_OF_TEXT)
    if end_token is None:
        raise ValueError(f"{tokenizer} has no token {END_OF_TEXT}, which separates documents")

    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        manifest = _write(draft, files, model, end_token, shard_tokens)
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def train(files: Sequence[Path], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the given size, trained on the files."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for file in files for document in _documents(file) for piece in document)
    model.train_from_iterator(pieces, trainer)
    return model


def _write(
    folder: Path, files: Sequence[Path], model: Tokenizer, end_token: int, shard_tokens: int
) -> Manifest:
    model.save(str(folder / TOKENIZER))
    size = model.get_vocab_size()
    dtype = np.dtype("<u2" if size <= _UINT16_VOCABULARY else "<u4")
    shards = _Shards(folder, dtype, shard_tokens)
    documents = 0
    for file in files:
        for document in _documents(file):
            documents += 1
            for ids in _encode(model, document):
                shards.append(ids)
            shards.append([end_token])
    manifest = Manifest(
        dtype=dtype.str,
        vocabulary=size,
        end_token=end_token,
        documents=documents,
        tokenizer=sha256_of(folder / TOKENIZER),
        shards=shards.close(),
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


class _Shards:
    """Writes token ids into files of a given number of tokens each."""

    def __init__(self, folder: Path, dtype: "np.dtype[np.unsignedinteger]", size: int) -> None:
        self._folder, self._dtype, self._size = folder, dtype, size
        self._done: list[Shard] = []
        self._file: BinaryIO | None = None
        self._tokens = 0

    def append(self, ids: Sequence[int]) -> None:
        array = np.asarray(ids, dtype=self._dtype)
        while len(array):
            if self._file is None:
                self._file = (self._folder / self._name).open("wb")
            head, array = np.split(array, [self._size - self._tokens])
            self._file.write(head.tobytes())
            self._tokens += len(head)
            if self._tokens == self._size:
                self._finish()

    def close(self) -> tuple[Shard, ...]:
        self._finish()
        return tuple(self._done)

    @property
    def _name(self) -> str:
        return f"shard-{len(self._done):05d}.bin"

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        path = self._folder / self._name
        shard = Shard(
            file=self._name,
            tokens=self._tokens,
            size_bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )
        self._done.append(shard)
        self._file, self._tokens = None, 0


def _encode(model: Tokenizer, pieces: Iterator[str]) -> Iterator[list[int]]:
    batch: list[str] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _BATCH_PIECES:
            yield from (encoding.ids for encoding in model.encode_batch(batch))
            batch = []
    yield from (encoding.ids for encoding in model.encode_batch(batch))


def _files(inputs: Sequence[Path]) -> Iterator[Path]:
    """The input files in a fixed order, so that the same inputs give the same corpus."""
    for path in inputs:
        if path.is_dir():
            yield from sorted(
                file for file in path.rglob("*") if file.suffix in {".txt", ".md", ".jsonl"}
            )
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} does not exist")


def _documents(file: Path) -> Iterator[Iterator[str]]:
    if file.suffix != ".jsonl":
        yield _pieces(file)
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{file}, line {number}: not a record {{"text": ...}}') from None
            yield iter([text])


def _pieces(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as text:
            while lines := text.readlines(_PIECE_BYTES):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
