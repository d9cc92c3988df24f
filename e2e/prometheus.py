"""A real Prometheus on loopback, from Debian's package, without installing its service.

with Prometheus(folder, [static_job("worker", {"10.0.0.7:9400": {"namespace": "a"}})]) as server:
    server.query("dstrain_step")
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from e2e.clusters import programs
from e2e.clusters.shell import ClusterError, run, wait_until


@dataclass(frozen=True)
class Series:
    """One series of an answer; `points` are (seconds since the epoch, value), one if instant."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]


def ensure_prometheus() -> Path:
    """The folder of `prometheus` and `promtool`: installed ones, or those of the test clusters."""
    installed = shutil.which("prometheus")
    if installed and shutil.which("promtool"):
        return Path(installed).parent
    return programs.ensure()


def check_metrics(exposition: str) -> None:
    """`promtool check metrics` on what a program exposes; ClusterError lists its findings."""
    run(ensure_prometheus() / "promtool", "check", "metrics", stdin=exposition)


def static_job(
    name: str, targets: Mapping[str, Mapping[str, str]], *, honor_labels: bool = False
) -> dict[str, Any]:
    """A scrape config for addresses that do not change: `host:port` -> labels to add."""
    return {
        "job_name": name,
        "honor_labels": honor_labels,
        "static_configs": [{"targets": [t], "labels": dict(ls)} for t, ls in targets.items()],
    }


class Prometheus:
    """A Prometheus server on a free port of loopback, as long as the `with` block runs.

    It keeps its data and its log in `folder`.
    """

    def __init__(
        self, folder: Path, jobs: Sequence[Mapping[str, Any]], *, interval_s: float = 1.0
    ) -> None:
        self._folder = folder
        self._jobs = jobs
        self._interval = f"{round(interval_s * 1000)}ms"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        folder = ensure_prometheus()
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {
                        "scrape_interval": self._interval,
                        "scrape_timeout": self._interval,
                    },
                    "scrape_configs": [dict(job) for job in self._jobs],
                }
            )
        )
        run(folder / "promtool", "check", "config", config)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    folder / "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    "--storage.tsdb.retention.time=10y",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_ready, "Prometheus to be ready", timeout_s=60)
        except ClusterError:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def query(self, expression: str, *, at_s: float | None = None) -> list[Series]:
        """The answer to an instant query, now or at a time in seconds since the epoch.

        Raises ClusterError with Prometheus's words for an expression that it refuses.
        """
        when = {} if at_s is None else {"time": str(at_s)}
        return _series(self.get("/api/v1/query", query=expression, **when))

    def query_range(
        self, expression: str, *, start_s: float, end_s: float, step_s: float
    ) -> list[Series]:
        """The answer to a range query; times in seconds since the epoch."""
        return _series(
            self.get(
                "/api/v1/query_range",
                query=expression,
                start=str(start_s),
                end=str(end_s),
                step=str(step_s),
            )
        )

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped, as /api/v1/targets describes it: `labels`, `health`, `lastError`."""
        return list(self.get("/api/v1/targets", state="active")["activeTargets"])

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API; ClusterError with Prometheus's words otherwise."""
        answer = httpx.get(f"{self.url}{path}", params=parameters, timeout=30)
        if answer.is_error:
            raise ClusterError(f"{path} {parameters}: {answer.text}")
        return answer.json()["data"]

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            log = (self._folder / "prometheus.log").read_text()
            raise ClusterError(f"Prometheus ended ({self._process.returncode}): {log[-2000:]}")
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).is_success
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _series(data: Any) -> list[Series]:
    if data["resultType"] in ("scalar", "string"):
        at_s, value = data["result"]
        return [Series({}, ((float(at_s), float(value)),))]
    return [
        Series(
            dict(entry["metric"]),
            tuple((float(t), float(v)) for t, v in entry.get("values") or [entry["value"]]),
        )
        for entry in data["result"]
    ]
