"""The objects that a training owns: worker pods, their service, their token, their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dstrain_api import constants as names
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.status import DeepSeekTrainingStatus

from deepseek_operator.core import fabric, nodes, volumes, worker
from deepseek_operator.core.model import Manifest, Settings, Training
from deepseek_operator.core.situation import Situation, pod_name
from deepseek_operator.core.template import avoiding, merged

SHM = "/dev/shm"  # noqa: S108, a mount in the pod
TMP = "/tmp"  # noqa: S108, likewise: the root file system is read-only
APP_LABELS = {
    "app.kubernetes.io/name": "dstrain-worker",
    "app.kubernetes.io/managed-by": names.MANAGER,
}


def gang(
    s: Situation, slots: Iterable[int], status: DeepSeekTrainingStatus
) -> tuple[Manifest, ...]:
    """Pods for these slots under the status' attempt, after what they need; nothing for no slots.

    What they need is asked for each time: it then is there again if somebody has deleted it.
    """
    avoid = tuple(n.name for n in nodes.excluded(s, status))
    tolerates = s.settings.taint_nodes and any(r.tolerated for r in status.nodes)
    pods = tuple(
        worker_pod(
            s.training,
            s.spec,
            s.settings,
            slot=i,
            attempt=status.attempt,
            avoid=avoid,
            tolerates=tolerates,
        )
        for i in slots
    )
    return (*supporting(s.training, s.spec, s.settings, s.observed.token), *pods) if pods else ()


def supporting(
    training: Training, spec: DeepSeekTrainingSpec, settings: Settings, token: str
) -> tuple[Manifest, ...]:
    """The token, the service, and the checkpoint claim unless the user names a place."""
    made = [_secret(training, token, settings.coordinator_ca), _service(training)]
    if spec.checkpoint.uri is None:
        made.append(_claim(training, spec))
    return tuple(made)


def worker_pod(
    training: Training,
    spec: DeepSeekTrainingSpec,
    settings: Settings,
    *,
    slot: int,
    attempt: int,
    avoid: tuple[str, ...] = (),
    tolerates: bool = False,
) -> Manifest:
    """One worker pod. `avoid` names nodes it must not run on; `tolerates` the taint of suspects."""
    name = pod_name(training.name, slot, attempt)
    labels = {
        **APP_LABELS,
        **selector_labels(training.name),
        names.LABEL_SLOT: str(slot),
        names.LABEL_ATTEMPT: str(attempt),
    }
    annotations = {}
    net = fabric.resolve(spec.fabric)
    if net.networks:
        annotations["k8s.v1.cni.cncf.io/networks"] = net.networks
    base: Manifest = {
        "metadata": {"labels": labels, "annotations": annotations},
        "spec": _pod_spec(training, spec, settings, name, slot, net),
    }
    patched = merged(base, spec.workers.template)
    # Who a pod belongs to is not for a template to say.
    meta = patched["metadata"]
    meta["labels"] = {**meta["labels"], **labels}
    if avoid:
        meta["annotations"] = {
            **meta["annotations"],
            names.ANNOTATION_EXCLUDED_NODES: ",".join(avoid),
        }
    if tolerates:
        suspects = {"key": names.TAINT_SUSPECT, "operator": "Exists"}
        spec_made = patched["spec"]
        spec_made["tolerations"] = [*spec_made.get("tolerations", ()), suspects]
    head = {"apiVersion": "v1", "kind": "Pod"}
    metadata = {**meta, **_identity(training, name)}
    return avoiding({**head, "metadata": metadata, "spec": patched["spec"]}, avoid)


def selector_labels(training: str) -> dict[str, str]:
    """Labels that select the pods of a training."""
    return {names.LABEL_TRAINING: training}


def _pod_spec(
    training: Training,
    spec: DeepSeekTrainingSpec,
    settings: Settings,
    name: str,
    slot: int,
    net: fabric.Fabric,
) -> dict[str, Any]:
    claim_volumes, claim_mounts = volumes.mounts(volumes.claims(training.name, spec))
    ca_volumes, ca_mounts = _trust(training, settings)
    container = worker.container(training, spec, settings, slot)
    container["volumeMounts"] = [
        {"name": "shm", "mountPath": SHM},
        {"name": "tmp", "mountPath": TMP},
        *claim_mounts,
        *ca_mounts,
    ]
    made: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": worker.GRACE_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostname": name,
        "subdomain": training.name,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": worker.USER_ID,
            "runAsGroup": worker.USER_ID,
            "fsGroup": worker.USER_ID,
            # A large checkpoint volume is not walked again at every start of a pod.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": {"podAntiAffinity": _spread(training.name)},
        "containers": [container],
        "volumes": [
            {
                "name": "shm",
                "emptyDir": {"medium": "Memory", "sizeLimit": str(spec.workers.shared_memory)},
            },
            {"name": "tmp", "emptyDir": {}},
            *claim_volumes,
            *ca_volumes,
        ],
    }
    if spec.workers.gpus_per_worker:
        made["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    if net.host_network:
        made["hostNetwork"] = True
        made["dnsPolicy"] = "ClusterFirstWithHostNet"
    if settings.image_pull_secrets:
        made["imagePullSecrets"] = [{"name": n} for n in settings.image_pull_secrets]
    return made


def _trust(training: Training, settings: Settings) -> tuple[list[Manifest], list[Manifest]]:
    """Volume and mount of the coordinator's CA, if it has one of its own."""
    if not settings.coordinator_ca:
        return [], []
    items = [{"key": worker.CA_KEY, "path": worker.CA_KEY}]
    secret = {"secretName": worker.secret_name(training.name), "items": items}
    mount = {"name": "coordinator-ca", "mountPath": worker.CA_FOLDER, "readOnly": True}
    return [{"name": "coordinator-ca", "secret": secret}], [mount]


def _spread(training: str) -> dict[str, Any]:
    """One worker per node where there is room: a lost node then costs one worker."""
    term = {
        "labelSelector": {"matchLabels": selector_labels(training)},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "podAffinityTerm": term}
        ]
    }


def _identity(training: Training, name: str) -> dict[str, Any]:
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": training.name,
        "uid": training.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {"name": name, "namespace": training.namespace, "ownerReferences": [owner]}


def _owned(training: Training, kind: str, name: str) -> Manifest:
    labels = {**APP_LABELS, **selector_labels(training.name)}
    return {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {**_identity(training, name), "labels": labels},
    }


def _secret(training: Training, token: str, ca: str) -> Manifest:
    """What a worker needs to speak with the coordinator: its token, and whom to trust."""
    return {
        **_owned(training, "Secret", worker.secret_name(training.name)),
        "type": "Opaque",
        "stringData": {"token": token} | ({worker.CA_KEY: ca} if ca else {}),
    }


def _service(training: Training) -> Manifest:
    """Headless: gives the pods names, and Prometheus their metrics port."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector_labels(training.name),
        "ports": [{"name": "metrics", "port": names.METRICS_PORT, "targetPort": "metrics"}],
    }
    return {**_owned(training, "Service", training.name), "spec": spec}


def _claim(training: Training, spec: DeepSeekTrainingSpec) -> Manifest:
    claim = spec.checkpoint.claim
    wanted: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": str(claim.size)}},
    }
    if claim.storage_class_name:
        wanted["storageClassName"] = claim.storage_class_name
    return {
        **_owned(training, "PersistentVolumeClaim", volumes.checkpoint_claim(training.name)),
        "spec": wanted,
    }
