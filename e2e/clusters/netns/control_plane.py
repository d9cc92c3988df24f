"""etcd, API server, controllers, scheduler and DNS, on the machine's side of the bridge."""

from __future__ import annotations

import json
import secrets
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from e2e.clusters.netns.plan import Plan
from e2e.clusters.netns.processes import start, wait_ready
from e2e.clusters.netns.state import State
from e2e.clusters.shell import run

ADMIN = "admin"
# token user -> (user name, group)
USERS = {
    ADMIN: ("admin", "system:masters"),
    "controllers": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
}


def make_credentials(plan: Plan, state: State) -> None:
    """Keys, and a token and kubeconfig for every user of the API server."""
    state.keys.mkdir()
    signing = state.keys / "service-accounts.key"
    run("openssl", "genrsa", "-out", signing, "2048")
    run("openssl", "rsa", "-in", signing, "-pubout", "-out", signing.with_suffix(".pub"))
    kubelet_client = state.keys / "kubelet-client"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650"),
        *("-subj", "/O=system:masters/CN=apiserver"),
        *("-keyout", f"{kubelet_client}.key", "-out", f"{kubelet_client}.crt"),
    )
    nodes = {node: (f"system:node:{node}", "system:nodes") for node in plan.nodes}
    lines = []
    for user, (name, group) in {**USERS, **nodes}.items():
        token = secrets.token_hex(16)
        lines.append(f'{token},{name},{user},"{group}"\n')
        _write_kubeconfig(plan, state, user, token)
    tokens = state.keys / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(lines))


def start_api_server(plan: Plan, state: State, programs: Path) -> None:
    """Start etcd and the API server; `wait_for_api_server` waits for them."""
    etcd = f"http://{plan.loopback}:2379"
    start(
        programs / "etcd",
        f"--data-dir={state.folder}/etcd",
        "--unsafe-no-fsync",  # The data does not outlive the cluster.
        f"--listen-client-urls={etcd}",
        f"--advertise-client-urls={etcd}",
        f"--listen-peer-urls=http://{plan.loopback}:2380",
        log=state.log("etcd"),
    )
    start(
        programs / "kube-apiserver",
        f"--etcd-servers={etcd}",
        f"--cert-dir={state.certificate.parent}",
        f"--bind-address={plan.gateway}",
        f"--advertise-address={plan.gateway}",
        f"--token-auth-file={state.keys}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-cluster-ip-range={plan.service_network}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-signing-key-file={state.keys}/service-accounts.key",
        f"--service-account-key-file={state.keys}/service-accounts.pub",
        # Else `logs` and `exec` try to resolve "node1" by the machine's DNS.
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={state.keys}/kubelet-client.crt",
        f"--kubelet-client-key={state.keys}/kubelet-client.key",
        log=state.log("kube-apiserver"),
    )


def wait_for_api_server(plan: Plan, state: State) -> None:
    def ready() -> bool:
        return state.certificate.exists() and _answers(
            f"https://{plan.gateway}:6443/readyz", certificate=state.certificate
        )

    wait_ready("kube-apiserver", state.folder, state.log("kube-apiserver"), ready)


def start_controllers(plan: Plan, state: State, programs: Path) -> None:
    """Start what works on the API server's objects, and DNS."""
    start(
        programs / "kube-controller-manager",
        f"--kubeconfig={state.kubeconfig('controllers')}",
        f"--service-account-private-key-file={state.keys}/service-accounts.key",
        f"--root-ca-file={state.certificate}",
        "--use-service-account-credentials=true",
        f"--flex-volume-plugin-dir={state.folder}/volume-plugins",  # It makes the folder.
        "--leader-elect=false",
        f"--bind-address={plan.loopback}",
        # The defaults are 50 s and 5 s; with these a silent node is NotReady in about 13 s.
        "--node-monitor-grace-period=12s",
        "--node-monitor-period=2s",
        log=state.log("kube-controller-manager"),
    )
    start(
        programs / "kube-scheduler",
        f"--kubeconfig={state.kubeconfig('scheduler')}",
        "--leader-elect=false",
        f"--bind-address={plan.loopback}",
        log=state.log("kube-scheduler"),
    )
    corefile = state.folder / "Corefile"
    corefile.write_text(_corefile(plan, state))
    start(programs / "coredns", "-conf", corefile, log=state.log("coredns"))


def wait_for_dns(plan: Plan, state: State) -> None:
    wait_ready(
        "coredns",
        state.folder,
        state.log("coredns"),
        lambda: _answers(f"http://{plan.loopback}:8181/ready"),
    )


def _corefile(plan: Plan, state: State) -> str:
    # Names outside the cluster end here at once: pods have no way out, and a silent or refusing
    # server would cost every such lookup its time-out.
    return f"""\
cluster.local:53 in-addr.arpa:53 {{
  bind {plan.gateway}
  ready {plan.loopback}:8181
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {state.kubeconfig(ADMIN)}
    pods insecure
  }}
}}
.:53 {{
  bind {plan.gateway}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def _write_kubeconfig(plan: Plan, state: State, user: str, token: str) -> None:
    server = f"https://{plan.gateway}:6443"
    cluster = {"server": server, "certificate-authority": str(state.certificate)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": plan.name, "cluster": cluster}],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": plan.name, "context": {"cluster": plan.name, "user": user}}],
        "current-context": plan.name,
    }
    path = state.kubeconfig(user)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))  # YAML's subset


def _answers(url: str, certificate: Path | None = None) -> bool:
    context = ssl.create_default_context(cafile=str(certificate)) if certificate else None
    # Never by a proxy that the environment names: the address is this machine's own.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=2) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
