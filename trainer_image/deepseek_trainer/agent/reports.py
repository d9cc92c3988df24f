"""What worker processes report: it comes as datagrams, and part of it goes on over HTTP.

Two threads, because the first must never wait: the kernel queues few datagrams, and a worker that
cannot report would stall its step. One reads the socket; the other sends the newest progress of
rank 0, and keeps it while the coordinator is away.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from dstrain_api.base import ApiModel
from dstrain_api.protocol import ProgressReport, Report
from pydantic import ConfigDict, Field, ValidationError

from deepseek_trainer.agent.client import CoordinatorClient, Fenced, Unreachable

log = logging.getLogger(__name__)

DATAGRAM_BYTES = 65_536
SEND_INTERVAL_S = 0.25
RETRY_S = 1.0


class WorkerReport(ApiModel):
    """One datagram of a worker process, as `deepseek_trainer.reporting` writes it.

    `progress` and `metrics` come from rank 0 of the training only. `metrics` holds further figures
    by their names in `dstrain_api.metrics`: the value of a gauge, one observation of a histogram,
    or what a counter has counted since the process began.
    """

    model_config = ConfigDict(**ApiModel.model_config | {"extra": "ignore"})

    local_rank: int = Field(0, ge=0)
    rank_step: int | None = Field(None, ge=0)
    own_seconds: float | None = Field(None, ge=0, lt=float("inf"))  # since the process began
    section: Annotated[str, Field(max_length=32)] = ""
    progress: ProgressReport | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    done: bool = False


class ReportSocket:
    """Reads worker processes' datagrams and hands each to `receive`, on its own thread."""

    def __init__(self, path: Path, receive: Callable[[WorkerReport], None]) -> None:
        self.path = path
        self._receive = receive
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._read, name="worker-reports", daemon=True).start()

    def _read(self) -> None:
        while True:
            datagram = self._socket.recv(DATAGRAM_BYTES)
            try:
                report = WorkerReport.model_validate_json(datagram)
            except ValidationError as error:
                log.warning("a worker's report is not understood: %s", error)
                continue
            self._receive(report)


class Forwarder:
    """Sends rank 0's newest progress, and the end of the program, to the coordinator."""

    def __init__(self, pod_uid: str, client: CoordinatorClient) -> None:
        self._pod_uid = pod_uid
        self._client = client
        self._changed = threading.Condition()
        self._pending: Report | None = None
        self._sending = False
        threading.Thread(target=self._send_for_ever, name="report-sender", daemon=True).start()

    def put(self, generation: int, report: WorkerReport) -> None:
        """Send this as soon as possible, in place of older progress of the same generation."""
        new = Report(
            pod_uid=self._pod_uid,
            generation=generation,
            progress=report.progress,
            done=report.done,
        )
        with self._changed:
            self._pending = _merged(self._pending, new)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; False if that did not happen in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._pending is None and not self._sending, timeout_s
            )

    def _send_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None)
                report, self._pending = self._pending, None
                self._sending = True
            assert report is not None  # noqa: S101 -- what wait_for waited for
            sent = self._send(report)
            with self._changed:
                if not sent:
                    self._pending = _merged(report, self._pending)
                self._sending = False
                self._changed.notify_all()
            time.sleep(SEND_INTERVAL_S if sent else RETRY_S)

    def _send(self, report: Report) -> bool:
        try:
            self._client.report(report)
        except Unreachable as error:
            log.debug("report: %s", error)
            return False
        except Fenced:
            pass  # the beats will end this pod
        return True


def _merged(old: Report | None, new: Report | None) -> Report | None:
    """The newer one, with what only the older one says of the same generation."""
    if old is None or new is None or old.generation != new.generation:
        return new or old
    progress = new.progress or old.progress
    if progress and old.progress and progress.resumed_step is None:
        progress = progress.model_copy(update={"resumed_step": old.progress.resumed_step})
    return new.model_copy(update={"progress": progress, "done": new.done or old.done})
