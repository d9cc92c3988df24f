"""torchrun's rendezvous, decided by the coordinator.

The handler lives in the agent process (torchrun, PID 1 of the pod), so its threads outlive every
worker restart: they beat, pass on reports and serve metrics. Facts about torchrun that shape it:

- Ranks are computed from group rank and processes per pod, without a store, if
  TORCH_ELASTIC_WORKER_IDENTICAL is 1.
- `use_agent_store` is False: rank 0's worker hosts the process-group store of its generation, and
  takes it to its grave.
- `num_nodes_waiting() > 0` ends a generation; that costs none of `--max-restarts`, which must be
  huge all the same.
- On SIGTERM torchrun does not call `shutdown`: the pod says goodbye through atexit.
- As PID 1 torchrun ignores SIGTERM until somebody handles it, and its own handler breaks off a
  save at the second signal (an order to stop is followed by the pod's deletion). So SIGTERM is
  handled here.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType

from dstrain_api.constants import (
    ENV_BEAT_INTERVAL,
    ENV_CHECKPOINT_DIR,
    ENV_CHECKPOINT_URI,
    ENV_FAILURE_INTERVAL,
    ENV_GENERATION,
    ENV_HANG_TIMEOUT,
    ENV_LOCAL_DIR,
    ENV_METRICS_PORT,
    ENV_NODE,
    ENV_POD,
    ENV_POD_IP,
    ENV_POD_UID,
    ENV_PREFLIGHT,
    ENV_REPORT_SOCKET,
    ENV_SLOT,
    ENV_TRAINING,
    METRICS_PORT,
    RENDEZVOUS_BACKEND,
)
from dstrain_api.protocol import PEER_LOST, Assignment, ErrorReport
from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.run import determine_local_world_size, parse_args

from deepseek_trainer.agent import flight
from deepseek_trainer.agent.client import CoordinatorClient, Fenced
from deepseek_trainer.agent.dumps import DumpBucket, DumpFolder, Dumps
from deepseek_trainer.agent.errors import WorkerFailure, report_of
from deepseek_trainer.agent.forks import ForkServer
from deepseek_trainer.agent.hang import HangWatch
from deepseek_trainer.agent.home import agent_home, local_folder
from deepseek_trainer.agent.membership import Identity, Membership
from deepseek_trainer.agent.memory import oom_kills
from deepseek_trainer.agent.metrics import AgentMetrics, serve
from deepseek_trainer.agent.nvml import add_gpus
from deepseek_trainer.agent.reports import Forwarder, ReportSocket, WorkerReport
from deepseek_trainer.agent.standstill import RankProgress
from deepseek_trainer.agent.workers import fork_workers, watch_workers

log = logging.getLogger(__name__)

EXIT_FENCED = 76  # EX_PROTOCOL: this pod was replaced
# A worker that lost a peer waits this long for the peer's own account to end the generation,
# before its broken connection is reported as the cause.
PEER_PATIENCE_S = 3.0
FLUSH_S = 5.0  # at the end, for the last report


class ExitStore(Store):
    """What torchrun's exit barrier asks of a store.

    It never waits: the coordinator knows who has finished.
    """

    def add(self, _key: str, _amount: int) -> int:
        """As if many were there already."""
        return sys.maxsize

    def set(self, _key: str, _value: str) -> None:
        """Nobody reads it."""

    def wait(self, *_: object) -> None:
        """No need to."""

    def set_timeout(self, _timeout: timedelta) -> None:
        """There is nothing to time out."""

    @property
    def timeout(self) -> timedelta:
        """Any."""
        return timedelta(seconds=1)


class Handler(RendezvousHandler):
    """One pod's rendezvous, from the start of its agent to the end."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        # First of all: it imports while this pod joins.
        processes = fork_workers(ForkServer())
        self._run_id = parameters.run_id
        self._stopping = False
        self._program_done = False
        self._failures: list[WorkerFailure] = []
        self._step = 0
        self._oom_kills = 0
        self._hang: ErrorReport | None = None
        timeout_s = os.environ.get(ENV_HANG_TIMEOUT)
        self._progress = RankProgress(float(timeout_s) if timeout_s else None)
        self._metrics = AgentMetrics(os.environ[ENV_TRAINING])
        self._membership = Membership(
            Identity(
                pod=os.environ[ENV_POD],
                pod_uid=os.environ[ENV_POD_UID],
                slot=int(os.environ[ENV_SLOT]),
                node=os.environ.get(ENV_NODE, ""),
                address=os.environ[ENV_POD_IP],
                processes=_processes(),
            ),
            CoordinatorClient.from_environment,
            beat_interval_s=float(os.environ.get(ENV_BEAT_INTERVAL, "1")),
            step=lambda: self._step,
            stop=self._terminate,
        )
        self._forwarder = Forwarder(os.environ[ENV_POD_UID], CoordinatorClient.from_environment())
        reports = ReportSocket(agent_home() / "reports", self._reported)
        os.environ[ENV_REPORT_SOCKET] = str(reports.path)
        if local := local_folder():
            os.environ[ENV_LOCAL_DIR] = str(local)
        if os.environ.get(ENV_CHECKPOINT_URI):
            os.environ[ENV_CHECKPOINT_DIR] = str(agent_home() / "checkpoints")
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        os.environ.update(flight.environment(agent_home()))
        self._handle_sigterm()
        watch_workers(self)
        HangWatch(
            progress=self._progress,
            membership=self._membership,
            expected=self._expects_progress,
            processes=processes,
            own_folder=agent_home(),
            kept=_shared_dumps(),
            found=self._found_hang,
        ).start()
        atexit.register(self._leave)
        self._serve_metrics()

    # What torchrun asks.

    def get_backend(self) -> str:
        """Name of the backend."""
        return RENDEZVOUS_BACKEND

    def get_run_id(self) -> str:
        """The training's uid, from the command line."""
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Block until this pod has a place in the next generation."""
        asked_s = time.monotonic()
        if self._program_done:
            # The program's last commit is made: what fails after that is done, and cannot be asked
            # to join again.
            log.info("the program had reached its end; leaving")
            self._membership.finish()
            sys.exit(0)
        if self._membership.generation:
            self._metrics.restarted()
        try:
            self._explain_failures()
            with _reserved_port(self._membership.identity.address) as port:
                assignment = self._membership.join(port)
        except Fenced as error:
            log.error("this pod was replaced (%s); leaving", error)  # noqa: TRY400 -- no traceback
            sys.exit(EXIT_FENCED)
        self._enter(assignment, time.monotonic() - asked_s)
        return RendezvousInfo(
            store=ExitStore(),
            rank=assignment.group_rank,
            world_size=assignment.group_world_size,
            bootstrap_store_info=RendezvousStoreInfo(
                assignment.master_address, assignment.master_port
            ),
        )

    def num_nodes_waiting(self) -> int:
        """1 when the generation is over: torchrun stops its workers and comes for the next one."""
        return int(self._membership.over and not self._program_done)

    def is_closed(self) -> bool:
        """Never: a training ends when its workers do."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def shutdown(self) -> bool:
        """The last word is said by atexit, on every way out."""
        return True

    # What the workers do.

    @property
    def saving(self) -> bool:
        """Whether workers that are ended now are to save; those of a replaced pod cannot commit."""
        return self._stopping and not self._membership.fenced

    def failed(self, failures: list[WorkerFailure]) -> None:
        """Worker processes ended badly."""
        self._failures = failures

    def finished(self) -> None:
        """All worker processes ended well."""
        self._program_done = True
        self._membership.finish()

    def _reported(self, report: WorkerReport) -> None:
        if report.rank_step is not None:
            self._step = report.rank_step
        self._progress.heard(report, time.monotonic())
        self._program_done = self._program_done or report.done
        self._metrics.worked(report)
        if self._membership.group_rank == 0 and report.local_rank == 0:
            self._metrics.reported(report)
            self._forwarder.put(self._membership.generation, report)

    # How.

    def _explain_failures(self) -> None:
        failures, self._failures = self._failures, []
        hang, self._hang = self._hang, None
        if not failures:
            return
        if hang:
            self._membership.report_error(hang)
            return
        began = self._progress.step() > 0
        error = report_of(
            failures,
            step=self._step,
            began=began,
            memory_ran_out=oom_kills() > self._oom_kills,
        )
        log.warning("local rank %s: %s", error.local_rank, error.message.splitlines()[-1])
        if error.fingerprint == PEER_LOST and self._membership.wait_over(PEER_PATIENCE_S):
            return  # the peer that failed has said why
        self._membership.report_error(error)

    def _expects_progress(self) -> bool:
        ending = self._stopping or self._program_done or self._membership.over
        return self._membership.place.state == "running" and not ending

    def _found_hang(self, error: ErrorReport) -> None:
        log.error("%s", error.message)
        self._hang = error

    def _enter(self, assignment: Assignment, seconds: float) -> None:
        self._progress.begin(self._membership.identity.processes, time.monotonic())
        self._oom_kills = oom_kills()
        os.environ[ENV_GENERATION] = str(assignment.generation)
        os.environ[ENV_FAILURE_INTERVAL] = f"{assignment.failure_interval_s:g}"
        os.environ[ENV_PREFLIGHT] = str(int(assignment.preflight))
        self._metrics.joined(assignment.generation, assignment.group_rank, seconds)
        log.info(
            "generation %s: worker %s of %s, rank 0 at %s:%s",
            assignment.generation,
            assignment.group_rank + 1,
            assignment.group_world_size,
            assignment.master_address,
            assignment.master_port,
        )

    def _handle_sigterm(self) -> None:
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            return  # the workers are saving already
        self._stopping = True
        # torchrun stops its workers on every way out.
        if self._membership.fenced:
            sys.exit(EXIT_FENCED)
        log.info("stopping: the workers save and exit")
        sys.exit(128 + number)

    def _terminate(self, why: str) -> None:
        log.warning("%s", why)
        os.kill(os.getpid(), signal.SIGTERM)

    def _leave(self) -> None:
        self._stopping = True  # from here on a signal has nothing to stop
        if not self._membership.fenced:
            self._forwarder.flush(FLUSH_S)  # the last step, saved by workers that were told to stop
        self._membership.leave()

    def _serve_metrics(self) -> None:
        port = int(os.environ.get(ENV_METRICS_PORT, METRICS_PORT))
        add_gpus(self._metrics, os.environ[ENV_TRAINING])
        try:
            port = serve(self._metrics, port)
        except OSError as error:
            log.warning("no metrics of this pod: port %s: %s", port, error)
            return
        log.info("metrics on port %s", port)


def _shared_dumps() -> Dumps:
    if uri := os.environ.get(ENV_CHECKPOINT_URI):
        return DumpBucket(uri)
    return DumpFolder(Path(os.environ.get(ENV_CHECKPOINT_DIR) or agent_home()))


def _processes() -> int:
    """Worker processes of this pod: torchrun's command line says it, not its parameters."""
    arguments = parse_args(sys.argv[1:])  # type: ignore[no-untyped-call]
    return int(determine_local_world_size(arguments.nproc_per_node))


class _reserved_port:  # noqa: N801 -- used as a function
    """A free port that nobody else gets while we wait; let go just before rank 0 listens on it."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))

    def __enter__(self) -> int:
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._socket.close()
