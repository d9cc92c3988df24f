"""What an operator of 500 trainings does when 50 of 1,000 nodes fail at once.

A real API server and the real operator process. Scheduler, kubelets and agents are played (see
`e2e.puppets`): each node has one worker pod, whose agent beats every five seconds.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from e2e.apiserver import ApiServer, api_server
from e2e.clusters import programs
from e2e.clusters.shell import wait_until
from e2e.operators import OperatorProcess, prepare
from e2e.puppets import Puppets, puppets

NODES: Final = 1000
TRAININGS: Final = 500
WORKERS: Final = 2
LOST: Final = 50
QUIET_S: Final = 30.0
PATIENCE_S: Final = 180.0
BEAT_S: Final = 5.0


def main() -> None:
    """Print times, requests and the operator's share of a core: at the start, quiet, and after."""
    with (
        tempfile.TemporaryDirectory() as folder,
        api_server(Path(folder), programs.ensure()) as server,
    ):
        prepare(server)
        operator = OperatorProcess(server.kubeconfig, Path(folder))
        operator.start()
        names = [f"node-{number:04}" for number in range(NODES)]
        try:
            with puppets(
                server, lambda: operator.url, nodes=names, tick_s=1.0, beat_s=BEAT_S
            ) as played:
                _run(server, operator, played, names)
        finally:
            operator.close()


def _run(server: ApiServer, operator: OperatorProcess, played: Puppets, nodes: list[str]) -> None:
    _wait(lambda: len(_nodes(server)) == len(nodes), "the nodes")
    with _Cost(operator) as cost:
        _apply(server)
        began_s = time.monotonic()
        _wait(lambda: len(_together(played, 1)) == TRAININGS, "all trainings to run")
    print(
        f"{TRAININGS} trainings of {WORKERS} workers run after {time.monotonic() - began_s:.0f} s"
    )
    print(f"  {cost}")
    with _Cost(operator) as cost:
        time.sleep(QUIET_S)
    print(f"{QUIET_S:.0f} s in which nothing happens\n  {cost}")

    lost = set(nodes[:: NODES // LOST])
    hit = {agent.training for agent in played.agents.values() if agent.node in lost}
    pods = {name: list(made) for name, made in played.made.items()}
    with _Cost(operator) as cost:
        off_s = time.monotonic()
        played.power_off(lost)
        replaced, together = _first_s(
            hit,
            off_s,
            lambda: {name for name in pods if played.made[name] != pods[name]},
            lambda: _together(played, 2),
        )
    print(f"{LOST} nodes are lost, {len(hit)} trainings are hit")
    print(f"  their pods made anew after {_spread(replaced)}")
    print(f"  their workers together again after {_spread(together)}")
    print(f"  {cost}")
    others = pods.keys() - hit
    touched = [name for name in others if played.made[name] != pods[name]]
    print(f"  {len(touched)} of the {len(others)} other trainings touched")
    assert not played.broken, played.broken


class _Cost:
    """What the operator asked of the API server and of its processor within a block."""

    def __init__(self, operator: OperatorProcess) -> None:
        self._operator = operator

    def __enter__(self) -> _Cost:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._now()
        self._spent = [now - before for now, before in zip(after, self._before, strict=True)]

    def __str__(self) -> str:
        requests, cpu_s, seconds = self._spent
        return f"{requests:.0f} requests to the API server, {cpu_s / seconds:.0%} of a core"

    def _now(self) -> tuple[float, float, float]:
        text = httpx.get(f"{self._operator.url}/metrics", timeout=30).text
        lines = [
            line for line in text.splitlines() if line.startswith("rest_client_requests_total")
        ]
        stat = Path(f"/proc/{self._operator.process.pid}/stat").read_text().rpartition(")")[2]
        ticks = sum(map(int, stat.split()[11:13]))
        requests = sum(float(line.rpartition(" ")[2]) for line in lines)
        return requests, ticks / os.sysconf("SC_CLK_TCK"), time.monotonic()


def _apply(server: ApiServer) -> None:
    items = [
        {
            "apiVersion": "dstrain.dev/v1alpha1",
            "kind": "DeepSeekTraining",
            "metadata": {"name": f"training-{number:03}", "namespace": "default"},
            "spec": {
                "entrypoint": {"module": "program"},
                "workers": {"replicas": WORKERS},
                "recovery": {"heartbeatTimeout": f"{3 * BEAT_S:.0f}s"},
            },
        }
        for number in range(TRAININGS)
    ]
    everything = {"apiVersion": "v1", "kind": "List", "items": items}
    server.kubectl("create", "-f", "-", stdin=json.dumps(everything), timeout_s=PATIENCE_S)


def _nodes(server: ApiServer) -> list[str]:
    return server.kubectl("get", "nodes", "-o", "name").split()


def _together(played: Puppets, generation: int) -> set[str]:
    """Trainings all of whose workers are in that generation or a later one."""
    agents = list(played.agents.values())
    counts: dict[str, int] = {}
    for agent in agents:
        if agent.generation >= generation:
            counts[agent.training] = counts.get(agent.training, 0) + 1
    return {name for name, count in counts.items() if count == WORKERS}


def _first_s(names: set[str], since_s: float, *those: Callable[[], set[str]]) -> list[list[float]]:
    """Seconds, in order, until every name was seen in each of `those` sets."""
    seen: list[dict[str, float]] = [{} for _ in those]

    def all_seen() -> bool:
        for times, holds_for in zip(seen, those, strict=True):
            for name in holds_for() & names:
                times.setdefault(name, time.monotonic() - since_s)
        return all(times.keys() == names for times in seen)

    _wait(all_seen, "all trainings that were hit")
    return [sorted(times.values()) for times in seen]


def _wait(holds: Callable[[], bool], what: str) -> None:
    wait_until(holds, what, timeout_s=PATIENCE_S, interval_s=0.2)


def _spread(ordered: list[float]) -> str:
    return f"{ordered[len(ordered) // 2]:.1f} s (median), {ordered[-1]:.1f} s (last)"


if __name__ == "__main__":
    main()
