"""`spec` of a DeepSeekTraining (v1alpha1). Descriptions become `kubectl explain`: unit, default and example in each.

What only needs one field is said by its type; what needs two is in `dstrain_api.rules`, once for CEL and once for Python.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from dstrain_api.base import ApiModel
from dstrain_api.model import ModelSpec
from dstrain_api.patterns import (
    AUTO_DURATION_PATTERN,
    AUTO_PATTERN,
    DURATION_PATTERN,
    HELP,
    QUANTITY_PATTERN,
    RESOURCE_PATTERN,
    STORE_PATTERN,
    URI_PATTERN,
)
from dstrain_api.quantities import quantity


def _quantity(value: object) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        quantity(value)
        return value
    raise ValueError(f"{value!r}: {HELP[QUANTITY_PATTERN]}; put it in quotes if it has a point")


def _auto_or_count(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"{value!r}: {HELP[AUTO_PATTERN]}")


def _template(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
        raise ValueError("write a pod template: {metadata: {...}, spec: {...}}")
    unknown = sorted(set(value) - {"metadata", "spec"})
    if unknown:
        raise ValueError(f"{unknown[0]} does not belong to a pod template; write {{metadata: {{...}}, spec: {{...}}}}")
    return value


def _loose_object(description: str) -> dict[str, Any]:
    return {"type": "object", "description": description, "x-kubernetes-preserve-unknown-fields": True}


Duration = Annotated[str, Field(pattern=DURATION_PATTERN, max_length=32)]
AutoOrDuration = Annotated[str, Field(pattern=AUTO_DURATION_PATTERN, max_length=32)]
Quantity = Annotated[
    int | str,
    PlainValidator(_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "minimum": 0, "maxLength": 32, "pattern": QUANTITY_PATTERN}),
]
AutoOrCount = Annotated[
    int | Literal["auto"],
    PlainValidator(_auto_or_count),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "minimum": 1, "maxLength": 4, "pattern": AUTO_PATTERN}),
]
Template = Annotated[
    dict[str, Any],
    PlainValidator(_template),
    WithJsonSchema({
        "type": "object",
        "properties": {
            "metadata": _loose_object("Labels and annotations of the pods. Default: none. Example: {annotations: {team: nlp}}."),
            "spec": _loose_object("Fields of the pod, merged into what the operator makes. Default: none. Example: {nodeSelector: {pool: h100}}."),
        },
    }),
]  # fmt: skip
Uri = Annotated[str, Field(pattern=URI_PATTERN, max_length=1024)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class EntrypointSpec(ApiModel):
    """Any program that torchrun can start, instead of the DeepSeek trainer."""

    module: str | None = Field(None, max_length=253, description="Python module, as in `python -m`. Default: none; give module or script. Example: my_project.train.")
    script: str | None = Field(None, max_length=1024, description="Path of a Python script in the image. Default: none; give module or script. Example: /app/train.py.")
    args: list[Annotated[str, Field(max_length=4096)]] = Field(default_factory=list, max_length=256, description="Arguments of the program. Default: []. Example: [--epochs, \"3\"].")


class DataSource(ApiModel):
    """One prepared corpus (see `dstrain data prepare`) and its share of the samples."""

    uri: Uri = Field(description="Prepared corpus: file:///path in the worker, pvc://claim/path, or builtin://mini. Required. Example: pvc://corpora/web.")
    weight: float = Field(1.0, gt=0, le=1_000_000, description="Share of the samples relative to the other sources. Default: 1. Example: 0.3.")


class DataSpec(ApiModel):
    """What the model reads."""

    sources: list[DataSource] = Field(min_length=1, max_length=64, description="Prepared corpora that are mixed by weight. Required. Example: [{uri: builtin://mini}].")
    tokenizer: Uri = Field("builtin://mini", description="tokenizer.json the corpora were prepared with; its fingerprint is checked. Default: builtin://mini. Example: pvc://corpora/tokenizer.json.")
    sequence_length: int = Field(64, ge=2, le=1_048_576, description="Tokens per sample. Default: 64. Example: 4096.")


class TotalSpec(ApiModel):
    """When the training is complete."""

    tokens: int = Field(ge=1, le=10**15, description="Tokens to train on, rounded up to whole global batches. Required. Example: 1000000.")


class TrainingSpec(ApiModel):
    """How much is trained, and in which batches."""

    total: TotalSpec = Field(description="When the training is complete. Required. Example: {tokens: 1000000}.")
    global_batch: int = Field(32, ge=1, le=1_000_000, description="Samples per optimizer step over all workers; the same while the gang grows or shrinks, and a multiple of the data-parallel ranks. Default: 32. Example: 1024.")
    micro_batch: int = Field(4, ge=1, le=4096, description="Most samples per forward pass of one data-parallel rank; lower it when memory is short. Default: 4. Example: 1.")
    on_loss_spike: Literal["warn", "rollback", "ignore"] = Field("warn", description="What a loss far above those before it does: warn in the log and the metrics; rollback goes back to the last checkpoint after five such steps in a row and leaves out their samples. Default: warn. Example: rollback.")
    seed: int = Field(1, ge=0, le=2**31 - 1, description="Seed of weights and sample order. Default: 1. Example: 42.")


class WarmupSpec(ApiModel):
    """Linear warm-up of the learning rate."""

    ratio: Ratio = Field(0.05, description="Share of the total tokens, as a ratio. Default: 0.05. Example: 0.01.")


class ScheduleSpec(ApiModel):
    """Learning rate over tokens, so that a resize does not shift it."""

    warmup: WarmupSpec = Field(default_factory=WarmupSpec, description="Linear warm-up. Default: {ratio: 0.05}. Example: {ratio: 0.01}.")
    decay: Literal["cosine", "constant"] = Field("cosine", description="Shape after the warm-up. Default: cosine. Example: constant.")
    min_ratio: Ratio = Field(0.01, description="Floor of the learning rate as a ratio of its peak. Default: 0.01. Example: 0.1.")


class OptimizerSpec(ApiModel):
    """How weights are updated."""

    name: Literal["adamw"] = Field("adamw", description="Algorithm. Default: adamw. Example: adamw.")
    lr: float = Field(3e-4, gt=0, le=10, description="Peak learning rate. Default: 3e-4. Example: 2.2e-4.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2, description="Decay of the first and second moment. Default: [0.9, 0.95]. Example: [0.9, 0.95].")
    weight_decay: float = Field(0.1, ge=0, le=10, description="Decoupled weight decay of matrices; norms and biases have none. Default: 0.1. Example: 0.1.")
    clip_norm: float = Field(1.0, gt=0, le=1_000_000, description="Largest global gradient norm. Default: 1. Example: 1.0.")
    on_non_finite: Literal["skip", "stop"] = Field("skip", description="What a gradient with NaN or infinity does: skip the step on all ranks, and after ten in a row go back to the last checkpoint and leave out their samples; or stop with an error at the first. Default: skip. Example: stop.")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, description="Learning rate over tokens. Default: warm-up 5 %, cosine to 1 %. Example: {decay: constant}.")


class PrecisionSpec(ApiModel):
    """Number formats. Weights, moments and reductions stay in fp32."""

    compute: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="Format of matrix products; fp16 adds dynamic loss scaling. Default: bf16. Example: fp32.")


class ParallelismSpec(ApiModel):
    """How one model is spread over the worker processes. tensor x dataReplicate x dataShard = processes."""

    data_shard: AutoOrCount = Field("auto", description="Ranks that share one copy of weights and moments (FSDP2); auto takes what the others leave. Default: auto. Example: 8.")
    data_replicate: int = Field(1, ge=1, le=65_536, description="Copies of the sharded model (hybrid sharding). Default: 1. Example: 2.")
    tensor: int = Field(1, ge=1, le=64, description="Ranks that split each layer (tensor parallelism); divides heads, denseFfn and moe.ffn. Default: 1. Example: 2.")


class ResourcesSpec(ApiModel):
    """Resources of one worker pod, as in a container."""

    requests: dict[str, Quantity] = Field(default_factory=dict, max_length=32, description="What the scheduler sets aside, as Kubernetes quantities. Default: {}. Example: {cpu: \"8\", memory: 64Gi}.")
    limits: dict[str, Quantity] = Field(default_factory=dict, max_length=32, description="What the pod may use at most, as Kubernetes quantities. Default: {}. Example: {memory: 64Gi}.")


class WorkersSpec(ApiModel):
    """The gang of worker pods."""

    replicas: int = Field(1, ge=1, le=20_000, description="Worker pods; `kubectl scale` changes it. Default: 1. Example: 16.")
    gpus_per_worker: int = Field(0, ge=0, le=64, description="nvidia.com/gpu limit of each pod; 0 trains on CPU. Default: 0. Example: 8.")
    processes_per_worker: int = Field(default_factory=lambda fields: fields["gpus_per_worker"] or 1, ge=1, le=64, description="Training processes per pod; with GPUs there is one for each. Default: gpusPerWorker, or 1 on CPU. Example: 2.")
    image: str = Field("", max_length=1024, description="Trainer image. Default: the operator's trainer image. Example: registry.example/dstrain-trainer:1.0.")
    shared_memory: Quantity = Field("1Gi", description="Size of /dev/shm in bytes, as a quantity. Default: 1Gi. Example: 64Gi.")
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec, description="Resources of one pod. Default: none. Example: {requests: {cpu: \"1\"}}.")
    template: Template = Field(default_factory=dict, description="Pod template patch: maps are merged, lists of named items by name (the container is `trainer`), other lists appended. Default: {}. Example: {spec: {nodeSelector: {pool: h100}}}.")


class ElasticSpec(ApiModel):
    """How far the gang may shrink when pods cannot be replaced, and grow by `kubectl scale`."""

    min_replicas: int = Field(1, ge=1, le=20_000, description="Fewest worker pods to train with. Default: 1. Example: 12.")
    max_replicas: int = Field(20_000, ge=1, le=20_000, description="Most worker pods that a scale may ask for. Default: 20000. Example: 16.")
    replacement_wait: AutoOrDuration = Field("auto", description="How long to wait for missing pods before going on with fewer; auto weighs what a restart has cost against how long a new pod takes to join, and waits for 45 s where no worker has run yet. Default: auto. Example: 2m.")
    scale_up_snooze: Duration = Field("5m", description="Shortest time between two growths of a gang that had to shrink; each takes place right after a checkpoint. Default: 5m. Example: 15m.")


class RdmaSpec(ApiModel):
    """Device resource that gives a pod its RDMA devices."""

    resource: Annotated[str, Field(pattern=RESOURCE_PATTERN, max_length=253)] = Field(description="Extended resource name of the device plugin. Required. Example: rdma/hca_shared_devices_a.")
    count: int = Field(1, ge=1, le=64, description="Devices per pod. Default: 1. Example: 8.")


class FabricSpec(ApiModel):
    """How worker pods talk to each other."""

    profile: Literal["tcp", "infiniband", "roce", "efa", "custom"] = Field("tcp", description="Network: sets the NCCL environment, devices, IPC_LOCK and host network that it needs; custom sets nothing. Default: tcp. Example: infiniband.")
    env: dict[str, Annotated[str, Field(max_length=4096)]] = Field(default_factory=dict, max_length=64, description="Variables added to, or put in place of, the profile's. Default: {}. Example: {NCCL_IB_HCA: mlx5}.")
    rdma: RdmaSpec | None = Field(None, description="Device resource. Default: the profile's. Example: {resource: rdma/ib, count: 8}.")
    ipc_lock: bool | None = Field(None, description="Whether the container gets CAP_IPC_LOCK to pin memory. Default: the profile's. Example: true.")
    host_network: bool | None = Field(None, description="Whether pods use the node's network. Default: the profile's. Example: true.")
    networks: str = Field("", max_length=1024, description="Extra networks, as the k8s.v1.cni.cncf.io/networks annotation. Default: none. Example: ib-net-0,ib-net-1.")


class ClaimSpec(ApiModel):
    """A volume claim that the operator creates for checkpoints when checkpoint.uri is absent."""

    size: Quantity = Field("10Gi", description="Requested bytes, as a quantity. Default: 10Gi. Example: 2Ti.")
    storage_class_name: str = Field("", max_length=253, description="Storage class; must allow ReadWriteMany. Default: the cluster's default class. Example: nfs.")


class CheckpointSpec(ApiModel):
    """Where and how often the state is saved."""

    uri: Annotated[str, Field(pattern=STORE_PATTERN, max_length=1024)] | None = Field(None, description="Where all workers save: a folder they share, pvc://claim/path of an existing claim or file:///path, or s3://bucket/prefix with AWS_* variables from workers.template. Default: a claim <name>-checkpoints made from claim. Example: pvc://checkpoints/run-7.")
    claim: ClaimSpec = Field(default_factory=ClaimSpec, description="The claim made when uri is absent; it is deleted with the training. Default: {size: 10Gi}. Example: {size: 2Ti, storageClassName: nfs}.")
    every_steps: int = Field(1000, ge=1, le=10**9, description="Most steps between checkpoints: multiples of it are saved, or the first step after them at which the save before is written. Default: 1000. Example: 200.")
    every_seconds: AutoOrCount = Field("auto", description="Most seconds between checkpoints; auto weighs what a save costs against how often this training fails (Daly's optimum), and never spends more than 1 % of the time on saves. Default: auto. Example: 600.")
    keep_last: int = Field(3, ge=2, le=1000, description="Newest checkpoints that are kept; at least two. Default: 3. Example: 5.")
    keep_every_steps: int = Field(0, ge=0, le=10**9, description="Checkpoints at multiples of this many steps are kept for ever; 0 keeps none. Default: 0. Example: 10000.")


class BudgetSpec(ApiModel):
    """How many failures of one class are repaired."""

    max: int = Field(ge=0, le=1000, description="Failures within the window; one more fails the training. Required. Example: 3.")
    window: Duration = Field(description="Length of the sliding window. Required. Example: 1h.")


class BudgetsSpec(ApiModel):
    """Budgets by class of failure. Preemptions and what a person asked for are free."""

    infrastructure: BudgetSpec = Field(default_factory=lambda: BudgetSpec(max=20, window="24h"), description="Lost nodes, evicted pods, bad GPUs. Default: {max: 20, window: 24h}. Example: {max: 50, window: 24h}.")
    application: BudgetSpec = Field(default_factory=lambda: BudgetSpec(max=3, window="1h"), description="Training processes that failed by themselves. Default: {max: 3, window: 1h}. Example: {max: 1, window: 1h}.")
    out_of_memory: BudgetSpec = Field(default_factory=lambda: BudgetSpec(max=1, window="1h"), description="Workers that needed more memory than there is: seldom chance. Default: {max: 1, window: 1h}. Example: {max: 0, window: 1h}.")
    configuration: BudgetSpec = Field(default_factory=lambda: BudgetSpec(max=0, window="1h"), description="Workers that cannot run as they are described; until the first step, also pods whose image or container cannot be had for 10 minutes. Default: {max: 0, window: 1h}. Example: {max: 2, window: 1h}.")
    numeric: BudgetSpec = Field(default_factory=lambda: BudgetSpec(max=3, window="24h"), description="Programs that gave up because of bad numbers. Default: {max: 3, window: 24h}. Example: {max: 0, window: 1h}.")


class RecoverySpec(ApiModel):
    """When something counts as failed, and how often it is repaired."""

    heartbeat_timeout: Duration = Field("3s", description="A worker pod silent for longer is taken for lost, one that beats irregularly a little later. Pods beat three times in it, and at least once a second unless the operator is set to fewer. Default: 3s. Example: 15s.")
    hang_timeout: AutoOrDuration = Field("auto", description="Time without a finished step after which a training hangs: the stacks of all processes are saved and they are started again. auto is five times the longest of the last steps, at least 60 s, or 10 minutes for a program that reports no sections. Reading a checkpoint, the first step and other sections have 10 minutes or more. Default: auto. Example: 5m.")
    preflight: Literal["auto", "never"] = Field("auto", description="Whether the nodes are checked before the first step and when a worker joins: GPU health, matrix products and exchange of data in pairs of ranks. A node that is broken, or more than twice as slow as the others in two rounds, is left. It takes a second or two at most where all are healthy, and is not done for an entrypoint. never is for nodes that are meant to differ. Default: auto. Example: never.")
    budgets: BudgetsSpec = Field(default_factory=BudgetsSpec, description="Failures that are repaired, by class. Default: see its fields. Example: {application: {max: 1, window: 1h}}.")


class DeepSeekTrainingSpec(ApiModel):
    """What to train, on what, with what, and what a failure may cost."""

    model: ModelSpec | None = Field(None, description="Which DeepSeek model is trained. Required unless entrypoint is given. Example: {preset: mini}.")
    data: DataSpec | None = Field(None, description="What the model reads. Required unless entrypoint is given. Example: {sources: [{uri: builtin://mini}]}.")
    training: TrainingSpec | None = Field(None, description="How much is trained. Required unless entrypoint is given. Example: {total: {tokens: 1000000}}.")
    optimizer: OptimizerSpec | None = Field(None, description="How weights are updated. Default: AdamW, 3e-4, cosine. Example: {lr: 2.2e-4}.")
    precision: PrecisionSpec | None = Field(None, description="Number formats. Default: {compute: bf16}. Example: {compute: fp16}.")
    parallelism: ParallelismSpec | None = Field(None, description="How the model is spread. Default: FSDP2 over all ranks. Example: {tensor: 2}.")
    entrypoint: EntrypointSpec | None = Field(None, description="Another program instead of the DeepSeek trainer; then model, data, training, optimizer, precision and parallelism are absent. Default: none. Example: {module: my_project.train}.")
    workers: WorkersSpec = Field(default_factory=WorkersSpec, description="The gang of worker pods. Default: one pod, one process. Example: {replicas: 2}.")
    elastic: ElasticSpec | None = Field(None, description="How far the gang may shrink and grow. Default: it waits for all replicas. Example: {minReplicas: 1, maxReplicas: 4}.")
    fabric: FabricSpec = Field(default_factory=FabricSpec, description="How pods talk to each other. Default: {profile: tcp}. Example: {profile: infiniband}.")
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="Where and how often the state is saved. Default: a claim of 10Gi, every 1000 steps. Example: {everySteps: 200}.")
    recovery: RecoverySpec = Field(default_factory=RecoverySpec, description="What counts as failed, how often it is repaired. Default: see its fields. Example: {heartbeatTimeout: 15s}.")
    suspend: bool = Field(False, description="Whether the pods are stopped (after a checkpoint) until this is false again. Default: false. Example: true.")
    ttl_seconds_after_finished: int = Field(0, ge=0, le=10**9, description="Seconds after which a finished training is deleted; 0 keeps it. Default: 0. Example: 86400.")
