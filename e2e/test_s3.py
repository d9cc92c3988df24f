"""Checkpoints in a bucket of a real S3 server, with real processes and no cluster.

A training on a cluster that goes on from its bucket is in test_scenarios.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepseek_trainer.agent.dumps import DumpBucket
from deepseek_trainer.bucket import PART_BYTES, Bucket, Conflict
from deepseek_trainer.state import manifest as manifests
from deepseek_trainer.state.manifest import CheckpointManifest
from deepseek_trainer.state.objects import CheckpointBucket
from deepseek_trainer.state.store import CommitRefused
from deepseek_trainer.state.verify import Verifier

from e2e.clusters.shell import wait_until
from e2e.faults.local import LocalStage
from e2e.s3 import S3Server

MINI = Path(__file__).resolve().parent.parent / "examples" / "mini.yaml"
TOKENS_PER_STEP = 16 * 64
OUTAGE_S = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    made = S3Server(tmp_path_factory.mktemp("s3"))
    made.start()
    os.environ |= made.environment
    yield made
    made.kill()
    for name in made.environment:
        del os.environ[name]


@pytest.fixture
def objects(server: S3Server, request: pytest.FixtureRequest) -> Path:
    """The folder of a bucket of this test's own."""
    return server.bucket(request.node.name.replace("_", "-")[:60].strip("-"))


def uri(objects: Path) -> str:
    return f"s3://{objects.name}/runs/one"


def store(objects: Path, staging: Path, training: str = "uid-1") -> CheckpointBucket:
    return CheckpointBucket(Bucket(uri(objects), patience_s=10), staging, training=training)


def draft(made: CheckpointBucket, step: int, generation: int, content: bytes = bytes(1000)) -> str:
    """A complete save of one file."""
    name = made.draft(step, generation)
    folder = made.folder(name)
    folder.mkdir(parents=True)
    files = {}
    for file in ("__0_0.distcp", ".metadata"):
        (folder / file).write_bytes(content)
        files[file] = manifests.describe(folder / file)
    made.upload(name, list(files))
    made.seal(
        name,
        CheckpointManifest(
            step=step,
            tokens=0,
            updates=0,
            generation=generation,
            world=1,
            layout={},
            data={},
            rng={},
            loss_scale={},
            config="",
            architecture={},
            versions={},
            files=files,
        ),
    )
    return name


def flip_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# The store.


def test_a_draft_counts_from_its_commit_on(objects: Path, tmp_path: Path) -> None:
    made = store(objects, tmp_path / "a")
    made.claim(1)
    assert not made.has_history()
    name = draft(made, 20, 1)
    assert made.committed() == []
    made.commit(name, 20)
    assert made.committed() == [20]
    assert made.has_history()
    assert made.manifest(20).folder == name
    latest = json.loads((objects / "runs" / "one" / "LATEST").read_text())
    assert (latest["checkpoint"], latest["generation"]) == ("step-20", 1)
    assert list((tmp_path / "a").iterdir()) == []  # nothing waits for its upload


def test_a_writer_that_was_replaced_commits_nothing(objects: Path, tmp_path: Path) -> None:
    old, new = store(objects, tmp_path / "old"), store(objects, tmp_path / "new")
    old.claim(1)
    late = draft(old, 20, 1)
    new.claim(2)
    with pytest.raises(CommitRefused, match="generation 2"):
        old.commit(late, 20)
    assert new.committed() == []
    new.commit(draft(new, 10, 2), 10)
    with pytest.raises(CommitRefused):
        old.commit(late, 20)
    assert new.committed() == [10]
    with pytest.raises(OSError, match="belongs to generation 2"):
        old.claim(1)


