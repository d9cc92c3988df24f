"""The objects that a training owns. `DSTRAIN_UPDATE_GOLDEN=1` rewrites the golden pods."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from deepseek_operator.core.manifests import supporting, worker_pod
from deepseek_operator.core.model import Settings, Training
from dstrain_api.config import TrainerConfig
from dstrain_api.rules import validate
from dstrain_api.status import DeepSeekTrainingStatus

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Settings(
    trainer_image="example/trainer:1", coordinator_url="http://operator.dstrain:8080"
)
PROFILES = {
    "tcp": {"profile": "tcp"},
    "infiniband": {"profile": "infiniband", "rdma": {"resource": "rdma/ib", "count": 8}},
    "roce": {"profile": "roce", "networks": "rail-0,rail-1", "env": {"NCCL_IB_TC": "106"}},
    "efa": {"profile": "efa", "rdma": {"resource": "vpc.amazonaws.com/efa", "count": 32}},
    "custom": {"profile": "custom", "hostNetwork": True, "ipcLock": True},
}


def spec(**changes):
    stored = {
        "model": {"preset": "mini"},
        "data": {
            "sources": [{"uri": "pvc://corpora/web"}, {"uri": "builtin://mini"}],
            "tokenizer": "file:///data/tokenizer.json",
        },
        "training": {"total": {"tokens": 1_000_000}},
        "workers": {"replicas": 2},
    }
    return validate({**stored, **changes})


def training(parsed):
    return Training(
        namespace="team",
        name="mini",
        uid="0000-1111",
        resource_version="1",
        generation=1,
        created_at_s=0.0,
        deleting=False,
        spec=parsed,
        spec_error="",
        status=DeepSeekTrainingStatus(),
    )


def pod(settings=SETTINGS, avoid=(), **changes):
    parsed = spec(**changes)
    return worker_pod(training(parsed), parsed, settings, slot=1, attempt=3, avoid=avoid)


def container(made):
    [only] = made["spec"]["containers"]
    return only


def environment(made):
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(made)["env"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_pod_of_each_fabric_profile_is_as_its_golden_file(profile):
    gpus = 0 if profile == "tcp" else 8
    made = pod(fabric=PROFILES[profile], workers={"replicas": 4, "gpusPerWorker": gpus})
    golden = GOLDEN / f"pod-{profile}.yaml"
    text = yaml.safe_dump(made, sort_keys=False)
    if os.environ.get("DSTRAIN_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert yaml.safe_load(text) == yaml.safe_load(golden.read_text())


def test_torchrun_is_the_command_itself_and_restarts_without_bound():
    command = container(pod())["command"]
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    assert "--rdzv-backend=dstrain" in command
    assert "--rdzv-endpoint=operator.dstrain:8080" in command
    assert "--rdzv-id=0000-1111" in command
    assert "--nnodes=2:2" in command
    assert "--max-restarts=1000000" in command
    assert command[-2:] == ["-m", "deepseek_trainer"]


def test_an_elastic_training_names_its_bounds_to_torchrun():
    command = container(pod(elastic={"minReplicas": 1, "maxReplicas": 4}))["command"]
    assert "--nnodes=1:4" in command


@pytest.mark.parametrize(
    ("entrypoint", "program"),
    [
        ({"module": "my.train", "args": ["--lr", "1"]}, ["-m", "my.train", "--lr", "1"]),
        ({"script": "/app/train.py"}, ["/app/train.py"]),
    ],
)
def test_an_entrypoint_runs_in_place_of_the_trainer(entrypoint, program):
    parsed = validate({"entrypoint": entrypoint})
    made = worker_pod(training(parsed), parsed, SETTINGS, slot=0, attempt=1)
    assert container(made)["command"][-len(program) :] == program
    assert "DSTRAIN_CONFIG" not in environment(made)


def test_the_pod_ends_later_than_its_workers_are_killed():
    made = pod()
    [timeout] = [a for a in container(made)["command"] if a.startswith("--shutdown-timeout=")]
    assert made["spec"]["terminationGracePeriodSeconds"] > int(timeout.split("=")[1])


def test_the_default_pod_fits_the_restricted_standard():
    made = pod()["spec"]
    security = made["containers"][0]["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert made["automountServiceAccountToken"] is False


def test_what_may_be_written_is_shared_memory_the_temporary_folder_and_checkpoints():
    made = pod(workers={"replicas": 2, "sharedMemory": "2Gi"})
    paths = {m["mountPath"]: m for m in container(made)["volumeMounts"]}
    assert set(paths) == {
        "/dev/shm",
        "/tmp",
        "/mnt/dstrain/corpora",
        "/mnt/dstrain/mini-checkpoints",
    }
    assert paths["/mnt/dstrain/corpora"]["readOnly"] is True
    assert "readOnly" not in paths["/mnt/dstrain/mini-checkpoints"]
    assert made["spec"]["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}


def test_the_trainer_reads_paths_where_the_spec_names_claims():
    given = environment(pod(checkpoint={"uri": "pvc://runs/seven"}))
    config = TrainerConfig.model_validate(json.loads(given["DSTRAIN_CONFIG"]))
    assert [s.uri for s in config.data.sources] == [
        "file:///mnt/dstrain/corpora/web",
        "builtin://mini",
    ]
    assert config.data.tokenizer == "file:///data/tokenizer.json"
    assert config.checkpoint.uri == "file:///mnt/dstrain/runs/seven"
    assert given["DSTRAIN_CHECKPOINT_DIR"] == "/mnt/dstrain/runs/seven"


def test_the_token_is_read_from_a_secret_and_the_rest_from_the_pod():
    given = environment(pod())
    assert given["DSTRAIN_TOKEN"] == {"secretKeyRef": {"name": "mini-token", "key": "token"}}
    assert given["DSTRAIN_POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert given["DSTRAIN_SLOT"] == "1"


@pytest.mark.parametrize(
    ("resources", "processes", "threads"),
    [({}, 2, "1"), ({"requests": {"cpu": "8"}}, 2, "4"), ({"limits": {"cpu": "1500m"}}, 2, "1")],
)
def test_each_process_gets_its_share_of_the_cores_as_threads(resources, processes, threads):
    workers = {"replicas": 2, "processesPerWorker": processes, "resources": resources}
    assert environment(pod(workers=workers))["OMP_NUM_THREADS"] == threads


def test_gpus_are_limits_and_their_nodes_taint_is_tolerated():
    made = pod(workers={"replicas": 2, "gpusPerWorker": 8})
    assert container(made)["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert made["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_a_template_is_merged_by_name_and_cannot_take_the_pod_away_from_its_training():
    template = {
        "metadata": {"labels": {"team": "nlp", "dstrain.dev/training": "other"}},
        "spec": {
            "nodeSelector": {"pool": "h100"},
            "containers": [
                {"name": "trainer", "env": [{"name": "DSTRAIN_SLOT", "value": "9"}]},
                {"name": "sidecar", "image": "x"},
            ],
        },
    }
    made = pod(workers={"replicas": 2, "template": template})
    assert made["metadata"]["labels"]["team"] == "nlp"
    assert made["metadata"]["labels"]["dstrain.dev/training"] == "mini"
    assert made["spec"]["nodeSelector"] == {"pool": "h100"}
    trainer, sidecar = made["spec"]["containers"]
    assert sidecar["name"] == "sidecar"
    assert [e for e in trainer["env"] if e["name"] == "DSTRAIN_SLOT"] == [
        {"name": "DSTRAIN_SLOT", "value": "9"}
    ]


def test_a_node_to_avoid_is_excluded_in_every_alternative_of_the_users_affinity():
    terms = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [z]}]} for z in "ab"]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    template = {"spec": {"affinity": {"nodeAffinity": required}}}
    made = pod(workers={"replicas": 2, "template": template}, avoid=("n1", "n2"))
    affinity = made["spec"]["affinity"]
    found = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for term in found["nodeSelectorTerms"]:
        assert term["matchExpressions"]
        assert [f["values"] for f in term["matchFields"]] == [["n1"], ["n2"]]
    assert affinity["podAntiAffinity"]
    assert made["metadata"]["annotations"]["dstrain.dev/excluded-nodes"] == "n1,n2"


def test_the_claim_is_made_only_when_no_folder_is_named():
    def kinds(parsed):
        return [m["kind"] for m in supporting(training(parsed), parsed, SETTINGS, "t")]

    assert kinds(spec()) == ["Secret", "Service", "PersistentVolumeClaim"]
    assert kinds(spec(checkpoint={"uri": "file:///runs"})) == ["Secret", "Service"]
    assert kinds(spec(checkpoint={"uri": "s3://runs/seven"})) == ["Secret", "Service"]


def test_a_bucket_is_not_mounted_and_workers_are_told_its_uri():
    made = pod(checkpoint={"uri": "s3://runs/seven"})
    given = environment(made)
    assert given["DSTRAIN_CHECKPOINT_URI"] == "s3://runs/seven"
    assert "DSTRAIN_CHECKPOINT_DIR" not in given
    config = TrainerConfig.model_validate_json(given["DSTRAIN_CONFIG"])
    assert config.checkpoint.uri == "s3://runs/seven"
    claims = [
        v["persistentVolumeClaim"] for v in made["spec"]["volumes"] if "persistentVolumeClaim" in v
    ]
    assert [claim["claimName"] for claim in claims] == ["corpora"]


def test_credentials_of_a_bucket_come_from_the_template():
    envfrom = [{"secretRef": {"name": "checkpoint-bucket"}}]
    template = {"spec": {"containers": [{"name": "trainer", "envFrom": envfrom}]}}
    made = pod(checkpoint={"uri": "s3://runs/seven"}, workers={"template": template})
    assert container(made)["envFrom"] == envfrom
    assert environment(made)["DSTRAIN_CHECKPOINT_URI"] == "s3://runs/seven"


def test_a_coordinator_with_its_own_ca_is_trusted_by_its_workers():
    parsed = spec()
    settings = replace(SETTINGS, coordinator_ca="PEM")
    secret = supporting(training(parsed), parsed, settings, "t")[0]
    assert secret["stringData"] == {"token": "t", "ca.crt": "PEM"}
    made = pod(settings=settings)["spec"]
    container = made["containers"][0]
    assert {"name": "DSTRAIN_CA_FILE", "value": "/etc/dstrain/ca.crt"} in container["env"]
    mount = next(m for m in container["volumeMounts"] if m["mountPath"] == "/etc/dstrain")
    volume = next(v for v in made["volumes"] if v["name"] == mount["name"])
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]


def test_everything_is_owned_by_the_training():
    parsed = spec()
    made = [*supporting(training(parsed), parsed, SETTINGS, "t"), pod()]
    for manifest in made:
        [owner] = manifest["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("0000-1111", True)
