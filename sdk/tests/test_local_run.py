"""Trainings on this machine: the real reconciler, real torchrun agents, real faults."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from deepseek_operator.kube.port import PODS, TRAININGS
from deepseek_operator.local.podinit import descendants
from dstrain.local.folder import RunFolder
from dstrain.local.run import NAMESPACE, LocalRun
from dstrain.local.terminal import Terminal
from dstrain.local.view import condition
from dstrain.manifest import checked_training
from dstrain_api.status import DeepSeekTrainingStatus

PATIENCE_S = 240.0  # the machine may be busy with other things
STEPS = 40

MINI = {
    "apiVersion": "dstrain.dev/v1alpha1",
    "kind": "DeepSeekTraining",
    "metadata": {"name": "mini"},
    "spec": {
        "model": {
            "preset": "mini",
            "overrides": {"layers": 2, "hidden": 64, "moe": {"experts": 4, "topK": 2, "shared": 1}},
        },
        "data": {"sources": [{"uri": "builtin://mini"}]},
        "training": {"total": {"tokens": STEPS * 2048}, "globalBatch": 32, "microBatch": 16},
        "optimizer": {"lr": 3e-3},
        "checkpoint": {"everySteps": 5},
        "workers": {"replicas": 2},
    },
}


@dataclass
class Story:
    """What a training went through, as status and pods at each point of it."""

    statuses: dict[str, DeepSeekTrainingStatus] = field(default_factory=dict)
    pods: dict[str, list[str]] = field(default_factory=dict)


class Told:
    """One training through faults; each part waits for what comes of the one before."""

    def __init__(self, local: LocalRun) -> None:
        self.local = local
        self.story = Story()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                assert not condition(self.local.status, "Failed"), self.local.status
                await asyncio.sleep(0.05)

    async def steps_past(self, step: int, generation: int = 0) -> None:
        def there() -> bool:
            status = self.local.status
            return (
                status.phase == "Running"
                and status.generation > generation
                and status.progress.step > step
                and all(entry.seconds is not None for entry in status.history)
            )

        await self.until(there)

    def note(self, part: str) -> None:
        self.story.statuses[part] = self.local.status
        self.story.pods[part] = [
            pod["metadata"]["name"]
            for pod in self.local.cluster.objects(PODS)
            if pod["status"]["phase"] == "Running"
        ]

    def suspend(self, wanted: bool) -> None:
        def change(stored: dict[str, Any]) -> None:
            stored["spec"]["suspend"] = wanted

        self.local.cluster.edit(TRAININGS, NAMESPACE, "mini", change)

    def processes(self, slot: int) -> list[int]:
        """torchrun and its worker process."""
        names = [n for n in self._running() if f"-{slot}-" in n]
        return self.local.cluster.processes(NAMESPACE, names[0])

    def _running(self) -> list[str]:
        pods = self.local.cluster.objects(PODS)
        return [p["metadata"]["name"] for p in pods if p["status"]["phase"] == "Running"]

    async def tell(self) -> None:
        await self.steps_past(6)
        self.note("running")
        os.kill(self.processes(1)[-1], signal.SIGKILL)
        await self.steps_past(6, generation=self.local.status.generation)
        self.note("worker killed")
        os.kill(self.processes(1)[0], signal.SIGKILL)
        await self.steps_past(6, generation=self.local.status.generation)
        self.note("pod killed")
        self.suspend(True)
        await self.until(lambda: not self.local.cluster.objects(PODS))
        await self.until(lambda: self.local.status.phase == "Suspended")
        self.note("suspended")
        self.suspend(False)
        await self.local.until_finished()
        self.note("finished")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = RunFolder(tmp_path_factory.mktemp("mini"))

    async def train() -> Story:
        local = LocalRun(MINI, folder, Terminal(sys.stdout))
        told = Told(local)
        async with local.running(), asyncio.timeout(PATIENCE_S):
            await told.tell()
        return told.story

    return asyncio.run(train())


def test_a_killed_worker_process_keeps_its_pod_and_gets_the_next_generation(story: Story) -> None:
    before, after = story.statuses["running"], story.statuses["worker killed"]
    assert story.pods["worker killed"] == story.pods["running"] == ["mini-0-1", "mini-1-1"]
    assert after.generation == before.generation + 1
    entry = after.history[-1]
    assert (entry.pod, entry.exit_code) == ("mini-1-1", -signal.SIGKILL)
    assert "killed by SIGKILL" in entry.message
    assert after.restarts.application == 1


def test_a_killed_pod_is_replaced_and_its_peer_stays(story: Story) -> None:
    after = story.statuses["pod killed"]
    assert story.pods["pod killed"] == ["mini-0-1", "mini-1-2"]
    assert len(after.history) == 2


def test_a_suspended_training_has_saved_its_last_step_and_has_no_pods(story: Story) -> None:
    after = story.statuses["suspended"]
    assert story.pods["suspended"] == []
    assert after.checkpoint
    assert after.checkpoint.step == after.progress.step
    assert len(after.history) == 2  # a suspension is no failure


def test_it_goes_on_and_completes(story: Story) -> None:
    after = story.statuses["finished"]
    assert (after.phase, after.progress.step) == ("Complete", STEPS)
    assert after.checkpoint
    assert after.checkpoint.step == STEPS
    assert after.progress.loss is not None
    assert after.progress.loss < 6.0  # ln 1024 = 6.9 at the start


# A program that is no model: it starts in no time.
SCRIPT = """
    apiVersion: dstrain.dev/v1alpha1
    kind: DeepSeekTraining
    metadata: {{name: script}}
    spec:
      entrypoint: {{script: {script}}}
      workers: {{replicas: {replicas}}}
      recovery: {{budgets: {{application: {{max: 0, window: 1h}}}}}}
