"""What worker pods and the coordinator say to each other: JSON over HTTP, one bearer token per training.

    POST /v1/trainings/{uid}/join    agent: I want the next generation   -> Assignment, or 202 and an empty Assignment: ask again
    POST /v1/trainings/{uid}/beat    agent, every beat interval          -> Orders, at the latest when the next beat is due
    POST /v1/trainings/{uid}/report  agent, for its worker processes     -> 204
    POST /v1/trainings/{uid}/commit  rank 0: may this become the checkpoint? -> Verdict

Status codes: 401 wrong token; 404 the training is not known (yet): ask again; 410 this pod is no member and will never be
one again (it was replaced): exit. Generations count from 1; 0 means none.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dstrain_api.base import ApiModel

Short = Annotated[str, Field(max_length=253)]

# What a pod can tell of its own processes' failures; the other classes are seen from outside.
ErrorClass = Literal["application", "outOfMemory", "configuration", "numeric"]

HANG = "hang"  # fingerprint of processes that made no step for too long, and were ended
PREFLIGHT = "preflight"  # fingerprint of a node that failed the check before training
PEER_LOST = "peer-lost"  # fingerprint of an error that the end of another worker has caused
ERROR_TEXT_LIMIT = 2048  # characters of an error that are kept; the end of a traceback says most


def _end_of_text(text: object) -> object:
    """An error is never refused for its length: what matters most comes last."""
    return text[-ERROR_TEXT_LIMIT:] if isinstance(text, str) else text


ErrorText = Annotated[str, BeforeValidator(_end_of_text), Field(max_length=ERROR_TEXT_LIMIT)]


class Join(ApiModel):
    """A pod asks for the next generation.

    `generation` is the one it comes from (0: none yet). Naming the current generation says that it is over.
    """

    pod: Short
    pod_uid: Short
    slot: int = Field(ge=0)
    node: Short = ""
    address: Short
    port: int = Field(
        ge=1, le=65_535, description="A free port of this pod, should it become rank 0."
    )
    generation: int = Field(ge=0)


class Assignment(ApiModel):
    """A pod's place in one generation; `generation` 0 means: not formed yet, ask again."""

    generation: int = 0
    group_rank: int = 0
    group_world_size: int = 0
    master_address: str = ""
    master_port: int = 0
    failure_interval_s: float = Field(
        0.0, ge=0, description="Mean seconds between failures of this training; 0: not known."
    )
    preflight: bool = Field(
        False, description="Whether the ranks check each other before they train."
    )


class Beat(ApiModel):
    """A pod is alive. It carries what a coordinator that has just started must know to adopt the generation."""

    pod: Short
    pod_uid: Short
    slot: int = Field(ge=0)
    node: Short = ""
    generation: int = Field(ge=0)
    group_rank: int = Field(ge=0)
    group_world_size: int = Field(ge=0)
    master_address: Short = ""
    master_port: int = Field(0, ge=0, le=65_535)
    state: Literal["joining", "running", "done", "leaving"]
    step: int = Field(0, ge=0, description="Last finished step of this pod's processes.")
    patience_s: float = Field(
        0.0,
        ge=0,
        le=60,
        description="Seconds that an answer may wait for other orders than to go on.",
    )


class Orders(ApiModel):
    """Answer to a beat. `generation` is the current one; another than the pod's own means: yours is over, join again."""

    generation: int
    stop: bool = Field(False, description="Save and exit: the training is suspended or ends.")


class SlowRank(ApiModel):
    """A rank whose own part of a step takes longer than that of the others."""

    rank: int = Field(ge=0)
    ratio: float = Field(
        gt=0, lt=float("inf"), description="Its time over the median of all ranks."
    )


class ProgressReport(ApiModel):
    """What rank 0 says after a step (at most a few times per second)."""

    step: int = Field(ge=0)
    total_steps: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    loss: float | None = None
    tokens_per_second: float = Field(0.0, ge=0)
    step_seconds: float = Field(0.0, ge=0)
    mfu: float | None = None
    resumed_step: int | None = Field(
        None, description="Step this generation resumed from; 0 from scratch."
    )
    verified_step: int = Field(
        0, ge=0, description="Newest committed step that was read back and is whole; 0: none yet."
    )
    skipped_steps: int = Field(0, ge=0, description="Steps without an update: bad gradients.")
    rollbacks: int = Field(0, ge=0, description="Returns to a checkpoint because of bad numbers.")
    stragglers: Annotated[tuple[SlowRank, ...], Field(max_length=8)] = Field(
        (), description="Ranks that have been slow for a while, the slowest first."
    )


class ErrorReport(ApiModel):
    """A worker process ended badly."""

    local_rank: int = Field(ge=0)
    exit_code: int
    message: ErrorText = ""
    fingerprint: Short = ""
    failure_class: ErrorClass = "application"
    step: int = Field(0, ge=0, description="Last finished step of this pod's processes.")
    stacks: Annotated[str, Field(max_length=1024)] = Field(
        "", description="Folder with the stacks of a hanging pod's processes."
    )


class Report(ApiModel):
    """Progress or an error of a pod's worker processes."""

    pod_uid: Short
    generation: int = Field(ge=0)
    progress: ProgressReport | None = None
    error: ErrorReport | None = None
    done: bool = Field(False, description="The program reached its end and made its last commit.")


class Commit(ApiModel):
    """Rank 0 asks whether a complete checkpoint folder may become the one to resume from."""

    pod_uid: Short
    generation: int = Field(ge=1)
    step: int = Field(ge=0)
    uri: Annotated[str, Field(max_length=1024)]


class Verdict(ApiModel):
    """Answer to a commit."""

    accepted: bool
    reason: str = ""
