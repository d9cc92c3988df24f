from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.clusters.netns.processes import find, in_cgroup, is_daemon, kill_all, start
from e2e.clusters.netns.state import State
from e2e.clusters.shell import ClusterError, run, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Processes:
    """Starts `tail -f` on a file under any name."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def start(self, name: str, file: Path) -> subprocess.Popen[bytes]:
        file.touch()
        process = subprocess.Popen([name, "-f", str(file)], executable="/usr/bin/tail")
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process


@pytest.fixture
def processes() -> Iterator[Processes]:
    with ExitStack() as stack:
        yield Processes(stack)


def test_a_daemon_is_known_by_its_program_and_a_path_below_the_folder(
    processes: Processes, tmp_path: Path
) -> None:
    here, beside = tmp_path / "a", tmp_path / "ab"
    here.mkdir()
    beside.mkdir()
    ours = processes.start("etcd", here / "data")
    processes.start("etcd", beside / "data")
    processes.start("tail", here / "data")  # Somebody reads a log.
    assert find(lambda pid: is_daemon(pid, here)) == [ours.pid]


def test_killing_the_daemons_of_a_folder_spares_those_of_another(
    processes: Processes, tmp_path: Path
) -> None:
    here, beside = tmp_path / "a", tmp_path / "b"
    here.mkdir()
    beside.mkdir()
    ours = [processes.start(name, here / name) for name in ("etcd", "kubelet", "coredns")]
    other = processes.start("kubelet", beside / "kubelet")
    kill_all(lambda pid: is_daemon(pid, here))
    assert [p.wait(timeout=5) for p in ours] == [-9, -9, -9]
    assert other.poll() is None


def test_an_ended_process_that_nobody_has_reaped_counts_as_gone(
    processes: Processes, tmp_path: Path
) -> None:
    process = processes.start("etcd", tmp_path / "data")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert find(lambda pid: is_daemon(pid, tmp_path)) == []


def test_a_daemon_outlives_the_one_who_started_it_and_writes_its_log(tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "script"
    script.write_text(f"echo started; exec -a etcd tail -f {script}")
    start("bash", script, log=log)
    try:
        wait_until(lambda: log.read_text() != "", "the log", timeout_s=5)
        wait_until(lambda: len(find(lambda pid: is_daemon(pid, tmp_path))) == 1, "it", timeout_s=5)
    finally:
        kill_all(lambda pid: is_daemon(pid, tmp_path))
    assert log.read_text().startswith("started\n")


def test_a_process_is_in_its_own_cgroup_and_not_in_one_whose_name_begins_alike() -> None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = [path for line in lines if (path := line.split(":", 2)[2]) != "/"]
    if not paths:
        pytest.skip("this process is in no cgroup but the root")
    name = paths[0].split("/")[1]
    assert in_cgroup(os.getpid(), name)
    assert not in_cgroup(os.getpid(), name[:-1])


def test_a_failed_program_is_reported_in_its_own_words() -> None:
    with pytest.raises(ClusterError, match=r"`sh -c .*` failed \(3\): no such luck"):
        run("sh", "-c", "echo no such luck >&2; exit 3")


def test_a_program_that_takes_too_long_is_reported() -> None:
    with pytest.raises(ClusterError, match="took longer than 0 s"):
        run("sleep", "1000", timeout_s=0.05)


def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="DSTRAIN_HOME"):
        State(Path("/") / ("x" * 80))