"""


def write_script(folder: Path, program: str, replicas: int = 1) -> Path:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(program))
    path = folder / "script.yaml"
    path.write_text(textwrap.dedent(SCRIPT.format(script=script, replicas=replicas)))
    return path


def dstrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dstrain", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_a_script_that_raises_fails_with_its_last_words(tmp_path: Path) -> None:
    program = """
        from dstrain import report
        report(step=1, total_steps=10, loss=2.5)
        raise ValueError("the corpus has no line 12")
    """
    path = write_script(tmp_path, program)
    ended = dstrain(tmp_path, "run", path.name)
    assert ended.returncode == 1, ended.stderr
    assert "ValueError: the corpus has no line 12" in ended.stdout.split("Failed (")[-1]
    logs = dstrain(tmp_path, "logs").stdout
    assert "raise ValueError" in logs


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the foreground of nobody, after its first report and with both workers at work."""
    program = """
        import signal, sys, time
        from dstrain import report
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
        print("at work")
        for step in range(1, 100_000):
            report(step=step, total_steps=100_000, loss=1 / step, tokens=step)
            time.sleep(0.05)
    """
    path = write_script(tmp_path, program, replicas=2)
    with subprocess.Popen(
        [sys.executable, "-m", "dstrain", "run", path.name, "--follow"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        at_work, reported = 0, False
        for line in process.stdout:
            at_work += "at work" in line
            reported = reported or ("step" in line and "loss" in line)
            if reported and at_work == 2:
                break
        yield process
        process.kill()


def living(pids: list[int]) -> list[int]:
    """Those that have not ended; the machine's init may be slow to collect orphans that have."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "gone"

    return [pid for pid in pids if state(pid) not in ("Z", "X", "gone")]


def test_ctrl_c_lets_workers_save_and_says_how_to_go_on(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    left = descendants(running.pid)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 1
    assert "Stopped" in out
    assert "Run the same command again to go on." in out
    assert "saved" in dstrain(tmp_path, "logs", "1").stdout
    assert not living(left)


def test_nothing_is_left_of_a_run_that_was_killed(running: subprocess.Popen[str]) -> None:
    left = descendants(running.pid)
    assert len(left) >= 6  # two pods: their podinit, torchrun and worker
    running.kill()
    deadline_s = time.monotonic() + PATIENCE_S
    while living(left):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_node_without_power_is_avoided_and_its_worker_replaced(tmp_path: Path) -> None:
    program = """
        import os, time
        from dstrain import report, report_done
        for step in range(1, 100_000):
            report(step=step, loss=1.0)
            time.sleep(0.05)
            if os.path.exists("finish"):
                break
    """
    path = write_script(tmp_path, program.replace("finish", str(tmp_path / "finish")), replicas=2)
    nodes = ("a", "b", "c")

    async def train() -> tuple[str, DeepSeekTrainingStatus, str]:
        folder = RunFolder(tmp_path / "run")
        local = LocalRun(checked_training(path), folder, Terminal(sys.stdout), nodes)
        told = Told(local)
        async with local.running(), asyncio.timeout(PATIENCE_S):
            await told.steps_past(5)
            (lost,) = [p for p in local.cluster.objects(PODS) if "-1-" in p["metadata"]["name"]]
            local.cluster.power_off(lost["spec"]["nodeName"])
            await told.steps_past(0, generation=local.status.generation)
            status = local.status
            (made,) = [p for p in local.cluster.objects(PODS) if "-1-" in p["metadata"]["name"]]
            (tmp_path / "finish").touch()
            await local.until_finished()
        folder.close()
        assert local.status.phase == "Complete"
        return lost["spec"]["nodeName"], status, made["spec"]["nodeName"]

    lost_node, status, new_node = asyncio.run(train())
    (entry,) = status.history
    assert (entry.failure_class, entry.reason) == ("infrastructure", "NodeLost")
    assert entry.node == lost_node
    assert new_node in set(nodes) - {lost_node}


def test_a_folder_is_not_taken_over_by_another_training(tmp_path: Path) -> None:
    path = write_script(tmp_path, "pass")
    spec = checked_training(path)["spec"]
    held = RunFolder(tmp_path / "runs" / "script")
    held.save({"spec": spec | {"workers": {"replicas": 7}}, "status": {}})
    held.refuse_another(spec)  # another size is no other training
    held.save({"spec": spec | {"entrypoint": {"module": "other"}}, "status": {}})
    held.close()
    ended = dstrain(tmp_path, "run", path.name)
    assert ended.returncode == 2
    assert "holds a run with another entrypoint; name another --dir" in ended.stderr


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    path = write_script(tmp_path, "pass")
    held = RunFolder(tmp_path / "runs" / "script")
    held.save({"spec": checked_training(path)["spec"], "status": {"phase": "Complete"}})
    held.close()
    ended = dstrain(tmp_path, "run", path.name)
    assert (ended.returncode, "is complete" in ended.stdout) == (0, True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    path = write_script(tmp_path, "pass")
    held = RunFolder(tmp_path / "runs" / "script")
    ended = dstrain(tmp_path, "run", path.name)
    held.close()
    assert ended.returncode == 2
    assert "another dstrain run works in" in ended.stderr
