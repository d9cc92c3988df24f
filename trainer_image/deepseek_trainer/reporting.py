"""What a training process tells its pod's agent: JSON datagrams on a local socket. No torch, no
waiting, no errors.

    {"localRank": 0, "rankStep": 12}     every rank
    {..., "ownSeconds": 3.2}             every rank, at times
    {"localRank": 0, "section": "save"}  every rank, where something else than steps begins
    {..., "progress": {...}}             rank 0: a protocol.ProgressReport
    {"localRank": 0, "metrics": {...}}   rank 0: figures by their names in dstrain_api.metrics
    {"localRank": 0, "done": true}       every rank, after the last commit

A figure that cannot be delivered at once is dropped: the next one replaces it. A section is waited
for a little: nothing replaces it.
"""

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain_api.constants import ENV_REPORT_SOCKET

SECTION_WAIT_S = 1.0
_section = "init"  # what the agent expects of a process that has just started


def report(
    *,
    step: int,
    loss: float | None = None,
    tokens: int | None = None,
    total_steps: int | None = None,
    tokens_per_second: float | None = None,
    step_seconds: float | None = None,
    mfu: float | None = None,
    resumed_step: int | None = None,
    verified_step: int | None = None,
    skipped_steps: int | None = None,
    rollbacks: int | None = None,
    stragglers: Mapping[int, float] | None = None,
    own_seconds: float | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Say how far this process is. Any program that torchrun starts may call it after a step, on
    every rank.

    Args:
        step: last finished optimizer step.
        loss: training loss, in nats per token.
        tokens: tokens trained on by all ranks since the training began.
        total_steps: steps until complete.
        tokens_per_second: throughput of all ranks.
        step_seconds: wall time of the step.
        mfu: model FLOP utilisation, as a ratio.
        resumed_step: step of the checkpoint that this process resumed from; 0 from scratch.
        verified_step: newest committed checkpoint that was read back and is whole.
        skipped_steps: steps without an update, because of bad gradients.
        rollbacks: returns to a checkpoint, because of bad numbers.
        stragglers: slow ranks, and how many times as long as others they work on a step.
        own_seconds: time since this process began that it has worked on steps without waiting for
            other ranks.
        metrics: further figures by their names in `dstrain_api.metrics`.
    """
    record = _finished(step)
    if own_seconds is not None:
        record["ownSeconds"] = own_seconds
    if os.environ.get("RANK", "0") == "0":
        progress = {
            "step": step,
            "loss": loss,
            "tokens": tokens,
            "totalSteps": total_steps,
            "tokensPerSecond": tokens_per_second,
            "stepSeconds": step_seconds,
            "mfu": mfu,
            "resumedStep": resumed_step,
            "verifiedStep": verified_step,
            "skippedSteps": skipped_steps,
            "rollbacks": rollbacks,
        }
        slow = [{"rank": rank, "ratio": ratio} for rank, ratio in (stragglers or {}).items()]
        record["progress"] = {**_finite(progress), "stragglers": slow}
        record["metrics"] = _finite(metrics or {})
    _send(record)


def report_step(step: int) -> None:
    """Say on any rank that a step is finished, and no more: cheap enough for every step."""
    _send(_finished(step))


def report_metrics(metrics: dict[str, float]) -> None:
    """Say further figures by their names in `dstrain_api.metrics`, on rank 0."""
    _send({"metrics": _finite(metrics)})


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Say on every rank that this process is busy with something else than steps: reading a
    checkpoint, an evaluation. It may take longer than a step before it counts as a hang; how long
    it takes is learned by its name.

    Args:
        name: at most 32 characters.
    """
    global _section
    before, _section = _section, name
    _send({"section": name}, wait_s=SECTION_WAIT_S)
    try:
        yield
    finally:
        _section = before
        _send({"section": before}, wait_s=SECTION_WAIT_S)


def report_done() -> None:
    """Say that this process has reached its end and the last checkpoint is committed."""
    _send({"done": True})


def _finished(step: int) -> dict[str, Any]:
    global _section
    _section = "step"
    return {"rankStep": step}


def _finite(figures: Mapping[str, float | None]) -> dict[str, float]:
    """The known figures; JSON has no NaN and no infinity."""
    return {
        name: value for name, value in figures.items() if value is not None and math.isfinite(value)
    }


def _send(record: dict[str, Any], *, wait_s: float = 0.0) -> None:
    path = os.environ.get(ENV_REPORT_SOCKET)
    if not path:
        return
    datagram = json.dumps({"localRank": int(os.environ.get("LOCAL_RANK", "0")), **record}).encode()
    # The agent may be restarting or its queue full; training never waits for a reader.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(wait_s)
        sender.sendto(datagram, path)
