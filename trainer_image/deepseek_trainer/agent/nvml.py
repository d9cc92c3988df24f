"""Figures of the pod's GPUs by NVML, read at each scrape. No driver, no figures, no error."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pynvml
from dstrain_api.metrics import by_name
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family

from deepseek_trainer.agent.metrics import AgentMetrics

log = logging.getLogger(__name__)

EVENT_WAIT_MS = 5_000
HERTZ_PER_MHZ = 1_000_000
_NO_GPUS = (
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_NO_PERMISSION,
)
_XID = "dstrain_gpu_xid_total"


@dataclass
class Gpu:
    """One GPU of the pod."""

    index: int
    uuid: str
    handle: Any
    xids: int | None = field(default=None)  # None: the driver does not report them


_READ: dict[str, Callable[[Any], float]] = {
    "dstrain_gpu_utilization_ratio": lambda h: pynvml.nvmlDeviceGetUtilizationRates(h).gpu / 100,
    "dstrain_gpu_memory_used_bytes": lambda h: pynvml.nvmlDeviceGetMemoryInfo(h).used,
    "dstrain_gpu_memory_total_bytes": lambda h: pynvml.nvmlDeviceGetMemoryInfo(h).total,
    "dstrain_gpu_power_watts": lambda h: pynvml.nvmlDeviceGetPowerUsage(h) / 1000,
    "dstrain_gpu_temperature_celsius": lambda h: pynvml.nvmlDeviceGetTemperature(
        h, pynvml.NVML_TEMPERATURE_GPU
    ),
    "dstrain_gpu_sm_clock_hertz": lambda h: (
        pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_SM) * HERTZ_PER_MHZ
    ),
    "dstrain_gpu_memory_clock_hertz": lambda h: (
        pynvml.nvmlDeviceGetClockInfo(h, pynvml.NVML_CLOCK_MEM) * HERTZ_PER_MHZ
    ),
}


def add_gpus(metrics: AgentMetrics, training: str) -> None:
    """Expose the GPUs that the driver shows to this pod, if there is one."""
    try:
        pynvml.nvmlInit()
        gpus = [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        if error.value not in _NO_GPUS:
            log.warning("no GPU figures: %s", error)
        return
    _count_xids(gpus)
    metrics.add(GpuSource(training, gpus))


class GpuSource:
    """Reads every figure of every GPU when it is asked; what a GPU cannot tell is left out."""

    def __init__(self, training: str, gpus: list[Gpu]) -> None:
        self._training = training
        self._gpus = gpus

    def collect(self) -> Iterable[Family]:
        """The families as they are now."""
        for name, read in _READ.items():
            family = _family(GaugeMetricFamily, name)
            for gpu in self._gpus:
                try:
                    family.add_metric(self._labels(gpu), read(gpu.handle))
                except pynvml.NVMLError as error:
                    log.debug("GPU %s: %s: %s", gpu.index, name, error)
            yield family
        xids = _family(CounterMetricFamily, _XID)
        for gpu in self._gpus:
            if gpu.xids is not None:
                xids.add_metric(self._labels(gpu), gpu.xids)
        yield xids

    def _labels(self, gpu: Gpu) -> list[str]:
        return [self._training, str(gpu.index), gpu.uuid]


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(index, _text(pynvml.nvmlDeviceGetUUID(handle)), handle)


def _count_xids(gpus: list[Gpu]) -> None:
    """Count the driver's XID errors from now on, on a thread that waits for them."""
    try:
        events = pynvml.nvmlEventSetCreate()
    except pynvml.NVMLError as error:
        log.info("the driver does not report XID errors: %s", error)
        return
    for gpu in gpus:
        try:
            pynvml.nvmlDeviceRegisterEvents(
                gpu.handle, pynvml.nvmlEventTypeXidCriticalError, events
            )
        except pynvml.NVMLError as error:  # not on every GPU, and not inside a MIG slice
            log.info("GPU %s does not report XID errors: %s", gpu.index, error)
            continue
        gpu.xids = 0
    if any(gpu.xids is not None for gpu in gpus):
        threading.Thread(
            target=_wait_for_xids, args=(events, gpus), name="gpu-xid", daemon=True
        ).start()


def _wait_for_xids(events: Any, gpus: list[Gpu]) -> None:
    by_address = {_address(gpu.handle): gpu for gpu in gpus}
    while True:
        try:
            event = pynvml.nvmlEventSetWait_v2(events, EVENT_WAIT_MS)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                continue
            log.warning("no more XID errors are counted: %s", error)
            return  # the GPU is lost, most likely
        gpu = by_address.get(_address(event.device))
        if gpu is not None and gpu.xids is not None:
            gpu.xids += 1
            log.warning("GPU %s (%s): XID %s", gpu.index, gpu.uuid, event.eventData)


def _family(kind: type[Any], name: str) -> Any:
    metric = by_name(name)
    return kind(name, metric.help, labels=metric.labels)


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
