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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2e.clusters.shell import ClusterError, run, wait_until


class ApiServer:
    """An API server. `kubectl` speaks to it as its administrator."""

    def __init__(self, folder: Path, programs: Path, port: int, arguments: Sequence[str]) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.port = port
        self.token = _write_credentials(folder, port)
        self.certificate = folder / "certificates" / "apiserver.crt"
        self._folder = folder
        self._programs = programs
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *needed: subprocess.Popen[bytes]) -> None:
        """Start it, or start it again with what it had stored; returns when it is ready.

        Raises ClusterError with the end of the log of what ended, it or one of `needed`.
        """
        self._process = _start(self._folder, self._programs / "kube-apiserver", *self._arguments)
        _wait_ready(self._folder, self, [*needed, self._process])

    def stop(self) -> None:
        """End it at once: connections break, and new ones are refused."""
        if self._process:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

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
    etcd_port, peer_port, port = free_ports(3)
    made = ApiServer(
        folder,
        programs,
        port,
        [
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
        ],
    )
    etcd = _start(
        folder,
        programs / "etcd",
        f"--data-dir={folder}/etcd",
        "--unsafe-no-fsync",
        f"--listen-client-urls=http://127.0.0.1:{etcd_port}",
        f"--advertise-client-urls=http://127.0.0.1:{etcd_port}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
    )
    try:
        made.start(etcd)
        yield made
    finally:
        made.stop()
        etcd.terminate()
        etcd.wait(timeout=30)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
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
    with (folder / f"{program.name}.log").open("ab") as log:
        return subprocess.Popen([program, *arguments], stdout=log, stderr=log, cwd=folder)


def _wait_ready(
    folder: Path, server: ApiServer, processes: Iterable[subprocess.Popen[bytes]]
) -> None:
    def ready() -> bool:
        for process in processes:
            if process.poll() is not None:
                name = Path(process.args[0]).name  # type: ignore[index, arg-type]
                log = (folder / f"{name}.log").read_text(errors="replace")
                raise ClusterError(f"{name} ended:\n{log[-2000:]}")
        return server.certificate.exists() and _answers(server)

    wait_until(ready, "the API server", timeout_s=60)


def _answers(server: ApiServer) -> bool:
    context = ssl.create_default_context(cafile=str(server.certificate))
    # Never by a proxy that the environment names.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    request = urllib.request.Request(
        f"https://127.0.0.1:{server.port}/readyz",
        headers={"Authorization": f"Bearer {server.token}"},
    )
    try:
        with opener.open(request, timeout=2) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
