"""What a run took and showed: times and outputs with names, and the machine they come from."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Where times were taken; they mean nothing without it."""

    cores: int
    cpu: str
    memory_bytes: int
    system: str
    python: str


@dataclass(frozen=True)
class Timing:
    """One measured duration; `passed` is False where what was timed ended with an error."""

    name: str
    seconds: float
    passed: bool = True


def this_machine() -> Machine:
    """The machine that this process runs on; `cores` are those it may use."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        cpu=_cpu_model(Path("/proc/cpuinfo").read_text()),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _cpu_model(cpuinfo: str) -> str:
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line
    ]
    return models[0] if models else platform.machine()


class Report:
    """Collects the timings of one run, in the order in which they end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started_at = datetime.now(UTC)
        self.timings: list[Timing] = []
        self.outputs: dict[str, str] = {}

    def time(self, name: str, seconds: float) -> None:
        """Note a duration that was measured elsewhere."""
        self.timings.append(Timing(name, seconds))

    def text(self, name: str, output: str) -> None:
        """Keep what a command printed, as a person would see it."""
        self.outputs[name] = output

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; a block that raises is noted as failed and raises on."""
        start_s = time.monotonic()
        passed = False
        try:
            yield
            passed = True
        finally:
            self.timings.append(Timing(name, time.monotonic() - start_s, passed))

    def as_json(self) -> str:
        """The report for programs; seconds to the millisecond."""
        content = {
            "name": self.name,
            "startedAt": self.started_at.isoformat(timespec="seconds"),
            "machine": asdict(this_machine()),
            "timings": [{**asdict(t), "seconds": round(t.seconds, 3)} for t in self.timings],
            "outputs": self.outputs,
        }
        return json.dumps(content, indent=2) + "\n"

    def as_text(self) -> str:
        """The report for people: a line per timing."""
        machine = this_machine()
        width = max((len(t.name) for t in self.timings), default=0)
        lines = [
            f"{self.name}, {self.started_at:%Y-%m-%d %H:%M} UTC",
            f"{machine.cores} cores of {machine.cpu}, {machine.memory_bytes / 2**30:.0f} GiB, "
            f"{machine.system}, Python {machine.python}",
            "",
            *(
                f"{t.name:<{width}}  {t.seconds:8.1f} s{'' if t.passed else '  failed'}"
                for t in self.timings
            ),
        ]
        for name, output in self.outputs.items():
            lines += ["", f"--- {name}", output.rstrip()]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `<name>.json` and `<name>.txt`, over those of the run before."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(self.as_json())
        (folder / f"{self.name}.txt").write_text(self.as_text())
