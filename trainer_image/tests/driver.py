"""Builds a small library in the place of the GPU driver's, so that pynvml's own calls are tried."""

import shutil
import subprocess
from pathlib import Path

import pytest


def built(folder: Path, source: str) -> Path:
    """The folder, with the library in it; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the driver library with")
    (folder / "nvml.c").write_text(source)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True)
    return folder
