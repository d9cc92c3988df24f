"""What a person sees of a local run."""

from __future__ import annotations

import io
import os

import pytest
from dstrain.local.terminal import Terminal
from dstrain.local.view import Story, brief, closing, progress_line
from dstrain_api.status import (
    CheckpointStatus,
    Condition,
    DeepSeekTrainingStatus,
    HistoryEntry,
    Progress,
    Restarts,
    Summary,
)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def running() -> DeepSeekTrainingStatus:
    return DeepSeekTrainingStatus(
        phase="Running",
        progress=Progress(step=200, total_steps=488, tokens=409_600, loss=4.31),
        checkpoint=CheckpointStatus(step=180),
        summary=Summary(
            progress="40%",
            step="200/488",
            tokens_per_second="5.2k",
            eta="42s",
            workers="2/2",
            restarts="1",
            loss="4.310",
        ),
    )


def test_one_line_says_how_far_and_how_fast() -> None:
    assert progress_line(running()) == (
        "Running  40%  step 200/488  loss 4.310  5.2k tok/s  ETA 42s  workers 2/2"
        "  restarts 1  checkpoint 180"
    )


def test_before_the_first_step_only_what_is_known_is_said() -> None:
    assert progress_line(DeepSeekTrainingStatus()) == "Pending  workers 0/0"


def test_on_a_terminal_the_line_is_replaced_and_events_stand_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    terminal = Terminal(screen)
    terminal.progress("Running  1%", "Running")
    terminal.say("- Started")
    terminal.progress("Running  2%", "Running")
    assert screen.getvalue() == (
        "\r\x1b[2KRunning  1%\r\x1b[2K- Started\nRunning  1%\r\x1b[2KRunning  2%"
    )


def test_colours_mark_the_phase_unless_they_are_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for unwanted, text in (("", "\x1b[32mRunning\x1b[0m  1%"), ("1", "Running  1%")):
        monkeypatch.setenv("NO_COLOR", unwanted)
        screen = Screen()
        Terminal(screen).progress("Running  1%", "Running")
        assert screen.getvalue() == f"\r\x1b[2K{text}"


def test_a_line_too_long_for_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 24)))
    screen = Screen()
    Terminal(screen).progress("Pending " + "x" * 50, "Pending")
    assert len(screen.getvalue().removeprefix("\r\x1b[2K")) == 19


def test_elsewhere_a_line_is_printed_when_the_phase_changes_and_now_and_then() -> None:
    out = io.StringIO()
    terminal = Terminal(out)
    for line, phase in (
        ("Starting  0%", "Starting"),
        ("Running  1%", "Running"),
        ("Running  2%", "Running"),
        ("Complete  100%", "Complete"),
    ):
        terminal.progress(line, phase)
    assert out.getvalue() == "Starting  0%\nRunning  1%\nComplete  100%\n"


def test_the_last_words_sum_up_the_run() -> None:
    entry = HistoryEntry(
        failure_class="application",
        reason="ProcessKilled",
        time="2026-11-21T12:00:00Z",
        seconds=4.2,
    )
    status = running().model_copy(
        update={
            "phase": "Complete",
            "restarts": Restarts(application=1),
            "history": [entry],
        }
    )
    story = Story(first_loss=6.95, first_step=1, seconds=54.2)
    assert closing(status, story, checkpoints="runs/mini/volumes", logs="runs/mini/pods") == (
        "Complete\n"
        "  loss         6.950 (step 1) -> 4.310 (step 200)\n"
        "  tokens       409,600\n"
        "  time         54 s\n"
        "  restarts     1, the slowest took 4.2 s\n"
        "  checkpoint   step 180 in runs/mini/volumes\n"
        "  logs         runs/mini/pods"
    )


def test_a_failed_run_begins_with_why() -> None:
    failed = Condition(
        type="Failed",
        status="True",
        reason="ProgramFailed",
        message="ValueError: no",
        last_transition_time="2026-11-21T12:00:00Z",
    )
    status = DeepSeekTrainingStatus(phase="Failed", conditions=[failed])
    story = Story(first_loss=None, first_step=0, seconds=3.0)
    words = closing(status, story, checkpoints="", logs="runs/x/pods")
    assert words.splitlines() == [
        "Failed (ProgramFailed): ValueError: no",
        "  time         3 s",
        "  logs         runs/x/pods",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("all is well", "all is well"),
        (
            "mini-0-1 failed: Traceback (most recent call last):\n  File x\nValueError: no\n",
            "mini-0-1 failed: ValueError: no",
        ),
        ("", ""),
    ],
)
def test_an_event_is_one_line(text: str, line: str) -> None:
    assert brief(text) == line
