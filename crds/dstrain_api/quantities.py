"""Kubernetes-style durations and quantities as numbers."""

import re
from decimal import Decimal
from typing import Final

from dstrain_api.patterns import DURATION_PATTERN, HELP, QUANTITY_PATTERN

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_FACTORS: Final = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}


def duration_s(text: str) -> float:
    """Seconds of a duration such as `90s`, `1h30m` or `500ms`.

    Raises:
        ValueError: the text is no duration.
    """
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError(f"{text!r}: {HELP[DURATION_PATTERN]}")
    parts = re.findall(r"([0-9.]+)(ms|s|m|h)", text)
    return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))


def quantity(text: str | int) -> Decimal:
    """Value of a quantity such as `500m`, `2`, `10Gi`, in units (cores, bytes, devices).

    Raises:
        ValueError: the text is no quantity.
    """
    match = re.fullmatch(QUANTITY_PATTERN, str(text))
    if not match:
        raise ValueError(f"{text!r}: {HELP[QUANTITY_PATTERN]}")
    suffix = match[2] or ""
    return Decimal(str(text).removesuffix(suffix)) * _FACTORS[suffix]
