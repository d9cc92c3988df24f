"""Saving and going on: with another number of ranks, after damage, after being told to stop."""

import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepseek_trainer import loop
from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.optim.totals import Flags
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.state.store import NoUsableCheckpoint
from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_REPORT_SOCKET, EXIT_RESTART

from .examples import config
from .ranks import answers, launch, start

STEPS, SAVED = 6, 3
Steps = list[tuple[int, float, list[tuple[int, int]]]]  # step, loss, (source, sample) of all ranks


def trainer_in(folder: Path, settings: TrainerConfig) -> Trainer:
    os.environ[ENV_CHECKPOINT_DIR] = str(folder)
    device = torch.device("cpu") if dist.is_initialized() else join_world()
    return Trainer(settings, device, StopFlag())


def train(folder: Path, settings: TrainerConfig, *, until: int, save: bool) -> Steps:
    """Restore, train until a step is done, and perhaps save there."""
    trainer = trainer_in(folder, settings)
    checkpoints = trainer.checkpointer()
    progress = checkpoints.restore()
    read: list[tuple[int, int]] = []
    trainer.stream.read = _recording(trainer, read)  # type: ignore[method-assign]
    found: Steps = []
    while progress.step < until:
        read.clear()
        totals = trainer.step(progress)
        by_rank: list[Any] = [None] * trainer.mesh.world
        dist.all_gather_object(by_rank, read)
        readers = by_rank[:: trainer.mesh.layout.tensor]  # a tensor group reads the same
        samples = [sample for of_rank in readers for sample in of_rank]
        found.append((progress.step, totals.loss_sum / trainer.tokens_per_step, samples))
    if save:
        checkpoints.save(progress)
        assert checkpoints.settle()
    return found


def _recording(trainer: Trainer, read: list[tuple[int, int]]) -> Callable[[int, int], Any]:
    original = trainer.stream.read

    def recording(begin: int, end: int) -> Any:
        read.extend(trainer.stream.locate(position) for position in range(begin, end))
        return original(begin, end)

    return recording


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps]:
    """A checkpoint of step 3 by four ranks (sharded x tensor), and how they would have gone on."""
    folder = tmp_path_factory.mktemp("four") / "checkpoints"
    settings = config(steps=STEPS, tensor=2)
    launch(4, lambda: train(folder, settings, until=SAVED, save=True))
    return folder, launch(4, lambda: train(folder, settings, until=STEPS, save=False))[0]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {}), (2, {"tensor": 2}), (3, {}), (4, {"tensor": 4})]
)
def test_a_checkpoint_of_four_ranks_goes_on_alike_with_any_other_number(
    world: int, layout: dict[str, int], saved_by_four: tuple[Path, Steps], tmp_path: Path
) -> None:
    saved, expected = saved_by_four
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    settings = config(steps=STEPS, **layout)
    found = launch(world, lambda: train(folder, settings, until=STEPS, save=False))[0]
    assert [step for step, _, _ in found] == [4, 5, 6]
    for (_, loss, samples), (_, expected_loss, expected_samples) in zip(
        found, expected, strict=True
    ):
        assert samples == expected_samples
        assert loss == pytest.approx(expected_loss, rel=1e-5)


DAMAGES: dict[str, Callable[[Path], object]] = {}


def damage(function: Callable[[Path], object]) -> Callable[[Path], object]:
    DAMAGES[function.__name__.replace("_", " ")] = function
    return function


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


@damage
def one_bit_flipped(checkpoint: Path) -> None:
    shard = largest_shard(checkpoint)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@damage
def a_region_zeroed(checkpoint: Path) -> None:
    shard = largest_shard(checkpoint)
    data = bytearray(shard.read_bytes())
    data[10_000:20_000] = bytes(10_000)
    shard.write_bytes(data)


@damage
def a_shard_cut_off(checkpoint: Path) -> None:
    shard = largest_shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[:-100])


@damage
def a_shard_lost(checkpoint: Path) -> None:
    largest_shard(checkpoint).unlink()


