"""The program as torchrun starts it, and alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

from deepseek_trainer.data.mini import MINI
from deepseek_trainer.state.folder import CheckpointFolder
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CONFIG
from dstrain_api.model import PRESETS

from .examples import config


def run(folder: Path, settings: str, *launcher: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {
        ENV_CONFIG: settings,
        ENV_CHECKPOINT_DIR: str(folder),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, *launcher, "-m", "deepseek_trainer"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", log)]


def test_the_mini_model_learns_its_corpus_in_one_process_and_keeps_the_last_checkpoints(
    tmp_path: Path,
) -> None:
    settings = config(
        steps=80, every_steps=20, keep_last=2, micro_batch=12, architecture=PRESETS["mini"]
    )
    log = run(tmp_path, settings.model_dump_json())
    assert losses(log)[-1] < losses(log)[0] - 1.5
    newest, before, *others = CheckpointFolder(tmp_path).committed()
    assert newest == 80
    assert before >= 60
    assert len(others) <= 2  # two verified ones stay until newer ones are


def test_torchrun_starts_it(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    log = run(tmp_path, config(steps=2, tensor=2).model_dump_json(), *torchrun)
    assert "tensor 2" in log
    assert CheckpointFolder(tmp_path).committed() == [2]


def test_a_finished_training_that_is_started_again_ends_at_once(tmp_path: Path) -> None:
    settings = config(steps=1).model_dump_json()
    first, second = run(tmp_path, settings), run(tmp_path, settings)
    assert len(losses(first)) == 1
    assert losses(second) == []


def test_the_corpus_says_where_it_comes_from_and_why_it_is_free() -> None:
    notice = (MINI / "NOTICE").read_text()
    for text in (MINI / "text").iterdir():
        assert text.stem in notice
    assert "public domain" in notice
