"""What faults cost: seconds from an injection to the first new step, by kind. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from e2e.faults.drive import Injection, Version

SLOW_S: Final = 20.0  # a recovery that takes longer breaks what docs/recovery.md promises


def recovery_s(injection: Injection, versions: Sequence[Version]) -> float | None:
    """Seconds from the fault to the first new step that a later generation was seen to make.

    None where no later generation came of it, or none has made a step: training does not notice
    that an operator is killed, and the next generation is another fault's.
    """
    if injection.fault.kind == "kill-operator":
        return None
    for version in versions:
        status = version.status
        if version.at_s < injection.at_s or status.get("generation", 0) <= injection.generation:
            continue
        recovered = all(entry.get("seconds") is not None for entry in status.get("history", []))
        if recovered and status.get("phase") in ("Running", "Complete"):
            return version.at_s - injection.at_s
    return None


def story(injection: Injection, versions: Sequence[Version]) -> str:
    """What the status said from a fault to the first new step, a line per change."""
    cost_s = recovery_s(injection, versions)
    end_s = math.inf if cost_s is None else injection.at_s + cost_s
    lines, last = [], ""
    for version in versions:
        status = version.status
        excluded = ", ".join(node["name"] for node in status.get("excludedNodes", []))
        said = f"{status.get('phase')}, generation {status.get('generation')}: "
        said += status.get("summary", {}).get("message", "")
        said += f" [avoids {excluded}]" if excluded else ""
        if injection.at_s <= version.at_s <= end_s and said != last:
            lines.append(f"{version.at_s - injection.at_s:6.1f} s  {said}")
            last = said
    return "\n".join(lines)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def histogram(found: Iterable[tuple[str, float | None]]) -> str:
    """A table of p50, p95 and max per kind of fault; None counts as not recovered."""
    by_kind: dict[str, list[float | None]] = defaultdict(list)
    for kind, seconds in found:
        by_kind[kind].append(seconds)
    lines = [f"{'fault':<16}{'count':>6}{'p50 s':>8}{'p95 s':>8}{'max s':>8}"]
    for kind in sorted(by_kind):
        times = [s for s in by_kind[kind] if s is not None]
        figures = (
            "".join(f"{percentile(times, share):>8.1f}" for share in (0.5, 0.95, 1.0))
            if times
            else f"{'-':>8}{'-':>8}{'-':>8}"
        )
        missing = len(by_kind[kind]) - len(times)
        note = f"  ({missing} without a new generation)" if missing and times else ""
        lines.append(f"{kind:<16}{len(by_kind[kind]):>6}{figures}{note}")
    return "\n".join(lines)
