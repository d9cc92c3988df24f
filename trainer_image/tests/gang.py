"""Pods' agents as torchrun starts them, with a real coordinator on loopback.

The policy is the plainest possible one (`Former`): what is shown is the agent's part.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_operator.core.model import Membership, MemberView
from deepseek_operator.runtime.coordinator import Coordinator
from deepseek_operator.server import ServerThread, make_app
from dstrain_api import constants as names

UID = "training-uid"
TOKEN = "secret"
BEAT_S = 0.5
SILENCE_S = 2.0
PATIENCE_S = 90.0

WORKER = """
    import json, os, signal, sys, time
    import torch, torch.distributed as dist
    from deepseek_trainer.reporting import report, report_done

    def hang(file):
        # as a file asks for it, once
        for kind in ("stop", "sleep", "spin"):
            if os.path.exists(file.format(kind)):
                os.unlink(file.format(kind))
                if kind == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif kind == "sleep":
                    time.sleep(600)
                else:
                    sum(range(10**13))  # never lets go of the interpreter's lock

    folder, slot = sys.argv[1], os.environ["DSTRAIN_SLOT"]
    dist.init_process_group("gloo")
    rank, world, step = dist.get_rank(), dist.get_world_size(), 0
    with open(f"{folder}/trace-{slot}", "a", buffering=1) as trace:
        while True:
            hang(folder + "/{}-" + slot)
            ones = torch.ones(1)
            dist.all_reduce(ones)
            step += 1
            said = dict(at=time.time(), pid=os.getpid(), rank=rank, world=world, step=step,
                        generation=int(os.environ["DSTRAIN_GENERATION"]), sum=ones.item(),
                        local=os.environ["DSTRAIN_LOCAL_DIR"],
                        failures=os.environ["DSTRAIN_FAILURE_INTERVAL_S"],
                        preflight=os.environ["DSTRAIN_PREFLIGHT"])
            trace.write(json.dumps(said) + "\\n")
            report(step=step, tokens=step * 100, step_seconds=0.02, resumed_step=0)
            if os.path.exists(f"{folder}/raise-{slot}"):
                os.unlink(f"{folder}/raise-{slot}")
                raise ValueError(f"slot {slot} met a bad sample")
            stop = torch.tensor(float(os.path.exists(f"{folder}/finish")))
            dist.all_reduce(stop)
            if stop:
                break
            time.sleep(0.02)
    report_done()
"""


class Former(threading.Thread):
    """Forms a generation when all wanted pods wait; ends it when a member asks or is silent."""

    def __init__(self, coordinator: Coordinator, wanted: int, generation: int = 0) -> None:
        super().__init__(daemon=True)
        self.coordinator = coordinator
        self.wanted = wanted
        self.generation = generation
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        seen = self.coordinator.snapshot(UID)
        if seen.membership:
            members = [m for m in seen.members if m.pod_uid in seen.membership.pod_uids]
            silent = any(m.silent_s > SILENCE_S for m in members)
            lost = len(members) < len(seen.membership.pod_uids)
            resized = len(members) != self.wanted
            if (seen.over or silent or lost or resized) and not seen.done:
                self.coordinator.end(UID, seen.membership.generation)
            return
        waiting = [m for m in seen.members if m.state == "joining" and m.silent_s < SILENCE_S]
        if len(waiting) == self.wanted:
            self.form(sorted(waiting, key=lambda m: m.slot))

    def form(self, members: list[MemberView]) -> None:
        self.generation += 1
        head = members[0]
        pods = tuple(m.pod_uid for m in members)
        self.coordinator.publish(
            UID,
            Membership(
                generation=self.generation,
                pod_uids=pods,
                master_address=head.address,
                master_port=head.port,
                preflight=any(m.generation == 0 for m in members),
            ),
        )


class Gang:
    """Agents, by slot, with everything that they write in one folder."""

    def __init__(self, folder: Path, slots: int, **environment: str) -> None:
        self.folder = folder
        self.environment = environment
        self.worker = folder / "worker.py"
        self.worker.write_text(textwrap.dedent(WORKER))
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.port = 0
        self.up(slots, generation=0)
        for slot in range(slots):
            self.start(slot)

    def up(self, wanted: int, generation: int) -> None:
        """A coordinator that has just started, on the same port as the one before."""
        self.coordinator = Coordinator(clock=time.time)
        self.coordinator.register(UID, generation=generation, token=TOKEN, silence_s=SILENCE_S)
        self.server = ServerThread(make_app(self.coordinator), port=self.port)
        self.port = self.server.port
        self.server.start()
        self.former = Former(self.coordinator, wanted, generation)
        self.former.start()

    def down(self) -> None:
        self.former.stopped = True
        self.former.join()
        self.server.stop()

    def start(self, slot: int) -> None:
        self.started += 1
        environment = {
            names.ENV_COORDINATOR: f"http://127.0.0.1:{self.port}",
            names.ENV_TOKEN: TOKEN,
            names.ENV_TRAINING: "gang",
            names.ENV_TRAINING_UID: UID,
            names.ENV_POD: f"gang-{slot}-{self.started}",
            names.ENV_POD_UID: f"pod-{slot}-{self.started}",
            names.ENV_POD_IP: "127.0.0.1",
            names.ENV_SLOT: str(slot),
            names.ENV_BEAT_INTERVAL: str(BEAT_S),
            names.ENV_METRICS_PORT: "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "TMPDIR": str(self.folder),  # killed agents leave their folders
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        with (self.folder / f"log-{slot}").open("ab") as log:
            self.agents[slot] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run"),
                    *("--rdzv-backend=dstrain", "--logs-specs=dstrain", f"--rdzv-id={UID}"),
                    *("--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=1000000"),
                    *("--monitor-interval=0.1", str(self.worker), str(self.folder)),
                ],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last(self, slot: int) -> dict[str, Any]:
        trace = self.folder / f"trace-{slot}"
        lines = trace.read_text().splitlines() if trace.exists() else []
        return json.loads(lines[-1]) if lines else {"generation": 0, "step": 0, "pid": 0}

    def log(self, slot: int) -> str:
        return (self.folder / f"log-{slot}").read_text()

    def kill_pod(self, slot: int) -> None:
        """What a dead container leaves: neither agent nor worker."""
        worker = int(self.last(slot)["pid"])
        self.agents[slot].kill()
        os.killpg(worker, signal.SIGKILL)
        self.agents[slot].wait()

    def steps(self, generation: int, slots: tuple[int, ...] = (0, 1, 2)) -> None:
        """Wait until these slots step in a generation of at least this number."""
        wait_for(
            lambda: all(self.last(slot)["generation"] >= generation for slot in slots),
            lambda: "\n".join(self.log(slot)[-3000:] for slot in slots),
        )

    def close(self) -> None:
        for slot, agent in self.agents.items():
            if agent.poll() is None:
                self.kill_pod(slot)
        self.down()
        for trace in self.folder.glob("trace-*"):  # killed agents leave these too
            for line in trace.read_text().splitlines():
                shutil.rmtree(json.loads(line)["local"], ignore_errors=True)


def wait_for(holds: Callable[[], object], tell: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, tell()
        time.sleep(0.02)
