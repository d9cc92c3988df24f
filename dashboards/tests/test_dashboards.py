import json
from pathlib import Path

import pytest
from dstrain_api.metrics import METRICS

from dashboards.generate import ROOT, outputs
from dashboards.lint import lint
from dashboards.panels import Panel, Query
from dashboards.promql import Selection, selections
from dashboards.training import TRAINING


@pytest.mark.parametrize("path", sorted((ROOT / "dashboards/json").glob("*.json")), ids=str)
def test_a_committed_dashboard_has_no_finding(path: Path) -> None:
    assert lint(json.loads(path.read_text())) == []


@pytest.mark.parametrize("path", sorted(outputs()), ids=lambda p: p.name)
def test_a_generated_file_is_as_committed(path: Path) -> None:
    assert path.read_text() == outputs()[path], "run: python -m dashboards.generate"


def test_every_committed_dashboard_is_generated() -> None:
    assert set((ROOT / "dashboards/json").glob("*.json")) <= set(outputs())


def test_every_metric_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [m.name for m in METRICS if f"`{m.name}`" not in page] == []


def test_panels_that_can_be_empty_say_when() -> None:
    panels = {p["title"]: p for p in json.loads(TRAINING.as_json())["panels"]}
    assert panels["Utilisation"]["description"].endswith("Empty on nodes without an NVIDIA GPU.")
    assert "Empty" not in panels["Loss"]["description"]


def test_a_panel_is_empty_only_if_all_its_queries_are() -> None:
    of = '{namespace="$namespace", training="$training"}'
    always, sometimes = Query(f"dstrain_loss{of}"), Query(f"dstrain_mfu_ratio{of}")
    assert Panel("", "", "none", (always, sometimes)).empty_when == ""
    assert Panel("", "", "none", (sometimes,)).empty_when.startswith("on hardware")


def test_selections_tell_a_series_and_the_function_over_its_range() -> None:
    expression = "sum(increase(a_total[$__range])) / rate(b_total[1m]) + c and on (job) d"
    assert set(selections(expression)) == {
        Selection("a_total", "increase"),
        Selection("b_total", "rate"),
        Selection("c", ""),
        Selection("d", ""),
    }
