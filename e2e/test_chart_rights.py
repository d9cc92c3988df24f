"""The chart as a real API server takes it: what it leaves behind, and what the operator may do.

There are no nodes here; e2e/test_chart.py shows the chart at work on a cluster.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from e2e.apiserver import ApiServer, api_server
from e2e.clusters import programs
from e2e.clusters.shell import ClusterError, run, wait_until

CHART = Path(__file__).resolve().parent.parent / "charts" / "deepseek-operator"
NAMESPACE, RELEASE, FULL_NAME = "dstrain-system", "dstrain", "dstrain-deepseek-operator"
KEY = f"{FULL_NAME}-token-key"
TRAINING = {
    "apiVersion": "dstrain.dev/v1alpha1",
    "kind": "DeepSeekTraining",
    "metadata": {"name": "kept", "namespace": "default"},
    "spec": {"entrypoint": {"module": "m"}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("chart"), programs.ensure()) as made:
        made.kubectl("create", "namespace", "team")
        yield made


def helm(server: ApiServer, *arguments: str) -> str:
    environment = {**os.environ, "KUBECONFIG": str(server.kubeconfig)}
    return run(programs.ensure() / "helm", *arguments, timeout_s=120, environment=environment)


@pytest.fixture
def installed(server: ApiServer, request: pytest.FixtureRequest) -> Iterator[None]:
    """The chart with the test's values."""
    values = [part for value in request.param for part in ("--set", value)]
    where = ("-n", NAMESPACE, "--create-namespace")
    helm(server, "upgrade", "--install", RELEASE, str(CHART), *where, *values)
    yield
    helm(server, "uninstall", RELEASE, "-n", NAMESPACE)


def may(server: ApiServer, verb: str, resource: str, namespace: str) -> bool:
    account = f"system:serviceaccount:{NAMESPACE}:{FULL_NAME}"
    arguments = ("auth", "can-i", verb, resource, f"--as={account}", "-n", namespace)
    try:
        return server.kubectl(*arguments).strip() == "yes"
    except ClusterError:  # `no` is exit code 1
        return False


def token_key(server: ApiServer) -> bytes:
    stored = server.kubectl("-n", NAMESPACE, "get", "secret", KEY, "-o", "jsonpath={.data.key}")
    return base64.b64decode(stored)


everywhere = pytest.mark.parametrize("installed", [()], indirect=True, ids=["everywhere"])
in_a_team = pytest.mark.parametrize(
    "installed", [("watchNamespaces={team}",)], indirect=True, ids=["team"]
)


@everywhere
def test_trainings_and_the_key_of_their_tokens_outlive_upgrade_and_uninstall(
    server: ApiServer, installed: None
) -> None:
    where = ("-n", NAMESPACE)
    key = token_key(server)
    assert len(key) == 64
    server.kubectl("wait", "--for=condition=Established", "crd/deepseektrainings.dstrain.dev")
    server.kubectl("apply", "-f", "-", stdin=json.dumps(TRAINING))
    helm(server, "upgrade", RELEASE, str(CHART), *where)
    assert token_key(server) == key
    helm(server, "uninstall", RELEASE, *where)
    assert "kept" in server.kubectl("get", "dst", "-o", "name")
    helm(server, "install", RELEASE, str(CHART), *where)
    assert token_key(server) == key
    assert "kept" in server.kubectl("get", "dst", "-o", "name")


@everywhere
def test_the_operator_has_its_rights_in_every_namespace_and_no_others(
    server: ApiServer, installed: None
) -> None:
    for verb, resource in (
        ("watch", "pods"),
        ("create", "pods"),
        ("delete", "pods"),
        ("watch", "nodes"),
        ("watch", "deepseektrainings.dstrain.dev"),
        ("delete", "deepseektrainings.dstrain.dev"),
        ("create", "secrets"),
        ("create", "events"),
    ):
        assert may(server, verb, resource, "team"), (verb, resource)
    for verb, resource in (
        ("get", "secrets"),
        ("list", "secrets"),
        ("delete", "persistentvolumeclaims"),
        ("patch", "deepseektrainings.dstrain.dev"),
        ("update", "nodes"),
        ("create", "deployments.apps"),
        ("create", "leases.coordination.k8s.io"),
        ("create", "endpointslices.discovery.k8s.io"),
    ):
        assert not may(server, verb, resource, "team"), (verb, resource)
    for kind in ("leases.coordination.k8s.io", "endpointslices.discovery.k8s.io"):
        assert may(server, "update", f"{kind}/{FULL_NAME}", NAMESPACE)
        assert not may(server, "update", f"{kind}/another", NAMESPACE)
        assert not may(server, "list", kind, NAMESPACE)


