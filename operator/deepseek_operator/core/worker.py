"""The container of a worker pod: torchrun, its arguments and its environment."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlsplit

from dstrain_api import constants as names
from dstrain_api.config import TrainerConfig
from dstrain_api.quantities import duration_s, quantity
from dstrain_api.spec import (
    DeepSeekTrainingSpec,
    EntrypointSpec,
    OptimizerSpec,
    ParallelismSpec,
    PrecisionSpec,
)

from deepseek_operator.core import fabric, volumes
from deepseek_operator.core.model import Settings, Training

# Workers save on SIGTERM. torchrun kills them after SHUTDOWN_S, the kubelet kills torchrun after
# GRACE_S: the difference is for the agent to say that it leaves.
SHUTDOWN_S = 90
GRACE_S = 120
BEATS_MISSED = 3  # by a pod that is taken for lost
USER_ID = 10001  # of the trainer image
CA_FOLDER, CA_KEY = "/etc/dstrain", "ca.crt"
RDZV_PORTS = {"http": 80, "https": 443}


def container(training: Training, spec: DeepSeekTrainingSpec, settings: Settings, slot: int) -> Any:
    """The one container of a worker pod, without its volume mounts."""
    net = fabric.resolve(spec.fabric)
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if net.ipc_lock:
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "name": names.TRAINER_CONTAINER,
        "image": spec.workers.image or settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        # torchrun is PID 1: the kubelet's SIGTERM reaches it, and its workers die with it.
        "command": command(training, spec, settings),
        "env": environment(training, spec, settings, slot, net),
        "ports": [{"name": "metrics", "containerPort": names.METRICS_PORT}],
        "resources": _resources(spec, net),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        # What a program writes last is in the pod's status when it ends by itself.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def secret_name(training: str) -> str:
    """Of the Secret with the training's token."""
    return f"{training}-token"


def command(training: Training, spec: DeepSeekTrainingSpec, settings: Settings) -> list[str]:
    """torchrun with our rendezvous. Its restarts are without bound: the budget is the training's.

    It is started as a module, which is the same program as the `torchrun` script and needs no PATH.
    """
    low, high = _size_bounds(spec)
    return [
        "python",
        "-m",
        "torch.distributed.run",
        f"--rdzv-backend={names.RENDEZVOUS_BACKEND}",
        f"--rdzv-endpoint={_endpoint(settings.coordinator_url)}",
        f"--rdzv-id={training.uid}",
        f"--nnodes={low}:{high}",
        f"--nproc-per-node={spec.workers.processes_per_worker}",
        "--max-restarts=1000000",
        "--monitor-interval=0.1",
        "--logs-specs=dstrain",  # the agent keeps the end of stderr: a traceback is there
        f"--shutdown-timeout={SHUTDOWN_S}",
        *_program(spec.entrypoint),
    ]


