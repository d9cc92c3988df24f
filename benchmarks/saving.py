"""By how much checkpoints and local copies hold up training: the mini model on two processes, with
the local tier in /dev/shm.

The share is measured inside the run (time in which the training thread waited or copied), so it
does not need a run without saves to compare with. Speed of the storage does not matter to it, for
the storage is written in the background; on a CPU that still takes time from the steps, which
tokens per second show.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_operator.core.worker import trainer_config
from dstrain.manifest import load_training
from dstrain_api.constants import (
    ENV_CHECKPOINT_DIR,
    ENV_CONFIG,
    ENV_LOCAL_DIR,
    ENV_REPORT_SOCKET,
)
from dstrain_api.spec import DeepSeekTrainingSpec

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "mini.yaml"
PROCESSES = 2
STEPS = 1200
EVERY_STEPS = {"default (1000 steps, auto)": 1000, "every 100 steps": 100, "every 20 steps": 20}


@dataclass(frozen=True)
class Run:
    """What one run reported."""

    seconds: float  # from its first to its last report
    stall_s: float
    saves: int
    tokens_per_second: float


def main() -> None:
    """Print, for each interval, saves and the share of the time that they held up training."""
    print(f"{'interval':<28}{'saves':>6}{'held up':>10}{'share':>8}{'tokens/s':>10}")
    for name, every_steps in EVERY_STEPS.items():
        run = measure(every_steps)
        print(
            f"{name:<28}{run.saves:>6}{run.stall_s:>8.2f} s{run.stall_s / run.seconds:>8.2%}"
            f"{run.tokens_per_second:>10.0f}"
        )


def measure(every_steps: int) -> Run:
    """Train the mini model for some steps."""
    spec: dict[str, Any] = json.loads(json.dumps(load_training(EXAMPLE)["spec"]))
    tokens = spec["training"]["globalBatch"] * spec["data"]["sequenceLength"] * STEPS
    spec["training"]["total"] = {"tokens": tokens}
    spec["workers"] = {"replicas": 1, "processesPerWorker": PROCESSES}
    spec["checkpoint"] = {"everySteps": every_steps, "keepLast": 1000}
    config = trainer_config("bench", DeepSeekTrainingSpec.model_validate(spec))
    assert config is not None
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as reports,
    ):
        path = Path(folder) / "reports"
        reports.bind(str(path))
        environment = {
            **os.environ,
            ENV_CONFIG: config.model_dump_json(),
            ENV_CHECKPOINT_DIR: f"{folder}/checkpoints",
            ENV_LOCAL_DIR: memory,
            ENV_REPORT_SOCKET: str(path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={PROCESSES}", "-m", "deepseek_trainer"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            run = _read(reports, process)
        saves = len(list((Path(folder) / "checkpoints").glob("step-*")))
    return Run(saves=saves, **run)


def _read(reports: socket.socket, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Rank 0's reports until it is done."""
    reports.settimeout(60)
    begin_s = end_s = stall_s = first_tokens = last_tokens = 0.0
    while process.poll() is None:
        record = json.loads(reports.recv(65_536))
        if record.get("done"):
            break
        if progress := record.get("progress"):
            end_s, last_tokens = time.monotonic(), progress["tokens"]
            begin_s, first_tokens = begin_s or end_s, first_tokens or last_tokens
            stall_s = record["metrics"]["dstrain_checkpoint_stall_seconds_total"]
    if process.wait(60):
        raise RuntimeError(f"the training failed with exit code {process.returncode}")
    seconds = end_s - begin_s
    rate = (last_tokens - first_tokens) / seconds
    return {"seconds": seconds, "stall_s": stall_s, "tokens_per_second": rate}


if __name__ == "__main__":
    main()
