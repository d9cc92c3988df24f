"""The API as a real API server keeps it: what it accepts, refuses, explains and scales.

The server runs alone (e2e/apiserver.py), so these tests need neither root nor a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from crds.tests.cases import CASES, by_name, patched
from e2e.apiserver import ApiServer, api_server
from e2e.clusters import programs
from e2e.clusters.shell import ClusterError, wait_until

ROOT = Path(__file__).resolve().parent.parent
CRD = ROOT / "crds" / "deepseektrainings.yaml"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server that knows DeepSeekTraining."""
    with api_server(tmp_path_factory.mktemp("api"), programs.ensure()) as made:
        made.kubectl("apply", "--server-side", "-f", str(CRD))
        made.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRD))
        # kubectl finds the kind in what the server publishes, which follows a moment later.
        wait_until(partial(_explains, made), "kubectl explain dst", timeout_s=30)
        yield made


def _explains(server: ApiServer) -> bool:
    try:
        return "DeepSeekTraining" in server.kubectl("explain", "dst")
    except ClusterError:
        return False


def manifest(change: dict[str, Any], name: str = "case") -> str:
    return json.dumps(
        {
            "apiVersion": "dstrain.dev/v1alpha1",
            "kind": "DeepSeekTraining",
            "metadata": {"name": name},
            "spec": patched(CASES["base"], change),
        }
    )


@by_name("good")
def test_a_good_spec_is_accepted(server: ApiServer, case: dict[str, Any]) -> None:
    server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest(case["change"]))


@by_name("bad")
def test_a_bad_spec_is_refused_with_its_field_and_what_to_change(
    server: ApiServer, case: dict[str, Any]
) -> None:
    with pytest.raises(ClusterError) as refusal:
        server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest(case["change"]))
    assert case["field"] in str(refusal.value)
    assert (case.get("says") or case["server"]) in str(refusal.value)
    assert "evaluating rule" not in str(refusal.value), "a rule stumbled over what is refused"


@pytest.mark.parametrize("name", ["a" * 41, "7b", "a.b"])
def test_a_name_that_pods_cannot_carry_is_refused(server: ApiServer, name: str) -> None:
    with pytest.raises(ClusterError, match="use at most 40 lower-case letters"):
        server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest({}, name=name))


@pytest.fixture
def stored(server: ApiServer, case: dict[str, Any]) -> Iterator[str]:
    """The training of an update case, as the API server keeps it."""
    server.kubectl("create", "-f", "-", stdin=manifest(case.get("from", {}), "stored"))
    yield "stored"
    server.kubectl("delete", "dst", "stored")


@by_name("refused_updates")
def test_a_change_of_what_is_fixed_is_refused(
    server: ApiServer, stored: str, case: dict[str, Any]
) -> None:
    patch = json.dumps({"spec": case["to"]})
    with pytest.raises(ClusterError) as refusal:
        server.kubectl("patch", "dst", stored, "--type=merge", "-p", patch)
    assert case["field"] in str(refusal.value)
    assert case["says"] in str(refusal.value)


@by_name("allowed_updates")
def test_a_change_of_what_is_not_fixed_is_accepted(
    server: ApiServer, stored: str, case: dict[str, Any]
) -> None:
    server.kubectl("patch", "dst", stored, "--type=merge", "-p", json.dumps({"spec": case["to"]}))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.name))
def test_an_example_is_accepted(server: ApiServer, example: Path) -> None:
    server.kubectl("apply", "--dry-run=server", "-f", str(example))


@pytest.mark.parametrize("case", [{}], ids=[""])
class TestAStoredTraining:
    def test_it_is_scaled_by_kubectl(self, server: ApiServer, stored: str) -> None:
        server.kubectl("scale", f"dst/{stored}", "--replicas=4")
        replicas = server.kubectl("get", "dst", stored, "-o", "jsonpath={.spec.workers.replicas}")
        assert replicas == "4"

    def test_it_is_not_scaled_to_a_size_that_does_not_divide(
        self, server: ApiServer, stored: str
    ) -> None:
        with pytest.raises(ClusterError, match="globalBatch 32 cannot be shared"):
            server.kubectl("scale", f"dst/{stored}", "--replicas=3")

    def test_its_status_is_written_apart_and_shown_in_columns(
        self, server: ApiServer, stored: str
    ) -> None:
        summary = {"progress": "41%", "step": "200/488", "tokensPerSecond": "5.2k", "mfu": "31%",
                   "eta": "3m", "workers": "2/2", "restarts": "1", "loss": "4.31",
                   "checkpoint": "100", "message": "training on 2 workers"}  # fmt: skip
        status = {"phase": "Running", "summary": summary}
        arguments = ("patch", "dst", stored, "--type=merge", "-p", json.dumps({"status": status}))
        server.kubectl(*arguments)
        assert "Running" not in server.kubectl("get", "dst", stored)
        server.kubectl(*arguments, "--subresource=status")
        header, row = server.kubectl("get", "dst", stored).strip().splitlines()
        columns = ["PHASE", "PROGRESS", "STEP", "TOK/S", "MFU", "ETA", "WORKERS", "RESTARTS"]
        assert header.split() == ["NAME", *columns, "AGE"]
        assert row.split()[1:-1] == [
            "Running", "41%", "200/488", "5.2k", "31%", "3m", "2/2", "1",
        ]  # fmt: skip
        wide = server.kubectl("get", "dst", stored, "-o", "wide").splitlines()
        assert wide[0].split()[-3:] == ["LOSS", "CHECKPOINT", "MESSAGE"]
        assert wide[1].rstrip().endswith("training on 2 workers")

    def test_it_is_found_by_its_category_and_short_name(
        self, server: ApiServer, stored: str
    ) -> None:
        for name in ("training", "dst", "deepseektrainings.v1alpha1.dstrain.dev"):
            assert stored in server.kubectl("get", name)


def test_every_field_is_explained(server: ApiServer) -> None:
    published = json.loads(server.kubectl("get", "--raw", "/openapi/v3/apis/dstrain.dev/v1alpha1"))
    schema = published["components"]["schemas"]["dev.dstrain.v1alpha1.DeepSeekTraining"]
    fields = dict(described(schema, "dst"))
    assert len(fields) > 150
    assert [path for path, text in fields.items() if not text] == []
    recursive = server.kubectl("explain", "dst", "--recursive")
    for path in fields:
        assert path.rsplit(".", 1)[1].removesuffix("[]") in recursive
    words = " ".join(server.kubectl("explain", "dst.spec.recovery.heartbeatTimeout").split())
    assert "Default: 3s. Example: 15s." in words


def described(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Path and description of every field below a published schema, as `explain` finds them."""
    for name, field in schema.get("properties", {}).items():
        if path == "dst" and name not in ("spec", "status"):
            continue  # told by Kubernetes
        yield f"{path}.{name}", field.get("description", "")
        yield from described(field, f"{path}.{name}")
        yield from described(field.get("items", {}), f"{path}.{name}[]")
