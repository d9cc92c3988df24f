"""The chart as helm renders it. Install, upgrade and uninstall are in e2e."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.clusters import programs

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "deepseek-operator"
RELEASE, NAMESPACE = "dstrain", "dstrain-system"
FULL_NAME = "dstrain-deepseek-operator"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("helm") or shutil.which("helm", path=programs.folder())
    if program is None:
        pytest.skip("there is no helm yet: put one on the PATH, or let `make e2e` build it")
    command = [program, *arguments, "--kube-version", "1.36.0"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(*values: str) -> list[dict[str, Any]]:
    """Manifests of the chart with `--set` values."""
    sets = [part for value in values for part in ("--set", value)]
    done = helm("template", RELEASE, str(CHART), "-n", NAMESPACE, *sets)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def only(manifests: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    found = [
        m for m in manifests if m["kind"] == kind and (not name or m["metadata"]["name"] == name)
    ]
    assert len(found) == 1, [m["metadata"]["name"] for m in found]
    return found[0]


def environment(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    container = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def granted(role: dict[str, Any]) -> set[tuple[str, str]]:
    """(resource, verb) of every right of a role."""
    return {
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_chart_is_clean_to_the_strict_linter() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("replicas=0", "replicas"),
        ("image.repo=x", "repo"),
        ("coordinator.port=high", "port"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("crds.keep=perhaps", "keep"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
    ],
)
def test_a_value_that_means_nothing_is_refused(value: str, named: str) -> None:
    done = helm("template", RELEASE, str(CHART), "--set", value)
    assert done.returncode != 0
    assert named in done.stderr


def test_every_value_is_in_the_schema_and_in_the_readme() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    readme = (CHART / "README.md").read_text()
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, value in values.items():
        if isinstance(value, dict) and set(value) == set(
            schema["properties"][name].get("properties", {})
        ):
            for inner in value:
                assert f"`{name}.{inner}" in readme
        assert f"`{name}" in readme


def test_the_crd_is_the_one_that_the_api_makes() -> None:
    made = yaml.safe_load((ROOT / "crds" / "deepseektrainings.yaml").read_text())
    crd = only(rendered(), "CustomResourceDefinition")
    assert crd["spec"] == made["spec"]
    assert crd["metadata"]["name"] == made["metadata"]["name"]


def test_dashboards_are_those_of_the_repository() -> None:
    made = {p.name: p.read_text() for p in (ROOT / "dashboards" / "json").glob("*.json")}
    copies = {p.name: p.read_text() for p in (CHART / "files" / "dashboards").glob("*.json")}
    assert copies == made, "run `make generate`"


def test_the_crd_can_be_left_to_somebody_else() -> None:
    kinds = {m["kind"] for m in rendered("crds.enabled=false")}
    assert "CustomResourceDefinition" not in kinds


@pytest.mark.parametrize(("keep", "policy"), [("true", "keep"), ("false", None)])
def test_what_running_trainings_need_outlives_an_uninstall_only_if_asked(
    keep: str, policy: str | None
) -> None:
    manifests = rendered(f"crds.keep={keep}")
    for kind in ("CustomResourceDefinition", "Secret"):
        annotations = only(manifests, kind)["metadata"].get("annotations", {})
        assert annotations.get("helm.sh/resource-policy") == policy


def test_the_operator_meets_the_restricted_pod_standard() -> None:
    pod = only(rendered(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_replicas_are_spread_and_a_new_one_stands_by_before_an_old_one_ends() -> None:
    manifests = rendered()
    spec = only(manifests, "Deployment")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"] == {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    affinity = spec["template"]["spec"]["affinity"]["podAntiAffinity"]
    (wish,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["podAffinityTerm"]["labelSelector"] == spec["selector"]
    budget = only(manifests, "PodDisruptionBudget")["spec"]
    assert (budget["selector"], budget["maxUnavailable"]) == (spec["selector"], 1)


def test_a_single_replica_may_be_drained() -> None:
    assert "PodDisruptionBudget" not in {m["kind"] for m in rendered("replicas=1")}


def test_an_affinity_of_the_user_takes_the_place_of_ours() -> None:
    spec = only(rendered("affinity.nodeAffinity.x=y"), "Deployment")["spec"]
    assert spec["template"]["spec"]["affinity"] == {"nodeAffinity": {"x": "y"}}


def test_the_leader_may_write_its_lease_and_its_route_and_no_others() -> None:
    role = only(rendered(), "Role", f"{FULL_NAME}-leader")
    assert role["metadata"]["namespace"] == NAMESPACE
    limited = [rule for rule in role["rules"] if "resourceNames" in rule]
    assert all(rule["resourceNames"] == [FULL_NAME] for rule in limited)
    assert granted({"rules": limited}) == {
        *(("leases", verb) for verb in ("get", "update")),
        *(("endpointslices", verb) for verb in ("get", "update")),
        ("services", "get"),
    }
    others = [rule for rule in role["rules"] if "resourceNames" not in rule]
    assert granted({"rules": others}) == {("leases", "create"), ("endpointslices", "create")}


def test_all_replicas_are_scraped() -> None:
    manifests = rendered("monitoring.serviceMonitor=true")
    selected = only(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    found = [
        m
        for m in manifests
        if m["kind"] == "Service" and selected.items() <= m["metadata"]["labels"].items()
    ]
    assert [m["metadata"]["name"] for m in found] == [f"{FULL_NAME}-metrics"]
    labels = only(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert found[0]["spec"]["selector"].items() <= labels.items()


def test_workers_find_the_coordinator_by_its_service() -> None:
    manifests = rendered("coordinator.port=9999")
    service = only(manifests, "Service")
    assert environment(manifests)["DSTRAIN_COORDINATOR_URL"] == (
        f"http://{service['metadata']['name']}.{NAMESPACE}.svc:{service['spec']['ports'][0]['port']}"
    )
    assert "selector" not in service["spec"], "the leader says where it leads to"
    assert environment(manifests)["DSTRAIN_LEASE"] == service["metadata"]["name"]
    pod = only(manifests, "Deployment")["spec"]["template"]
    assert pod["spec"]["containers"][0]["ports"] == [{"name": "http", "containerPort": 9999}]


def test_images_and_pull_secrets_reach_the_operator() -> None:
    manifests = rendered(
        "image.repository=r/o",
        "image.tag=1",
        "trainer.image.repository=r/t",
        "trainer.image.tag=2",
        "trainer.imagePullSecrets[0].name=a",
        "trainer.imagePullSecrets[1].name=b",
        "imagePullSecrets[0].name=c",
    )
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "r/o:1"
    assert pod["imagePullSecrets"] == [{"name": "c"}]
    assert environment(manifests)["DSTRAIN_TRAINER_IMAGE"] == "r/t:2"
    assert environment(manifests)["DSTRAIN_TRAINER_PULL_SECRETS"] == "a,b"


def test_with_tls_the_coordinator_is_reached_by_https() -> None:
    manifests = rendered("tls.secretName=cert")
    variables = environment(manifests)
    assert variables["DSTRAIN_COORDINATOR_URL"].startswith("https://")
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    mount = next(m for m in container["volumeMounts"] if m["name"] == "tls")
    assert variables["DSTRAIN_TLS_CERT_FILE"] == f"{mount['mountPath']}/tls.crt"
    assert {"name": "tls", "secret": {"secretName": "cert"}} in pod["volumes"]


def test_the_operator_may_do_what_it_does_and_no_more() -> None:
    role = only(rendered(), "ClusterRole", FULL_NAME)
    assert granted(role) == {
        *(("nodes", verb) for verb in ("list", "watch")),
        *(("pods", verb) for verb in ("list", "watch", "create", "delete")),
        *(("deepseektrainings", verb) for verb in ("list", "watch", "delete")),
        ("deepseektrainings/status", "update"),
        ("services", "create"),
        ("secrets", "create"),
        ("persistentvolumeclaims", "create"),
        ("events", "create"),
    }


def test_the_operator_may_change_nodes_only_where_it_is_to_taint_them() -> None:
    manifests = rendered("taintNodes=true")
    role = only(manifests, "ClusterRole", FULL_NAME)
    assert {verb for kind, verb in granted(role) if kind == "nodes"} == {
        *("list", "watch", "get", "update")
    }
    assert environment(manifests)["DSTRAIN_TAINT_NODES"] == "true"
    assert environment(rendered())["DSTRAIN_TAINT_NODES"] == "false"


def test_limited_to_namespaces_the_operator_sees_only_nodes_elsewhere() -> None:
    manifests = rendered("watchNamespaces={team-a,team-b}")
    everywhere = only(manifests, "ClusterRole", FULL_NAME)
    assert granted(everywhere) == {("nodes", verb) for verb in ("list", "watch")}
    roles = [m for m in manifests if m["kind"] == "Role" and m["metadata"]["name"] == FULL_NAME]
    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    assert all(("pods", "create") in granted(role) for role in roles)
    bindings = [m for m in manifests if m["kind"] == "RoleBinding"]
    assert {b["subjects"][0]["namespace"] for b in bindings} == {NAMESPACE}
    assert environment(manifests)["DSTRAIN_WATCH_NAMESPACES"] == "team-a,team-b"


def test_viewers_cannot_write_and_editors_cannot_write_the_status() -> None:
    manifests = rendered()
    view = only(manifests, "ClusterRole", f"{FULL_NAME}-view")
    edit = only(manifests, "ClusterRole", f"{FULL_NAME}-edit")
    assert {verb for _, verb in granted(view)} == {"get", "list", "watch"}
    assert ("deepseektrainings", "create") in granted(edit)
    assert not any(resource == "deepseektrainings/status" for resource, _ in granted(edit))


def test_monitoring_is_off_until_it_is_asked_for() -> None:
    kinds = {m["kind"] for m in rendered()}
    assert not kinds & {"PodMonitor", "ServiceMonitor", "ConfigMap", "NetworkPolicy"}


def test_worker_pods_and_operator_are_scraped_when_asked() -> None:
    manifests = rendered("monitoring.podMonitor=true", "monitoring.serviceMonitor=true")
    workers = only(manifests, "PodMonitor")["spec"]
    assert workers["selector"]["matchExpressions"] == [
        {"key": "dstrain.dev/training", "operator": "Exists"}
    ]
    assert workers["podMetricsEndpoints"][0]["port"] == "metrics"
    endpoint = only(manifests, "ServiceMonitor")["spec"]["endpoints"][0]
    assert endpoint["honorLabels"] is True
    service = only(manifests, "Service", f"{FULL_NAME}-metrics")
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]


def test_dashboards_are_whole_when_asked_for() -> None:
    data = only(rendered("monitoring.dashboards=true"), "ConfigMap")["data"]
    for name, text in data.items():
        source = ROOT / "dashboards" / "json" / name.removeprefix("dstrain-")
        assert json.loads(text) == json.loads(source.read_text())


def test_a_network_policy_lets_in_one_port() -> None:
    policy = only(rendered("networkPolicy.enabled=true"), "NetworkPolicy")["spec"]
    assert policy["ingress"] == [{"ports": [{"port": "http"}]}]
