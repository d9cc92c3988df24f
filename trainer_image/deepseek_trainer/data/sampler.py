"""Which samples a step reads: a pure function of the seed and the position, never of the number of
workers.

The training reads an endless stream of positions 0, 1, 2 ... A step consumes [position, position +
global batch). With several sources, positions are cut into blocks in which every source has its
share, in a shuffled order. Inside a source each pass is a new permutation, computed per index, so
nothing is stored and nothing has to be replayed on resume.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deepseek_trainer.data.corpus import Corpus

BLOCK: Final = 1024  # positions per mixing block: shares are exact to 1/1024
_ROUNDS: Final = 6


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Where the stream is: all that a checkpoint needs to go on with any number of workers."""

    epoch: int
    cursor: int
    seed: int
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON record."""
        return asdict(self)


class Stream:
    """The endless, shuffled mixture of several corpora.

    Args:
        corpora: the sources, all of one sequence length.
        weights: share of each source, relative to the others.
        seed: of the order.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], seed: int) -> None:
        self.corpora = corpora
        self.seed = seed
        self.samples_per_epoch = sum(corpus.samples for corpus in corpora)
        self.fingerprint = _digest(
            *(f"{c.manifest.fingerprint}:{w}" for c, w in zip(corpora, weights, strict=True)),
            f"sequence:{corpora[0].sequence_length}",
        )
        self._shares = shares(weights)
        self._ends = np.cumsum(self._shares)

    def state(self, position: int) -> DataState:
        """The state after everything before `position` was read."""
        epoch, cursor = divmod(position, self.samples_per_epoch)
        return DataState(epoch=epoch, cursor=cursor, seed=self.seed, fingerprint=self.fingerprint)

    def position(self, state: DataState) -> int:
        """Inverse of `state`.

        Raises:
            ValueError: the state belongs to other data or another seed.
        """
        if state.fingerprint != self.fingerprint:
            raise ValueError(
                "the checkpoint was made with other data (sources, weights, tokenizer or "
                "sequenceLength): restore them, or point checkpoint.uri to an empty folder to "
                "start again"
            )
        if state.seed != self.seed:
            raise ValueError(
                f"the checkpoint was made with training.seed {state.seed}, not {self.seed}: "
                "restore it, or point checkpoint.uri to an empty folder to start again"
            )
        return state.epoch * self.samples_per_epoch + state.cursor

    def locate(self, position: int) -> tuple[int, int]:
        """(source, sample inside the source) at a position."""
        source, running = self._turn(position) if len(self.corpora) > 1 else (0, position)
        size = self.corpora[source].samples
        epoch, index = divmod(running, size)
        return source, permute(index, size, f"{self.seed}/source/{source}/epoch/{epoch}")

    def _turn(self, position: int) -> tuple[int, int]:
        """(source whose turn it is, how many turns it had before)."""
        block, offset = divmod(position, BLOCK)
        slot = permute(offset, BLOCK, f"{self.seed}/block/{block}")
        source = int(np.searchsorted(self._ends, slot, side="right"))
        share = self._shares[source]
        return source, block * share + slot - int(self._ends[source] - share)

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Samples at positions [begin, end), shape [end - begin, sequence_length + 1]."""
        places = (self.locate(position) for position in range(begin, end))
        return np.stack([self.corpora[source].sample(index) for source, index in places])


def shares(weights: Sequence[float]) -> list[int]:
    """Positions of each source in a block of `BLOCK`, by largest remainder; every source has at
    least one.
    """
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_need = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in range(BLOCK - sum(counts)):
        counts[by_need[i % len(counts)]] += 1
    while sum(counts) > BLOCK:
        counts[counts.index(max(counts))] -= 1
    return counts


def permute(index: int, size: int, key: str) -> int:
    """Image of `index` under a pseudo-random permutation of range(size).

    A balanced Feistel network over the next power of four, walked until it falls into the range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): constant memory, and
    expected at most four rounds of walking.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


@lru_cache(maxsize=4096)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
