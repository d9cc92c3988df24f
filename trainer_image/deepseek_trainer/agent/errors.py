"""What a failed worker process has to say: from its exit code and the end of its stderr to one
error report. Pure.

An error's class decides what happens next, so it is named only for a known exception in its place:
"configuration" stops the training, and is for what no second try can mend; all else that a program
raises is "application".
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from dstrain_api.constants import EXIT_RESTART
from dstrain_api.protocol import (
    ERROR_TEXT_LIMIT,
    PEER_LOST,
    PREFLIGHT,
    ErrorClass,
    ErrorReport,
)

OOM_TEXT = (
    "killed by the kernel, for the pod's memory limit was reached; raise "
    "workers.resources.limits.memory, or lower training.microBatch"
)
LAST_LINES = 5  # of stderr, where there is no traceback
FRAMES = 3  # innermost ones in a fingerprint: the same bug through another caller is the same

_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)  # torch puts it before a traceback
# At the start of a line: not one that a logger has written behind its own prefix.
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):$", re.MULTILINE)
_CRASH = re.compile(r"^(Fatal Python error: |terminate called )", re.MULTILINE)
_FRAME = re.compile(r'^\s+File "([^"]+)", line (\d+), in (\S+)', re.MULTILINE)
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)(:|$)", re.MULTILINE)
# C++ warnings and the crash handler speak after the traceback.
_NOISE = re.compile(r"^(\[rank\d+\]:)?\[[WEIF]\d{4} |^\s*warnings\.warn|^\S+\.py:\d+: \w*Warning: ")
# gloo, NCCL and TCPStore, when the process at the other end has gone.
_PEER = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Connection was likely closed"
    r"|Socket (closed|Timeout)|remote process exited|ncclRemoteError|failed to recv, got 0 bytes"
    r"|Timed out waiting .*(recv|send) operation|DistNetworkError|Read (from|error) .*\[",
    re.IGNORECASE,
)
# Python's MemoryError; PyTorch's caching allocator, its CPU allocator and the CUDA driver.
_OUT_OF_MEMORY = re.compile(
    r"\A([\w.]*\b(OutOfMemoryError|MemoryError)\b"
    r"|RuntimeError: .*(DefaultCPUAllocator: (not enough|can't allocate) memory"
    r"|CUDA (error: )?out of memory))",
    re.DOTALL,
)
_NUMERIC = ("NonFiniteGradient", "RollbackFailed")
_BAD_NODE = "deepseek_trainer.preflight.check.PreflightFailed"
_UNUSABLE = ("NoUsableCheckpoint",)
# Before the first step these are the program's own; later a file system may have failed.
_UNLOADABLE = ("ModuleNotFoundError", "ImportError", "SyntaxError", "IndentationError")
# What the interpreter says, without a traceback, when it cannot find or read the program.
_NO_PROGRAM = re.compile(
    r"^(\S+: (No module named \S+|can't open file .*: \[Errno 2\] No such file or directory)$"
    r"|(Syntax|Indentation|Tab)Error: )"
)
_TRAINER = "/deepseek_trainer/"


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """A worker process that ended badly; `exit_code` is negative for a signal."""

    local_rank: int
    exit_code: int
    stderr: str = ""  # its end


def report_of(
    failures: Sequence[WorkerFailure],
    *,
    step: int = 0,
    began: bool = False,
    memory_ran_out: bool = False,
) -> ErrorReport:
    """One pod's failure: that of the process which failed first of its own accord.

    Args:
        failures: at least one, in the order in which they were noticed.
        step: last finished step that is known of this pod's processes.
        began: whether they have finished a step since they were started.
        memory_ran_out: whether the kernel killed a process of this pod for it meanwhile.
    """
    errors = (error_of(f, step=step, began=began, memory_ran_out=memory_ran_out) for f in failures)
    return min(errors, key=_blame)


def error_of(
    failure: WorkerFailure, *, step: int = 0, began: bool = False, memory_ran_out: bool = False
) -> ErrorReport:
    """A failed process as an error report: the end of its traceback, where there is one."""
    stderr = _RANK_PREFIX.sub("", failure.stderr)
    killed = failure.exit_code == -signal.SIGKILL and memory_ran_out
    if failure.exit_code < 0:
        said = OOM_TEXT if killed else _signal_text(-failure.exit_code)
        text = "\n".join([said, *_from_last(_CRASH, stderr)])
    else:
        lines = _from_last(_TRACEBACK, stderr) or _lines(stderr)[-LAST_LINES:]
        text = "\n".join(lines) or f"exited with code {failure.exit_code} without a word on stderr"
    return ErrorReport(
        local_rank=failure.local_rank,
        exit_code=failure.exit_code,
        message=text[-ERROR_TEXT_LIMIT:],
        fingerprint=_fingerprint(failure.exit_code, text),
        failure_class=_class_of(failure, text, began=began, killed=killed),
        step=step,
    )


def _class_of(failure: WorkerFailure, text: str, *, began: bool, killed: bool) -> ErrorClass:
    if killed:
        return "outOfMemory"
    return "application" if failure.exit_code < 0 else _class(text, began=began)


def _blame(error: ErrorReport) -> int:
    """Smaller is more likely the cause: crashes, errors, then what follows from others' ends."""
    if error.exit_code == EXIT_RESTART:
        return 3
    if error.exit_code < 0:
        return 0
    return 2 if error.fingerprint == PEER_LOST else 1


def _from_last(mark: re.Pattern[str], text: str) -> list[str]:
    """The lines from the last `mark` on; none if there is no mark."""
    starts = [found.start() for found in mark.finditer(text)]
    return _lines(text[starts[-1] :]) if starts else []


def _lines(text: str) -> list[str]:
    """The lines that say something, without the noise at the end."""
    lines = [line for line in text.splitlines() if line.strip()]
    while lines and _NOISE.search(lines[-1]):
        lines.pop()
    return lines


def _fingerprint(exit_code: int, text: str) -> str:
    if exit_code < 0:
        return f"signal-{-exit_code}"
    start = _TRACEBACK.search(text)
    if start is None:
        return PEER_LOST if _PEER.search(text) else f"exit-{exit_code}"
    traceback = text[start.end() :]
    raised = _EXCEPTION.search(traceback)
    if raised and raised.group(1) == _BAD_NODE:
        return PREFLIGHT
    if raised and _PEER.search(traceback[raised.start() :]):
        return PEER_LOST
    frames = _FRAME.findall(traceback)[-FRAMES:]
    identity = repr((raised.group(1) if raised else "", frames))
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _class(text: str, *, began: bool) -> ErrorClass:
    start = _TRACEBACK.search(text)
    if start is None:
        return "configuration" if _NO_PROGRAM.match(text.splitlines()[-1]) else "application"
    traceback = text[start.end() :]
    raised = _EXCEPTION.search(traceback)
    if raised is None:
        return "application"
    if _OUT_OF_MEMORY.match(traceback[raised.start() :]):
        return "outOfMemory"
    name = raised.group(1).rpartition(".")[2]
    frames = _FRAME.findall(traceback)
    if name in _NUMERIC:
        return "numeric"
    if name in _UNUSABLE or (not began and name in _UNLOADABLE):
        return "configuration"
    # The trainer raises ValueError for what a person has to change, and for nothing else.
    ours = bool(frames) and _TRAINER in frames[-1][0]
    return "configuration" if name == "ValueError" and ours and not began else "application"


def _signal_text(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    hint = " (the kernel does this when memory runs out)" if number == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
