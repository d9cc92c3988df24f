"""Whether the kernel has killed processes of this container because memory ran out.

With cgroup v2 a kubelet ends the whole container and says OOMKilled. With v1, and where it is told
to leave the others alone (`singleProcessOOMKill`), one process is gone by a SIGKILL that nobody
sent: only the cgroup's counter tells it from any other.
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

COUNTERS: Final = (
    Path("/sys/fs/cgroup/memory.events"),  # v2
    Path("/sys/fs/cgroup/memory/memory.oom_control"),  # v1
)


def oom_kills(counters: Iterable[Path] = COUNTERS) -> int:
    """Processes that were killed so far; 0 where the kernel does not tell."""
    for path in counters:
        if path.exists():
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields.get("oom_kill", 0))
    return 0
