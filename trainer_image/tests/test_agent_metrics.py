"""What a scrape of a worker pod finds."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import pytest
from deepseek_trainer.agent.metrics import AgentMetrics, serve
from deepseek_trainer.agent.reports import WorkerReport
from dstrain_api.metrics import RANK_ZERO_NAMES, by_name
from dstrain_api.protocol import ProgressReport
from prometheus_client.parser import text_string_to_metric_families


def said(step: int, tokens: int, resumed_step: int | None = None, **metrics: float) -> WorkerReport:
    progress = ProgressReport(
        step=step,
        total_steps=100,
        tokens=tokens,
        loss=4.0,
        tokens_per_second=1000.0,
        step_seconds=0.2,
        resumed_step=resumed_step,
    )
    return WorkerReport(progress=progress, metrics=metrics)


def samples(metrics: AgentMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels and sample.labels["training"] == "mini"
    }


@pytest.fixture
def metrics() -> AgentMetrics:
    made = AgentMetrics("mini")
    made.joined(generation=3, group_rank=0, seconds=0.5)
    return made


def test_names_help_and_labels_are_those_of_the_registry(metrics: AgentMetrics) -> None:
    metrics.reported(said(10, 1000, 0, dstrain_grad_norm=1.0))
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        registered = by_name(name)
        assert (family.documentation, family.type) == (registered.help, registered.type)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(registered.labels)


def test_rank_zero_tells_how_far_the_training_is(metrics: AgentMetrics) -> None:
    metrics.reported(said(10, 1000, 0, dstrain_grad_norm=1.5, dstrain_learning_rate=3e-4))
    found = samples(metrics)
    assert found["dstrain_step"] == 10
    assert found["dstrain_loss"] == 4.0
    assert found["dstrain_throughput_tokens_per_second"] == 1000.0
    assert found["dstrain_grad_norm"] == 1.5
    assert found["dstrain_step_duration_seconds_count"] == 1
    assert "dstrain_mfu_ratio" not in found  # not known


def test_figures_of_the_training_go_with_rank_zero(metrics: AgentMetrics) -> None:
    metrics.reported(said(10, 1000, 0))
    metrics.joined(generation=4, group_rank=1, seconds=0.1)
    found = samples(metrics)
    assert found["dstrain_generation"] == 4
    assert found["dstrain_rendezvous_duration_seconds_count"] == 2
    assert not any(name.startswith("dstrain_step") for name in found)


def test_tokens_are_counted_again_when_they_are_trained_on_again(metrics: AgentMetrics) -> None:
    metrics.reported(said(step=10, tokens=1000, resumed_step=0))
    metrics.reported(said(step=12, tokens=1200))
    metrics.joined(generation=4, group_rank=0, seconds=0.1)
    metrics.reported(said(step=11, tokens=1100, resumed_step=10))  # from the checkpoint of step 10
    assert samples(metrics)["dstrain_tokens_total"] == pytest.approx(1000 + 200 + 100)


def test_counters_of_a_process_go_on_when_the_next_one_begins_at_zero(
    metrics: AgentMetrics,
) -> None:
    metrics.reported(said(1, 100, 0, dstrain_skipped_steps_total=1))
    metrics.reported(said(2, 200, None, dstrain_skipped_steps_total=3))
    metrics.joined(generation=4, group_rank=0, seconds=0.1)
    metrics.reported(said(1, 100, 0, dstrain_skipped_steps_total=1))
    assert samples(metrics)["dstrain_skipped_steps_total"] == 4


def test_a_checkpoint_is_dated_when_it_is_told(metrics: AgentMetrics) -> None:
    before_s = time.time()
    metrics.reported(
        said(
            10,
            1000,
            0,
            dstrain_checkpoint_last_step=10,
            dstrain_checkpoint_save_duration_seconds=0.7,
        )
    )
    found = samples(metrics)
    assert found["dstrain_checkpoint_last_step"] == 10
    assert before_s <= found["dstrain_checkpoint_last_timestamp_seconds"] <= time.time()
    assert found["dstrain_checkpoint_save_duration_seconds_sum"] == 0.7


def test_only_registered_figures_are_taken_from_a_program(metrics: AgentMetrics) -> None:
    metrics.reported(said(1, 100, 0, my_own_figure=1.0, dstrain_generation=99))
    found = samples(metrics)
    assert found["dstrain_generation"] == 3
    assert "my_own_figure" not in found
    assert {name for name in RANK_ZERO_NAMES if name in found}


def test_restarts_are_counted(metrics: AgentMetrics) -> None:
    metrics.restarted()
    metrics.restarted()
    assert samples(metrics)["dstrain_worker_restarts_total"] == 2


def test_it_is_served_where_prometheus_looks(metrics: AgentMetrics) -> None:
    port = serve(metrics, 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        assert answer.read() == metrics.exposition()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/")


def test_what_may_happen_is_zero_before_it_does(metrics: AgentMetrics) -> None:
    found = samples(metrics)
    assert found["dstrain_worker_restarts_total"] == 0
    assert found["dstrain_skipped_steps_total"] == 0
    assert found["dstrain_step_duration_seconds_count"] == 0


def test_work_of_every_rank_is_counted_over_all_its_processes(metrics: AgentMetrics) -> None:
    for seconds in (1.5, 4.0):
        metrics.worked(WorkerReport(local_rank=1, own_seconds=seconds))
    metrics.worked(WorkerReport(local_rank=0, rank_step=3))
    metrics.joined(generation=4, group_rank=1, seconds=0.1)
    metrics.worked(WorkerReport(local_rank=1, own_seconds=0.5))
    name = "dstrain_rank_compute_seconds_total"
    assert f'{name}{{local_rank="1",training="mini"}} 4.5' in metrics.exposition().decode()
    assert f'{name}{{local_rank="0"' not in metrics.exposition().decode()
