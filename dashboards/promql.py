"""What a PromQL expression of a dashboard is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from types import MappingProxyType

import promql_parser

# Stand-ins for Grafana's variables where no Grafana replaces them.
EXAMPLE: Mapping[str, str] = MappingProxyType(
    {"namespace": "default", "training": "mini", "__rate_interval": "1m", "__range": "6h"}
)


@dataclass(frozen=True)
class Selection:
    """One use of a series: its name, and the function over its range ('' for its present value)."""

    series: str
    function: str


def substitute(expression: str, variables: Mapping[str, str] = EXAMPLE) -> str:
    """`expression` as Prometheus gets it; KeyError for a variable without a value."""
    return Template(expression).substitute(variables)


def selections(expression: str) -> list[Selection]:
    """Every use of a series in `expression`; ValueError where it does not parse."""
    found: list[Selection] = []
    inside_matrix = 0  # the walk also visits the vector selector of each matrix selector

    def visit(node: promql_parser.Expr) -> None:
        nonlocal inside_matrix
        if isinstance(node, promql_parser.Call):
            found.extend(
                Selection(argument.vector_selector.name or "", node.func.name)
                for argument in node.args
                if isinstance(argument, promql_parser.MatrixSelector)
            )
        elif isinstance(node, promql_parser.MatrixSelector):
            inside_matrix += 1
        elif isinstance(node, promql_parser.VectorSelector):
            if inside_matrix:
                inside_matrix -= 1
            else:
                found.append(Selection(node.name or "", ""))

    promql_parser.walk(promql_parser.parse(substitute(expression)), visit)
    return found
