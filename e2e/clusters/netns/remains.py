"""What daemons leave outside the folder of their cluster, and its removal."""

from __future__ import annotations

from pathlib import Path

from e2e.clusters.netns.processes import find, runs
from e2e.clusters.shell import ClusterError, run

REMOVAL_S = 300.0  # unpacked images are hundreds of thousands of files


def unmount_below(folder: Path) -> None:
    """Detach every mount below `folder`, the innermost first."""
    for mount in reversed(_mounts_below(folder)):
        run("umount", "--lazy", mount)


def remove_below(folder: Path) -> None:
    """Remove a folder in which nothing is mounted any more.

    Raises ClusterError rather than delete through a mount, which may be somebody's data.
    """
    if left := _mounts_below(folder):
        raise ClusterError(f"still mounted: {', '.join(left)}")
    run("rm", "-rf", "--one-file-system", folder, timeout_s=REMOVAL_S)


def remove_shim_sockets(containerd_state: Path) -> None:
    """A killed shim leaves its socket in /run/containerd/s; the bundle says which it is."""
    for address in containerd_state.glob("io.containerd.runtime.v2.task/*/*/address"):
        Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)


def remove_cni_results(folder: Path) -> None:
    """libcni caches each attachment, with the path of its namespace, for the whole machine."""
    for result in Path("/var/lib/cni/results").glob("*"):
        if f'"{folder}/' in result.read_text():
            result.unlink(missing_ok=True)


def remove_log_links(folder: Path) -> None:
    """Kubelet links each container's log in /var/log/containers, wherever the logs are."""
    for link in Path("/var/log/containers").glob("*"):
        if link.is_symlink() and folder in link.readlink().parents:
            link.unlink(missing_ok=True)


def remove_kubelet_socket() -> None:
    """Every kubelet makes this one path, whatever its root folder; the last one gone cleans up."""
    if find(lambda pid: runs(pid, "kubelet")):
        return
    folder = Path("/var/lib/kubelet/device-plugins")
    (folder / "kubelet.sock").unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        if empty.exists() and not any(empty.iterdir()):
            empty.rmdir()


def _mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    # The kernel writes blanks in a path as octal escapes.
    paths = [line.split()[1].encode().decode("unicode_escape") for line in lines]
    return [p for p in paths if p.startswith(f"{folder}/")]
