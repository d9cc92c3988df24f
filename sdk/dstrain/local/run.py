"""`dstrain run`: reconciler, coordinator and a cluster of processes in one program."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from deepseek_operator.core.model import Settings
from deepseek_operator.core.volumes import checkpoint_uri
from deepseek_operator.kube.port import EVENTS, PODS, TRAININGS, Resource, WatchEvent
from deepseek_operator.local.cluster import LocalCluster
from deepseek_operator.runtime.clock import steady_clock
from deepseek_operator.runtime.controller import Controller
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.runtime.views import training_view
from deepseek_operator.server import ServerThread, make_app
from dstrain_api.rules import validate
from dstrain_api.status import DeepSeekTrainingStatus

from dstrain.local.folder import RunFolder, carried_over
from dstrain.local.logs import follow_logs
from dstrain.local.terminal import Terminal
from dstrain.local.view import Story, brief, closing, condition, progress_line

NAMESPACE = "default"
STATUS_INTERVAL_S = 0.5
BEAT_INTERVAL_S = 0.5
OK, FAILED = 0, 1


class LocalRun:
    """One training in one folder, from its start to its end or to the next Ctrl-C.

    This machine poses as `nodes`.
    """

    def __init__(
        self,
        training: dict[str, Any],
        folder: RunFolder,
        terminal: Terminal,
        nodes: Sequence[str] = ("local",),
    ) -> None:
        self.name: str = training["metadata"]["name"]
        self.folder = folder
        self.terminal = terminal
        clock = steady_clock()
        self.cluster = LocalCluster(folder.path, nodes=nodes, clock=clock)
        self.coordinator = Coordinator(clock=clock)
        self.server = ServerThread(make_app(self.coordinator))
        self.controller = Controller(
            cluster=self.cluster,
            coordinator=self.coordinator,
            settings=Settings(
                trainer_image="this machine",
                coordinator_url=f"http://127.0.0.1:{self.server.port}",
                beat_interval_s=BEAT_INTERVAL_S,
                status_interval_s=STATUS_INTERVAL_S,
            ),
            operator_key=os.urandom(32),
            clock=clock,
            jitter=random.random,
        )
        self._manifest = {
            **training,
            "metadata": {**training["metadata"], "namespace": NAMESPACE},
        }
        self._began_s = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._changed = asyncio.Event()

    @property
    def status(self) -> DeepSeekTrainingStatus:
        """The training's status as it is now."""
        return training_view(self.cluster.get(TRAININGS, NAMESPACE, self.name)).status

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Reconcile inside; every process has gone afterwards."""
        self.server.start()
        self.cluster.observe(self._observed)
        previous = self.folder.previous()
        await self.cluster.create(self._manifest)
        if previous is not None:
            self._restore(carried_over(previous))
        working = asyncio.create_task(self.controller.run())
        try:
            yield
        finally:
            self.controller.stop()
            await self.cluster.aclose()
            await working
            self.server.stop()
            self._save()

    async def until_finished(self) -> None:
        """Wait for the end of the training, and of its pods."""
        await self._until(lambda: condition(self.status, "Finished") is not None)
        await self._until(lambda: not self._living())

    async def stop(self) -> None:
        """Have the workers save at one step and exit."""

        def suspend(stored: dict[str, Any]) -> None:
            stored["spec"]["suspend"] = True

        self.cluster.edit(TRAININGS, NAMESPACE, self.name, suspend)
        await self._until(lambda: not self.cluster.objects(PODS))

    def last_words(self) -> str:
        """What came of it, and where it lies."""
        loss, step = self._first or (None, 0)
        story = Story(first_loss=loss, first_step=step, seconds=time.monotonic() - self._began_s)
        return closing(
            self.status,
            story,
            checkpoints=self._checkpoints(),
            logs=_short(self.folder.path / "pods"),
        )

    def _checkpoints(self) -> str:
        spec = validate(self._manifest["spec"])
        uri = checkpoint_uri(self.name, spec.checkpoint)
        if uri.startswith("pvc://"):
            return _short(self.cluster.volumes / uri.removeprefix("pvc://"))
        return uri.removeprefix("file://")

    def _living(self) -> list[dict[str, Any]]:
        return [
            pod
            for pod in self.cluster.objects(PODS)
            if pod["status"]["phase"] not in ("Succeeded", "Failed")
        ]

    def _restore(self, status: DeepSeekTrainingStatus) -> None:
        dumped = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.cluster.edit(TRAININGS, NAMESPACE, self.name, lambda t: t.update(status=dumped))

    def _save(self) -> None:
        self.folder.save(self.cluster.get(TRAININGS, NAMESPACE, self.name))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    # Every change, in the middle of the write that makes it.

    def _observed(self, resource: Resource, event: WatchEvent) -> None:
        self._changed.set()
        if resource == TRAININGS and event.type != "DELETED":
            training = training_view(event.object)
            self.controller.put(training)
            self._show(training.status)
        elif resource == EVENTS and event.type == "ADDED":
            self._tell(event.object)

    def _show(self, status: DeepSeekTrainingStatus) -> None:
        progress = status.progress
        if self._first is None and progress.loss is not None and status.phase == "Running":
            self._first = (progress.loss, progress.step)
        if status.observed_generation:
            self.folder.save({"spec": self._manifest["spec"], "status": _plain(status)})
            self.terminal.progress(progress_line(status), status.phase)

    def _tell(self, event: dict[str, Any]) -> None:
        tone = event.get("type", "Normal")
        mark = "!" if tone == "Warning" else "-"
        self.terminal.say(f"{mark} {event['reason']}: {brief(event['message'])}", tone)


def run(training: dict[str, Any], path: Path, *, follow: bool) -> int:
    """Train until the end; the exit code.

    Raises RunInUse, AnotherTraining.
    """
    folder = RunFolder(path)
    folder.refuse_another(training["spec"])
    terminal = Terminal(sys.stdout)
    if folder.has_completed(training["spec"]):
        terminal.say(f"{_short(path)} is complete; raise training.total, or name another --dir")
        return OK
    logging.basicConfig(
        filename=folder.operator_log,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        return asyncio.run(_run(training, folder, terminal, follow=follow))
    finally:
        folder.close()


async def _run(
    training: dict[str, Any], folder: RunFolder, terminal: Terminal, *, follow: bool
) -> int:
    local = LocalRun(training, folder, terminal)
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    previous = folder.previous()
    if previous is not None and previous.checkpoint:
        terminal.say(f"going on in {_short(folder.path)} from step {previous.checkpoint.step}")
    async with local.running():
        following = loop.create_task(follow_logs(folder.path, terminal)) if follow else None
        finished = await _first_of(local.until_finished(), interrupted)
        if not finished:
            interrupted.clear()
            terminal.say("stopping: the workers save; press Ctrl-C again to end them at once")
            await _first_of(local.stop(), interrupted)
        if following:
            following.cancel()
        words = local.last_words()
        status = local.status
    terminal.finish()
    terminal.say(words, status.phase)
    if condition(status, "Complete"):
        return OK
    if not finished:
        terminal.say("Run the same command again to go on.")
    return FAILED


async def _first_of(waiting: Coroutine[Any, Any, None], interrupted: asyncio.Event) -> bool:
    """Whether it ended before the interruption."""
    task = asyncio.ensure_future(waiting)
    interruption = asyncio.ensure_future(interrupted.wait())
    await asyncio.wait({task, interruption}, return_when=asyncio.FIRST_COMPLETED)
    ended = bool(task.done())
    for one in (task, interruption):
        one.cancel()
        with suppress(asyncio.CancelledError):
            await one
    return ended


def _plain(status: DeepSeekTrainingStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _short(path: Path) -> str:
    """A path as a person would type it here."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
