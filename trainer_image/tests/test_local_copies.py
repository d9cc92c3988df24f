"""The local tier: what a killed process leaves in its pod's memory, and when it counts."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.optim.totals import Flags
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.state.checkpoint import Checkpointer, Offer, common_copies
from deepseek_trainer.state.local import CopyId, LocalCopies, file_size, free_memory, open_copies
from deepseek_trainer.state.progress import Progress
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_GENERATION, ENV_LOCAL_DIR
from torch.distributed.tensor import DTensor

from .examples import config
from .ranks import launch, start

WORLD = 2
SETTINGS = config(steps=20, every_steps=1000)


@pytest.fixture
def pod() -> Iterator[Path]:
    """A pod: its memory, and the folder that all share."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def begin(pod: Path, generation: int) -> tuple[Trainer, Checkpointer, Progress]:
    os.environ |= {
        ENV_CHECKPOINT_DIR: str(pod / "checkpoints"),
        ENV_GENERATION: str(generation),
        ENV_LOCAL_DIR: str(pod),
        "LOCAL_WORLD_SIZE": str(WORLD),
    }
    trainer = Trainer(SETTINGS, join_world(), StopFlag())
    checkpoints = trainer.checkpointer()
    return trainer, checkpoints, checkpoints.restore()


def train(
    pod: Path, *, generation: int = 1, to: int, copy: tuple[int, ...] = (), save: bool = False
) -> tuple[int, list[float]]:
    """Resume, train to a step, keep copies of some; the step it resumed from, and its losses."""
    trainer, checkpoints, progress = begin(pod, generation)
    resumed, losses = progress.step, []
    while progress.step < to:
        losses.append(trainer.step(progress).loss_sum)
        if progress.step in copy:
            checkpoints.keep(progress, Flags(copy=True))
            assert checkpoints.settle()
    if save:
        checkpoints.save(progress)
        assert checkpoints.settle()
    return resumed, losses


def test_the_next_generation_goes_on_from_the_newest_copy_as_if_nothing_had_happened(
    pod: Path,
) -> None:
    (pod / "other").mkdir()
    undisturbed = launch(WORLD, lambda: train(pod / "other", to=5, copy=()))[0][1]
    launch(WORLD, lambda: train(pod, to=3, copy=(1, 2, 3)))
    for resumed, losses in launch(WORLD, lambda: train(pod, generation=2, to=5)):
        assert resumed == 3
        assert losses == undisturbed[3:]


def test_a_newer_checkpoint_wins_over_a_copy(pod: Path) -> None:
    launch(WORLD, lambda: train(pod, to=3, copy=(2,), save=True))
    assert launch(WORLD, lambda: train(pod, generation=2, to=4))[0][0] == 3


def test_a_copy_wins_over_an_older_checkpoint(pod: Path) -> None:
    launch(WORLD, lambda: train(pod, to=2, save=True))
    launch(WORLD, lambda: train(pod, generation=2, to=4, copy=(4,)))
    assert launch(WORLD, lambda: train(pod, generation=3, to=5))[0][0] == 4


def test_where_one_rank_has_another_step_the_one_before_is_used(pod: Path) -> None:
    """As when rank 1 was killed before it had completed its copy of step 3."""

    def killed_early() -> None:
        trainer, checkpoints, progress = begin(pod, 1)
        for step in (1, 2, 3):
            trainer.step(progress)
            if trainer.mesh.rank == 0 or step < 3:
                checkpoints.keep(progress, Flags(copy=True))
            checkpoints.settle()

    launch(WORLD, killed_early)
    assert launch(WORLD, lambda: train(pod, generation=2, to=3))[0][0] == 2


def test_a_damaged_copy_on_one_rank_is_used_on_none(pod: Path) -> None:
    launch(WORLD, lambda: train(pod, to=3, copy=(2, 3)))
    file = pod / "process-1"
    data = bytearray(file.read_bytes())
    half = len(data) // 2
    newest = max((0, half), key=lambda at: data[at : at + 600].find(b'"step": 3'))
    data[newest + 65_536 + 1000] ^= 1
    file.write_bytes(data)
    assert launch(WORLD, lambda: train(pod, generation=2, to=3))[0][0] == 2


def test_going_back_to_a_checkpoint_ends_the_timeline_of_the_copies(pod: Path) -> None:
    launch(WORLD, lambda: train(pod, to=2, save=True))
    launch(WORLD, lambda: train(pod, generation=2, to=4, copy=(4,)))
    hidden = (pod / "process-1").rename(pod / "hidden")  # pod 1 is replaced: its memory is gone
    assert launch(WORLD, lambda: train(pod, generation=3, to=3))[0][0] == 2
    hidden.rename(pod / "process-1")  # and the old one is back
    assert launch(WORLD, lambda: train(pod, generation=4, to=3))[0][0] == 2


ONE, TWO = CopyId(4, 2, 0), CopyId(6, 2, 0)


