"""Records of collectives, asked for as torch's NCCL ranks expect it; the rank is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepseek_trainer.agent import flight

# What ProcessGroupNCCL's DumpPipe and the recorder's writer do.
RANK = """
    import os, sys, time
    rank = sys.argv[1]
    pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + rank + ".pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    print("ready", flush=True)
    while not os.read(reader, 128):
        time.sleep(0.05)
    with open(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + rank, "wb") as record:
        record.write(b"collectives")
    time.sleep(60)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK), "3"],
        env=os.environ | flight.environment(tmp_path),
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    yield 3
    process.kill()
    process.communicate()


def test_a_rank_that_is_asked_tells_what_it_has_recorded(tmp_path: Path, rank: int) -> None:
    (tmp_path / "flight-3").write_bytes(b"of an earlier time")
    assert flight.ask(tmp_path, rank)
    assert flight.record(tmp_path, rank, deadline_s=time.monotonic() + 10) == b"collectives"


def test_a_rank_without_nccl_is_not_waited_for(tmp_path: Path) -> None:
    assert not flight.ask(tmp_path, 0)


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "flight-0.pipe")
    assert not flight.ask(tmp_path, 0)


def test_a_record_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    assert flight.record(tmp_path, 0, deadline_s=time.monotonic()) == b""
