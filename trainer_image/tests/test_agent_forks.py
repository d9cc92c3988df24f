"""A worker that is forked from the preloaded server is what a fresh interpreter would be."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepseek_trainer.agent.forks import PR_SET_CHILD_SUBREAPER, ForkServer, RankProcess
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CONFIG

from .examples import config

PATIENCE_S = 60.0

# What a program can see of how it was started.
LOOK = """
    import json, os, sys, threading
    import torch
    status = open("/proc/self/status").read().splitlines()
    print(json.dumps({
        "name": __name__, "file": __file__, "spec": bool(__spec__), "argv": sys.argv,
        "path": sys.path, "cwd": os.getcwd(), "umask": os.umask(0o22), "flags": str(sys.flags),
        "signals": [line for line in status if line.startswith(("SigBlk", "SigIgn"))],
        "threads": threading.active_count(), "torch": torch.get_num_threads(),
        "leader": os.getsid(0) == os.getpid(),
        "main": sys.modules["__main__"].__dict__ is globals(),
        "own": os.environ["OWN"], "home": os.environ.get("HOME"),
        "files": sorted(os.listdir("/proc/self/fd"))[:3], "buffered": sys.stdout.line_buffering,
        "unnamed": sorted(set(globals()) - {"status"}),
    }))
"""
RAISE = """
    def inner():
        raise ValueError("no such sample")
    def outer():
        try:
            {}["x"]
        except KeyError as error:
            inner()
    outer()
"""


class Ranks:
    """Programs in one folder, started by fork or afresh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = ForkServer()

    def command(self, source: str, *arguments: str, module: bool = False) -> list[str]:
        name = f"program_{len(list(self.folder.iterdir()))}"
        path = self.folder / f"{name}.py"
        path.write_text(textwrap.dedent(source))
        target = ["-m", name] if module else [str(path)]
        return [sys.executable, "-u", *target, *arguments]

    def fork(self, command: list[str], **environment: str) -> RankProcess | None:
        with (
            Path(os.devnull).open() as nothing,
            (self.folder / "out").open("w") as out,
            (self.folder / "err").open("w") as err,
        ):
            return self.server.fork(
                command,
                os.environ | {"OWN": "x"} | environment,
                (nothing.fileno(), out.fileno(), err.fileno()),
                title="dstrain-rank-7",
                stacks=self.folder / "stacks",
            )

    def forked(self, command: list[str], **environment: str) -> tuple[int, str, str]:
        rank = self.fork(command, **environment)
        assert rank
        code = rank.wait(PATIENCE_S)
        return code, (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def fresh(self, command: list[str]) -> tuple[int, str, str]:
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | {"OWN": "x"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("programs")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Ranks(folder)
        assert made.forked(made.command("pass")) == (0, "", "")  # it is there
        yield made
    # From here on orphans of other tests are init's to collect, not this process's.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.parametrize("module", [True, False])
def test_a_program_sees_what_it_would_see_in_a_fresh_interpreter(
    ranks: Ranks, module: bool
) -> None:
    command = ranks.command(LOOK, "--flag", "a b", module=module)
    forked, fresh = ranks.forked(command), ranks.fresh(command)
    assert (forked[0], fresh[0]) == (0, 0), (forked, fresh)
    assert json.loads(forked[1]) == json.loads(fresh[1])


@pytest.mark.parametrize("module", [True, False])
def test_a_traceback_is_the_same_to_the_letter(ranks: Ranks, module: bool) -> None:
    command = ranks.command(RAISE, module=module)
    forked = ranks.forked(command)
    assert forked == ranks.fresh(command)
    assert forked[0] == 1


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit('in words')", 1),
        ("import os; os._exit(9)", 9),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import atexit; atexit.register(print, 'bye')", 0),
        ("import threading, time; threading.Timer(0.2, print, ['late']).start()", 0),
    ],
)
def test_it_ends_as_a_fresh_one_would(ranks: Ranks, source: str, code: int) -> None:
    command = ranks.command(source)
    forked, fresh = ranks.forked(command), ranks.fresh(command)
    assert (forked[0], fresh[0]) == (code, code)
    assert forked[1] == fresh[1]


