"""What the driver says of a GPU's health. What it cannot tell is no fault."""

from collections.abc import Callable
from typing import Any, Final

import pynvml

# The hardware slows itself down: a brake of the power supply, or too hot.
_BRAKES: Final = (
    pynvml.nvmlClocksThrottleReasonHwSlowdown
    | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
)


def trouble(uuid: str) -> str:
    """What is wrong with a GPU, in words; empty if nothing is, or nothing can be said.

    Args:
        uuid: as NVML writes it, GPU-...
    """
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return ""
    found = [said for check in _CHECKS if (said := _asked(check, handle))]
    return f"{uuid}: {', '.join(found)}" if found else ""


def _asked(check: Callable[[Any], str], handle: Any) -> str:
    try:
        return check(handle)
    except pynvml.NVMLError:  # not on this kind of GPU
        return ""


def _remapping(handle: Any) -> str:
    _, _, _, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return "a row of its memory could not be remapped" if failed else ""


def _retirement(handle: Any) -> str:
    pending = pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)
    return "pages of its memory wait for their retirement by a reset" if pending else ""


def _memory_errors(handle: Any) -> str:
    count = pynvml.nvmlDeviceGetTotalEccErrors(
        handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    )
    return f"{count} uncorrected memory errors since its driver was loaded" if count else ""


def _brakes(handle: Any) -> str:
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return "it is slowed down by heat or its power supply" if reasons & _BRAKES else ""


_CHECKS: Final = (_remapping, _retirement, _memory_errors, _brakes)