def test_a_writer_that_is_replaced_in_the_middle_of_a_commit_takes_it_back(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = store(objects, tmp_path / "old"), store(objects, tmp_path / "new")
    old.claim(1)
    late = draft(old, 20, 1)
    original = Bucket.put_new

    def replaced(bucket: Bucket, name: str, content: bytes) -> str:
        tag = original(bucket, name, content)
        monkeypatch.undo()
        new.claim(2)
        return tag

    monkeypatch.setattr(Bucket, "put_new", replaced)
    with pytest.raises(CommitRefused, match="another generation has begun"):
        old.commit(late, 20)
    assert new.committed() == []


def test_a_step_is_committed_once(objects: Path, tmp_path: Path) -> None:
    made = store(objects, tmp_path)
    made.claim(1)
    first = draft(made, 20, 1)
    made.commit(first, 20)
    with pytest.raises(CommitRefused, match="committed already"):
        made.commit(draft(made, 20, 1), 20)
    assert made.manifest(20).folder == first


def test_an_answer_that_was_lost_is_no_conflict(objects: Path) -> None:
    bucket = Bucket(uri(objects))
    tag = bucket.put_new("a", b"1")
    assert bucket.put_new("a", b"1") == tag  # the same writer, again
    with pytest.raises(Conflict, match="written by another"):
        bucket.put_new("a", b"2")
    newer = bucket.put_over("a", b"2", tag)
    assert bucket.put_over("a", b"2", tag) == newer
    with pytest.raises(Conflict):
        bucket.put_over("a", b"3", tag)


def test_drafts_of_earlier_generations_are_cleared_and_the_rest_stays(
    objects: Path, tmp_path: Path
) -> None:
    made = store(objects, tmp_path)
    made.claim(1)
    kept = draft(made, 10, 1)
    made.commit(kept, 10)
    twin = draft(made, 10, 1)
    left = draft(made, 20, 1)
    bad = draft(made, 15, 1)
    made.commit(bad, 15)
    made.quarantine(15)
    store(objects, tmp_path).claim(2)
    there = {path.name for path in (objects / "runs" / "one").iterdir()}
    assert {kept, bad, f"{bad}.bad", "step-10", "LATEST"} == there
    assert {twin, left}.isdisjoint(there)


def test_retention_deletes_what_is_not_kept(objects: Path, tmp_path: Path) -> None:
    made = store(objects, tmp_path)
    made.claim(1)
    for step in (10, 20, 30, 40):
        made.commit(draft(made, step, 1), step)
        made.mark_verified(step)
    made.prune(keep_last=2, keep_every_steps=20)
    assert made.committed() == [40, 30, 20]
    folder = objects / "runs" / "one"
    assert sorted(path.name.split(".")[0] for path in folder.iterdir() if path.is_dir()) == [
        *("step-20", "step-20", "step-30", "step-30", "step-40", "step-40")
    ]
    assert not list(folder.glob("step-10*"))


def test_a_damaged_object_is_found_in_the_background_and_its_step_can_be_saved_again(
    objects: Path, tmp_path: Path
) -> None:
    made = store(objects, tmp_path)
    made.claim(1)
    made.commit(draft(made, 10, 1), 10)
    name = draft(made, 20, 1)
    made.commit(name, 20)
    flip_one_bit(objects / "runs" / "one" / name / "__0_0.distcp")
    words: list[str] = []
    verifier = Verifier(
        made,
        verified=lambda: words.append("verified"),
        damaged=lambda: words.append("damaged"),
    )
    verifier.committed()
    verifier.wait()
    assert words == ["damaged", "verified"]
    assert (made.committed(), verifier.last_step) == ([10], 10)
    latest = json.loads((objects / "runs" / "one" / "LATEST").read_text())
    assert latest["checkpoint"] == "step-10"
    made.commit(draft(made, 20, 1), 20)
    assert made.committed() == [20, 10]
    assert made.unverified() == 20


def test_a_large_file_travels_in_parts(objects: Path, tmp_path: Path) -> None:
    content = os.urandom(2 * PART_BYTES + 5)
    (tmp_path / "large").write_bytes(content)
    bucket = Bucket(uri(objects))
    bucket.upload("large", tmp_path / "large")
    assert bucket.get("large").tag.endswith('-3"')  # of three parts
    assert bucket.size("large") == len(content)
    assert bucket.sha256("large", len(content)) == hashlib.sha256(content).hexdigest()


def test_errors_say_what_to_change(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Bucket("s3://no-such-bucket/run")
    for act in (nowhere.names, lambda: nowhere.put("a", b"")):
        with pytest.raises(OSError, match=r"s3://no-such-bucket/run.*correct checkpoint\.uri"):
            act()
    server.bucket("there")
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(OSError, match=r"s3://there.*refused.*AWS_SECRET_ACCESS_KEY"):
            Bucket("s3://there").put("a", b"")
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"s3://there.*AWS_ENDPOINT_URL"):
            Bucket("s3://there", patience_s=1).put("a", b"")


def test_stacks_of_all_pods_are_in_the_bucket(objects: Path) -> None:
    one, other = DumpBucket(uri(objects)), DumpBucket(uri(objects))
    for generation in range(1, 8):
        one.put(generation, "a-0.txt", f"first of {generation}".encode())
    other.put(7, "b-1.txt", b"second")
    other.prune()
    assert sorted(one.texts(7)) == ["first of 7", "second"]
    assert one.texts(2) == []
    assert one.texts(3) == ["first of 3"]
    assert one.place(7) == f"{uri(objects)}/stacks/7"


# Trainings.


def training(objects: Path, *, steps: int, every_steps: int) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(MINI.read_text())
    made["spec"]["training"]["total"] = {"tokens": steps * TOKENS_PER_STEP}
    made["spec"]["parallelism"] = {}
    made["spec"]["workers"] = {"replicas": 2}
    made["spec"]["checkpoint"] = {"uri": uri(objects), "everySteps": every_steps}
    return made


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_loaded(
    objects: Path, tmp_path: Path
) -> None:
    first = LocalStage(training(objects, steps=40, every_steps=20), tmp_path / "a", nodes=1)
    with first.running():
        pass
    (folder,) = (objects / "runs" / "one").glob("step-40.g*-????????")
    flip_one_bit(max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size))
    second = LocalStage(training(objects, steps=60, every_steps=20), tmp_path / "b", nodes=1)
    with second.running():
        pass
    assert second.versions()[-1].status["phase"] == "Complete"
    assert (objects / "runs" / "one" / f"{folder.name}.bad").exists()
    assert store(objects, tmp_path).committed()[0] == 60
    logs = "".join(path.read_text() for path in (tmp_path / "b" / "pods").glob("*/log"))
    assert f"checkpoint 40 in {uri(objects)} is damaged" in logs


def test_a_server_that_is_away_during_a_save_holds_up_nobody(
    server: S3Server, objects: Path, tmp_path: Path
) -> None:
    made = training(objects, steps=400, every_steps=50)
    stage = LocalStage(made, tmp_path / "run", nodes=2)

    def step() -> int:
        versions = stage.versions()
        return int(versions[-1].status.get("progress", {}).get("step", 0)) if versions else 0

    def saved() -> int:
        versions = stage.versions()
        return int(versions[-1].status.get("checkpoint", {}).get("step", 0)) if versions else 0

    with stage.running():
        wait_until(lambda: saved() >= 50, "a save", timeout_s=120)
        server.kill()
        before, last_saved = step(), saved()
        time.sleep(OUTAGE_S)
        during = step()
        server.start()
        assert during > before + 50  # a save was due
        wait_until(lambda: saved() > last_saved, "the next save", timeout_s=60)
    status = stage.versions()[-1].status
    assert (status["phase"], status["generation"]) == ("Complete", 1)
    assert status.get("history", []) == []
