"""`status` of a DeepSeekTraining (v1alpha1): small, written by the operator alone, enough to go on after it is replaced."""

from typing import Annotated, Literal

from pydantic import Field

from dstrain_api.base import ApiModel

Text = Annotated[str, Field(max_length=4096)]

Phase = Literal["Pending", "Starting", "Running", "Recovering", "Suspended", "Complete", "Failed"]
FailureClass = Literal["infrastructure", "preemption", "application", "outOfMemory", "configuration", "numeric", "voluntary"]
FREE_CLASSES: frozenset[FailureClass] = frozenset({"preemption", "voluntary"})  # nobody's fault: they use no budget
ConditionType = Literal[
    "Accepted", "Scheduled", "Running", "Progressing", "CheckpointCurrent", "Degraded", "Suspended", "Complete",
    "Failed", "Finished",
]  # fmt: skip


class Condition(ApiModel):
    """One aspect of the training, as every Kubernetes condition."""

    type: ConditionType = Field(description="Aspect. Default: none. Example: Running.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds. Default: none. Example: True.")
    reason: Annotated[str, Field(max_length=128)] = Field(description="One word why, from a closed list. Default: none. Example: NodeLost.")
    message: Text = Field("", description="What happened and what to do, for a person. Default: empty. Example: waiting for 1 of 2 workers.")
    last_transition_time: str = Field(max_length=64, description="When status last changed, RFC 3339. Default: none. Example: 2026-11-21T12:00:00Z.")
    observed_generation: int = Field(0, ge=0, description="metadata.generation this was said of. Default: 0. Example: 1.")


class Restarts(ApiModel):
    """Failures since the training was created, by class. They never go down."""

    infrastructure: int = Field(0, ge=0, description="Lost nodes, evicted pods, bad GPUs. Default: 0. Example: 1.")
    preemption: int = Field(0, ge=0, description="Workers that gave way to others or whose node was taken away; they use no budget. Default: 0. Example: 1.")
    application: int = Field(0, ge=0, description="Training processes that failed by themselves. Default: 0. Example: 2.")
    out_of_memory: int = Field(0, ge=0, description="Workers that needed more memory than there is. Default: 0. Example: 1.")
    configuration: int = Field(0, ge=0, description="Workers that cannot run as they are described. Default: 0. Example: 1.")
    numeric: int = Field(0, ge=0, description="Programs that gave up because of bad numbers. Default: 0. Example: 1.")
    voluntary: int = Field(0, ge=0, description="Scales, drains and deletions by a person; they use no budget. Default: 0. Example: 1.")

    @property
    def counted(self) -> int:
        """Failures of the classes that have a budget."""
        by_class = self.model_dump(by_alias=True)
        return sum(count for failure_class, count in by_class.items() if failure_class not in FREE_CLASSES)

    def plus(self, failure_class: FailureClass) -> "Restarts":
        """One more of this class."""
        by_class = self.model_dump(by_alias=True)
        return Restarts(**{**by_class, failure_class: by_class[failure_class] + 1})


class HistoryEntry(ApiModel):
    """One failure and what it cost."""

    attempt: int = Field(0, ge=0, description="Attempt that failed. Default: 0. Example: 3.")
    generation: int = Field(0, ge=0, description="Generation that ended. Default: 0. Example: 4.")
    failure_class: FailureClass = Field(description="Class of the failure. Default: none. Example: infrastructure.")
    reason: Annotated[str, Field(max_length=128)] = Field(description="One word why. Default: none. Example: NodeLost.")
    message: Text = Field("", description="What happened, for a person. Default: empty. Example: node gpu-7 went silent.")
    node: str = Field("", max_length=253, description="Node of the failed worker. Default: empty. Example: gpu-7.")
    pod: str = Field("", max_length=253, description="Pod of the failed worker. Default: empty. Example: mini-1-3.")
    exit_code: int | None = Field(None, description="Exit code of the failed process, negative for a signal. Default: none. Example: -9.")
    fingerprint: str = Field("", max_length=253, description="Tells one error of the program from another; empty where the program did not fail by itself. Default: empty. Example: ValueError-1f3a9c.")
    stacks: str = Field("", max_length=1024, description="Folder with the stacks of all processes of a hang. Default: empty. Example: /mnt/dstrain/checkpoints/mini/stacks/g4.")
    from_step: int = Field(0, ge=0, description="Last step reached before the failure. Default: 0. Example: 140.")
    committed_step: int = Field(0, ge=0, description="Newest committed step at that time. Default: 0. Example: 120.")
    resumed_step: int | None = Field(None, ge=0, description="Step of the checkpoint that the next generation resumed from. Default: none. Example: 120.")
    time: str = Field(max_length=64, description="When it was noticed, RFC 3339. Default: none. Example: 2026-11-21T12:00:00Z.")
    seconds: float | None = Field(None, ge=0, description="Seconds from notice to the next new step. Default: none until recovered. Example: 4.2.")


