"""How long this rank's own work takes. In a gang every step lasts as long as that of the slowest
rank, so only what stands between two collectives tells which one that is.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Stopwatch:
    """Adds up the time in parts of a step in which a rank waits for no other: on the device where
    it computes, with all that holds it up there.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: float | torch.Event = 0.0
        self._ended: list[tuple[float | torch.Event, float | torch.Event]] = []
        self._before: list[tuple[float | torch.Event, float | torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A part that waits for nobody. Parts are not nested."""
        self._begin()
        yield
        self._end()

    def watch(self, module: nn.Module) -> None:
        """Count every forward of a module, after its weights were gathered. To be called when it is
        sharded: hooks run in the order in which they were added.
        """
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end(), prepend=True)

    def take(self) -> float:
        """Seconds between the last two calls: what was recorded since may still be on its way
        through the device. The caller waits for the device between two calls.
        """
        parts, self._before, self._ended = self._before, self._ended, []
        return sum(_seconds(begin, end) for begin, end in parts)

    def _begin(self) -> None:
        self._began = self._now()

    def _end(self) -> None:
        self._ended.append((self._began, self._now()))

    def _now(self) -> float | torch.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        return event


def _seconds(begin: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)  # noqa: S101 -- both come from the same clock
    assert isinstance(end, float)  # noqa: S101
    return end - begin