@pytest.mark.parametrize(
    ("held", "newest", "usable"),
    [
        (([ONE, TWO], [TWO, ONE]), (3, 1), [TWO, ONE]),
        (([ONE, TWO], [ONE]), (3, 1), [ONE]),
        (([ONE, TWO], [ONE, TWO]), (4, 1), [TWO]),
        (([ONE], [CopyId(4, 3, 0)]), (3, 1), []),  # the same step of two generations
        (([ONE], [CopyId(4, 2, 1)]), (3, 1), []),  # before and after a rollback
        (([ONE, TWO], [ONE, TWO]), (3, 3), []),  # a later generation has committed since
        (([ONE], None), (3, 1), []),
        (([], []), (0, 0), []),
    ],
)
def test_a_copy_counts_if_all_hold_the_same_and_no_checkpoint_has_overtaken_it(
    held: tuple[list[CopyId] | None, ...], newest: tuple[int, int], usable: list[CopyId]
) -> None:
    assert common_copies([Offer(copies, newest=newest) for copies in held]) == usable


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(10.0), "b": torch.arange(3), "empty": torch.empty(0)}


def copies_in(folder: Path, identity: str = "this training") -> LocalCopies:
    opened = open_copies(folder, tensors(), identity)
    assert opened
    return opened


def put(copies: LocalCopies, step: int) -> None:
    copies.begin().take()
    copies.complete(CopyId(step, 1, 0), progress={"step": step}, updates=step)


def steps(copies: LocalCopies) -> list[int]:
    return sorted(copy.id.step for copy in copies.held())


def test_the_two_newest_copies_are_held_and_found_again(pod: Path) -> None:
    copies = copies_in(pod)
    for step in (1, 2, 3):
        put(copies, step)
    assert steps(copies_in(pod)) == [2, 3]
    copies_in(pod).begin()
    assert steps(copies_in(pod)) == [3]  # the older gave way


@pytest.mark.parametrize("byte", [0, 9, 16, 40])
def test_a_label_that_was_cut_off_does_not_count(pod: Path, byte: int) -> None:
    put(copies_in(pod), 1)
    with (pod / "process-0").open("r+b") as file:
        file.seek(byte)
        file.write(b"\xff")
    assert steps(copies_in(pod)) == []


def test_copies_of_another_training_or_place_do_not_count(pod: Path) -> None:
    put(copies_in(pod), 1)
    assert steps(copies_in(pod, "another rank")) == []


def test_without_room_for_two_copies_there_are_none_and_the_log_says_why(
    pod: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deepseek_trainer.state.local.free_memory", lambda: 1000.0)
    assert open_copies(pod, tensors(), "") is None
    assert "raise workers.sharedMemory" in caplog.text
    assert list(pod.iterdir()) == []
    assert file_size(tensors()) > 1000


def group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 400\nfile 300\ninactive_file 200\n")
    return folder


@pytest.mark.parametrize(
    ("make", "free"),
    [
        (lambda folder: group(folder, "1000"), 500),
        (lambda folder: group(folder, "max"), float("inf")),
        (lambda folder: folder, float("inf")),
    ],
)
def test_free_memory_is_the_limit_less_what_cannot_be_given_back(
    make: Callable[[Path], Path], free: float, tmp_path: Path
) -> None:
    assert free_memory(make(tmp_path)) == free


def train_and_note(pod: Path, generation: int, notes: Path) -> None:
    """Train for ever, copy as often as possible, and note a digest of the state of every step."""
    trainer, checkpoints, progress = begin(pod, generation)
    with (notes / str(trainer.mesh.rank)).open("a", buffering=1) as file:
        file.write(f"resumed {progress.step} {digest(trainer)}\n")
        while True:
            wish = Flags(copy=True, busy=checkpoints.flags(0).busy)
            checkpoints.keep(progress, trainer.step(progress, wish).flags)
            file.write(f"made {progress.step} {digest(trainer)}\n")


def digest(trainer: Trainer) -> str:
    sha = hashlib.sha256()
    for tensor in [*trainer.model.parameters(), *trainer.optimizer.moments().values()]:
        assert isinstance(tensor, DTensor)
        sha.update(tensor.to_local().detach().numpy().tobytes())
    return sha.hexdigest()


def test_whenever_processes_are_killed_a_state_is_resumed_that_all_of_them_had(
    pod: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    for generation in range(1, 5):
        ranks = start(WORLD, train_and_note, pod, generation, tmp_path)
        before = lines(tmp_path)
        while lines(tmp_path) < before + 2 * rng.randint(4, 12):
            time.sleep(rng.uniform(0.001, 0.01))
        for process, _ in ranks:
            process.kill()
        for process, _ in ranks:
            process.join()
    resumed = []
    for file in sorted(tmp_path.iterdir()):
        made: dict[str, str] = {}
        for line in file.read_text().splitlines():
            kind, step, sha = line.split()
            assert made.setdefault(step, sha) == sha  # the same numbers the second time
            if kind == "resumed":
                resumed.append(int(step))
    assert resumed[:4] == resumed[4:]
    assert resumed == sorted(resumed[:4]) * 2
    assert resumed[-1] > 0


def lines(notes: Path) -> int:
    return sum(file.read_text().count("\n") for file in notes.iterdir())
