"""What is wrong with a dashboard's JSON: the rules of grafana/dashboard-linter, and our own.

Not asked for: the variables `job` and `instance`, since a training's own labels name it whoever
scrapes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dstrain_api.metrics import by_sample
from grafana_foundation_sdk.models import units

from dashboards.promql import selections

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
ON_TIME_RANGE_CHANGED = 2
UNITS = frozenset(v for v in vars(units).values() if isinstance(v, str))
COUNTER_FUNCTIONS = frozenset({"rate", "irate", "increase"})
RANGES = {"rate": {"$__rate_interval"}, "increase": {"$__rate_interval", "$__range"}}

_RANGED = re.compile(r"(\w+)\([^()\[\]]*\[([^\]]*)\]")
_LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")


def lint(dashboard: Json) -> list[str]:
    """Every finding, each with the place it is about; [] for a good dashboard."""
    findings = [*_of_dashboard(dashboard), *_of_variables(dashboard)]
    for panel in dashboard["panels"]:
        if panel["type"] not in ("row", "text"):
            where = f"panel {panel.get('title') or panel.get('id')!r}"
            found = [*_of_panel(panel), *_of_targets(panel)]
            findings += [f"{where}: {finding}" for finding in found]
    return findings


def _of_dashboard(dashboard: Json) -> Iterator[str]:
    if dashboard.get("editable") is not False:
        yield "it can be edited in place, where an update would overwrite the edit"
    if not dashboard.get("uid"):
        yield "no uid, so its links do not survive an update"
    ids = Counter(panel.get("id") for panel in dashboard["panels"])
    yield from (f"{n} panels have the id {i}" for i, n in ids.items() if n > 1)
    taken: Counter[tuple[int, int]] = Counter()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        if at["x"] + at["w"] > COLUMNS:
            yield f"panel {panel.get('title')!r} is wider than the grid"
        taken.update(
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        )
    if any(n > 1 for n in taken.values()):
        yield "panels lie over each other"


def _of_variables(dashboard: Json) -> Iterator[str]:
    variables = dashboard["templating"]["list"]
    sources = [v for v in variables if v["type"] == "datasource"]
    named = [(v["name"], v.get("label"), v["query"]) for v in sources]
    if named != [("datasource", "Data Source", "prometheus")]:
        yield "needs one data source variable, `datasource`, labelled Data Source"
    for variable in variables:
        if variable["type"] != "query":
            continue
        where = f"variable {variable['name']}"
        if variable.get("datasource") != DATASOURCE:
            yield f"{where}: does not use the data source variable"
        if variable.get("refresh") != ON_TIME_RANGE_CHANGED:
            yield f"{where}: is not read again when the time range changes"
        match = _LABEL_VALUES.fullmatch(variable["query"])
        if match is None:
            yield f"{where}: is not label_values(selector, label)"
        else:
            for selection in selections(match["selector"]):
                if match["label"] not in by_sample(selection.series).labels:
                    yield f"{where}: {selection.series} has no label {match['label']}"


def _of_panel(panel: Json) -> Iterator[str]:
    for needed in ("title", "description"):
        if not panel.get(needed):
            yield f"no {needed}"
    if panel.get("datasource") != DATASOURCE:
        yield "does not use the data source variable"
    unit = panel["fieldConfig"]["defaults"].get("unit", "")
    if unit not in UNITS and not unit.startswith("si:"):
        yield f"unit {unit!r} is not one of Grafana's"


def _of_targets(panel: Json) -> Iterator[str]:
    targets = panel.get("targets", [])
    if not targets:
        yield "asks nothing"
    references = [t.get("refId") for t in targets]
    if not all(references) or len(set(references)) < len(references):
        yield f"its queries need a refId each, not {references}"
    for target in targets:
        if target.get("datasource") != DATASOURCE:
            yield f"query {target.get('refId')} does not use the data source variable"
        yield from of_expression(target["expr"])


def of_expression(expression: str) -> Iterator[str]:
    """What is wrong with one PromQL expression that has Grafana's variables in it."""
    try:
        used = selections(expression)
    except (KeyError, ValueError) as e:
        yield f"`{expression}` is not PromQL: {e}"
        return
    for function, duration in _RANGED.findall(expression):
        if duration not in RANGES.get(function, set()):
            yield f"{function}[{duration}] does not follow the zoom: use $__rate_interval"
    for selection in used:
        try:
            metric = by_sample(selection.series)
        except KeyError:
            yield f"{selection.series} is not in the registry of metrics"
            continue
        if metric.type != "gauge" and selection.function not in COUNTER_FUNCTIONS:
            yield f"{selection.series} is a counter and needs rate or increase"
        if metric.type == "gauge" and selection.function in COUNTER_FUNCTIONS:
            yield f"{selection.series} is a gauge and has no {selection.function}"
        if "training" in metric.labels:
            of_training = f'{selection.series}{{namespace="$namespace", training="$training"'
            if of_training not in expression:
                yield f"{selection.series} is not narrowed to the chosen training"
