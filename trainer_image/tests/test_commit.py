"""Commits, the checkpoint folder and reports, without a model."""

import json
import math
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from deepseek_trainer import reporting
from deepseek_trainer.agent.client import Unreachable
from deepseek_trainer.state.commit import Committer, ask_coordinator
from deepseek_trainer.state.folder import CheckpointFolder
from dstrain_api import constants
from dstrain_api.protocol import Commit, ProgressReport, Verdict


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def draft(folder: CheckpointFolder, step: int, generation: int = 1) -> str:
    name = folder.draft(step, generation)
    folder.folder(name).mkdir()
    (folder.folder(name) / "shard").write_text(f"{step} of {generation}")
    return name


class Coordinator:
    """Answers commits when the test says so."""

    def __init__(self) -> None:
        self.asked: Queue[tuple[int, str]] = Queue()
        self.answers: Queue[Verdict | Unreachable] = Queue()

    def ask(self, step: int, uri: str) -> Verdict:
        self.asked.put((step, uri))
        answer = self.answers.get(timeout=10)
        if isinstance(answer, Unreachable):
            raise answer
        return answer


YES, NO = Verdict(accepted=True), Verdict(accepted=False, reason="generation 1 is over")


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


def committer(folder: CheckpointFolder, coordinator: Coordinator) -> tuple[Committer, list[int]]:
    steps: list[int] = []

    def committed(step: int, _seconds: float) -> None:
        steps.append(step)

    made = Committer(folder, ask=coordinator.ask, uri="pvc://claim/run/", committed=committed)
    return made, steps


def test_an_accepted_draft_gets_its_name_and_latest_points_to_it(
    folder: CheckpointFolder, coordinator: Coordinator
) -> None:
    commits, steps = committer(folder, coordinator)
    coordinator.answers.put(YES)
    commits.submit(40, draft(folder, 40), began_s=0.0)
    assert commits.wait().accepted
    assert coordinator.asked.get() == (40, "pvc://claim/run/step-40")
    assert folder.committed() == [40]
    assert (folder.root / "LATEST").read_text() == "step-40\n"
    assert steps == [40]


def test_a_refused_draft_is_deleted(folder: CheckpointFolder, coordinator: Coordinator) -> None:
    commits, steps = committer(folder, coordinator)
    coordinator.answers.put(NO)
    commits.submit(40, draft(folder, 40), began_s=0.0)
    assert commits.wait() == NO
    assert list(folder.root.iterdir()) == []
    assert steps == []


def test_a_coordinator_that_is_away_is_asked_again_and_training_is_not_held_up(
    folder: CheckpointFolder, coordinator: Coordinator
) -> None:
    commits, steps = committer(folder, coordinator)
    commits.submit(40, draft(folder, 40), began_s=0.0)  # returns although nobody answers
    coordinator.answers.put(Unreachable("away"))
    coordinator.answers.put(YES)
    assert commits.wait().accepted
    assert steps == [40]


def test_the_next_save_takes_the_place_of_a_draft_that_waits(
    folder: CheckpointFolder, coordinator: Coordinator
) -> None:
    commits, steps = committer(folder, coordinator)
    commits.submit(40, draft(folder, 40), began_s=0.0)
    assert coordinator.asked.get(timeout=10)[0] == 40
    commits.submit(50, draft(folder, 50), began_s=0.0)
    commits.submit(60, draft(folder, 60), began_s=0.0)
    coordinator.answers.put(Unreachable("away"))
    coordinator.answers.put(YES)
    assert commits.wait().accepted
    assert coordinator.asked.get(timeout=10)[0] == 60
    assert steps == [60]
    assert sorted(path.name for path in folder.root.iterdir()) == ["LATEST", "step-60"]


def test_a_commit_that_cannot_be_written_is_told_to_who_waits_and_the_next_one_may_succeed(
    folder: CheckpointFolder, coordinator: Coordinator
) -> None:
    commits, steps = committer(folder, coordinator)
    coordinator.answers.put(YES)
    commits.submit(40, "never-written", began_s=0.0)
    with pytest.raises(FileNotFoundError):
        commits.wait()
    coordinator.answers.put(YES)
    commits.submit(50, draft(folder, 50), began_s=0.0)
    assert commits.wait().accepted
    assert steps == [50]


def test_a_checkpoint_counts_when_it_has_its_name_whatever_latest_says(
    folder: CheckpointFolder,
) -> None:
    """As after a kill between the two renames of a commit."""
    folder.commit(draft(folder, 40), 40)
    folder.folder(draft(folder, 50)).rename(folder.path(50))
    assert (folder.root / "LATEST").read_text() == "step-40\n"
    assert folder.committed() == [50, 40]


