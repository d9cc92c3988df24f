"""The life of a training as a user sees it with kubectl.

The real cluster, the real chart, the real images. What a training survives is in test_recovery.py.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import install
from e2e.clusters.interface import Cluster
from e2e.clusters.shell import wait_until
from e2e.conftest import MakeTraining, a_namespace, trainings
from e2e.report import Report
from e2e.s3 import S3Server
from e2e.training import Seen, Training, with_config_map, with_secret

SHORT: dict[str, Any] = {  # 80 steps
    "training": {"total": {"tokens": 81_920}},
    "checkpoint": {"everySteps": 20},
}
COMPLETE_S = 300.0  # the mini model needs about a minute on two quiet cores


@pytest.fixture(scope="module")
def short_losses(cluster: Cluster, operator: install.Release) -> tuple[float, ...]:
    """Final losses of two SHORT trainings side by side, to which nothing happens."""
    with a_namespace(cluster) as namespace, trainings(cluster, namespace) as make:
        both = [make("left", **SHORT), make("right", **SHORT)]
        for training in both:
            training.apply()
        return tuple(loss(training.wait_complete(COMPLETE_S)) for training in both)


def loss(seen: Seen) -> float:
    """The last that it reported, in nats per token."""
    return float(seen.status["progress"]["loss"])


def run_marks(report: Report, training: Training) -> None:
    """Report the times of a start: submit, first pod, first step."""
    running = next(s for s in training.seen if s.step >= 1)
    placed = next(s for s in training.seen if s.status.get("attempt", 0) >= 1)
    report.time(f"{training.name}: submit to pods", placed.at_s - training.applied_at_s)
    report.time(f"{training.name}: submit to first step seen", running.at_s - training.applied_at_s)


def recovery_marks(report: Report, what: str, finished: Seen) -> None:
    """Report what the status says the failures cost."""
    for entry in finished.status.get("history", []):
        if entry.get("seconds") is not None:
            report.time(f"{what}: failure to first new step ({entry['reason']})", entry["seconds"])


def rank_zero(training: Training) -> str:
    """Name of the newest pod in slot 0, whose log tells the steps."""
    every = [p["metadata"] for p in training.pods()]
    return str([m for m in every if m["labels"]["dstrain.dev/slot"] == "0"][-1]["name"])


def test_apply_reaches_complete_and_tells_its_story(
    make_training: MakeTraining, report: Report
) -> None:
    training = make_training("mini")
    training.apply()
    training.wait_step(1, 120)
    columns = training.kubectl("get", "dst", "mini")
    assert "PROGRESS" in columns
    assert "TOK/S" in columns
    finished = training.wait_complete(COMPLETE_S)
    run_marks(report, training)

    progress = finished.status["progress"]
    assert progress["step"] == progress["totalSteps"]
    shown = {s.status["summary"]["progress"] for s in training.seen if s.step}
    assert len(shown) >= 3, f"columns showed progress while it ran: {shown}"
    steps = training.steps(rank_zero(training))
    assert steps[0][1] - steps[-1][1] >= 1.5, "the model learned"
    assert [s for s, _ in steps] == sorted(s for s, _ in steps)
    assert finished.status["checkpoint"]["step"] == progress["totalSteps"]
    report.text("kubectl get dst while running", columns)
    report.text("kubectl get dst at the end", training.kubectl("get", "dst", "mini"))
    report.time("mini: submit to complete", finished.at_s - training.applied_at_s)


def test_two_trainings_at_once_complete_with_one_result(short_losses: tuple[float, ...]) -> None:
    assert short_losses[0] == pytest.approx(short_losses[1], abs=1e-3)


def test_power_off_of_a_node_resumes_elsewhere_with_the_same_result(
    make_training: MakeTraining,
    cluster: Cluster,
    operator: install.Release,
    report: Report,
    short_losses: tuple[float, ...],
) -> None:
    training = make_training("powerloss", **SHORT)
    training.apply()
    operator_node = operator.node()
    training.wait("a commit", lambda s: bool(s.status.get("checkpoint")), 180)
    victim = next(p for p in training.live_pods() if p["spec"]["nodeName"] != operator_node)
    node = victim["spec"]["nodeName"]
    off_at = time.monotonic()
    cluster.power_off(node)
    try:
        lost = training.wait("NodeLost", lambda s: _lost(s, node), 60)
        report.time("power-off to noticed", lost.at_s - off_at)
        before = lost.status["history"][-1]["fromStep"]
        again = training.wait("a new step", lambda s: _recovered(s, before), 120)
        report.time("power-off to first new step seen", again.at_s - off_at)
        assert node not in {p["spec"].get("nodeName") for p in training.live_pods()}
    finally:
        cluster.power_on(node)
    finished = training.wait_complete(COMPLETE_S)
    recovery_marks(report, "power-off", finished)

    entry = finished.status["history"][-1]
    assert entry["reason"] == "NodeLost"
    assert entry["node"] == node
    assert entry["resumedStep"] is not None
    assert entry["resumedStep"] > 0, "from a checkpoint, not from scratch"
    total = finished.status["progress"]["totalSteps"]
    assert_continuous(training.steps(rank_zero(training)), entry["resumedStep"], total)
    assert loss(finished) == pytest.approx(short_losses[0], abs=1e-3)
    cluster.wait_ready(node)
    assert not [p for p in training.live_pods() if p["spec"].get("nodeName") == node]


def _lost(seen: Seen, node: str) -> bool:
    return any(
        h["reason"] == "NodeLost" and h["node"] == node for h in seen.status.get("history", [])
    )


def _recovered(seen: Seen, step: int) -> bool:
    history = seen.status.get("history", [])
    return bool(history) and history[-1].get("seconds") is not None and seen.step >= step


def assert_continuous(steps: list[tuple[int, float]], resumed: int, last: int) -> None:
    """The log, a line every two seconds, goes up but for one return to after the checkpoint."""
    numbers = [number for number, _ in steps]
    returns = [after for before, after in itertools.pairwise(numbers) if after <= before]
    assert all(after > resumed for after in returns)
    assert len(returns) <= 1, numbers
    assert numbers[-1] == last


def test_suspend_stops_the_pods_after_a_save_and_resume_goes_on(
    make_training: MakeTraining, short_losses: tuple[float, ...]
) -> None:
    training = make_training("pause", **SHORT)
    training.apply()
    training.wait_step(20, 180)
    training.patch(suspend=True)
    training.wait("Suspended", lambda s: s.status["phase"] == "Suspended", 150)
    wait_until(lambda: not training.pods(), "the pods to end", timeout_s=60)
    saved = training.wait("a save", lambda s: _committed(s) >= 20, 10)
    assert saved.is_true("Suspended")
    training.patch(suspend=False)
    finished = training.wait_complete(COMPLETE_S)
    assert loss(finished) == pytest.approx(short_losses[0], abs=1e-3)
    assert finished.status["restarts"]["application"] == 0, "a suspension costs no budget"
    assert finished.status["restarts"]["infrastructure"] == 0


def _committed(seen: Seen) -> int:
    return int((seen.status.get("checkpoint") or {"step": 0})["step"])


def test_delete_while_running_leaves_nothing(
    make_training: MakeTraining, cluster: Cluster, namespace: str
) -> None:
    training = make_training("gone")
    training.apply()
    training.wait_step(5, 180)
    training.delete()
    kinds = "dst,pods,services,secrets,persistentvolumeclaims"
    wait_until(lambda: not _names(cluster, namespace, kinds), "nothing to be left", timeout_s=30)


def _names(cluster: Cluster, namespace: str, kinds: str) -> list[str]:
    out = cluster.kubectl("-n", namespace, "get", kinds, "-o", "name", "--ignore-not-found")
    return out.split()


@pytest.fixture
def bucket_server(cluster: Cluster, tmp_path: Path) -> Iterator[S3Server]:
    """An S3 server that pods can reach."""
    server = S3Server(tmp_path, cluster.host)
    server.start()
    yield server
    server.kill()


def test_a_training_that_keeps_checkpoints_in_a_bucket_goes_on_from_there(
    make_training: MakeTraining, bucket_server: S3Server, short_losses: tuple[float, ...]
) -> None:
    bucket = bucket_server.bucket("checkpoints")
    training = make_training(
        "bucket", training=SHORT["training"],
        checkpoint={"uri": "s3://checkpoints/run-7", "everySteps": 20},
        workers={"template": with_secret("checkpoint-bucket")},
    )  # fmt: skip
    keys = [f"--from-literal={name}={value}" for name, value in bucket_server.environment.items()]
    training.kubectl("create", "secret", "generic", "checkpoint-bucket", *keys)
    training.apply()
    training.wait("a commit", lambda s: _committed(s) >= 20, 180)
    # What is in memory goes with its pods.
    training.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
    finished = training.wait_complete(COMPLETE_S)
    assert finished.status["history"][-1]["resumedStep"] >= 20
    assert loss(finished) == pytest.approx(short_losses[0], abs=1e-3)
    total = finished.status["progress"]["totalSteps"]
    assert finished.status["checkpoint"]["uri"] == f"s3://checkpoints/run-7/step-{total}"
    assert (bucket / "run-7" / f"step-{total}" / "manifest.json").exists()
    assert not training.kubectl("get", "pvc", "-o", "name").strip(), "nothing else is needed"


def test_a_training_that_cannot_be_scheduled_says_so(make_training: MakeTraining) -> None:
    training = make_training("toolarge", workers={"resources": {"requests": {"cpu": "1000"}}})
    training.apply()
    seen = training.wait("why", lambda s: "cpu" in s.condition("Scheduled").get("message", ""), 60)
    assert seen.condition("Scheduled")["status"] == "False"
    assert "lower workers.resources.requests" in seen.condition("Scheduled")["message"]
    wait_until(lambda: _warned(training, "cpu"), "an event", timeout_s=10)


def test_a_missing_image_is_named(make_training: MakeTraining) -> None:
    image = "registry.invalid/nobody/nothing:1"
    training = make_training("noimage", workers={"image": image})
    training.apply()
    seen = training.wait("the image", lambda s: image in json.dumps(s.status), 90)
    assert seen.status["phase"] != "Running"
    wait_until(lambda: _warned(training, image), "an event", timeout_s=10)


def test_a_script_that_raises_fails_with_its_own_words(make_training: MakeTraining) -> None:
    training = make_training(
        "broken", model=None, data=None, training=None,
        optimizer=None, precision=None, parallelism=None,
        entrypoint={"script": "/app/broken.py"},
        workers={"template": with_config_map("script", "/app")},
        recovery={"budgets": {"application": {"max": 1, "window": "1h"}}},
    )  # fmt: skip
    source = "broken.py=raise ValueError('the learning rate is a banana')"
    training.kubectl("create", "configmap", "script", f"--from-literal={source}")
    training.apply()
    seen = training.wait("Failed", lambda s: s.is_true("Failed"), 120)
    assert "ValueError: the learning rate is a banana" in seen.condition("Failed")["message"]
    assert seen.is_true("Finished")
    wait_until(lambda: _warned(training, "banana"), "an event", timeout_s=10)


def _warned(training: Training, word: str) -> bool:
    """Whether a warning event of the training contains the word."""
    return any(word in e["message"] for e in training.events() if e["type"] == "Warning")
