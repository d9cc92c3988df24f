"""A dashboard's questions, asked as Grafana asks them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dashboards.panels import Board, Panel, Query
from dashboards.promql import substitute
from e2e.prometheus import Prometheus, Series


@dataclass(frozen=True)
class Question:
    """One query of a panel; `may_be_empty` where the dashboard says so."""

    panel: Panel
    query: Query

    @property
    def may_be_empty(self) -> bool:
        return bool(self.panel.empty_when or self.query.empty_when)

    def __str__(self) -> str:
        return f"{self.panel.title}: {self.query.expression}"


def questions(board: Board) -> Iterator[Question]:
    """Every query of every panel."""
    for panel in board.panels():
        for query in panel.queries:
            yield Question(panel, query)


def ask(
    server: Prometheus,
    question: Question,
    variables: Mapping[str, str],
    *,
    window_s: float,
    interval_s: float,
) -> list[Series]:
    """The series that the panel would draw for the last `window_s` seconds.

    `variables` are the dashboard's choices; `interval_s` is how often the targets are scraped.
    """
    # Grafana's rate interval is at least four scrapes long.
    expression = substitute(
        question.query.expression,
        {
            **variables,
            "__rate_interval": f"{round(4000 * interval_s)}ms",
            "__range": f"{round(window_s)}s",
        },
    )
    if question.panel.kind == "stat":
        answer = server.query(expression)
    else:
        now_s = time.time()
        answer = server.query_range(
            expression,
            start_s=now_s - window_s,
            end_s=now_s,
            step_s=max(interval_s, window_s / 100),
        )
    # A quantile of nothing is NaN, which a panel does not draw.
    return [s for s in answer if any(math.isfinite(value) for _, value in s.points)]


def unanswered(
    server: Prometheus,
    board: Board,
    variables: Mapping[str, str],
    *,
    window_s: float,
    interval_s: float,
) -> list[Question]:
    """The questions whose panels would draw nothing."""
    return [
        question
        for question in questions(board)
        if not ask(server, question, variables, window_s=window_s, interval_s=interval_s)
    ]


def offered(server: Prometheus, board: Board, name: str, variables: Mapping[str, str]) -> list[str]:
    """The values that a variable of the dashboard offers, given the other choices."""
    variable = next(v for v in board.variables if v.name == name)
    selector = substitute(variable.values_of, variables)
    return list(server.get(f"/api/v1/label/{name}/values", **{"match[]": selector}))
