import re

import prometheus_client
import pytest
from dstrain_api.metrics import (
    GPU_NAMES,
    METRICS,
    RANK_ZERO_NAMES,
    Metric,
    by_exporter,
    by_name,
    by_sample,
)

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)


def test_a_name_is_used_once() -> None:
    names = [m.name for m in METRICS]
    assert len(names) == len(set(names))


@every_metric
def test_a_name_ends_with_its_unit_or_total(metric: Metric) -> None:
    suffix = "total" if metric.type == "counter" else metric.unit
    assert metric.name.endswith(suffix)
    assert (metric.type == "counter") == metric.name.endswith("_total")


@every_metric
def test_a_name_has_our_prefix_or_is_one_of_controller_runtime(metric: Metric) -> None:
    assert re.match(r"(dstrain|controller_runtime|workqueue|rest_client)_", metric.name)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)


@every_metric
def test_histograms_and_only_they_have_rising_buckets(metric: Metric) -> None:
    assert (metric.type == "histogram") == (metric.buckets is not None)
    if metric.buckets:
        assert list(metric.buckets) == sorted(set(metric.buckets))


@every_metric
def test_help_is_a_sentence(metric: Metric) -> None:
    assert re.fullmatch(r"[A-Z0-9].*\.", metric.help)


@every_metric
def test_prometheus_client_accepts_it_under_its_own_name(metric: Metric) -> None:
    kind = getattr(prometheus_client, metric.type.capitalize())
    buckets = {"buckets": metric.buckets} if metric.buckets else {}
    registry = prometheus_client.CollectorRegistry()
    made = kind(metric.name, metric.help, metric.labels, registry=registry, **buckets)
    made.labels(*("x" for _ in metric.labels)) if metric.labels else made
    samples = {s.name for family in registry.collect() for s in family.samples}
    assert set(metric.sample_names) <= samples


def test_worker_pods_name_the_training_and_leave_the_namespace_to_the_scrape() -> None:
    for metric in by_exporter("agent"):
        assert metric.labels[0] == "training"
        assert "namespace" not in metric.labels


def test_the_operator_names_the_namespace_wherever_it_names_a_training() -> None:
    for metric in by_exporter("operator"):
        assert ("training" in metric.labels) == ("namespace" in metric.labels)


def test_lookups_find_metrics_by_name_by_series_and_by_group() -> None:
    steps = by_name("dstrain_step_duration_seconds")
    assert by_sample("dstrain_step_duration_seconds_bucket") is steps
    assert by_sample("dstrain_loss") is by_name("dstrain_loss")
    assert steps.name in RANK_ZERO_NAMES
    assert all(by_name(name).exporter == "agent" for name in GPU_NAMES | RANK_ZERO_NAMES)
    with pytest.raises(KeyError):
        by_sample("dstrain_step_duration_seconds")
