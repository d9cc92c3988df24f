"""What the operator exposes, against the one registry of names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from deepseek_operator.core.model import Key, Training
from deepseek_operator.metrics import OperatorMetrics
from deepseek_operator.runtime.views import training_view
from dstrain_api.metrics import by_exporter
from dstrain_api.status import DeepSeekTrainingStatus
from prometheus_client.parser import text_string_to_metric_families

ENTRY = {
    "failureClass": "infrastructure",
    "reason": "NodeLost",
    "time": "2026-11-21T12:00:00Z",
    "attempt": 1,
    "generation": 1,
}
STATUS: dict[str, Any] = {
    "phase": "Running",
    "workers": {"desired": 2, "ready": 1},
    "restarts": {"infrastructure": 3},
    "progress": {"step": 50, "totalSteps": 200, "etaSeconds": 60},
    "checkpoint": {"step": 40, "time": "2026-11-21T12:00:00Z"},
    "history": [ENTRY],
}


def training(status: dict[str, Any] = STATUS) -> Training:
    view = training_view(
        {
            "metadata": {
                "namespace": "team",
                "name": "mini",
                "uid": "u",
                "resourceVersion": "1",
                "creationTimestamp": "2026-11-21T12:00:00Z",
            }
        }
    )
    return replace(view, status=DeepSeekTrainingStatus.model_validate(status))


def exposed(metrics: OperatorMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.expose().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def following(trainings: Iterable[Training]) -> OperatorMetrics:
    metrics = OperatorMetrics()
    metrics.follow(lambda: trainings, lambda: 4)
    metrics.built("1", "3.11", "1.45")
    return metrics


def test_every_metric_of_the_registry_is_exposed_with_its_labels_and_no_other() -> None:
    metrics = following([training()])
    recovered = {**STATUS, "phase": "Complete", "history": [{**ENTRY, "seconds": 4.0}]}
    metrics.status_written(Key("team", "mini"), training().status, training(recovered).status)
    metrics.reconciled("error", 0.01)
    metrics.requested("GET", "200")
    found: dict[str, set[str]] = {}
    for name, labels in exposed(metrics):
        found.setdefault(name, set()).update(label for label, _ in labels)
    for described in by_exporter("operator"):
        for sample in described.sample_names:
            assert found[sample] - {"le"} == set(described.labels), sample
    ours = {s for described in by_exporter("operator") for s in described.sample_names}
    assert {name for name in found if name.startswith("dstrain_")} <= ours


def test_figures_of_a_training_are_those_of_its_status() -> None:
    found = exposed(following([training()]))

    def value(name: str, **labels: str) -> float:
        of_training = {"namespace": "team", "training": "mini", **labels}
        return found[name, frozenset(of_training.items())]

    assert value("dstrain_training_phase", phase="Running") == 1
    assert value("dstrain_training_phase", phase="Failed") == 0
    assert value("dstrain_training_workers", state="ready") == 1
    assert value("dstrain_training_restarts_total", failure_class="infrastructure") == 3
    assert value("dstrain_training_progress_ratio") == 0.25
    assert value("dstrain_training_eta_seconds") == 60
    assert value("dstrain_training_last_checkpoint_step") == 40
    assert value("dstrain_training_last_checkpoint_timestamp_seconds") == 1795262400


def test_recovery_is_counted_once_when_its_time_is_known() -> None:
    metrics = following([])
    failed, recovered = training(), training({**STATUS, "history": [{**ENTRY, "seconds": 4.0}]})
    key = Key("team", "mini")
    metrics.status_written(key, failed.status, recovered.status)
    metrics.status_written(key, recovered.status, recovered.status)
    labels = frozenset({"namespace": "team", "training": "mini"}.items())
    assert exposed(metrics)["dstrain_training_recovery_duration_seconds_count", labels] == 1
    metrics.gone(key)
    assert ("dstrain_training_recovery_duration_seconds_count", labels) not in exposed(metrics)


def test_training_that_is_gone_has_no_series() -> None:
    trainings = [training()]
    metrics = following(trainings)
    trainings.clear()
    assert not [labels for _, labels in exposed(metrics) if ("training", "mini") in labels]
