"""The rounds of all ranks, and what follows. Ranks talk through the store of the process group,
which needs no collective that a bad rank could break. Rank 0 judges.
"""

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from dstrain_api.constants import ENV_NODE, ENV_PREFLIGHT
from torch._C._distributed_c10d import PrefixStore

from deepseek_trainer.preflight import judge
from deepseek_trainer.preflight.judge import Pairs, Result
from deepseek_trainer.preflight.measure import FIRST_TRIES, SECOND_TRIES, measure

_log = logging.getLogger(__name__)
LIMIT_S: Final = 30.0  # for one rank's part of a round, which takes a fraction of a second
SILENT_S: Final = 10.0  # more, and a rank will not answer
LAST_WORDS: Final = timedelta(seconds=5)
_AT_ONCE: Final = timedelta(milliseconds=10)
Said = dict[int, str]  # what is wrong, by rank


class PreflightFailed(RuntimeError):
    """This rank's node is not fit to train on."""


def passed(device: torch.device) -> bool:
    """Check all ranks, if rank 0 was told to; False if another one is bad, so that the generation
    cannot begin.

    Raises:
        PreflightFailed: this one is.
    """
    talk = _Talk()
    if talk.rank == 0:  # its word is for all: ranks that disagree would wait for each other
        talk.say("wanted", os.environ.get(ENV_PREFLIGHT) == "1")
    if not talk.hear("wanted"):
        return True
    bad = _rounds(talk, device)
    if talk.rank in bad:
        raise PreflightFailed(bad[talk.rank])
    return not bad


class _Talk:
    """What ranks say to each other, as JSON under a key."""

    def __init__(self) -> None:
        self._store = PrefixStore("preflight", dist.distributed_c10d._get_default_store())
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def say(self, key: str, what: object) -> None:
        self._store.set(key, json.dumps(what))

    def hear(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def hear_all(self, keys: list[str]) -> list[Any]:
        """What was said already, in one question."""
        return [json.loads(said) for said in self._store.multi_get(keys)] if keys else []

    def heard(self, keys: list[str], timeout: timedelta) -> bool:
        """Whether all this was said in time."""
        try:
            self._store.wait(keys, timeout)
        except dist.DistStoreError:
            return False
        return True


def _rounds(talk: _Talk, device: torch.device) -> Said:
    """Both rounds; the bad ranks."""
    began_s = time.monotonic()
    _measure(talk, device, "first", judge.first_pairs(talk.world), FIRST_TRIES)
    usual: dict[int, Result] = {}
    if talk.rank == 0:
        usual, silent = _results(talk, "first", range(talk.world))
        found = judge.suspects(usual, usual)
        talk.say("suspects", [found, {} if silent else judge.second_pairs(usual, found), silent])
    suspects, pairs, silent = (_by_rank(said) for said in talk.hear("suspects"))
    if not suspects or silent:
        bad = silent
    else:
        if talk.rank in suspects or talk.rank in pairs:
            _measure(talk, device, "second", pairs, SECOND_TRIES)
        if talk.rank == 0:
            again, silent = _results(talk, "second", suspects)
            talk.say("bad", {**judge.suspects(again, usual), **silent})
        bad = _by_rank(talk.hear("bad"))
    if talk.rank == 0:
        took_s = time.monotonic() - began_s
        _log.info("preflight of %d ranks: %.2f s, bad: %s", talk.world, took_s, bad or "none")
        _log.info("once suspected: %s", suspects or "none")
    _part(talk, bad)
    return bad


def _measure(talk: _Talk, device: torch.device, name: str, pairs: Pairs, tries: int) -> None:
    with _watched():
        result = measure(device, os.environ.get(ENV_NODE, ""), pairs.get(talk.rank), tries)
    talk.say(f"{name}/{talk.rank}", result.model_dump())


def _results(talk: _Talk, name: str, ranks: Iterable[int]) -> tuple[dict[int, Result], Said]:
    """What these ranks have measured, and who has not said it."""
    by_key = {f"{name}/{rank}": rank for rank in ranks}
    silent: Said = {}
    if not talk.heard([*by_key], timedelta(seconds=LIMIT_S + SILENT_S)):
        for key, rank in list(by_key.items()):
            if not talk.heard([key], _AT_ONCE):
                silent[rank] = f"it did not answer for {LIMIT_S + SILENT_S:.0f} s"
                del by_key[key]
    said = talk.hear_all([*by_key])
    return {r: Result.model_validate(s) for r, s in zip(by_key.values(), said, strict=True)}, silent


def _part(talk: _Talk, bad: Said) -> None:
    """Rank 0 holds the store: it leaves when all know why."""
    if not bad:
        return
    talk.say(f"known/{talk.rank}", True)
    if talk.rank == 0:
        talk.heard([f"known/{rank}" for rank in range(talk.world)], LAST_WORDS)


@contextmanager
def _watched() -> Iterator[None]:
    """Ends this process if its device does not answer."""
    timer = threading.Timer(LIMIT_S, _give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up() -> None:
    error = PreflightFailed(f"its device did not answer for {LIMIT_S:.0f} s")
    try:
        raise error
    except PreflightFailed:
        traceback.print_exc()
    os._exit(1)


def _by_rank(said: dict[str, Any]) -> dict[int, Any]:
    """JSON's keys are texts."""
    return {int(rank): what for rank, what in said.items()}
