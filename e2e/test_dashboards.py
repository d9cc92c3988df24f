"""Every question of a dashboard, asked of a real Prometheus that scrapes everything we name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dstrain_api.metrics import GPU_NAMES, METRICS

from dashboards.training import TRAINING
from e2e.clusters.shell import wait_until
from e2e.prometheus import Prometheus, check_metrics, static_job
from e2e.questions import Question, ask, offered, questions, unanswered
from e2e.serving import serve
from e2e.synthetic import METRICS_TYPE, Exposition

INTERVAL_S = 0.2
SCRAPES = 15
CHOSEN = {"namespace": "default", "training": "mini"}


def asks_for_gpus(question: Question) -> bool:
    return any(name in question.query.expression for name in GPU_NAMES)


@pytest.fixture(scope="module", params=[True, False], ids=["with GPUs", "without GPUs"])
def gpus(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def prometheus(gpus: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    pod = {"namespace": "default", "pod": "mini-0-1"}
    pods, deployment = Exposition("agent", gpus=gpus), Exposition("operator")
    with (
        serve(lambda _: pods.tick(), METRICS_TYPE) as worker,
        serve(lambda _: deployment.tick(), METRICS_TYPE) as operator,
        Prometheus(
            folder,
            [
                static_job("dstrain-worker", {worker: pod}),
                static_job("dstrain-operator", {operator: {}}, honor_labels=True),
            ],
            interval_s=INTERVAL_S,
        ) as server,
    ):
        wait_until(lambda: scrapes(server) >= SCRAPES, f"{SCRAPES} scrapes of both", timeout_s=60)
        yield server


def scrapes(server: Prometheus) -> float:
    """Finished scrapes of the target that has the fewest."""
    counts = [s.value for s in server.query("count_over_time(up[1h])")]
    return min(counts) if len(counts) == 2 else 0


def test_what_we_expose_is_clean_to_promtool(gpus: bool) -> None:
    for exporter in ("agent", "operator"):
        check_metrics(Exposition(exporter, gpus=gpus).tick())


def test_prometheus_has_every_metric_of_the_registry(prometheus: Prometheus, gpus: bool) -> None:
    names = set(prometheus.get("/api/v1/label/__name__/values"))
    absent = set() if gpus else GPU_NAMES
    assert {s for m in METRICS if m.name not in absent for s in m.sample_names} <= names
    assert not absent & names


def test_the_variables_offer_the_training(prometheus: Prometheus) -> None:
    for variable, value in CHOSEN.items():
        assert offered(prometheus, TRAINING, variable, CHOSEN) == [value]


def test_every_panel_has_data_but_those_of_gpus_that_are_not_there(
    prometheus: Prometheus, gpus: bool
) -> None:
    empty = unanswered(prometheus, TRAINING, CHOSEN, window_s=60, interval_s=INTERVAL_S)
    of_gpus = [q for q in questions(TRAINING) if asks_for_gpus(q)]
    assert empty == ([] if gpus else of_gpus)
    assert all(q.may_be_empty for q in of_gpus)


def test_panels_speak_of_the_chosen_training_only(prometheus: Prometheus) -> None:
    other = {"namespace": "default", "training": "other"}
    for question in questions(TRAINING):
        if "$training" in question.query.expression:
            assert ask(prometheus, question, other, window_s=60, interval_s=INTERVAL_S) == []
