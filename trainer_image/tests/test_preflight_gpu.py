"""What the driver says of a GPU's health, by pynvml's own ctypes calls, against a driver library
made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .driver import built

# GPU-good is well, GPU-bad has everything, GPU-old knows of nothing.
DRIVER = r"""
#include <string.h>
enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
static char good, bad, old;
#define TELL(on_good, on_bad) if (d == &old) return NOT_SUPPORTED; \
  if (d == &good) { on_good; } else { on_bad; } return SUCCESS
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **d) {
  *d = !strcmp(uuid, "GPU-good") ? &good : !strcmp(uuid, "GPU-bad") ? &bad : &old;
  return strcmp(uuid, "GPU-none") ? SUCCESS : NOT_FOUND; }
int nvmlDeviceGetRemappedRows(void *d, unsigned *c, unsigned *u, unsigned *p, unsigned *f) {
  *c = *u = 2; *p = 0; TELL(*f = 0, *f = 1); }
int nvmlDeviceGetRetiredPagesPendingStatus(void *d, int *pending) {
  TELL(*pending = 0, *pending = 1); }
int nvmlDeviceGetTotalEccErrors(void *d, int type, int counter, unsigned long long *n) {
  TELL(*n = 0, *n = type == 1 && counter == 0 ? 3 : 0); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *reasons) {
  TELL(*reasons = 0x4, *reasons = 0x40); }
const char *nvmlErrorString(int code) { return "?"; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("driver"), DRIVER)


def trouble(uuid: str, library_path: Path) -> str:
    program = f"from deepseek_trainer.preflight.gpu import trouble; print(trouble('{uuid}'))"
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"LD_LIBRARY_PATH": str(library_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_everything_that_is_wrong_with_a_gpu_is_told(driver: Path) -> None:
    assert trouble("GPU-bad", driver) == (
        "GPU-bad: a row of its memory could not be remapped, pages of its memory wait for their "
        "retirement by a reset, 3 uncorrected memory errors since its driver was loaded, it is "
        "slowed down by heat or its power supply"
    )


@pytest.mark.parametrize("uuid", ["GPU-good", "GPU-old", "GPU-none"])
def test_what_is_well_or_cannot_be_told_is_no_trouble(uuid: str, driver: Path) -> None:
    assert trouble(uuid, driver) == ""


def test_without_a_driver_there_is_no_trouble(tmp_path: Path) -> None:
    assert trouble("GPU-good", tmp_path) == ""
