"""Programs that cannot be helped: each ends Failed, soon, and in words that say what to change."""

from __future__ import annotations

from typing import Any

from e2e.conftest import MakeTraining
from e2e.training import Seen, Training, with_config_map

PATIENCE_S = 180.0
# A program that reports nothing is never said to stand still.
STEPS = (
    "import time; from deepseek_trainer.reporting import report; report(step=3); time.sleep(1)\n"
)
NO_MODEL: dict[str, Any] = dict.fromkeys(
    ("model", "data", "training", "optimizer", "precision", "parallelism")
)


def script(make_training: MakeTraining, name: str, source: str, **workers: Any) -> Training:
    """A training of a program of these lines on one worker."""
    training = make_training(
        name,
        **NO_MODEL,
        entrypoint={"script": "/app/program.py"},
        workers={
            "replicas": 1,
            "processesPerWorker": 1,
            "template": with_config_map("program", "/app"),
            **workers,
        },
    )
    training.kubectl("create", "configmap", "program", f"--from-literal=program.py={source}")
    training.apply()
    return training


def failed(training: Training) -> Seen:
    return training.wait("Failed", lambda s: s.is_true("Failed"), PATIENCE_S)


def test_the_same_error_at_the_same_step_twice_is_the_last(make_training: MakeTraining) -> None:
    source = STEPS + "raise KeyError('tokens of shard 7')"
    seen = failed(script(make_training, "repeated", source))
    said = seen.condition("Failed")
    assert said["reason"] == "RepeatedError"
    assert "tokens of shard 7" in said["message"]
    assert len(seen.status["history"]) == 2


def test_three_generations_without_a_step_are_the_last(make_training: MakeTraining) -> None:
    source = STEPS + "raise type(f'E{time.time_ns()}', (Exception,), {})('another one')"
    seen = failed(script(make_training, "stuck", source))
    assert seen.condition("Failed")["reason"] == "NoProgress"
    assert len(seen.status["history"]) == 4  # the first one came to a step


def test_too_little_memory_is_said_so(make_training: MakeTraining) -> None:
    source = "x = bytearray(3 << 30); x[::4096] = bytes(len(x[::4096]))"
    seen = failed(script(make_training, "large", source, resources={"limits": {"memory": "1Gi"}}))
    said = seen.condition("Failed")
    assert "memory" in said["message"]
    assert seen.status["restarts"]["outOfMemory"] >= 1
