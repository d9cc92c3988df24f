"""Runs a function on several ranks, forked from the test process: torch is imported once."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
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
    """What the function returned on every rank; fails with the traceback of a rank."""
    try:
        received = [pickle.loads(connection.recv_bytes()) for _, connection in started]
    finally:
        for process, _ in started:
            process.join(10)
            process.kill()
    for rank, (good, answer) in enumerate(received):
        assert good, f"rank {rank}:\n{answer}"
    return [answer for _, answer in received]


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
