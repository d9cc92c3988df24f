import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from dashboards.lint import lint, of_expression
from dashboards.training import TRAINING

Json = dict[str, Any]


def graph(dashboard: Json) -> Json:
    """Its first time series."""
    return next(p for p in dashboard["panels"] if p["type"] == "timeseries")


def set_editable(d: Json) -> None:
    d["editable"] = True


def drop_description(d: Json) -> None:
    del graph(d)["description"]


def invent_unit(d: Json) -> None:
    graph(d)["fieldConfig"]["defaults"]["unit"] = "furlongs"


def fix_datasource(d: Json) -> None:
    graph(d)["targets"][0]["datasource"] = {"type": "prometheus", "uid": "prod"}


def empty_ref_id(d: Json) -> None:
    graph(d)["targets"][0]["refId"] = ""


def repeat_id(d: Json) -> None:
    graph(d)["id"] = d["panels"][0]["id"]


def overlap(d: Json) -> None:
    graph(d)["gridPos"]["x"] += 1


def drop_queries(d: Json) -> None:
    graph(d)["targets"] = []


def rename_datasource_variable(d: Json) -> None:
    d["templating"]["list"][0]["name"] = "prometheus"


def never_refresh_variable(d: Json) -> None:
    d["templating"]["list"][1]["refresh"] = 0


def ask_for_unknown_label(d: Json) -> None:
    d["templating"]["list"][1]["query"] = "label_values(dstrain_loss, namespace)"


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (set_editable, "edited in place"),
        (drop_description, "no description"),
        (invent_unit, "furlongs"),
        (fix_datasource, "query A does not use the data source variable"),
        (empty_ref_id, "refId"),
        (repeat_id, "have the id"),
        (overlap, "over each other"),
        (drop_queries, "asks nothing"),
        (rename_datasource_variable, "one data source variable"),
        (never_refresh_variable, "time range changes"),
        (ask_for_unknown_label, "has no label namespace"),
    ],
)
def test_a_spoiled_dashboard_is_found(spoil: Callable[[Json], None], finding: str) -> None:
    dashboard = copy.deepcopy(json.loads(TRAINING.as_json()))
    spoil(dashboard)
    assert [f for f in lint(dashboard) if finding in f]


OF = '{namespace="$namespace", training="$training"}'


@pytest.mark.parametrize(
    ("expression", "finding"),
    [
        (f"rate(dstrain_tokens_total{OF}[$__rate_interval]", "is not PromQL"),
        (f"max(dstrain_loss{OF}) + $nothing", "is not PromQL"),
        (f"sum(rate(dstrain_tokens_total{OF}[5m]))", "does not follow the zoom"),
        (f"sum(rate(dstrain_tokens_total{OF}[$__range]))", "does not follow the zoom"),
        (f"sum(dstrain_tokens_total{OF})", "is a counter"),
        (f"sum(dstrain_step_duration_seconds_bucket{OF})", "is a counter"),
        (f"rate(dstrain_loss{OF}[$__rate_interval])", "is a gauge"),
        (f"max(dstrain_lost{OF})", "not in the registry"),
        ("max(dstrain_loss)", "not narrowed"),
    ],
)
def test_a_bad_expression_is_found(expression: str, finding: str) -> None:
    assert [f for f in of_expression(expression) if finding in f]


def test_a_good_expression_has_no_finding() -> None:
    assert not list(of_expression(f"sum(rate(dstrain_tokens_total{OF}[$__rate_interval]))"))
