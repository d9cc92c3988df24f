"""An API server alone: etcd and kube-apiserver on free loopback ports, without root or nodes.

What only asks what the API server accepts starts in seconds here and needs no cluster.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.clusters.shell import ClusterError, run, wait_until


class ApiServer:
    """A running API server. `kubectl` speaks to it as its administrator."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self._programs = programs

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60) -> str:
        """Standard output of `kubectl`; ClusterError with its words if it fails."""
        # Discovery is cached by host and port, which another server may have had before.
        cache = self.kubeconfig.with_name("cache")
        environment = {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(cache)}
        return run(
            self._programs / "kubectl",
            *arguments,
            stdin=stdin,
            timeout_s=timeout_s,
            environment=environment,
        )


@contextmanager
def api_server(folder: Path, programs: Path) -> Iterator[ApiServer]:
    """An API server with its data and logs in an empty `folder`; gone at the end.

    Raises ClusterError with the end of its log if it does not start.
    """
    etcd_port, peer_port, port = _free_ports(3)
    token = _write_credentials(folder, port)
    processes = []
    try:
        processes.append(
            _start(
                folder,
                programs / "etcd",
                f"--data-dir={folder}/etcd",
                "--unsafe-no-fsync",
                f"--listen-client-urls=http://127.0.0.1:{etcd_port}",
                f"--advertise-client-urls=http://127.0.0.1:{etcd_port}",
                f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
            )
        )
        processes.append(
            _start(
                folder,
                programs / "kube-apiserver",
                f"--etcd-servers=http://127.0.0.1:{etcd_port}",
                f"--cert-dir={folder}/certificates",
                "--bind-address=127.0.0.1",
                f"--secure-port={port}",
                f"--token-auth-file={folder}/tokens.csv",
                "--authorization-mode=RBAC",
                # The token controller that makes service accounts usable is not here.
                "--disable-admission-plugins=ServiceAccount",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={folder}/accounts.key",
                f"--service-account-key-file={folder}/accounts.key",
            )
        )
        _wait_ready(folder, port, token, processes)
        yield ApiServer(folder, programs)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _write_credentials(folder: Path, port: int) -> str:
    run("openssl", "genrsa", "-out", folder / "accounts.key", "2048")
    token = secrets.token_hex(16)
    tokens = folder / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text(f'{token},admin,admin,"system:masters"\n')
    cluster = {
        "server": f"https://127.0.0.1:{port}",
        "certificate-authority": f"{folder}/certificates/apiserver.crt",
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "api", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "api", "context": {"cluster": "api", "user": "admin"}}],
        "current-context": "api",
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(json.dumps(config))
    return token


def _start(folder: Path, program: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / f"{program.name}.log").open("wb") as log:
        return subprocess.Popen([program, *arguments], stdout=log, stderr=log, cwd=folder)


def _wait_ready(
    folder: Path, port: int, token: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    def ready() -> bool:
        for process in processes:
            if process.poll() is not None:
                name = Path(process.args[0]).name  # type: ignore[index, arg-type]
                log = (folder / f"{name}.log").read_text(errors="replace")
                raise ClusterError(f"{name} ended:\n{log[-2000:]}")
        certificate = folder / "certificates" / "apiserver.crt"
        return certificate.exists() and _answers(port, token, certificate)

    wait_until(ready, "the API server", timeout_s=60)


def _answers(port: int, token: str, certificate: Path) -> bool:
    context = ssl.create_default_context(cafile=str(certificate))
    # Never by a proxy that the environment names.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    request = urllib.request.Request(
        f"https://127.0.0.1:{port}/readyz", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with opener.open(request, timeout=2) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
