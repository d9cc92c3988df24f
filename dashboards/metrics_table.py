"""docs/metrics.md: every metric, from the registry."""

from __future__ import annotations

from collections.abc import Callable

from dstrain_api.metrics import METRICS, RANK_ZERO_NAMES, Metric

_HEAD = """\
# Metrics

<!-- Generated from crds/dstrain_api/metrics.py by `python -m dashboards.generate`. -->

Worker pods expose theirs on `:9400/metrics`, the operator its own on its `/metrics`. Scrape the
operator with `honorLabels: true`, since it names the `namespace` of each training itself; on worker
pods `namespace` and `pod` come from the scrape. Series that carry `training` go with the training.
A counter or histogram is exposed as zero from the start, unless the table says when it is absent.
"""

_SECTIONS: tuple[tuple[str, str, Callable[[Metric], bool]], ...] = (
    (
        "The training as a whole",
        "Exposed by the worker pod that holds rank 0, from the first step on.",
        lambda m: m.name in RANK_ZERO_NAMES,
    ),
    (
        "Worker pods",
        "Exposed by every worker pod.",
        lambda m: m.exporter == "agent" and m.name not in RANK_ZERO_NAMES,
    ),
    (
        "Trainings, as the operator sees them",
        "Exposed by the operator, for every training.",
        lambda m: m.exporter == "operator" and "training" in m.labels,
    ),
    (
        "The operator itself",
        "Exposed by the operator. Names without `dstrain_` mean what they mean in every "
        "controller; other programs of a cluster expose them, too.",
        lambda m: m.exporter == "operator" and "training" not in m.labels,
    ),
)


def metrics_page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for title, introduction, belongs in _SECTIONS:
        rows = "\n".join(_row(m) for m in METRICS if belongs(m))
        parts.append(
            f"\n## {title}\n\n{introduction}\n\n"
            f"| name | type | labels | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    meaning = metric.help + (f" Absent {metric.absent}." if metric.absent else "")
    if metric.buckets:
        meaning += f" Buckets {metric.buckets[0]:g} to {metric.buckets[-1]:g} s."
    return f"| `{metric.name}` | {metric.type} | {labels} | {meaning} |"
