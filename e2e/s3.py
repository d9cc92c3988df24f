"""A real S3 server of this machine, whose buckets are folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from e2e.clusters import programs

READY_S = 20.0


class S3Server:
    """One server at an address of this machine.

    Args:
        folder: below it each folder is a bucket, and each file an object.
        host: where it listens.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._host = host
        self._program = programs.ensure_s3_server()
        self._buckets = folder / "buckets"
        self._buckets.mkdir()
        self._log = folder / "server.log"
        with socket.socket() as probe:
            probe.bind((host, 0))
            self._port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{self._port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "only-for-this-test",
            "AWS_REGION": "us-east-1",
        }

    def bucket(self, name: str) -> Path:
        """Make a bucket; the folder of its objects."""
        made = self._buckets / name
        made.mkdir(exist_ok=True)
        return made

    def start(self) -> None:
        """Serve; returns when it answers."""
        keys = {
            "ROOT_ACCESS_KEY": self.environment["AWS_ACCESS_KEY_ID"],
            "ROOT_SECRET_KEY": self.environment["AWS_SECRET_ACCESS_KEY"],
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "--port", f"{self._host}:{self._port}", "posix", self._buckets],
                env={**os.environ, **keys},
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + READY_S
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline_s:
                raise RuntimeError(f"the S3 server does not start: {self._log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it without a word to its clients."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            socket.create_connection((self._host, self._port), timeout=1).close()
        except OSError:
            return False
        return True
