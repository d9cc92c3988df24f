"""The root cgroup of each node, on either version of cgroups."""

from __future__ import annotations

from pathlib import Path

from e2e.clusters.shell import wait_until

ROOT = Path("/sys/fs/cgroup")


def hierarchies() -> list[Path]:
    """Roots of the mounted hierarchies: one on version 2, one per controller on version 1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [d for d in ROOT.iterdir() if d.is_dir() and not d.is_symlink()]


def make(cgroup: str) -> None:
    """Make a node's root cgroup in every hierarchy.

    A kubelet demands that its cgroupRoot exists; on version 1 that means in every hierarchy, and
    a cpuset takes no process before its processors and memory nodes are written.
    """
    for hierarchy in hierarchies():
        (hierarchy / cgroup).mkdir(exist_ok=True)
    cpuset = ROOT / "cpuset"
    if cpuset in hierarchies():
        for setting in ("cpuset.cpus", "cpuset.mems"):
            (cpuset / cgroup / setting).write_text((cpuset / setting).read_text())


def remove(prefix: str) -> None:
    """Remove the cgroups at the root whose names begin with `prefix`, once they are empty."""

    def gone() -> bool:
        roots = [d for h in hierarchies() for d in h.glob(f"{prefix}*")]
        removed = [_remove_tree(root) for root in roots]
        return all(removed)

    wait_until(gone, f"the cgroups {prefix}* to become empty", timeout_s=10)


def _remove_tree(root: Path) -> bool:
    """Remove a cgroup and all below it; False if one of them is still busy."""
    children = [_remove_tree(child) for child in root.iterdir() if child.is_dir()]
    try:
        root.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False  # Its processes were killed, but the kernel has not let go of them yet.
    return all(children)