def test_a_step_that_an_earlier_generation_committed_late_gives_way(
    folder: CheckpointFolder,
) -> None:
    folder.commit(draft(folder, 40, generation=1), 40)
    folder.commit(draft(folder, 40, generation=2), 40)
    assert (folder.root / "step-40" / "shard").read_text() == "40 of 2"
    assert sorted(path.name for path in folder.root.iterdir()) == ["LATEST", "step-40"]


def test_the_newest_are_kept_and_the_multiples(folder: CheckpointFolder) -> None:
    for step in range(10, 110, 10):
        folder.commit(draft(folder, step), step)
        folder.prune(keep_last=2, keep_every_steps=30)
    assert folder.committed() == [100, 90, 60, 30]


def test_only_drafts_of_earlier_generations_are_cleared(folder: CheckpointFolder) -> None:
    folder.commit(draft(folder, 10), 10)
    for generation in (1, 2, 3):
        draft(folder, 20, generation)
    folder.claim(generation=2)
    assert sorted(path.name for path in folder.root.iterdir()) == [
        "LATEST",
        "step-10",
        "step-20.g3.tmp",
    ]


def test_a_folder_that_is_not_there_has_no_history(tmp_path: Path) -> None:
    assert not CheckpointFolder(tmp_path / "none").has_history()


class Server:
    """A coordinator behind HTTP."""

    def __init__(self) -> None:
        self.status, self.verdict = 200, YES
        self.requests: list[tuple[str, str | None, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers["Authorization"], body))
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.verdict.model_dump_json().encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    for name, value in {
        constants.ENV_COORDINATOR: made.address,
        constants.ENV_TRAINING_UID: "uid-1",
        constants.ENV_TOKEN: "secret",
        constants.ENV_POD_UID: "pod-1",
        constants.ENV_GENERATION: "3",
    }.items():
        monkeypatch.setenv(name, value)
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_the_question_names_the_generation_and_carries_the_token(server: Server) -> None:
    assert ask_coordinator(40, "pvc://claim/step-40").accepted
    ((path, token, body),) = server.requests
    assert (path, token) == ("/v1/trainings/uid-1/commit", "Bearer secret")
    commit = Commit(pod_uid="pod-1", generation=3, step=40, uri="pvc://claim/step-40")
    assert Commit.model_validate(body) == commit


def test_a_pod_that_was_replaced_is_refused(server: Server) -> None:
    server.status = 410
    assert "replaced" in ask_coordinator(40, "uri").reason


@pytest.mark.parametrize("status", [404, 500, 503])
def test_another_error_means_ask_again(server: Server, status: int) -> None:
    server.status = status
    with pytest.raises(Unreachable, match=str(status)):
        ask_coordinator(40, "uri")


def test_nobody_there_means_ask_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(Unreachable, match="refused"):
        ask_coordinator(40, "uri")


def test_without_a_coordinator_every_commit_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(constants.ENV_COORDINATOR, raising=False)
    assert ask_coordinator(40, "uri").accepted


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "reports"
    monkeypatch.setenv(constants.ENV_REPORT_SOCKET, str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.settimeout(5)
        yield listening


def test_rank_zero_reports_progress_the_protocol_understands(
    agent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    reporting.report(step=12, loss=4.5, tokens=1200, metrics={"dstrain_grad_norm": 0.5})
    record = json.loads(agent.recv(65_536))
    assert record["rankStep"] == 12
    assert record["metrics"] == {"dstrain_grad_norm": 0.5}
    progress = ProgressReport.model_validate(record["progress"])
    assert progress == ProgressReport(step=12, loss=4.5, tokens=1200)


def test_what_is_not_finite_is_left_out(
    agent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    reporting.report(step=12, loss=math.nan, metrics={"dstrain_grad_norm": math.inf})
    record = json.loads(agent.recv(65_536))
    assert record["progress"] == {"step": 12, "stragglers": []}
    assert record["metrics"] == {}


def test_another_rank_reports_its_step_only(
    agent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")
    reporting.report(step=12, loss=4.5)
    assert json.loads(agent.recv(65_536)) == {"localRank": 1, "rankStep": 12}


@pytest.mark.parametrize("path", ["", "/nowhere/reports"])
def test_a_report_never_fails(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(constants.ENV_REPORT_SOCKET, path)
    reporting.report(step=1)


def test_a_report_does_not_wait_for_a_reader_that_is_slow(agent: socket.socket) -> None:
    for step in range(2000):  # more than any queue holds
        reporting.report(step=step)
    assert os.path.exists(os.environ[constants.ENV_REPORT_SOCKET])  # noqa: PTH110
