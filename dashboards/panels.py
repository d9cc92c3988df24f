"""Dashboards as data: rows of panels with their questions, and their Grafana JSON.

Every panel asks one question, says in its description how to read the answer, and, from the
registry of metrics, when it is empty.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dstrain_api.metrics import by_sample
from grafana_foundation_sdk.builders import common, stat, text, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.text import TextMode

from dashboards.promql import selections

DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 7  # grid units of 30 pixels; the grid is 24 units wide
STAT_HEIGHT = 4

Kind = Literal["stat", "lines", "bars"]


@dataclass(frozen=True)
class Query:
    """A PromQL expression with Grafana's variables, and the name of its series in the legend."""

    expression: str
    legend: str = ""

    @property
    def empty_when(self) -> str:
        """When it has no answer because a metric of it is absent; '' if it always has one."""
        used = (by_sample(selection.series) for selection in selections(self.expression))
        return next((metric.absent for metric in used if metric.absent), "")


def quantiles(histogram: str, selector: str) -> tuple[Query, ...]:
    """Median and 95th percentile of a histogram's series that a selector (`{...}`) finds."""
    buckets = f"sum by (le) (rate({histogram}_bucket{selector}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", legend)
        for q, legend in ((0.5, "median"), (0.95, "95th percentile"))
    )


@dataclass(frozen=True)
class Panel:
    """One question; `empty` says when no series answers it, if the metrics do not say so already.

    `zero`: the axis begins there. `colors` maps names of series, for a stat that shows the name
    instead of the value.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    zero: bool = True
    maximum: float | None = None
    decimals: int | None = None
    empty: str = ""
    colors: dict[str, str] = field(default_factory=dict)

    @property
    def empty_when(self) -> str:
        """When the panel shows nothing; '' if it always shows something."""
        if self.empty:
            return self.empty
        absences = [query.empty_when for query in self.queries]
        return absences[0] if all(absences) else ""

    @property
    def full_description(self) -> str:
        """The description, with when the panel is empty."""
        return (
            f"{self.description} Empty {self.empty_when}." if self.empty_when else self.description
        )


@dataclass(frozen=True)
class Row:
    """Panels under one heading; `note` is shown on top of them."""

    title: str
    panels: tuple[Panel, ...]
    note: str = ""


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the dashboard: the values of a label."""

    name: str
    label: str
    values_of: str


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    def panels(self) -> Iterator[Panel]:
        """All panels with queries, from the top."""
        for row in self.rows:
            yield from row.panels

    def as_json(self) -> str:
        """The dashboard as Grafana imports it."""
        return json.dumps(_build(self), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _build(board: Board) -> models.Dashboard:
    built = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["dstrain"])
        .readonly()
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            builders.DatasourceVariable("datasource").label("Data Source").type("prometheus")
        )
    )
    for variable in board.variables:
        built = built.with_variable(
            builders.QueryVariable(variable.name)
            .label(variable.label)
            .datasource(DATASOURCE)
            .query(f"label_values({variable.values_of}, {variable.name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
    numbers = itertools.count(1)
    for row in board.rows:
        built = built.with_row(builders.Row(row.title).id(next(numbers)))
        if row.note:
            built = built.with_panel(_note(row.note).id(next(numbers)))
        only_stats = all(panel.kind == "stat" for panel in row.panels)
        for panel in row.panels:
            height = STAT_HEIGHT if only_stats else PANEL_HEIGHT
            built = built.with_panel(_panel(panel).id(next(numbers)).height(height))
    return built.build()


def _note(words: str) -> text.Panel:
    return (
        text.Panel()
        .title("")
        .transparent(True)
        .mode(TextMode.MARKDOWN)
        .content(words)
        .span(24)
        .height(2)
    )


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    built = _stat(panel) if panel.kind == "stat" else _timeseries(panel)
    built = (
        built.title(panel.title)
        .description(panel.full_description)
        .datasource(DATASOURCE)
        .unit(panel.unit)
        .span(panel.width)
    )
    if panel.maximum is not None:
        built = built.max(panel.maximum)
    if panel.decimals is not None:
        built = built.decimals(panel.decimals)
    for position, query in enumerate(panel.queries):
        target = (
            Dataquery().expr(query.expression).legend_format(query.legend).datasource(DATASOURCE)
        )
        target = target.instant() if panel.kind == "stat" else target.range()
        built = built.with_target(target.ref_id(chr(ord("A") + position)))
    return built


def _stat(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .no_value("none yet")
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color("text"))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if panel.colors:
        built = built.text_mode(common_models.BigValueTextMode.NAME)
    elif _has_legend(panel):
        built = built.text_mode(common_models.BigValueTextMode.VALUE_AND_NAME)
    for name, color in panel.colors.items():
        fixed = {"mode": "fixed", "fixedColor": color}
        built = built.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    return built


def _timeseries(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(0)
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .show_legend(_has_legend(panel))
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if panel.kind == "bars":
        built = built.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(60)
    return built.axis_soft_min(0) if panel.zero else built


def _has_legend(panel: Panel) -> bool:
    return len(panel.queries) > 1 or "{{" in panel.queries[0].legend
