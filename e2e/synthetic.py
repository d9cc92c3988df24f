"""Worker pods and an operator that only have metrics: everything in the registry, and it moves."""

from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import dataclass
from typing import get_args

from dstrain_api.constants import SINGULAR
from dstrain_api.metrics import GPU_NAMES, Exporter, Metric, by_exporter
from dstrain_api.status import Phase, Restarts
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

METRICS_TYPE = "text/plain; version=0.0.4"
LABEL_VALUES = {
    "namespace": ("default",),
    "training": ("mini",),
    "local_rank": ("0", "1"),
    "gpu": ("0", "1"),
    "gpu_uuid": ("GPU-00000000-0000-0000-0000-000000000000",),
    "phase": get_args(Phase),
    "state": ("desired", "ready"),
    "failure_class": tuple(Restarts.model_fields),
    "version": ("0.1.0",),
    "python": ("3.13",),
    "kopf": ("1.45",),
    "result": ("success", "error"),
    "controller": (SINGULAR,),
    "name": (SINGULAR,),
    "code": ("200", "409"),
    "method": ("GET", "POST"),
}


@dataclass(frozen=True)
class _Child:
    """One series (or histogram) of a metric."""

    metric: Metric
    labels: dict[str, str]
    made: Counter | Gauge | Histogram


class Exposition:
    """What one program exposes; every `tick` moves its values on."""

    def __init__(self, exporter: Exporter, *, gpus: bool = True) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._ticks = 0
        self._lock = threading.Lock()
        self._children = [
            child
            for metric in by_exporter(exporter)
            if gpus or metric.name not in GPU_NAMES
            for child in _children(metric, self._registry)
        ]

    def tick(self) -> str:
        """The exposition after one more step."""
        with self._lock:
            self._ticks += 1
            for position, child in enumerate(self._children):
                self._move(child, 1 + math.sin(self._ticks / 7 + position) / 4)
            return generate_latest(self._registry).decode()

    def _move(self, child: _Child, value: float) -> None:
        if isinstance(child.made, Counter):
            child.made.inc(value)
        elif isinstance(child.made, Histogram):
            child.made.observe(value / 10)
        elif child.metric.name.endswith("timestamp_seconds"):
            child.made.set(time.time() - 30)
        elif "phase" in child.labels:
            child.made.set(child.labels["phase"] == "Running")
        else:
            child.made.set(value)


def _children(metric: Metric, registry: CollectorRegistry) -> list[_Child]:
    family: Counter | Gauge | Histogram
    if metric.type == "counter":
        family = Counter(metric.name, metric.help, metric.labels, registry=registry)
    elif metric.type == "gauge":
        family = Gauge(metric.name, metric.help, metric.labels, registry=registry)
    else:
        assert metric.buckets
        family = Histogram(
            metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    values = [LABEL_VALUES[label] for label in metric.labels]
    sets = [dict(zip(metric.labels, chosen, strict=True)) for chosen in itertools.product(*values)]
    return [_Child(metric, ls, family.labels(**ls) if ls else family) for ls in sets]