def test_a_crash_says_where_it_happened(ranks: Ranks) -> None:
    code, _, err = ranks.forked(ranks.command("import os; os.kill(os.getpid(), 11)"))
    assert code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in err


def test_a_class_of_the_program_can_be_pickled(ranks: Ranks) -> None:
    source = """
        import pickle
        class Sample: pass
        print(type(pickle.loads(pickle.dumps(Sample()))) is Sample)
    """
    assert ranks.forked(ranks.command(source))[:2] == (0, "True\n")


def test_two_forks_draw_different_random_numbers(ranks: Ranks) -> None:
    source = """
        import random, numpy, torch
        print(random.random(), numpy.random.rand(), torch.rand(()).item())
    """
    command = ranks.command(source)
    first, second = (ranks.forked(command)[1].split() for _ in range(2))
    assert not set(first) & set(second)


def test_sigterm_reaches_the_program_and_a_signal_to_its_group_what_it_has_started(
    ranks: Ranks,
) -> None:
    source = """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    for ended_by, code in ((os.kill, 3), (os.killpg, -signal.SIGKILL)):
        rank = ranks.fork(ranks.command(source))
        assert rank
        while not (said := (ranks.folder / "out").read_text()).endswith("\n"):
            time.sleep(0.01)
        assert rank.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(0)
        ended_by(rank.pid, signal.SIGTERM if code > 0 else signal.SIGKILL)
        assert rank.wait(PATIENCE_S) == code
        os.kill(int(said), signal.SIGKILL) if code > 0 else None
        assert Path(f"/proc/{rank.pid}").exists() is False


def test_people_see_which_rank_a_process_is(ranks: Ranks) -> None:
    command = ranks.command("print(open('/proc/self/comm').read())")
    assert ranks.forked(command)[1].strip() == "dstrain-rank-7"


@pytest.mark.parametrize(
    "command",
    [
        ["/bin/true"],
        [sys.executable, "-u", "/no/such/script.py"],
        [sys.executable, "-u", "/tmp"],
        [sys.executable, "-I", "-u", "-m", "this"],
    ],
)
def test_what_only_a_fresh_interpreter_starts_rightly_is_refused(
    ranks: Ranks, command: list[str]
) -> None:
    assert ranks.fork(command) is None


def test_a_module_of_the_user_in_the_place_of_a_loaded_one_is_respected(
    ranks: Ranks, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.touch()
    command = [sys.executable, "-u", str(script)]
    assert ranks.fork(command)
    (tmp_path / "numpy.py").touch()
    assert ranks.fork(command) is None


def test_the_first_step_finds_what_it_imports_loaded(ranks: Ranks, tmp_path: Path) -> None:
    source = """
        import json, os, sys
        before = set(sys.modules)
        from dstrain_api.config import TrainerConfig
        from deepseek_trainer.loop import main
        assert main(TrainerConfig.model_validate_json(os.environ["DSTRAIN_CONFIG"])) == 0
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    code, out, err = ranks.forked(
        ranks.command(source),
        **{ENV_CONFIG: config(steps=1).model_dump_json(), ENV_CHECKPOINT_DIR: str(tmp_path)},
    )
    assert code == 0, err
    late: list[Any] = json.loads(out.splitlines()[-1])
    assert len(late) < 10, late


def test_ranks_outlive_a_killed_server_and_another_takes_its_place(ranks: Ranks) -> None:
    rank = ranks.fork(ranks.command("import time; time.sleep(0.5)"))
    assert rank
    killed = ranks.server.pid
    os.kill(killed, signal.SIGKILL)
    command = ranks.command("print('here')")
    assert ranks.fork(command) is None  # not waited for
    assert rank.wait(PATIENCE_S) == 0
    deadline_s = time.monotonic() + PATIENCE_S
    while (again := ranks.fork(command)) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert again.wait(PATIENCE_S) == 0
    assert ranks.server.pid != killed
