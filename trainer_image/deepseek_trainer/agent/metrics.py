"""`:9400/metrics` of a worker pod: its own figures, its GPUs', the whole training's while it holds
rank 0. Names, help and labels come from `dstrain_api.metrics`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from dstrain_api.metrics import GPU_NAMES, RANK_ZERO_NAMES, by_exporter, by_name
from dstrain_api.protocol import ProgressReport
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric as Family

from deepseek_trainer.agent.reports import WorkerReport

_BY_FIGURE = {  # of a progress report; all gauges
    "step": "dstrain_step",
    "total_steps": "dstrain_total_steps",
    "loss": "dstrain_loss",
    "tokens_per_second": "dstrain_throughput_tokens_per_second",
    "mfu": "dstrain_mfu_ratio",
}
_OWN_SECONDS = "dstrain_rank_compute_seconds_total"
_SAVED_STEP = "dstrain_checkpoint_last_step"
_SAVED_AT = "dstrain_checkpoint_last_timestamp_seconds"


class Source(Protocol):
    """Anything that has metric families to add to a scrape."""

    def collect(self) -> Iterable[Family]:
        """The families as they are now."""


class AgentMetrics:
    """The figures of one pod. Each method may be called from any thread."""

    def __init__(self, training: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter
        self._training = training
        self._lock = threading.Lock()
        self._pod, self._rank_zero = CollectorRegistry(), CollectorRegistry()
        self._families = {
            metric.name: _KINDS[metric.type](
                metric.name,
                metric.help,
                metric.labels,
                registry=self._rank_zero if metric.name in RANK_ZERO_NAMES else self._pod,
                **({"buckets": metric.buckets} if metric.buckets else {}),
            )
            for metric in by_exporter("agent")
            if metric.name not in GPU_NAMES
        }
        self._sources: list[Source] = []
        self._holds_rank_zero = False
        self._last: ProgressReport | None = None  # of this generation
        self._counted: dict[str, float] = {}  # of rank 0's process, by counter
        self._own_s: dict[int, float] = {}  # of this generation's processes, by local rank
        self._put("dstrain_generation", 0)
        for metric in by_exporter("agent"):
            if metric.name in self._families and metric.type != "gauge" and not metric.absent:
                self._families[metric.name].labels(training)  # 0 is there before the first event

    def add(self, source: Source) -> None:
        """Expose these families as well."""
        self._sources.append(source)

    def joined(self, generation: int, group_rank: int, seconds: float) -> None:
        """The pod has a place in a generation, `seconds` after it asked for one."""
        with self._lock:
            self._put("dstrain_generation", generation)
            self._put("dstrain_rendezvous_duration_seconds", seconds)
            self._holds_rank_zero = group_rank == 0
            self._last = None
            self._counted.clear()
            self._own_s.clear()

    def restarted(self) -> None:
        """Worker processes of this pod are started again."""
        self._put("dstrain_worker_restarts_total", 1)

    def worked(self, report: WorkerReport) -> None:
        """A rank of this pod has said something."""
        if report.own_seconds is None:
            return
        with self._lock:
            before_s = self._own_s.get(report.local_rank, 0.0)
            self._own_s[report.local_rank] = report.own_seconds
            child = self._families[_OWN_SECONDS].labels(self._training, str(report.local_rank))
            child.inc(max(0.0, report.own_seconds - before_s))

    def reported(self, report: WorkerReport) -> None:
        """Rank 0 of the training, in this pod, has said how far it is."""
        with self._lock:
            if report.progress is not None:
                self._progress(report.progress)
            for name, value in report.metrics.items():
                if name in RANK_ZERO_NAMES:
                    self._extra(name, value)

    def collect(self) -> Iterable[Family]:
        """All families of a scrape."""
        yield from self._pod.collect()
        if self._holds_rank_zero:
            yield from self._rank_zero.collect()
        for source in self._sources:
            yield from source.collect()

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self)

    def _progress(self, progress: ProgressReport) -> None:
        last, self._last = self._last, progress
        for figure, name in _BY_FIGURE.items():
            value = getattr(progress, figure)
            if value is not None:
                self._put(name, value)
        if progress.step_seconds and (last is None or progress.step != last.step):
            self._put("dstrain_step_duration_seconds", progress.step_seconds)
        if last is not None:
            fresh = float(progress.tokens - last.tokens)
        elif progress.resumed_step is not None and progress.step:
            # The first report of a generation: every step consumes the same number of tokens.
            fresh = progress.tokens * (progress.step - progress.resumed_step) / progress.step
        else:
            fresh = 0.0
        self._put("dstrain_tokens_total", max(0, fresh))

    def _extra(self, name: str, value: float) -> None:
        if by_name(name).type == "counter":
            counted = self._counted.get(name, 0.0)
            self._counted[name] = value
            value = max(0.0, value - counted)
        self._put(name, value)
        if name == _SAVED_STEP:
            self._put(_SAVED_AT, time.time())

    def _put(self, name: str, value: float) -> None:
        child = self._families[name].labels(self._training)
        if isinstance(child, Gauge):
            child.set(value)
        elif isinstance(child, Counter):
            child.inc(value)
        else:
            child.observe(value)


_KINDS: dict[str, Any] = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}


class _Server(ThreadingHTTPServer):
    """Listens on IPv4 and, where the machine has it, IPv6."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def serve(metrics: AgentMetrics, port: int) -> int:
    """Answer GET /metrics on all addresses from a daemon thread; return the port (`port` 0: any).

    Raises OSError where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = metrics.exposition()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are no news."""

    server = _Server(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_address[1])
