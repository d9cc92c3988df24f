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
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import kopf

from deepseek_operator import handlers, logs
from deepseek_operator.kube.api import ApiCluster
from deepseek_operator.kube.port import ClusterError, NotFound
from deepseek_operator.metrics import OperatorMetrics
from deepseek_operator.runtime.controller import RESYNC_S, Controller
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.runtime.trainings import put_object, relist, remove_object
from deepseek_operator.server import ServerThread, make_app
from deepseek_operator.settings import Configuration, from_environment

ANY_ADDRESS: Final = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104
LOOP_LAG_LIMIT_S: Final = 5.0
HOST_RESTART_S: Final = 5.0
HOST_STOP_S: Final = 2.0
FIRST_LIST_RETRY_S: Final = 2.0

log = logging.getLogger(__name__)


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch that never run backwards, whatever happens to the system's clock."""
    offset_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset_s


class KopfThread:
    """kopf in its own thread and loop, so that what it cancels at its end is only its own."""

    def __init__(self, namespaces: Sequence[str], registry: kopf.OperatorRegistry) -> None:
        self._namespaces = namespaces
        self._registry = registry
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. It has nothing to lose, so it is not waited for long."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(HOST_STOP_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(
                    kopf.operator(
                        registry=self._registry,
                        settings=handlers.settings(),
                        standalone=True,
                        clusterwide=not self._namespaces,
                        namespaces=self._namespaces,
                        stop_flag=self._stop,
                    )
                )
            except Exception:
                log.exception("the watch of trainings ended, starting it again")
            self._stop.wait(HOST_RESTART_S)


class Operator:
    """All parts, put together."""

    def __init__(self, configuration: Configuration, cluster: ApiCluster, metrics: OperatorMetrics):
        self._cluster = cluster
        self._namespaces = configuration.namespaces or ("",)
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
        )
        app = make_app(
            coordinator,
            metrics=metrics.expose,
            unhealthy=self._unhealthy,
            unready=lambda: self.controller.unready,
        )
        self.server = ServerThread(
            app,
            host=configuration.host or ANY_ADDRESS,
            port=configuration.port,
            tls_cert=configuration.tls_cert,
            tls_key=configuration.tls_key,
        )

    async def run(self, stopped: asyncio.Event) -> None:
        """Work until `stopped`; then finish what is being done. Raises what a bug raises."""
        loop = asyncio.get_running_loop()

        def changed(stored: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(put_object, self.controller, stored)

        def deleted(stored: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(remove_object, self.controller, stored)

        host = KopfThread(
            [n for n in self._namespaces if n],
            handlers.registry(changed=changed, deleted=deleted),
        )
        self.server.start()
        log.info("listening on port %d", self.server.port)
        controlling = asyncio.create_task(self.controller.run())
        listing = asyncio.create_task(self._keep_listing(host))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait([controlling, listing, stopping], return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping: finishing what is being done")
        listing.cancel()
        self.controller.stop()
        try:
            await controlling
        finally:
            await asyncio.to_thread(host.stop)
            await asyncio.to_thread(self.server.stop)
            await self._cluster.close()
            log.info("stopped")

    async def _keep_listing(self, host: KopfThread) -> None:
        """List all trainings now and then; kopf only serves what exists when it starts."""
        started = False
        while True:
            try:
                await relist(self.controller, self._cluster, self._namespaces)
            except ClusterError as error:
                missing = "the resource is not installed: apply the CRD of DeepSeekTraining; "
                log.warning(
                    "cannot list trainings, trying again: %s%s",
                    missing if isinstance(error, NotFound) else "",
                    error,
                )
                await asyncio.sleep(FIRST_LIST_RETRY_S * (1 + random.random()))  # noqa: S311
                continue
            if not started:
                host.start()
                started = True
            await asyncio.sleep(RESYNC_S * (0.8 + 0.4 * random.random()))  # noqa: S311

    def _unhealthy(self) -> Sequence[str]:
        late_s = self.controller.pulse.late_s
        if late_s > LOOP_LAG_LIMIT_S:
            return (f"the event loop is blocked for {late_s:.0f} s",)
        return self.controller.unhealthy


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
    try:
        configuration = from_environment(os.environ)
    except ValueError as error:
        print(f"dstrain-operator: {error}", file=sys.stderr)
        return 2
    asyncio.run(_serve(configuration))
    return 0


if __name__ == "__main__":
    sys.exit(main())
