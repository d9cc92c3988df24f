"""Runs a function on several ranks, forked from the test process: torch is imported once."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Started = list[tuple[multiprocessing.process.BaseProcess, Connection]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    world: int, function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None
) -> Started:
    """Start `function(*args)` on every rank of a world of its own; one thread per rank."""
    torch.set_num_threads(1)  # in the parent too: a thread pool does not survive a fork
    port = free_port()
    context = multiprocessing.get_context("fork")
    started: Started = []
    for rank in range(world):
        here, there = context.Pipe()
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        process = context.Process(target=_rank, args=(settings, there, function, args), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def answers(started: Started) -> list[Any]:
    """What the function returned on every rank; fails with the traceback of the first rank that
    fails, and ends the others, which may wait for it for ever.
    """
    ranks = {connection: rank for rank, (_, connection) in enumerate(started)}
    found: dict[int, Any] = {}
    try:
        while len(found) < len(ranks):
            for connection in wait([c for c, rank in ranks.items() if rank not in found]):
                assert isinstance(connection, Connection)
                good, answer = pickle.loads(connection.recv_bytes())
                assert good, f"rank {ranks[connection]}:\n{answer}"
                found[ranks[connection]] = answer
        for process, _ in started:
            process.join(10)
    finally:
        for process, _ in started:
            process.kill()
    return [found[rank] for rank in sorted(found)]


def launch(
    world: int, function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None
) -> list[Any]:
    """What `function(*args)` returns on every rank."""
    return answers(start(world, function, *args, env=env))


def _rank(
    settings: Mapping[str, str], connection: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(settings)
    try:
        # By value: a connection's own pickler would share tensors' memory with a process that ends.
        connection.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - handed to the test
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)  # peers must not wait for this one in a collective
