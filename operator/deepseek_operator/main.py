"""The operator as a process: `dstrain-operator [run | version]`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import random
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Final

from deepseek_operator import handlers, logs
from deepseek_operator.connections import raise_file_limit
from deepseek_operator.kube.api import ApiCluster
from deepseek_operator.kube.port import ClusterError, NotFound
from deepseek_operator.metrics import OperatorMetrics
from deepseek_operator.runtime.clock import steady_clock
from deepseek_operator.runtime.controller import RESYNC_S, Controller
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.runtime.election import Election
from deepseek_operator.runtime.trainings import put_object, relist, remove_object
from deepseek_operator.server import ServerThread, make_app
from deepseek_operator.settings import Configuration, from_environment

ANY_ADDRESS: Final = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104
LOOP_LAG_LIMIT_S: Final = 5.0
HOST_RESTART_S: Final = 5.0
LIST_RETRY_S: Final = 5.0

log = logging.getLogger(__name__)


class LeadershipLost(Exception):
    """Another replica may have acted: what this process knows is old."""


class Operator:
    """All parts, put together. One of several replicas stands by until it holds the Lease."""

    def __init__(self, configuration: Configuration, cluster: ApiCluster, metrics: OperatorMetrics):
        self._cluster = cluster
        self._namespaces = configuration.namespaces or ("",)
        self._listed = False
        replica = configuration.replica
        self._election = Election(cluster, replica) if replica else None
        metrics.leading(self._leads)
        clock = steady_clock()
        coordinator = Coordinator(clock=clock)
        self.controller = Controller(
            cluster=cluster,
            coordinator=coordinator,
            settings=configuration.settings,
            operator_key=configuration.token_key,
            clock=clock,
            jitter=random.random,
            namespaces=self._namespaces,
            metrics=metrics,
            leads=self._leads,
        )
        app = make_app(
            coordinator,
            metrics=metrics.expose,
            unhealthy=self._unhealthy,
            unready=self._unready,
            leads=self._leads,
        )
        self.server = ServerThread(
            app,
            host=configuration.host or ANY_ADDRESS,
            port=configuration.port,
            tls_cert=configuration.tls_cert,
            tls_key=configuration.tls_key,
        )

    async def run(self, stopped: asyncio.Event) -> None:
        """Work until `stopped`; then finish what is being done.

        Raises LeadershipLost, and what a bug raises.
        """
        self.server.start()
        log.info("listening on port %d", self.server.port)
        stopping = asyncio.create_task(stopped.wait())
        try:
            if self._election:
                await self._compete(self._election, stopping)
            else:
                await self._lead([stopping])
        finally:
            await asyncio.to_thread(self.server.stop)
            await self._cluster.close()
            log.info("stopped")

    async def _compete(self, election: Election, stopping: asyncio.Task[Any]) -> None:
        """Stand by, lead when elected, and give the Lease back at the end."""
        campaigning = asyncio.create_task(election.run())
        electing = asyncio.create_task(election.elected.wait())
        await asyncio.wait([campaigning, electing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if electing.done() and not stopping.done():
            routing = asyncio.create_task(election.keep_routed(self.server.port))
            await self._lead([campaigning, routing, stopping])
            await _ended(routing)
        if campaigning.done():
            await campaigning
            raise LeadershipLost
        await _ended(campaigning)
        await election.release()

    async def _lead(self, ends: Sequence[asyncio.Task[Any]]) -> None:
        """Keep the trainings as they should be until one of these tasks ends."""
        controlling = asyncio.create_task(self.controller.run())
        watching = asyncio.create_task(self._keep_watching())
        await asyncio.wait([controlling, watching, *ends], return_when=asyncio.FIRST_COMPLETED)
        if self._leads():
            log.info("stopping: finishing what is being done")
            self.controller.stop()
        else:
            controlling.cancel()  # what was begun is another one's to finish
        await _ended(watching)
        with suppress(asyncio.CancelledError):
            await controlling

    async def _keep_watching(self) -> None:
        """Let kopf watch the trainings; list them now and then, and before each start of kopf.

        It serves only a resource that exists when it starts, and misses what is deleted while it
        does not watch.
        """
        loop = asyncio.get_running_loop()

        def changed(stored: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(put_object, self.controller, stored)

        def deleted(stored: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(remove_object, self.controller, stored)

        registry = handlers.registry(changed=changed, deleted=deleted)
        while True:
            await self._list()
            host = handlers.KopfThread([n for n in self._namespaces if n], registry)
            host.start()
            try:
                while not await host.ended_within(RESYNC_S * random.uniform(0.8, 1.2)):  # noqa: S311
                    await self._list()
            finally:
                await host.stop()
            await asyncio.sleep(HOST_RESTART_S)

    async def _list(self) -> None:
        """Compare the trainings with those of the API server, as soon as that is possible."""
        while True:
            try:
                await relist(self.controller, self._cluster, self._namespaces)
            except ClusterError as error:
                hint = " (is the CRD of DeepSeekTraining installed?)"
                log.warning(
                    "cannot list trainings, trying again: %s%s",
                    error,
                    hint if isinstance(error, NotFound) else "",
                )
                await asyncio.sleep(LIST_RETRY_S * random.uniform(0.8, 1.2))  # noqa: S311
            else:
                self._listed = True
                return

    def _unready(self) -> Sequence[str]:
        if self._election and not self._election.elected.is_set():
            return self._election.unready
        unlisted = () if self._listed else ("the list of trainings is not complete yet",)
        return (*unlisted, *self.controller.unready)

    def _leads(self) -> bool:
        return self._election.leads if self._election else True

    def _unhealthy(self) -> Sequence[str]:
        if self._election and (still := self._election.unhealthy):
            return still
        late_s = self.controller.pulse.late_s
        if late_s > LOOP_LAG_LIMIT_S:
            return (f"the event loop is blocked for {late_s:.0f} s",)
        return self.controller.unhealthy


async def _ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end. Raises what a bug in it raised."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _serve(configuration: Configuration) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    metrics = OperatorMetrics()
    metrics.built(version("dstrain"), platform.python_version(), version("kopf"))
    cluster = await ApiCluster.connect(on_call=metrics.requested)
    await Operator(configuration, cluster, metrics).run(stopped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="dstrain-operator",
        description="Keeps DeepSeekTrainings running. Configured by DSTRAIN_* variables.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "version"),
        default="run",
        help="run the operator (default), or print its version",
    )
    if parser.parse_args(arguments).command == "version":
        print(version("dstrain"))
        return 0
    logs.configure()
    raise_file_limit()
    try:
        configuration = from_environment(os.environ)
    except ValueError as error:
        print(f"dstrain-operator: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_serve(configuration))
    except LeadershipLost:
        log.error("another replica may lead: this one starts anew")  # noqa: TRY400 - no defect
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
