"""Retention, room on the storage, and checkpoints that are read back after their commit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from deepseek_trainer.state import manifest
from deepseek_trainer.state.folder import CheckpointFolder
from deepseek_trainer.state.manifest import CheckpointManifest
from deepseek_trainer.state.store import kept_steps
from deepseek_trainer.state.verify import Verifier

from .ranks import launch
from .test_resume import config, one_bit_flipped, train, trainer_in


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def commit(folder: CheckpointFolder, step: int) -> Path:
    name = folder.draft(step, 1)
    draft = folder.folder(name)
    draft.mkdir()
    files = {}
    for file in ("__0_0.distcp", ".metadata"):
        (draft / file).write_bytes(bytes(1000))
        files[file] = manifest.describe(draft / file)
    facts = CheckpointManifest(
        step=step,
        tokens=0,
        updates=0,
        generation=1,
        world=1,
        layout={},
        data={},
        rng={},
        loss_scale={},
        config="",
        architecture={},
        versions={},
        files=files,
    )
    folder.seal(name, facts)
    folder.commit(name, step)
    return folder.path(step)


class Heard:
    def __init__(self) -> None:
        self.words: list[str] = []

    def verifier(self, folder: CheckpointFolder) -> Verifier:
        return Verifier(
            folder,
            verified=lambda: self.words.append("verified"),
            damaged=lambda: self.words.append("damaged"),
        )


def test_a_committed_checkpoint_is_read_back_and_marked(folder: CheckpointFolder) -> None:
    heard = Heard()
    verifier = heard.verifier(folder)
    path = commit(folder, 10)
    verifier.committed()
    verifier.wait()
    assert heard.words == ["verified"]
    assert verifier.last_step == 10
    assert (path / "verified").exists()
    assert folder.unverified() is None


def test_one_that_went_bad_is_put_aside_and_latest_names_the_one_before(
    folder: CheckpointFolder,
) -> None:
    heard = Heard()
    verifier = heard.verifier(folder)
    commit(folder, 10)
    one_bit_flipped(commit(folder, 20))
    verifier.committed()
    verifier.wait()
    assert heard.words == ["damaged", "verified"]
    assert verifier.last_step == 10
    assert sorted(path.name for path in folder.root.iterdir()) == [
        "LATEST",
        "step-10",
        "step-20.bad-1",
    ]
    assert (folder.root / "LATEST").read_text() == "step-10\n"


def test_storage_that_is_away_says_nothing_about_a_checkpoint(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> list[str]:
        raise OSError("the server does not answer")

    heard = Heard()
    verifier = heard.verifier(folder)
    commit(folder, 10)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_trainer.state.verify.problems_of", away)
        verifier.committed()
        verifier.wait()
    assert "does not answer" in caplog.text
    assert heard.words == []
    verifier.committed()
    verifier.wait()
    assert heard.words == ["verified"]


@pytest.mark.parametrize(
    ("steps", "verified", "every", "kept"),
    [
        ([40, 30, 20, 10], [40, 30], 0, {40, 30}),
        ([40, 30, 20, 10], [20, 10], 0, {40, 30, 20, 10}),
        ([40, 30, 20, 10], [30, 10], 0, {40, 30, 10}),
        ([40, 30, 20, 10], [], 0, {40, 30}),
        ([104, 101, 61, 55, 33, 30, 12], [104, 101], 30, {104, 101, 61, 30}),
    ],
)
def test_the_newest_stay_and_the_newest_verified_and_the_first_after_each_multiple(
    steps: list[int], verified: list[int], every: int, kept: set[int]
) -> None:
    assert kept_steps(steps, verified, keep_last=2, keep_every_steps=every) == kept


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def crowded(root: Path, free: Callable[[int], int]) -> tuple[list[str], str]:
    """Save once more where `free(checkpoints)` bytes are free."""
    trainer = trainer_in(root, config(keep_last=5))
    checkpoints = trainer.checkpointer()
    progress = checkpoints.restore()
    trainer.step(progress)
    shutil.disk_usage = lambda _: Usage(0, 0, free(len(list(root.glob("step-*")))))  # type: ignore[assignment]
    checkpoints.save(progress)
    try:
        checkpoints.settle()
    except OSError as error:
        return [path.name for path in root.glob("step-*")], str(error)
    return [path.name for path in root.glob("step-*")], ""


@pytest.fixture
def three(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        launch(1, lambda step=step: train(root, config(keep_last=5), until=step, save=True))
    return root


def test_older_checkpoints_make_room_for_a_save(three: Path) -> None:
    ((names, problem),) = launch(1, crowded, three, lambda count: 10**9 if count <= 2 else 0)
    assert problem == ""
    assert sorted(names) == ["step-2", "step-3", "step-4"]


def test_without_room_nothing_is_written_and_two_checkpoints_stay(three: Path) -> None:
    for names, problem in launch(2, crowded, three, lambda _: 1000):
        assert "step 4 cannot be saved" in problem
        assert "make room there" in problem
        assert sorted(names) == ["step-2", "step-3"]
