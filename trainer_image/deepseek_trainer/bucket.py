"""A prefix of an S3 bucket, with what checkpoints and stacks need of it.

Credentials, endpoint and region come from the standard AWS_* variables. Requests are repeated with
growing pauses while the server is away, and large objects travel in parts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

SCHEME: Final = "s3://"
PART_BYTES: Final = 16 * 2**20  # with 10,000 parts: files of up to 156 GiB
_PARTS_AT_ONCE: Final = 4
_PATIENCE_S: Final = 180.0
_BUCKET_ADVICE: Final = "make the bucket, or correct checkpoint.uri"
_ACCESS_ADVICE: Final = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION of the workers, and that they "
    "may list, get, put and delete there"
)
_AWAY_ADVICE: Final = "check AWS_ENDPOINT_URL of the workers, and the server"


class Conflict(Exception):
    """The object is not as the writer believed."""


@dataclass(frozen=True)
class Stored:
    """An object and the tag of this version of it."""

    content: bytes
    tag: str


class Bucket:
    """Objects below one prefix.

    Args:
        uri: s3://bucket or s3://bucket/prefix.
        patience_s: for how long a request is repeated while the server is away.

    Raises:
        OSError: (all methods) the storage is away or refuses; says what to change.
    """

    def __init__(self, uri: str, *, patience_s: float = _PATIENCE_S) -> None:
        self.uri = uri.rstrip("/")
        name, _, prefix = self.uri.removeprefix(SCHEME).partition("/")
        self._store = S3Store(
            name,
            prefix=prefix or None,
            # The timeout is of one request, which is at most one part.
            client_options={"allow_http": True, "connect_timeout": "5s", "timeout": "60s"},
            retry_config={
                "max_retries": 1000,
                "retry_timeout": timedelta(seconds=patience_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.2),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        )

    def names(self) -> list[str]:
        """Objects right below the prefix, and what lies deeper by its first part, as `name/`."""
        with self._explained("list"):
            found = obstore.list_with_delimiter(self._store)
        folders = [f"{path.rstrip('/')}/" for path in found["common_prefixes"]]
        return [*folders, *(entry["path"] for entry in found["objects"])]

    def below(self, folder: str) -> list[tuple[str, int]]:
        """Names and bytes of all objects in a folder; the names with the folder."""
        with self._explained("list"):
            entries = [entry for page in obstore.list(self._store, folder) for entry in page]
        return [(entry["path"], entry["size"]) for entry in entries]

    def get(self, name: str) -> Stored:
        """A small object. Raises FileNotFoundError if there is none."""
        with self._explained("get"):
            result = obstore.get(self._store, name)
            return Stored(bytes(result.bytes()), result.meta["e_tag"] or "")

    def put(self, name: str, content: bytes) -> None:
        """A small object, in place of one that is there."""
        with self._explained("put"):
            obstore.put(self._store, name, content)

    def put_new(self, name: str, content: bytes) -> str:
        """A small object where there is none; its tag. Raises Conflict if there is one."""
        with self._explained("put"):
            try:
                return obstore.put(self._store, name, content, mode="create")["e_tag"] or ""
            except AlreadyExistsError as error:
                return self._own(name, content, error)

    def put_over(self, name: str, content: bytes, tag: str) -> str:
        """A small object in place of one version; its tag. Raises Conflict if it is another."""
        with self._explained("put"):
            try:
                return obstore.put(self._store, name, content, mode={"e_tag": tag})["e_tag"] or ""
            except (PreconditionError, FileNotFoundError) as error:
                return self._own(name, content, error)

    def _own(self, name: str, content: bytes, error: Exception) -> str:
        """The tag, if what is there is ours: the answer to a request was lost and it was repeated.
        No two writers write the same bytes.
        """
        try:
            there = self.get(name)
        except FileNotFoundError:
            raise Conflict(f"{self.uri}/{name} is gone") from error
        if there.content != content:
            raise Conflict(f"{self.uri}/{name} was written by another") from error
        return there.tag

    def upload(self, name: str, file: Path) -> None:
        """A file of any size, in parts."""
        with self._explained("put"):
            obstore.put(
                self._store,
                name,
                file,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def size(self, name: str) -> int:
        """Bytes of an object. Raises FileNotFoundError if there is none."""
        with self._explained("get"):
            return obstore.head(self._store, name)["size"]

    def parts(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """The content of an object in order, in parts that are read several at once."""
        begins = range(0, size_bytes, PART_BYTES)

        def read(begin: int) -> bytes:
            end = min(begin + PART_BYTES, size_bytes)
            return bytes(obstore.get_range(self._store, name, start=begin, end=end))

        with self._explained("get"), ThreadPoolExecutor(_PARTS_AT_ONCE) as readers:
            for first in range(0, len(begins), _PARTS_AT_ONCE):
                yield from readers.map(read, begins[first : first + _PARTS_AT_ONCE])

    def sha256(self, name: str, size_bytes: int) -> str:
        """Of an object's content."""
        digest = hashlib.sha256()
        for part in self.parts(name, size_bytes):
            digest.update(part)
        return digest.hexdigest()

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""
        if names:
            with self._explained("delete"):
                obstore.delete(self._store, list(names))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Errors as OSError, with what a person can change."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise OSError(f"{self.uri}: there is no such bucket; {_BUCKET_ADVICE}") from error
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise OSError(
                f"{self.uri}: {what} is refused ({_short(error)}); {_ACCESS_ADVICE}"
            ) from (error)
        except BaseError as error:
            said = _short(error)
            if "NoSuchBucket" in str(error):
                raise OSError(f"{self.uri}: there is no such bucket; {_BUCKET_ADVICE}") from error
            raise OSError(f"{self.uri}: {what} failed ({said}); {_AWAY_ADVICE}") from error


def _short(error: Exception) -> str:
    """Without the library's own debugging text."""
    return " ".join(str(error).partition("Debug source")[0].split())[:400]