def environment(
    training: Training,
    spec: DeepSeekTrainingSpec,
    settings: Settings,
    slot: int,
    net: fabric.Fabric,
) -> list[dict[str, Any]]:
    """Variables of every worker pod; what only the cluster knows comes by field references."""
    plain = {
        names.ENV_COORDINATOR: settings.coordinator_url,
        names.ENV_TRAINING: training.name,
        names.ENV_TRAINING_UID: training.uid,
        names.ENV_NAMESPACE: training.namespace,
        names.ENV_SLOT: str(slot),
        names.ENV_BEAT_INTERVAL: f"{_beat_interval_s(spec, settings):g}",
        names.ENV_METRICS_PORT: str(names.METRICS_PORT),
        **volumes.checkpoint_place(volumes.checkpoint_uri(training.name, spec.checkpoint)),
        # The agent computes ranks from its place in the gang and needs no store for it.
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
        "OMP_NUM_THREADS": str(_threads(spec)),
        "HOME": "/tmp",  # noqa: S108, an empty folder of the pod; the user has no other
        "PYTHONUNBUFFERED": "1",
    }
    if spec.recovery.hang_timeout != "auto":
        plain[names.ENV_HANG_TIMEOUT] = f"{duration_s(spec.recovery.hang_timeout):g}"
    if settings.coordinator_ca:
        plain[names.ENV_CA_FILE] = f"{CA_FOLDER}/{CA_KEY}"
    config = trainer_config(training.name, spec)
    if config:
        plain[names.ENV_CONFIG] = config.model_dump_json(by_alias=True, exclude_none=True)
    fields = {
        names.ENV_POD: "metadata.name",
        names.ENV_POD_UID: "metadata.uid",
        names.ENV_POD_IP: "status.podIP",
        names.ENV_NODE: "spec.nodeName",
    }
    token = {"secretKeyRef": {"name": secret_name(training.name), "key": "token"}}
    return [
        *({"name": k, "value": v} for k, v in plain.items()),
        *({"name": k, "valueFrom": {"fieldRef": {"fieldPath": v}}} for k, v in fields.items()),
        {"name": names.ENV_TOKEN, "valueFrom": token},
        *({"name": k, "value": v} for k, v in sorted(net.env.items())),
    ]


def _beat_interval_s(spec: DeepSeekTrainingSpec, settings: Settings) -> float:
    """Three beats fit into the silence that makes a pod lost, whatever the operator is set to."""
    longest_s = duration_s(spec.recovery.heartbeat_timeout) / BEATS_MISSED
    return min(settings.beat_interval_s, longest_s)


def trainer_config(training: str, spec: DeepSeekTrainingSpec) -> TrainerConfig | None:
    """The trainer's part of the spec with paths for URIs; None for a program of the user."""
    if spec.model is None or spec.data is None or spec.training is None:
        return None
    uri = volumes.local_uri(volumes.checkpoint_uri(training, spec.checkpoint))
    return TrainerConfig(
        architecture=spec.model.resolve(),
        data=volumes.local_data(spec.data),
        training=spec.training,
        optimizer=spec.optimizer or OptimizerSpec(),
        precision=spec.precision or PrecisionSpec(),
        parallelism=spec.parallelism or ParallelismSpec(),
        checkpoint=spec.checkpoint.model_copy(update={"uri": uri}),
    )


def _program(entrypoint: EntrypointSpec | None) -> list[str]:
    if entrypoint is None:
        return ["-m", "deepseek_trainer"]
    if entrypoint.module:
        return ["-m", entrypoint.module, *entrypoint.args]
    return [entrypoint.script or "", *entrypoint.args]


def _size_bounds(spec: DeepSeekTrainingSpec) -> tuple[int, int]:
    if spec.elastic is None:
        return spec.workers.replicas, spec.workers.replicas
    return spec.elastic.min_replicas, max(spec.elastic.max_replicas, spec.elastic.min_replicas)


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or RDZV_PORTS.get(parts.scheme, names.COORDINATOR_PORT)}"


def _threads(spec: DeepSeekTrainingSpec) -> int:
    """Threads of each process: its share of the pod's cores; 1 where no share is named."""
    resources = spec.workers.resources
    cores = resources.limits.get("cpu", resources.requests.get("cpu"))
    if cores is None:
        return 1
    return max(1, math.floor(quantity(cores) / spec.workers.processes_per_worker))


def _resources(spec: DeepSeekTrainingSpec, net: fabric.Fabric) -> dict[str, dict[str, str]]:
    devices: dict[str, str] = {}
    if spec.workers.gpus_per_worker:
        devices["nvidia.com/gpu"] = str(spec.workers.gpus_per_worker)
    if net.rdma:
        devices[net.rdma.resource] = str(net.rdma.count)
    asked = spec.workers.resources
    limits = {**{k: str(v) for k, v in asked.limits.items()}, **devices}
    requests = {k: str(v) for k, v in asked.requests.items()}
    return {k: v for k, v in (("requests", requests), ("limits", limits)) if v}