@pytest.fixture
def operator(server: ApiServer, installed: None, tmp_path: Path) -> Iterator[Path]:
    """The operator as a process of this machine, with the rights of its account; the log's path."""
    log = tmp_path / "operator.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("dstrain-operator")],
            env={**os.environ, **operator_environment(server, tmp_path)},
            stdout=out,
            stderr=out,
        )
    yield log
    server.kubectl("-n", "team", "delete", "dst", "--all")
    process.terminate()
    process.wait(timeout=30)


def operator_environment(server: ApiServer, folder: Path) -> dict[str, str]:
    """What the chart's Deployment sets, and the credentials of its account."""
    arguments = ("-n", NAMESPACE, "get", "deployment", FULL_NAME, "-o", "yaml")
    template = yaml.safe_load(server.kubectl(*arguments))["spec"]["template"]["spec"]
    given = {e["name"]: e["value"] for e in template["containers"][0]["env"] if "value" in e}
    config = json.loads(server.kubeconfig.read_text())
    token = server.kubectl("-n", NAMESPACE, "create", "token", FULL_NAME).strip()
    config["users"][0]["user"]["token"] = token
    kubeconfig = folder / "operator-kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(json.dumps(config))
    listen = {"DSTRAIN_COORDINATOR_HOST": "127.0.0.1", "DSTRAIN_COORDINATOR_PORT": "0"}
    key = {"DSTRAIN_TOKEN_KEY": token_key(server).decode()}
    pod = {"NAME": "operator-1", "NAMESPACE": NAMESPACE, "IP": "10.244.0.1"}
    fields = {f"DSTRAIN_POD_{name}": value for name, value in pod.items()}
    return {**given, **listen, **key, **fields, "KUBECONFIG": str(kubeconfig)}


@pytest.mark.parametrize(
    "installed", [(), ("watchNamespaces={team}",)], indirect=True, ids=["everywhere", "team"]
)
def test_these_rights_are_enough_to_begin_and_suspend_a_training(
    server: ApiServer, operator: Path
) -> None:
    namespace = ("-n", "team")

    def pods() -> list[str]:
        return server.kubectl(*namespace, "get", "pods", "-o", "name").split()

    def condition(kind: str) -> str:
        path = f"jsonpath={{.status.conditions[?(@.type=='{kind}')].status}}"
        return server.kubectl(*namespace, "get", "dst", "rights", "-o", path)

    spec = {"entrypoint": {"module": "m"}, "workers": {"replicas": 2}}
    training = TRAINING | {"metadata": {"name": "rights", "namespace": "team"}, "spec": spec}
    server.kubectl("wait", "--for=condition=Established", "crd/deepseektrainings.dstrain.dev")
    server.kubectl("apply", "-f", "-", stdin=json.dumps(training))
    wait_until(lambda: len(pods()) == 2, "two pods", timeout_s=30)
    wait_until(lambda: condition("Accepted") == "True", "the status", timeout_s=30)
    assert (
        server.kubectl(*namespace, "get", "secret,service,pvc", "-o", "name").count("rights") == 3
    )
    server.kubectl(
        *namespace, "patch", "dst", "rights", "--type=merge", "-p", '{"spec":{"suspend":true}}'
    )
    # Without a kubelet a pod that was never scheduled is gone at once.
    wait_until(lambda: pods() == [], "no pods", timeout_s=30)
    wait_until(lambda: condition("Suspended") == "True", "the status", timeout_s=30)
    wait_until(
        lambda: "Suspended" in server.kubectl(*namespace, "get", "events"), "events", timeout_s=30
    )
    holder = ("get", "lease", FULL_NAME, "-o", "jsonpath={.spec.holderIdentity}")
    assert server.kubectl("-n", NAMESPACE, *holder) == "operator-1"
    address = ("get", "endpointslice", FULL_NAME, "-o", "jsonpath={.endpoints[*].addresses}")
    assert server.kubectl("-n", NAMESPACE, *address) == '["10.244.0.1"]'
    log = operator.read_text()
    assert "orbidden" not in log, log


@in_a_team
def test_limited_to_a_namespace_the_operator_has_its_rights_only_there(
    server: ApiServer, installed: None
) -> None:
    assert may(server, "create", "pods", "team")
    assert may(server, "watch", "nodes", "team")
    assert not may(server, "create", "pods", "default")
    assert not may(server, "watch", "deepseektrainings.dstrain.dev", "default")


@everywhere
def test_a_restricted_namespace_takes_the_operator(server: ApiServer, installed: None) -> None:
    label = "pod-security.kubernetes.io/enforce=restricted"
    server.kubectl("label", "--overwrite", "namespace", NAMESPACE, label)
    arguments = ("-n", NAMESPACE, "get", "deployment", FULL_NAME, "-o", "yaml")
    template = yaml.safe_load(server.kubectl(*arguments))["spec"]["template"]
    metadata = {"name": "probe", "namespace": NAMESPACE}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
