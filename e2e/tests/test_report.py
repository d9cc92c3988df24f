import json
from pathlib import Path

import pytest

from e2e.report import Report


def test_times_and_machine_are_in_both_files(tmp_path: Path) -> None:
    report = Report("suite")
    report.time("submit to pods", 1.23456)
    with report.phase("cluster up"):
        pass
    report.write(tmp_path / "runs")

    content = json.loads((tmp_path / "runs" / "suite.json").read_text())
    assert [t["name"] for t in content["timings"]] == ["submit to pods", "cluster up"]
    assert content["timings"][0]["seconds"] == 1.235
    assert content["machine"]["cores"] >= 1
    text = (tmp_path / "runs" / "suite.txt").read_text()
    assert "submit to pods       1.2 s" in text
    assert content["machine"]["cpu"] in text


def test_a_phase_that_raises_is_reported_as_failed() -> None:
    report = Report("suite")
    with pytest.raises(ZeroDivisionError), report.phase("broken"):
        _ = 1 / 0
    assert [(t.name, t.passed) for t in report.timings] == [("broken", False)]
    assert "failed" in report.as_text()


def test_a_report_without_timings_can_be_written(tmp_path: Path) -> None:
    Report("empty").write(tmp_path)
    assert json.loads((tmp_path / "empty.json").read_text())["timings"] == []
