"""The one folder where clusters, programs and images are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$DSTRAIN_HOME`, or `~/.cache/dstrain`."""
    return Path(os.environ.get("DSTRAIN_HOME") or "~/.cache/dstrain").expanduser().absolute()
