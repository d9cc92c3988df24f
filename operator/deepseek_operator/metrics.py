"""The operator's own metrics, by the names of `dstrain_api.metrics`.

What is said of trainings is read from their status at each scrape, so a series goes with its
training. Only durations and what outlives a training are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, get_args

from dstrain_api.metrics import CONTROLLER, by_name
from dstrain_api.status import DeepSeekTrainingStatus, HistoryEntry, Phase, Restarts
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deepseek_operator.core.clock import seconds
from deepseek_operator.core.model import Key, Training

ENDS: Final = ("Complete", "Failed")


class OperatorMetrics:
    """All that the operator exposes. Written from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector):
            collector(registry=self._registry)
        self._recovery = self._histogram("dstrain_training_recovery_duration_seconds")
        self._finished = self._counter("dstrain_trainings_finished_total")
        self._lag = self._gauge("dstrain_operator_event_loop_lag_seconds")
        self._reconciles = self._counter("controller_runtime_reconcile_total")
        self._errors = self._counter("controller_runtime_reconcile_errors_total")
        self._durations = self._histogram("controller_runtime_reconcile_time_seconds")
        self._requests = self._counter("rest_client_requests_total")
        self._depth = self._gauge("workqueue_depth")
        self._built = self._gauge("dstrain_operator_build_info")
        self._leader = self._gauge("dstrain_operator_leader")
        # A counter that starts with its first event would hide that event from `increase`.
        self._errors.labels(CONTROLLER)
        for end in ENDS:
            self._finished.labels(end)

    def follow(self, trainings: Callable[[], Iterable[Training]], depth: Callable[[], int]) -> None:
        """Take what is said of trainings, and of the queue, from here at each scrape."""
        self._registry.register(_Trainings(trainings))
        self._depth.labels(CONTROLLER).set_function(depth)

    def built(self, version: str, python: str, kopf: str) -> None:
        """Say what runs."""
        self._built.labels(version, python, kopf).set(1)

    def leading(self, leads: Callable[[], bool]) -> None:
        """Say at each scrape whether this replica acts."""
        self._leader.set_function(lambda: float(leads()))

    def expose(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def reconciled(self, result: str, duration_s: float) -> None:
        """Count one reconcile; `result` is success, requeue or error."""
        self._reconciles.labels(CONTROLLER, result).inc()
        if result == "error":
            self._errors.labels(CONTROLLER).inc()
        self._durations.labels(CONTROLLER).observe(duration_s)

    def requested(self, method: str, code: str) -> None:
        """Count one call of the Kubernetes API."""
        self._requests.labels(code, method).inc()

    def lagged(self, lag_s: float) -> None:
        """Note how late the event loop woke up."""
        self._lag.set(lag_s)

    def status_written(
        self, key: Key, before: DeepSeekTrainingStatus, after: DeepSeekTrainingStatus
    ) -> None:
        """Count what has newly ended: recoveries, trainings."""
        open_before = {_identity(h) for h in before.history if h.seconds is None}
        for entry in after.history:
            if entry.seconds is not None and _identity(entry) in open_before:
                self._recovery.labels(key.namespace, key.name).observe(entry.seconds)
        if after.phase != before.phase and after.phase in ENDS:
            self._finished.labels(after.phase).inc()

    def followed(self, key: Key) -> None:
        """Expose the counters of a training from before its first event."""
        self._recovery.labels(key.namespace, key.name)

    def gone(self, key: Key) -> None:
        """Drop the series of a training that is no more."""
        self._recovery.remove_by_labels({"namespace": key.namespace, "training": key.name})

    def _counter(self, name: str) -> Counter:
        described = by_name(name)
        return Counter(name, described.help, described.labels, registry=self._registry)

    def _gauge(self, name: str) -> Gauge:
        described = by_name(name)
        return Gauge(name, described.help, described.labels, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        described = by_name(name)
        return Histogram(
            name,
            described.help,
            described.labels,
            registry=self._registry,
            buckets=described.buckets or Histogram.DEFAULT_BUCKETS,
        )


class _Trainings(Collector):
    """What the statuses say, as it is at the scrape."""

    def __init__(self, trainings: Callable[[], Iterable[Training]]) -> None:
        self._trainings = trainings

    def collect(self) -> Iterator[Metric]:
        found = [((t.namespace, t.name), t.status) for t in self._trainings()]
        phase = _gauge_family("dstrain_training_phase")
        workers = _gauge_family("dstrain_training_workers")
        restarts = _counter_family("dstrain_training_restarts_total")
        progress = _gauge_family("dstrain_training_progress_ratio")
        eta = _gauge_family("dstrain_training_eta_seconds")
        step = _gauge_family("dstrain_training_last_checkpoint_step")
        time = _gauge_family("dstrain_training_last_checkpoint_timestamp_seconds")
        for labels, status in found:
            for name in get_args(Phase):
                phase.add_metric((*labels, name), float(status.phase == name))
            workers.add_metric((*labels, "desired"), status.workers.desired)
            workers.add_metric((*labels, "ready"), status.workers.ready)
            for failure_class in Restarts.model_fields:
                count = getattr(status.restarts, failure_class)
                restarts.add_metric((*labels, failure_class), count)
            if status.progress.total_steps:
                done = status.progress.step / status.progress.total_steps
                progress.add_metric(labels, min(1.0, done))
            if status.progress.eta_seconds is not None:
                eta.add_metric(labels, status.progress.eta_seconds)
            if status.checkpoint:
                step.add_metric(labels, status.checkpoint.step)
                if status.checkpoint.time:
                    time.add_metric(labels, seconds(status.checkpoint.time))
        yield from (phase, workers, restarts, progress, eta, step, time)


def _gauge_family(name: str) -> GaugeMetricFamily:
    described = by_name(name)
    return GaugeMetricFamily(name, described.help, labels=described.labels)


def _counter_family(name: str) -> CounterMetricFamily:
    described = by_name(name)
    return CounterMetricFamily(name, described.help, labels=described.labels)


def _identity(entry: HistoryEntry) -> tuple[int, int, str]:
    return entry.attempt, entry.generation, entry.time
