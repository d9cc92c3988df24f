"""The mini model under each layout, and what a layout costs against one process.

At this size a step is overhead, not arithmetic: the ratio says what FSDP2 and tensor parallelism
add per step on CPU, and says nothing of GPUs. Layouts take turns, so that a drift of the machine's
speed falls on all of them.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deepseek_operator.core.worker import trainer_config
from dstrain.manifest import load_training
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CONFIG
from dstrain_api.spec import DeepSeekTrainingSpec

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "mini.yaml"
STEPS = 60
ROUNDS = 3
LAYOUTS = {
    "1 process": (1, 1),
    "FSDP2 x 2": (2, 1),
    "tensor x 2": (2, 2),
    "FSDP2 x 2, tensor x 2": (4, 2),
}
THROUGHPUT = re.compile(r"step \d+/\d+ .* ([0-9.]+) tok/s")


def main() -> None:
    """Print median tokens per second of each layout and its ratio to one process."""
    figures: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(ROUNDS):
        for name, (processes, tensor) in LAYOUTS.items():
            figures[name].append(tokens_per_second(processes, tensor))
    base = statistics.median(figures["1 process"])
    print(f"{'layout':<24}{'tokens/s':>10}{'ratio':>8}   all {ROUNDS} rounds")
    for name, found in figures.items():
        middle = statistics.median(found)
        each = " ".join(f"{value:.0f}" for value in found)
        print(f"{name:<24}{middle:>10.0f}{middle / base:>8.2f}   {each}")


def tokens_per_second(processes: int, tensor: int) -> float:
    """Throughput over the last steps of a short run."""
    spec: dict[str, Any] = json.loads(json.dumps(load_training(EXAMPLE)["spec"]))
    tokens = spec["training"]["globalBatch"] * spec["data"]["sequenceLength"] * STEPS
    spec["training"]["total"] = {"tokens": tokens}
    spec["parallelism"] = {"tensor": tensor}
    spec["workers"] = {"replicas": 1, "processesPerWorker": processes}
    config = trainer_config("bench", DeepSeekTrainingSpec.model_validate(spec))
    assert config is not None
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            ENV_CONFIG: config.model_dump_json(),
            ENV_CHECKPOINT_DIR: folder,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "deepseek_trainer"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(THROUGHPUT.findall(done.stdout + done.stderr)[-1])


if __name__ == "__main__":
    main()