class WorkersStatus(ApiModel):
    """The gang in numbers."""

    desired: int = Field(0, ge=0, description="Pods wanted. Default: 0. Example: 2.")
    ready: int = Field(0, ge=0, description="Pods in the current generation. Default: 0. Example: 2.")
    selector: str = Field("", max_length=1024, description="Label selector of the pods, for the scale subresource. Default: empty. Example: dstrain.dev/training=mini.")


class Progress(ApiModel):
    """How far the training is, as last reported."""

    step: int = Field(0, ge=0, description="Last finished optimizer step. Default: 0. Example: 120.")
    total_steps: int = Field(0, ge=0, description="Steps until complete. Default: 0. Example: 488.")
    tokens: int = Field(0, ge=0, description="Tokens trained on. Default: 0. Example: 245760.")
    loss: float | None = Field(None, description="Training loss, in nats per token. Default: none. Example: 4.31.")
    tokens_per_second: float = Field(0.0, ge=0, description="Throughput of all workers, in tokens per second. Default: 0. Example: 5200.")
    mfu: float | None = Field(None, ge=0, description="Model FLOP utilisation as a ratio; none where the peak is unknown (CPU). Default: none. Example: 0.31.")
    skipped_steps: int = Field(0, ge=0, description="Steps without an update, because gradients were not finite. Default: 0. Example: 2.")
    rollbacks: int = Field(0, ge=0, description="Returns to a checkpoint because of bad numbers, without a restart. Default: 0. Example: 1.")
    eta_seconds: float | None = Field(None, ge=0, description="Seconds until complete at the current throughput. Default: none. Example: 42.")


class CheckpointStatus(ApiModel):
    """The checkpoint the next generation resumes from."""

    step: int = Field(0, ge=0, description="Optimizer step of the checkpoint. Default: 0. Example: 100.")
    uri: str = Field("", max_length=1024, description="Folder of the checkpoint, or its name in a bucket. Default: empty. Example: pvc://checkpoints/mini/step-100.")
    time: str = Field("", max_length=64, description="When it was committed, RFC 3339. Default: empty. Example: 2026-11-21T12:00:00Z.")
    generation: int = Field(0, ge=0, description="Generation that committed it. Default: 0. Example: 2.")


class NodeRecord(ApiModel):
    """What a node did to this training lately."""

    name: Annotated[str, Field(max_length=253)] = Field(description="Node. Default: none. Example: gpu-7.")
    reason: Annotated[str, Field(max_length=128)] = Field(description="Reason of the last failure that points at it. Default: none. Example: ProcessKilled.")
    offences: float = Field(0.0, ge=0, description="Failures that point at it, as of the last one; each counts half after an hour. Default: 0. Example: 1.9.")
    time: str = Field(max_length=64, description="When the last one was noticed, RFC 3339. Default: none. Example: 2026-11-21T12:00:00Z.")
    avoid_until: str | None = Field(None, max_length=64, description="When new pods may use it again, RFC 3339. Default: none. Example: 2026-11-21T13:00:00Z.")
    tolerated: bool = Field(False, description="Whether it is used all the same, because pods found no other node. Default: false. Example: true.")


class ExcludedNode(ApiModel):
    """A node that new pods avoid."""

    name: Annotated[str, Field(max_length=253)] = Field(description="Node. Default: none. Example: gpu-7.")
    reason: Annotated[str, Field(max_length=512)] = Field(description="Why, for a person. Default: none. Example: NodeLost.")
    until: str | None = Field(None, max_length=64, description="When it may be used again, RFC 3339. Default: none while that depends on the node. Example: 2026-11-21T13:00:00Z.")


