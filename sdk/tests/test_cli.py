"""The command line without a training: answers, exit codes, and that it starts at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from dstrain.cli import main

GOOD = """
apiVersion: dstrain.dev/v1alpha1
kind: DeepSeekTraining
metadata: {name: mini}
spec:
  model: {preset: mini}
  data: {sources: [{uri: "builtin://mini"}]}
  training: {total: {tokens: 1000000}}
"""


def test_a_good_file_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(GOOD)
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: DeepSeekTraining mini is valid\n"


def test_every_problem_of_a_bad_file_is_told_and_the_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(GOOD.replace("preset: mini", "preset: huge").replace("1000000", "-1"))
    assert main(["validate", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith(f"{path}: spec.") for line in told)


def test_a_run_of_a_bad_file_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(GOOD.replace("sources", "source"))
    assert main(["run", "mini.yaml"]) == 2
    assert "spec.data.source" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2


def write_log(folder: Path, pod: str, text: str, at_s: float) -> None:
    log = folder / "pods" / pod / "log"
    log.parent.mkdir(parents=True)
    log.write_text(text)
    os.utime(log, (at_s, at_s))


@pytest.mark.parametrize(
    ("worker", "text"), [("1", "second try\n"), ("mini-1-1", "first try\n"), ("0", "rank 0\n")]
)
def test_logs_of_a_worker_are_those_of_its_newest_pod(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], worker: str, text: str
) -> None:
    now_s = time.time()
    write_log(tmp_path, "mini-0-1", "rank 0\n", now_s)
    write_log(tmp_path, "mini-1-1", "first try\n", now_s - 10)
    write_log(tmp_path, "mini-1-2", "second try\n", now_s)
    assert main(["logs", "--dir", str(tmp_path), worker]) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == text.encode()


def test_logs_that_are_not_there_are_told_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, "mini-0-1", "", time.time())
    assert main(["logs", "--dir", str(tmp_path), "7"]) == 2
    assert "there are mini-0-1" in capsys.readouterr().err


def test_text_becomes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    output = tmp_path / "corpus"
    code = main(
        ["data", "prepare", str(tmp_path / "a.txt"), "--output", str(output), "--vocabulary", "300"]
    )
    assert code == 0
    assert (output / "manifest.json").exists()
    assert "tokens" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"dstrain {version('dstrain')}\n"


def test_the_command_starts_without_anything_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'kubernetes', 'kopf', 'fastapi', 'asyncio', 'yaml'}"
    program = f"import sys, dstrain, dstrain.cli; print({heavy} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert told.stdout == b"set()\n"


def test_a_script_reports_without_loading_torch() -> None:
    program = (
        "import sys; from dstrain import report; report(step=1); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert told.stdout == b"False\n"
