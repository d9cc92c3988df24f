"""What the plan sees and says. Frozen views, made once at the border.

Times are `float` seconds of one injected clock.

`now` and every `*_at_s` are seconds since the epoch; every `*_age_s` is a duration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dstrain_api.protocol import ProgressReport
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.status import DeepSeekTrainingStatus, FailureClass

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A DeepSeekTraining as the watch last showed it.

    `spec` is None where the stored object does not pass validation; `spec_error` then says what
    to change.
    """

    namespace: str
    name: str
    uid: str
    resource_version: str
    generation: int
    created_at_s: float
    deleting: bool
    spec: DeepSeekTrainingSpec | None
    spec_error: str
    status: DeepSeekTrainingStatus

    @property
    def key(self) -> Key:
        """Its name in the queue."""
        return Key(self.namespace, self.name)


@dataclass(frozen=True, order=True)
class Key:
    """What the queue holds: a training by name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class ContainerView:
    """The trainer container of a pod: why it waits, or how it ended."""

    running: bool = False
    waiting_reason: str = ""  # ImagePullBackOff, CreateContainerConfigError ...
    waiting_message: str = ""
    exit_code: int | None = None
    terminated_reason: str = ""  # OOMKilled, Error, Completed ...
    terminated_message: str = ""


@dataclass(frozen=True, kw_only=True)
class PodView:
    """A worker pod, narrowed to what decisions need."""

    namespace: str
    name: str
    uid: str
    training: str
    training_uid: str  # of the owner reference
    slot: int
    attempt: int
    node: str  # empty until scheduled
    phase: str  # Pending, Running, Succeeded, Failed, Unknown
    deleting: bool
    created_at_s: float
    scheduled_at_s: float = 0.0  # when it got its node; 0: not yet
    unschedulable: str = ""  # the scheduler's message while PodScheduled is False
    excluded_nodes: tuple[str, ...] = ()  # of its annotation: nodes it was made to avoid
    disrupted: str = ""  # reason of the DisruptionTarget condition, if any
    reason: str = ""  # status.reason, such as Evicted
    message: str = ""  # status.message, which belongs to it
    memory_limit: str = ""  # of the trainer container
    container: ContainerView = field(default_factory=ContainerView)

    @property
    def finished(self) -> bool:
        """Whether its containers will never run again."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """A node that can be reached, or not."""

    name: str
    ready: bool  # False for NotReady and Unknown
    ready_since_s: float = 0.0  # seconds since the epoch
    fault: str = ""  # what is broken on it, in its own words
    leaving: str = ""  # the taint that says that it is about to be taken away


@dataclass(frozen=True, kw_only=True)
class MemberView:
    """A pod as the coordinator knows it, by its beats and joins."""

    pod: str
    pod_uid: str
    slot: int
    node: str
    state: Literal["joining", "running", "done", "leaving"]
    generation: int  # the one it is in, or comes from while joining
    silent_s: float  # since its last beat or join
    gap_s: float = 0.0  # longest time between two words of it, lately
    address: str = ""
    port: int = 0
    group_world_size: int = 0
    waiting_s: float = 0.0  # since it asked to join; 0 unless joining
    joined_at_s: float = 0.0  # when it asked for its first generation; 0: not known


@dataclass(frozen=True, kw_only=True)
class WorkerError:
    """A worker process that ended badly, as its pod reported it."""

    pod: str
    pod_uid: str
    node: str
    generation: int
    exit_code: int
    message: str
    fingerprint: str
    at_s: float
    failure_class: FailureClass = "application"
    step: int = 0  # last one that the pod's processes finished; 0: none, or not said
    stacks: str = ""  # folder with the stacks of a hang


@dataclass(frozen=True, kw_only=True)
class CommitView:
    """The newest checkpoint that the coordinator accepted."""

    step: int
    uri: str
    generation: int
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Membership:
    """One generation: who is in it, by rank. Published after its number is in the status."""

    generation: int
    pod_uids: tuple[str, ...]  # by group rank
    master_address: str
    master_port: int
    failure_interval_s: float = 0.0  # mean time between failures; 0: not known
    preflight: bool = False  # its ranks check each other first


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """All that the coordinator knows of one training: a table, no decisions.

    `listening_s` is how long this coordinator has been up: what it has not heard of yet is
    unknown, not bad.
    """

    members: tuple[MemberView, ...] = ()
    membership: Membership | None = (
        None  # the current generation; None when none is formed or it is over
    )
    over: bool = False  # a member of the current generation asked for the next one
    progress: ProgressReport | None = None
    progress_generation: int = 0
    progress_at_s: float = 0.0
    errors: tuple[WorkerError, ...] = ()  # of the current or last generation, oldest first
    commit: CommitView | None = None
    done: bool = False  # rank 0 reported the end of the program after its last commit
    listening_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator's own configuration contributes to a plan."""

    trainer_image: str
    coordinator_url: str
    coordinator_ca: str = ""  # PEM of the CA that worker pods must trust besides their own
    beat_interval_s: float = 1.0
    status_interval_s: float = (
        10.0  # shortest time between two status writes that only carry progress
    )
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    taint_nodes: bool = False  # keep all pods away from nodes that failures point at


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything a plan may look at, from caches only."""

    pods: tuple[PodView, ...] = ()
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    gathering: Gathering = field(default_factory=Gathering)
    refused: str = ""  # what the cluster said when it refused the last create for good, if it did
    token: str = ""  # the training's bearer token, for its Secret
    status_written_at_s: float = 0.0  # when this process last wrote the status; 0: never


@dataclass(frozen=True, kw_only=True)
class PodDelete:
    """A pod to delete. `grace_s` 0 forces it, for a node that cannot answer."""

    name: str
    uid: str
    grace_s: int | None = None  # None: the pod's own


@dataclass(frozen=True, kw_only=True)
class Taint:
    """A node to taint, with the reason of the last failure that points at it."""

    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a person should read with `kubectl describe`. `reason` is from a closed list."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, in this order: status, membership, creates, deletes, taints, events.

    `status` None leaves it as it is; a status is written before anything else is done.
    `membership` is published to the waiting pods; `end_generation` tells the members of that
    generation to join again.
    """

    status: DeepSeekTrainingStatus | None = None
    membership: Membership | None = None
    end_generation: int | None = None
    stop: bool = False  # members are told to save and exit
    fence: tuple[str, ...] = ()  # pod uids that the coordinator must refuse from now on
    creates: tuple[Manifest, ...] = ()
    deletes: tuple[PodDelete, ...] = ()
    delete_training: bool = False  # its time to live is over
    taints: tuple[Taint, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after_s: float | None = None