class StragglerStatus(ApiModel):
    """A worker process that all others wait for, step after step."""

    rank: int = Field(ge=0, description="Rank of the process. Default: none. Example: 3.")
    pod: str = Field("", max_length=253, description="Its pod. Default: empty. Example: mini-1-3.")
    node: str = Field("", max_length=253, description="Its node. Default: empty. Example: gpu-7.")
    ratio: float = Field(ge=0, description="Time of its own part of a step over the median of all ranks. Default: none. Example: 2.1.")


class Summary(ApiModel):
    """Texts for the columns of `kubectl get`."""

    progress: str = Field("", max_length=32, description="Share of the total tokens. Default: empty. Example: 41%.")
    step: str = Field("", max_length=32, description="Step of total steps. Default: empty. Example: 200/488.")
    tokens_per_second: str = Field("", max_length=32, description="Throughput in tokens per second. Default: empty. Example: 5.2k.")
    mfu: str = Field("", max_length=32, description="Model FLOP utilisation. Default: empty. Example: 31%.")
    eta: str = Field("", max_length=32, description="Time until complete. Default: empty. Example: 3h12m.")
    workers: str = Field("", max_length=32, description="Ready of desired workers. Default: empty. Example: 2/2.")
    restarts: str = Field("", max_length=32, description="Failures that were repaired. Default: empty. Example: 1.")
    loss: str = Field("", max_length=32, description="Training loss. Default: empty. Example: 4.31.")
    checkpoint: str = Field("", max_length=32, description="Step of the last committed checkpoint. Default: empty. Example: 100.")
    message: str = Field("", max_length=512, description="What is going on, in one sentence. Default: empty. Example: training on 2 workers.")


class DeepSeekTrainingStatus(ApiModel):
    """What is true of the training."""

    observed_generation: int = Field(0, ge=0, description="metadata.generation this status speaks of. Default: 0. Example: 1.")
    phase: Phase = Field("Pending", description="Summary of the conditions. Default: Pending. Example: Running.")
    conditions: list[Condition] = Field(default_factory=list, max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}, description="Aspects of the training, one per type. Default: []. Example: [{type: Running, status: \"True\"}].")
    attempt: int = Field(0, ge=0, description="Raised before pods are created or replaced. Default: 0. Example: 1.")
    generation: int = Field(0, ge=0, description="Number of the newest rendezvous; an older one cannot commit. Default: 0. Example: 2.")
    restarts: Restarts = Field(default_factory=Restarts, description="Failures by class. Default: zeros. Example: {infrastructure: 1}.")
    history: list[HistoryEntry] = Field(default_factory=list, max_length=10, description="The last ten failures, oldest first. Default: []. Example: [{reason: NodeLost}].")
    failures: dict[str, Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=1001)]] = Field(default_factory=dict, max_length=8, description="Times (RFC 3339) of the failures inside their budget's window, by class. Default: {}. Example: {application: [\"2026-11-21T12:00:00Z\"]}.")
    workers: WorkersStatus = Field(default_factory=WorkersStatus, description="The gang in numbers. Default: zeros. Example: {desired: 2, ready: 2}.")
    progress: Progress = Field(default_factory=Progress, description="How far the training is. Default: zeros. Example: {step: 120}.")
    checkpoint: CheckpointStatus | None = Field(None, description="What the next generation resumes from. Default: none before the first commit. Example: {step: 100}.")
    nodes: list[NodeRecord] = Field(default_factory=list, max_length=32, description="Nodes that failures point at, the last one last. Default: []. Example: [{name: gpu-7, offences: 1.9}].")
    excluded_nodes: list[ExcludedNode] = Field(default_factory=list, max_length=32, description="Nodes that new pods avoid. Default: []. Example: [{name: gpu-7, reason: NodeLost}].")
    stragglers: list[StragglerStatus] = Field(default_factory=list, max_length=8, description="Worker processes that have been slower than the others for a minute, the slowest first; nothing is restarted because of it. Default: []. Example: [{rank: 3, pod: mini-1-3, node: gpu-7, ratio: 2.1}].")
    start_time: str | None = Field(None, max_length=64, description="When the first pods were created, RFC 3339. Default: none. Example: 2026-11-21T12:00:00Z.")
    finish_time: str | None = Field(None, max_length=64, description="When it completed or failed, RFC 3339. Default: none. Example: 2026-11-21T13:00:00Z.")
    summary: Summary = Field(default_factory=Summary, description="Texts for printer columns. Default: empty. Example: {progress: 41%}.")
