"""GPU figures by pynvml's own ctypes calls, against a driver library made here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .driver import built

# Two GPUs; the second has no power sensor and no XID events. One XID 79 comes on the first.
DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
typedef unsigned long long u64;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { u64 total, free, used; } memory;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } event;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, TIMEOUT = 10 };
static int first, second;
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
  *d = i ? &second : &first; return SUCCESS; }
int nvmlDeviceGetUUID(void *d, char *s, unsigned n) {
  snprintf(s, n, "GPU-%s", d == &first ? "aa" : "bb"); return SUCCESS; }
int nvmlDeviceGetUtilizationRates(void *d, utilization *u) {
  u->gpu = d == &first ? 87 : 3; u->memory = 0; return SUCCESS; }
int nvmlDeviceGetMemoryInfo(void *d, memory *m) {
  m->total = 80ULL << 30; m->used = 60ULL << 30; m->free = 20ULL << 30; return SUCCESS; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) {
  if (d == &second) return NOT_SUPPORTED; *mw = 654321; return SUCCESS; }
int nvmlDeviceGetTemperature(void *d, unsigned sensor, unsigned *c) { *c = 61; return SUCCESS; }
int nvmlDeviceGetClockInfo(void *d, unsigned type, unsigned *mhz) {
  *mhz = type == 1 ? 1980 : 2619; return SUCCESS; }
int nvmlEventSetCreate(void **set) { *set = &first; return SUCCESS; }
int nvmlDeviceRegisterEvents(void *d, u64 types, void *set) {
  return d == &first && types == 8 ? SUCCESS : NOT_SUPPORTED; }
int nvmlEventSetWait_v2(void *set, event *e, unsigned timeout_ms) {
  static int told; if (told) { usleep(timeout_ms * 1000); return TIMEOUT; }
  told = 1; memset(e, 0, sizeof *e); e->device = &first; e->type = 8; e->data = 79;
  return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "?"; }
"""

SCRAPE = """
    import logging, sys, time
    from deepseek_trainer.agent.metrics import AgentMetrics
    from deepseek_trainer.agent.nvml import add_gpus

    logging.basicConfig(format="%(message)s")
    metrics = AgentMetrics("mini")
    add_gpus(metrics, "mini")
    deadline = time.monotonic() + 10
    while b"gpu_xid_total" in metrics.exposition() and time.monotonic() < deadline:
        if b'gpu_uuid="GPU-aa",training="mini"} 1.0' in metrics.exposition():
            break
        time.sleep(0.01)
    sys.stdout.buffer.write(metrics.exposition())
"""


def scrape(library_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRAPE)],
        env=os.environ | {"LD_LIBRARY_PATH": str(library_path)},
        capture_output=True,
        text=True,
        check=True,
    )


def gpu_samples(exposition: str) -> dict[str, float]:
    lines = [line for line in exposition.splitlines() if line.startswith("dstrain_gpu_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("driver"), DRIVER)


def test_every_gpu_tells_its_figures_in_base_units(driver: Path) -> None:
    told = scrape(driver)
    assert gpu_samples(told.stdout) == {
        f'dstrain_gpu_{name}{{gpu="{gpu}",gpu_uuid="GPU-{uuid}",training="mini"}}': value
        for gpu, uuid, figures in (
            (
                "0",
                "aa",
                {
                    "utilization_ratio": 0.87,
                    "memory_used_bytes": 60 * 2**30,
                    "memory_total_bytes": 80 * 2**30,
                    "power_watts": 654.321,
                    "temperature_celsius": 61,
                    "sm_clock_hertz": 1980e6,
                    "memory_clock_hertz": 2619e6,
                    "xid_total": 1,
                },
            ),
            (
                "1",
                "bb",
                {
                    "utilization_ratio": 0.03,
                    "memory_used_bytes": 60 * 2**30,
                    "memory_total_bytes": 80 * 2**30,
                    "temperature_celsius": 61,
                    "sm_clock_hertz": 1980e6,
                    "memory_clock_hertz": 2619e6,
                },
            ),
        )
        for name, value in figures.items()
    }
    assert "GPU 0 (GPU-aa): XID 79" in told.stderr


def test_without_a_driver_there_are_no_gpu_figures_and_no_complaint(tmp_path: Path) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    told = scrape(tmp_path)
    assert gpu_samples(told.stdout) == {}
    assert told.stderr == ""
