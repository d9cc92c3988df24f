"""Run all benchmarks, or those named on the command line."""

from __future__ import annotations

import sys

from benchmarks import fleet, layouts, planning, recovery, saving
from e2e.report import this_machine

BENCHMARKS = {
    "planning": planning.main,
    "layouts": layouts.main,
    "saving": saving.main,
    "recovery": recovery.main,
    "fleet": fleet.main,
}


def main(names: list[str]) -> int:
    """Print the machine and each benchmark's table; 2 for an unknown name."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
        return 2
    machine = this_machine()
    print(f"{machine.cores} cores of {machine.cpu}, {machine.system}, Python {machine.python}")
    for name in names or BENCHMARKS:
        print(f"\n{name}")
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
