"""Operators as processes of this machine, against an API server without nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from e2e.apiserver import ApiServer, free_ports
from e2e.clusters.shell import wait_until

NAMESPACE, SERVICE = "operators", "operator"
TOKEN_KEY = "k" * 32
START_S = 30.0
CRD = Path(__file__).resolve().parent.parent / "crds" / "deepseektrainings.yaml"


def prepare(server: ApiServer) -> None:
    """What the chart brings along: the kind, a namespace, and the Service that replicas share."""
    server.kubectl("apply", "--server-side", "-f", str(CRD))
    server.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRD))
    wait_until(
        lambda: "dstrain.dev" in server.kubectl("get", "--raw", "/apis"), "the kind", timeout_s=30
    )
    server.kubectl("create", "namespace", NAMESPACE)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": NAMESPACE},
        "spec": {"ports": [{"name": "http", "port": 8080}]},
    }
    server.kubectl("apply", "-f", "-", stdin=json.dumps(service))


class OperatorProcess:
    """One replica. `number` gives it its pod name and address; 0 is an operator without a Lease."""

    def __init__(self, kubeconfig: Path, folder: Path, number: int = 0) -> None:
        (port,) = free_ports(1)
        self.name = f"operator-{number}"
        self.address = f"10.244.0.{number}"  # only written down: an EndpointSlice takes no loopback
        self.log_path = folder / f"{self.name}.log"
        replica = {
            "DSTRAIN_LEASE": SERVICE,
            "DSTRAIN_POD_NAME": self.name,
            "DSTRAIN_POD_NAMESPACE": NAMESPACE,
            "DSTRAIN_POD_IP": self.address,
        }
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "DSTRAIN_TRAINER_IMAGE": "registry.example/trainer:1",
            "DSTRAIN_COORDINATOR_URL": f"http://{SERVICE}.{NAMESPACE}.svc:8080",
            "DSTRAIN_COORDINATOR_HOST": "127.0.0.1",
            "DSTRAIN_COORDINATOR_PORT": str(port),
            "DSTRAIN_TOKEN_KEY": TOKEN_KEY,
            **(replica if number else {}),
        }
        self.process: subprocess.Popen[bytes]
        self.url = f"http://127.0.0.1:{port}"

    def launch(self) -> None:
        """Start, or start again, without a look at what becomes of it."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("dstrain-operator")],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        """Launch; returns when it answers."""
        said = len(self.log)
        port = self.url.rpartition(":")[2]
        self.launch()
        listening = f"listening on port {port}"
        wait_until(
            lambda: listening in self.log[said:] or self.process.poll() is not None,
            f"{self.name} to listen",
            timeout_s=START_S,
            interval_s=0.02,
        )
        assert listening in self.log[said:], self.log

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def leads(self) -> bool:
        return "dstrain_operator_leader 1.0" in httpx.get(f"{self.url}/metrics", timeout=5).text

    def probe(self, name: str) -> httpx.Response:
        """The answer to /healthz or /readyz."""
        return httpx.get(f"{self.url}/{name}", timeout=5)

    def kill(self) -> None:
        """Without a chance to say anything."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stand still, as on a machine that swaps; `resume` goes on."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """As the kubelet does: SIGTERM, then wait."""
        self.process.terminate()
        self.process.wait(timeout=40)

    def close(self) -> None:
        """End it, however it is."""
        if self.process.poll() is None:
            self.resume()
            self.kill()


def lease(server: ApiServer) -> dict[str, Any]:
    """The spec of the replicas' Lease."""
    stored = server.kubectl("-n", NAMESPACE, "get", "lease", SERVICE, "-o", "json")
    return dict(json.loads(stored)["spec"])


def destinations(server: ApiServer) -> list[str]:
    """The addresses that the Service leads to."""
    stored = server.kubectl("-n", NAMESPACE, "get", "endpointslices", "-o", "json")
    return [
        address
        for item in json.loads(stored)["items"]
        for endpoint in item["endpoints"]
        for address in endpoint["addresses"]
    ]
