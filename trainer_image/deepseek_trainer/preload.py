"""A fork server: it imports once what a training step imports, then every rank is a fork of it.

Starting Python, torch and what the first step pulls in costs seconds per process; a fork costs
milliseconds. The server touches no device, starts no thread and keeps no state: a rank begins as a
fresh interpreter would, with modules loaded.

It is given one end of a socket by the pod's agent (`agent.forks` has the other) and lives as long
as that: end of file, and it exits. It says `ready` once, then answers each `Request`, which comes
with three descriptors (stdin, stdout, stderr), by a `Reply`. All are JSON after a length of four
bytes.

Who is a rank's parent decides who learns how it ended. So the server forks twice: the process in
between is gone before the agent hears the rank's id, and the kernel hands the rank to the agent,
which is the reaper of all below it. Signals, exit codes and `kill` are then those of any child, and
the server may die without harm to ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final, TypedDict

from deepseek_trainer.program import Program, program_of, run, shadowed_module

# The loop imports nearly all. What torch itself imports late, in the first `fully_shard` and the
# first optimizer, hangs on this one module.
MODULES: Final = ("deepseek_trainer.loop", "torch._dynamo")
STACKS_SIGNAL: Final = 50  # a real-time signal: no program has a use of its own for it
HEADER: Final = struct.Struct("!I")


class Request(TypedDict):
    """A rank to start."""

    command: list[str]
    environment: dict[str, str]
    title: str  # of the process, as `ps` shows it
    stacks: str  # file for the stacks of all threads on STACKS_SIGNAL


class Reply(TypedDict):
    """The id of its process, or 0 and the reason why a fresh interpreter must do it."""

    pid: int
    refused: str


def main(descriptor: int) -> None:
    """Serve until the agent is gone; returns never, exits with the rank's code in a rank."""
    if not sys.flags.safe_path:
        del sys.path[0]  # this program's; each rank puts its own there
    for name in MODULES:
        importlib.import_module(name)
    if threads := len(os.listdir("/proc/self/task")) - 1:  # noqa: PTH208
        sys.exit(f"the fork server cannot fork: its imports have started {threads} threads")
    gc.collect()
    gc.freeze()  # what is loaded stays; ranks share its pages with the server
    run(_serve(socket.socket(fileno=descriptor)))


def send(connection: socket.socket, message: object, descriptors: tuple[int, ...] = ()) -> None:
    """One message, and descriptors with it. Raises OSError when the other side has gone."""
    body = json.dumps(message).encode()
    header = HEADER.pack(len(body))
    if descriptors:
        socket.send_fds(connection, [header], descriptors)
    else:
        connection.sendall(header)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """One message and its descriptors. Raises EOFError when the other side has gone."""
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 3)
    (size,) = HEADER.unpack(header or _end())
    body = bytearray()
    while len(body) < size:
        body += connection.recv(size - len(body)) or _end()
    return json.loads(body), descriptors


def _end() -> bytes:
    raise EOFError("the other side has gone")


def _serve(connection: socket.socket) -> Program:
    """Fork a rank for each request; returns in the rank, with the program that it is to run."""
    send(connection, "ready")
    while True:
        try:
            asked, descriptors = receive(connection)
        except (EOFError, ConnectionResetError):
            os._exit(0)
        request: Request = asked
        program = program_of(request["command"])
        refused = "it is no plain Python program" if program is None else _in_the_way(program)
        pid: int | None = 0
        if program and not refused:
            pid = _fork(connection, request, descriptors)
            if pid is None:
                return program
            refused = "" if pid else "the fork failed"
        for descriptor in descriptors:
            os.close(descriptor)
        send(connection, Reply(pid=pid or 0, refused=refused))


def _in_the_way(program: Program) -> str:
    name = "" if sys.flags.safe_path else shadowed_module(program.folder)
    return f"{program.folder} has a module of its own named {name}" if name else ""


def _fork(connection: socket.socket, request: Request, descriptors: list[int]) -> int | None:
    """The rank's process id, 0 if there is none; None in the rank itself."""
    said, say = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            if os.fork():
                os._exit(0)
        except OSError as error:
            print(f"fork server: {error}", file=sys.stderr)
            os._exit(1)
        os.setsid()  # before anybody knows its id: it is ended by its group
        os.write(say, str(os.getpid()).encode())
        for end in (said, say):
            os.close(end)
        connection.close()
        _begin(request, descriptors)
        return None
    os.close(say)
    os.waitpid(between, 0)
    with open(said, "rb") as answer:  # noqa: PTH123 -- a descriptor
        return int(answer.read() or 0)


def _begin(request: Request, descriptors: list[int]) -> None:
    """What a fresh process gets from the kernel and at the interpreter's start."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(OSError):  # a name is for people
        Path("/proc/self/comm").write_text(request["title"])
    # `random` seeds itself anew in a fork; these do so when they are imported.
    importlib.import_module("numpy.random").seed()
    importlib.import_module("torch").default_generator.seed()
    faulthandler.enable()
    stacks = open(request["stacks"], "w")  # noqa: PTH123, SIM115 -- open as long as the process
    faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
