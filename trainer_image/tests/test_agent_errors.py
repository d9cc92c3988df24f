"""What becomes of a failed worker's exit code and stderr."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deepseek_trainer.agent.errors import WorkerFailure, error_of, report_of
from deepseek_trainer.agent.memory import oom_kills
from dstrain_api.constants import EXIT_RESTART
from dstrain_api.protocol import ERROR_TEXT_LIMIT, PEER_LOST, PREFLIGHT


def failure(stderr: str = "", *, exit_code: int = 1, local_rank: int = 0) -> WorkerFailure:
    return WorkerFailure(local_rank=local_rank, exit_code=exit_code, stderr=stderr)


def of_program(program: str) -> WorkerFailure:
    """A program that really ran."""
    ended = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False
    )
    return failure(ended.stderr, exit_code=ended.returncode)


BUG = """
import sys
print("some warning before", file=sys.stderr)
def inner(x):
    raise ValueError(f"sample {x} is bad\\nlook at line {x}")
def outer(x):
    inner(x)
outer(%d)
"""


def test_the_message_is_the_traceback_to_its_last_line() -> None:
    message = error_of(of_program(BUG % 7)).message
    assert message.startswith("Traceback (most recent call last):")
    assert message.endswith("ValueError: sample 7 is bad\nlook at line 7")


def test_the_last_of_chained_tracebacks_counts() -> None:
    program = "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e"
    message = error_of(of_program(program)).message
    assert message.endswith("KeyError: 'x'")
    assert "ZeroDivisionError" not in message


def test_ranks_in_front_of_lines_and_warnings_behind_are_left_out() -> None:
    stderr = (
        "[rank0]: Traceback (most recent call last):\n"
        '[rank0]:   File "/app/train.py", line 3, in <module>\n'
        "[rank0]: RuntimeError: no\n"
        "[rank0]:[W1121 14:00:00.000 ProcessGroupNCCL.cpp:1] Warning: destroy_process_group()\n"
    )
    assert error_of(failure(stderr)).message.endswith("\nRuntimeError: no")


def test_a_traceback_that_was_only_logged_is_not_the_end() -> None:
    stderr = "W1121 x.py:1] Traceback (most recent call last):\nW1121 x.py:1] KeyError: 1\nbye\n"
    assert error_of(failure(stderr)).message.endswith("bye")


def test_without_a_traceback_the_last_lines_speak() -> None:
    error = error_of(of_program("import sys; sys.exit('no such file: corpus.bin')"))
    assert (error.message, error.fingerprint) == ("no such file: corpus.bin", "exit-1")


def test_a_silent_exit_is_told_by_its_code() -> None:
    assert error_of(failure(exit_code=3)).message == "exited with code 3 without a word on stderr"


def test_a_killed_process_is_told_by_its_signal_alone() -> None:
    stderr = "Traceback (most recent call last):\nKeyError: handled long ago\n"
    error = error_of(failure(stderr, exit_code=-signal.SIGKILL))
    assert error.message == "killed by SIGKILL (the kernel does this when memory runs out)"


def test_a_crash_says_where() -> None:
    program = "import faulthandler, os; faulthandler.enable(); os.kill(os.getpid(), 11)"
    error = error_of(of_program(program))
    assert error.message.startswith("killed by SIGSEGV\nFatal Python error: Segmentation fault")
    assert error.fingerprint == "signal-11"


def test_the_end_of_a_long_text_is_kept() -> None:
    message = error_of(of_program("raise ValueError('x' * 10_000 + 'end')")).message
    assert (len(message), message[-3:]) == (ERROR_TEXT_LIMIT, "end")


def test_the_same_bug_has_the_same_fingerprint_whatever_its_message() -> None:
    assert error_of(of_program(BUG % 7)).fingerprint == error_of(of_program(BUG % 8)).fingerprint


def test_another_place_has_another_fingerprint() -> None:
    elsewhere = BUG.replace("def outer", "\ndef outer") % 7
    assert error_of(of_program(BUG % 7)).fingerprint != error_of(of_program(elsewhere)).fingerprint


@pytest.mark.parametrize(
    "last_line",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]",
        "torch.distributed.DistBackendError: NCCL error: remote process exited or there was ...",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
    ],
)
def test_a_broken_connection_to_another_worker_is_recognised(last_line: str) -> None:
    stderr = f'Traceback (most recent call last):\n  File "a.py", line 1, in f\n{last_line}\n'
    assert error_of(failure(stderr)).fingerprint == PEER_LOST


def test_a_pod_reports_the_crash_before_the_error_before_the_broken_connection() -> None:
    lost = failure("Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n")
    bug = failure("Traceback (most recent call last):\nValueError: x\n", local_rank=1)
    crash = failure(exit_code=-signal.SIGSEGV, local_rank=2)
    asked = failure(exit_code=EXIT_RESTART, local_rank=3)
    assert report_of([asked, lost, bug, crash]).local_rank == 2
    assert report_of([asked, lost, bug]).local_rank == 1
    assert report_of([asked, lost]).local_rank == 0
    assert report_of([asked]).exit_code == EXIT_RESTART


IN_TRAINER = """Traceback (most recent call last):
  File "/opt/lib/deepseek_trainer/parallel/mesh.py", line 52, in plan_layout
    raise ValueError(
%s
"""
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise MemoryError", "outOfMemory"),
        ("import torch; torch.empty(10**15)", "outOfMemory"),
        ("import no_such_module", "configuration"),
        ("from json import no_such_name", "configuration"),
        ("x = = 1", "configuration"),
        ("raise ValueError('a sample of the user')", "application"),
        ("raise RuntimeError('MemoryError: not one')", "application"),
        ("import sys; sys.exit(3)", "application"),
        ("class NonFiniteGradient(Exception): pass\nraise NonFiniteGradient('3')", "numeric"),
        ("class NoUsableCheckpoint(Exception): pass\nraise NoUsableCheckpoint", "configuration"),
    ],
)
def test_a_known_exception_has_its_class(program: str, expected: str) -> None:
    assert error_of(of_program(program)).failure_class == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("ValueError: parallelism: tensor 3 does not fit", "configuration"),
        ("RuntimeError: a bug of ours", "application"),
        (OOM, "outOfMemory"),
        ("deepseek_trainer.loop.NonFiniteGradient: step 3", "numeric"),
        ("torch.AcceleratorError: CUDA error: an illegal memory access", "application"),
    ],
)
def test_what_the_trainer_raises_has_its_class(error: str, expected: str) -> None:
    assert error_of(failure(IN_TRAINER % error)).failure_class == expected


@pytest.mark.parametrize("missing", [["-m", "no_such_module"], ["/no/such/script.py"]])
def test_a_program_that_is_not_there_is_a_matter_of_configuration(missing: list[str]) -> None:
    ended = subprocess.run([sys.executable, *missing], stderr=-1, text=True, check=False)
    said = failure(ended.stderr, exit_code=ended.returncode)
    assert error_of(said).failure_class == "configuration"


def test_after_a_step_was_finished_the_configuration_was_right() -> None:
    for text in (IN_TRAINER % "ValueError: x", IN_TRAINER % "ImportError: stale handle"):
        assert error_of(failure(text), began=True).failure_class == "application"


def test_an_error_says_after_which_step() -> None:
    assert report_of([failure()], step=12).step == 12


def test_a_kill_for_memory_is_told_from_any_other() -> None:
    killed = WorkerFailure(local_rank=0, exit_code=-9)
    assert error_of(killed).failure_class == "application"
    known = error_of(killed, memory_ran_out=True)
    assert known.failure_class == "outOfMemory"
    assert "workers.resources.limits.memory" in known.message


def test_a_crash_beside_a_kill_for_memory_stays_a_crash() -> None:
    crashed = WorkerFailure(local_rank=0, exit_code=-11)
    assert error_of(crashed, memory_ran_out=True).failure_class == "application"


@pytest.mark.parametrize(
    "text", ["low 0\noom 3\noom_kill 2\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"]
)
def test_the_kernel_counts_kills_for_memory(tmp_path: Path, text: str) -> None:
    counter = tmp_path / "counter"
    counter.write_text(text)
    assert oom_kills([tmp_path / "absent", counter]) == 2
    assert oom_kills([tmp_path / "absent"]) == 0


def test_a_failed_check_of_the_node_is_known_by_its_name_whatever_it_says() -> None:
    program = (
        "from deepseek_trainer.preflight import PreflightFailed\n"
        "raise PreflightFailed('the exchange of data failed: Connection closed by peer')"
    )
    error = error_of(of_program(program))
    assert error.fingerprint == PREFLIGHT
    assert error.message.endswith(
        "PreflightFailed: the exchange of data failed: Connection closed by peer"
    )