@damage
def metadata_lost(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


@damage
def metadata_of_garbage(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"garbage")


@damage
def manifest_lost(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@damage
def manifest_cut_off(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:100])


@damage
def shards_of_two_saves_mixed(checkpoint: Path) -> None:
    older = checkpoint.with_name("step-2")
    name = largest_shard(checkpoint).name
    shutil.copyfile(older / name, checkpoint / name)


def restored_step(folder: Path, settings: TrainerConfig) -> int | str:
    try:
        return trainer_in(folder, settings).checkpointer().restore().step
    except NoUsableCheckpoint as error:
        return str(error)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = config(steps=STEPS)

    def two_checkpoints() -> None:
        train(folder, settings, until=2, save=True)
        train(folder, settings, until=4, save=True)

    launch(2, two_checkpoints)
    copies = {name: shutil.copytree(folder, tmp_path / name) for name in DAMAGES}
    for name, copy in copies.items():
        DAMAGES[name](copy / "step-4")

    def restore_all() -> dict[str, int | str]:
        return {name: restored_step(copy, settings) for name, copy in copies.items()}

    for rank in launch(2, restore_all):
        assert rank == dict.fromkeys(DAMAGES, 2)
    for copy in copies.values():
        assert sorted(path.name for path in copy.iterdir()) == ["LATEST", "step-2", "step-4.bad-1"]
        assert (copy / "LATEST").read_text() == "step-2\n"


def test_no_usable_checkpoint_never_means_starting_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = config(steps=STEPS)
    launch(1, lambda: train(folder, settings, until=2, save=True))
    one_bit_flipped(folder / "step-2")
    first, second = (launch(1, lambda: restored_step(folder, settings))[0] for _ in range(2))
    assert "none is whole" in str(first)
    assert "none is whole" in str(second)  # also when only quarantined ones are left


def test_what_was_cut_off_while_writing_is_removed_and_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = config(steps=STEPS)
    launch(1, lambda: train(folder, settings, until=2, save=True))
    draft = shutil.copytree(folder / "step-2", folder / "step-4.g0.tmp")
    (draft / ".metadata").unlink()
    assert launch(1, lambda: restored_step(folder, settings)) == [2]
    assert not draft.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"seed": 2}}, "training.seed 1, not 2"),
        ({"data": {"sequence_length": 16}}, "other data"),
        ({"architecture": {"hidden": 64}}, "another model"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    change: dict[str, dict[str, int]], words: str, saved_by_four: tuple[Path, Steps], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_by_four[0], tmp_path / "checkpoints")
    settings = config()
    ((part, fields),) = change.items()
    other = getattr(settings, part).model_copy(update=fields)
    settings = settings.model_copy(update={part: other})
    with pytest.raises(AssertionError, match=words):
        launch(1, lambda: restored_step(folder, settings))


def test_a_manifest_says_what_the_state_is(saved_by_four: tuple[Path, Steps]) -> None:
    manifest = json.loads((saved_by_four[0] / f"step-{SAVED}" / "manifest.json").read_text())
    assert manifest["layout"] == {"replicate": 1, "shard": 2, "tensor": 2}
    assert (manifest["step"], manifest["world"], manifest["updates"]) == (SAVED, 4, SAVED)
    assert manifest["data"]["cursor"] == SAVED * 12
    assert sorted(manifest["files"]) == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]
    assert (saved_by_four[0] / "LATEST").read_text().strip() == f"step-{SAVED}"


def test_sigterm_of_one_rank_saves_on_all_at_one_step_and_the_run_ends_as_undisturbed(
    tmp_path: Path,
) -> None:
    settings = config(steps=30, every_steps=1000)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"

    def run(folder: Path, reports: Path) -> int:
        os.environ |= {ENV_CHECKPOINT_DIR: str(folder), ENV_REPORT_SOCKET: str(reports)}
        return loop.main(settings)

    def at_the_end(record: dict[str, Any]) -> bool:
        return bool(record.get("progress", {}).get("step") == 30)

    with Reports(tmp_path / "socket") as reports:
        ranks = start(2, lambda: run(undisturbed, reports.path))
        expected = reports.until(at_the_end)
        reports.until(lambda record: record.get("done", False))
        assert answers(ranks) == [0, 0]

        ranks = start(2, lambda: run(stopped, reports.path))
        reports.until(lambda record: record.get("progress", {}).get("step", 30) < 30)
        os.kill(ranks[1][0].pid or 0, signal.SIGTERM)
        assert answers(ranks) == [EXIT_RESTART, 0]
        (saved,) = stopped.glob("step-*")
        saved_step = int(saved.name.removeprefix("step-"))
        assert 0 < saved_step < 30

        ranks = start(2, lambda: run(stopped, reports.path))
        found = reports.until(at_the_end)
        assert answers(ranks) == [0, 0]
    assert found["progress"]["loss"] == expected["progress"]["loss"]
    assert found["progress"]["resumedStep"] == saved_step


class Reports:
    """The agent's end of the report socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            record: dict[str, Any] = json.loads(self.socket.recv(65_536))
            if wanted(record):
                return record


def full_storage(folder: Path) -> str:
    """Rank 1 has no room for its shard: a save that may fail, then one that must not."""
    trainer = trainer_in(folder, config(steps=STEPS))
    checkpoints = trainer.checkpointer()
    progress = checkpoints.restore()
    trainer.step(progress)
    if trainer.mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    checkpoints.keep(progress, Flags(save=True))
    trainer.step(progress)
    checkpoints.save(progress)
    with pytest.raises(OSError, match="step 2 cannot be saved") as refused:
        checkpoints.settle()
    return str(refused.value)


def test_full_storage_does_not_stop_training_until_a_save_is_needed(tmp_path: Path) -> None:
    for reason in launch(2, full_storage, tmp_path / "checkpoints"):
        assert "may be full or away" in reason
    assert list((tmp_path / "checkpoints").glob("step-*")) == []
