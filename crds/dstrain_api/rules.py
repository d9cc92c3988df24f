"""What a spec must fulfil beyond the types of its fields, written once for CEL and for Python.

Rules and their messages use the names of `dstrain_api.terms`. The API server reads the CEL, the
operator, the client and local runs read the Python; tests put the same specs through both.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from dstrain_api.patterns import NAME_LIMIT, NAME_PATTERN
from dstrain_api.problems import field_problems
from dstrain_api.quantities import duration_s
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.terms import Values, present

SHORTEST_HANG_S: Final = 1  # agents look twice a second
SHORTEST_HEARTBEAT_S: Final = 3  # three beats at the shortest interval
NAME_MESSAGE: Final = (
    f"use at most {NAME_LIMIT} lower-case letters, digits and '-', beginning with a letter and not "
    "ending with '-': the names of pods and of a service begin with it"
)


class InvalidSpec(ValueError):
    """This cannot be trained. Each of `problems` names a field and says what to change."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One condition on several fields.

    `cel` and `message` hold terms in braces. A rule speaks only where all terms of `when` are
    true. `sizing` marks the rules that decide how many replicas can train together.
    """

    name: str
    field: str  # below spec: where the message is shown
    when: tuple[str, ...] = ()
    cel: str
    holds: Callable[[Values], bool]
    message: str
    sizing: bool = False

    def broken(self, values: Values) -> bool:
        """Whether the rule speaks of this spec and is not fulfilled."""
        return all(values[term] for term in self.when) and not self.holds(values)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What an update must leave as it is: CEL alone, only the API server sees both versions."""

    name: str
    field: str
    cel: str
    message: str


def _required(part: str, example: str) -> Rule:
    return Rule(
        name=f"{part}-required",
        field="",
        when=("trainer",),
        cel=f"{{{part}Given}}",
        holds=lambda v: bool(v[f"{part}Given"]),
        message=f"{part} is required unless entrypoint is given; add for example {part}: "
        + example.replace("{", "{{").replace("}", "}}"),
    )


def _absent(part: str) -> Rule:
    return Rule(
        name=f"{part}-without-entrypoint",
        field=part,
        when=("entrypoint",),
        cel=f"!{{{part}Given}}",
        holds=lambda v: not v[f"{part}Given"],
        message=f"{part} belongs to the DeepSeek trainer, which entrypoint replaces; "
        "remove one of the two",
    )


def _split(dimension: str, words: str) -> Rule:
    return Rule(
        name=f"{dimension}-by-tensor",
        field="parallelism.tensor",
        when=("knownPreset", "positiveSizes"),
        cel=f"{{{dimension}}} % {{tensor}} == 0",
        holds=lambda v: v[dimension] % v["tensor"] == 0,
        message=f"the model's {{{dimension}}} {words} cannot be split over tensor {{tensor}}; "
        "set tensor to a number that divides them",
    )


RULES: Final[tuple[Rule, ...]] = (
    _required("model", "{preset: mini}"),
    _required("data", "{sources: [{uri: 'builtin://mini'}]}"),
    _required("training", "{total: {tokens: 1000000}}"),
    *map(_absent, ("model", "data", "training", "optimizer", "precision", "parallelism")),
    Rule(
        name="entrypoint-one-program",
        field="entrypoint",
        when=("entrypoint",),
        cel="{moduleGiven} != {scriptGiven}",
        holds=lambda v: v["moduleGiven"] != v["scriptGiven"],
        message="give exactly one of module and script",
    ),
    Rule(
        name="moe-top-k",
        field="model.overrides.moe.topK",
        when=("knownPreset",),
        cel="{topK} <= {experts}",
        holds=lambda v: v["topK"] <= v["experts"],
        message="topK {topK} is more than the {experts} experts; lower topK or raise experts",
    ),
    Rule(
        name="moe-groups",
        field="model.overrides.moe.groups",
        when=("knownPreset", "positiveGroups"),
        cel="{experts} % {groups} == 0",
        holds=lambda v: v["experts"] % v["groups"] == 0,
        message="{experts} experts cannot be split into {groups} equal groups; "
        "set groups to a number that divides experts",
    ),
    Rule(
        name="moe-limited-groups",
        field="model.overrides.moe.limitedGroups",
        when=("knownPreset",),
        cel="{limitedGroups} <= {groups}",
        holds=lambda v: v["limitedGroups"] <= v["groups"],
        message="limitedGroups {limitedGroups} is more than the {groups} groups; "
        "lower limitedGroups",
    ),
    Rule(
        name="moe-experts-in-reach",
        field="model.overrides.moe.limitedGroups",
        when=("knownPreset", "positiveGroups", "groupsFit"),
        cel="{topK} <= {experts} / {groups} * {limitedGroups}",
        holds=lambda v: v["topK"] <= v["experts"] // v["groups"] * v["limitedGroups"],
        message="a token may visit {limitedGroups} of {groups} groups, which hold fewer than topK "
        "{topK} of the {experts} experts; raise limitedGroups or lower topK",
    ),
    Rule(
        name="dense-layers",
        field="model.overrides.denseLayers",
        when=("knownPreset",),
        cel="{denseLayers} <= {layers}",
        holds=lambda v: v["denseLayers"] <= v["layers"],
        message="denseLayers {denseLayers} is more than the {layers} layers; "
        "lower denseLayers or raise layers",
    ),
    Rule(
        name="rope-even",
        field="model.overrides.mla.ropeDim",
        when=("knownPreset",),
        cel="{ropeDim} % 2 == 0",
        holds=lambda v: v["ropeDim"] % 2 == 0,
        message="ropeDim {ropeDim} must be even, since rotary channels come in pairs",
    ),
    _split("heads", "heads"),
    _split("denseFfn", "channels of denseFfn"),
    _split("expertFfn", "channels of moe.ffn"),
    Rule(
        name="processes-per-gpu",
        field="workers.processesPerWorker",
        cel="{gpus} == 0 || {processes} == {gpus}",
        holds=lambda v: v["gpus"] in (0, v["processes"]),
        message="processesPerWorker {processes} must equal gpusPerWorker {gpus}, one process for "
        "each GPU; leave processesPerWorker out",
    ),
    Rule(
        name="ranks-by-parallelism",
        field="workers.replicas",
        when=("trainer", "positiveSizes"),
        cel="{ranks} % ({tensor} * {dataReplicate}) == 0",
        holds=lambda v: v["ranks"] % (v["tensor"] * v["dataReplicate"]) == 0,
        message="replicas {replicas} x processesPerWorker {processes} = {ranks} ranks cannot be "
        "divided by parallelism.tensor {tensor} x dataReplicate {dataReplicate}; "
        "change one of them",
        sizing=True,
    ),
    Rule(
        name="ranks-by-fixed-shard",
        field="parallelism.dataShard",
        when=("trainer", "fixedShard"),
        cel="{ranks} == {tensor} * {dataReplicate} * {dataShard}",
        holds=lambda v: v["ranks"] == v["tensor"] * v["dataReplicate"] * v["dataShard"],
        message="tensor {tensor} x dataReplicate {dataReplicate} x dataShard {dataShard} must be "
        "the {ranks} ranks (replicas x processesPerWorker); set dataShard: auto or change one",
        sizing=True,
    ),
    Rule(
        name="batch-by-ranks",
        field="training.globalBatch",
        when=("trainer", "positiveSizes"),
        cel="{globalBatch} * {tensor} % {ranks} == 0",
        holds=lambda v: v["globalBatch"] * v["tensor"] % v["ranks"] == 0,
        message="globalBatch {globalBatch} cannot be shared equally by the data-parallel ranks "
        "({ranks} ranks / tensor {tensor}); change globalBatch or workers.replicas",
        sizing=True,
    ),
    Rule(
        name="elastic-order",
        field="elastic.minReplicas",
        when=("elastic",),
        cel="{minReplicas} <= {maxReplicas}",
        holds=lambda v: v["minReplicas"] <= v["maxReplicas"],
        message="minReplicas {minReplicas} is more than maxReplicas {maxReplicas}; exchange them",
    ),
    Rule(
        name="elastic-replicas",
        field="workers.replicas",
        when=("elastic", "boundsInOrder"),
        cel="{replicas} >= {minReplicas} && {replicas} <= {maxReplicas}",
        holds=lambda v: v["minReplicas"] <= v["replicas"] <= v["maxReplicas"],
        message="replicas {replicas} must be from elastic.minReplicas {minReplicas} to maxReplicas "
        "{maxReplicas}; change replicas or the bounds",
    ),
    Rule(
        name="checkpoint-one-place",
        field="checkpoint.claim",
        cel="!({uriAndClaim})",
        holds=lambda v: not v["uriAndClaim"],
        message="claim is only made where uri is absent; remove one of the two",
    ),
    Rule(
        name="heartbeat-shortest",
        field="recovery.heartbeatTimeout",
        when=("durationHeartbeat",),
        cel=f"duration({{heartbeatTimeout}}) >= duration('{SHORTEST_HEARTBEAT_S}s')",
        holds=lambda v: duration_s(v["heartbeatTimeout"]) >= SHORTEST_HEARTBEAT_S,
        message="heartbeatTimeout {heartbeatTimeout} is less than three beats; "
        f"set {SHORTEST_HEARTBEAT_S}s or more",
    ),
    Rule(
        name="hang-shortest",
        field="recovery.hangTimeout",
        when=("durationHang",),
        cel=f"duration({{hangTimeout}}) >= duration('{SHORTEST_HANG_S}s')",
        holds=lambda v: duration_s(v["hangTimeout"]) >= SHORTEST_HANG_S,
        message="hangTimeout {hangTimeout} is too short to tell a hang from a slow step; "
        f"set {SHORTEST_HANG_S}s or more, or auto",
    ),
)


def _camel(path: str) -> str:
    return ".".join(map(to_camel, path.split(".")))


def _unchanged(path: str) -> str:
    now, before = present(path), present(path, root="oldSelf")
    field = _camel(path)
    return f"({now}) == ({before}) && (!({now}) || self.{field} == oldSelf.{field})"


def _fixed(path: str, why: str) -> Transition:
    field = _camel(path)
    return Transition(
        name=f"{field}-fixed",
        field=field,
        cel=_unchanged(path),
        message=f"{field} cannot change after creation: {why}; create another training",
    )


def _fixed_while_running(path: str) -> Transition:
    """A pod is told at its start, and ranks that disagree about this hang: there must be none."""
    field = _camel(path)
    return Transition(
        name=f"{field}-while-suspended",
        field=field,
        cel=f"({_unchanged(path)}) || (has(oldSelf.suspend) && oldSelf.suspend)",
        message=f"{field} can only change while the training is suspended; set suspend: true first",
    )


_RUN = "it decides what is trained"
_PODS = "all pods of a training are alike"
TRANSITIONS: Final[tuple[Transition, ...]] = (
    *(
        _fixed(path, _RUN)
        for path in (
            "entrypoint",
            "model",
            "data",
            "training.global_batch",
            "training.seed",
            "precision",
            "parallelism",
        )
    ),
    *(_fixed(path, _PODS) for path in ("workers.gpus_per_worker", "workers.processes_per_worker")),
    *(_fixed(path, "the saved state is there") for path in ("checkpoint.uri", "checkpoint.claim")),
    Transition(
        name="training-tokens-grow",
        field="training.total.tokens",
        cel="!has(self.training) || !has(oldSelf.training) || "
        "self.training.total.tokens >= oldSelf.training.total.tokens",
        message="training.total.tokens can only be raised; to stop early, set suspend: true or "
        "delete the training",
    ),
    *(
        _fixed_while_running(path)
        for path in (
            "training.total",
            "training.micro_batch",
            "training.on_loss_spike",
            "optimizer",
            "checkpoint.every_steps",
            "checkpoint.every_seconds",
            "fabric",
        )
    ),
)


def validate(spec: Mapping[str, Any]) -> DeepSeekTrainingSpec:
    """A spec as a manifest holds it, checked and with all defaults.

    Raises:
        InvalidSpec: fields are unknown, missing, of a wrong type, or do not fit together.
    """
    try:
        # As JSON, where types are strict but a whole number is also a float.
        parsed = DeepSeekTrainingSpec.model_validate_json(
            json.dumps(_whole_numbers(spec)), strict=True
        )
    except ValidationError as error:
        raise InvalidSpec(field_problems(error, DeepSeekTrainingSpec)) from None
    values = Values(parsed)
    broken = [rule for rule in RULES if rule.broken(values)]
    if broken:
        raise InvalidSpec(
            f"{'.'.join(filter(None, ('spec', rule.field)))}: {rule.message.format_map(values)}"
            for rule in broken
        )
    return parsed


def validate_name(name: str) -> None:
    """Refuse a name that pods, a service and labels cannot carry.

    Raises:
        InvalidSpec: the name is too long or has the wrong characters.
    """
    if len(name) > NAME_LIMIT or not re.fullmatch(NAME_PATTERN, name):
        raise InvalidSpec((f"metadata.name: {name!r}: {NAME_MESSAGE}",))


def allowed_replicas(spec: DeepSeekTrainingSpec) -> Callable[[int], bool]:
    """Whether that many worker pods can train together: parallelism and batch must divide.

    The bounds of `elastic` are not looked at.
    """
    sizing = [rule for rule in RULES if rule.sizing]

    def allowed(replicas: int) -> bool:
        workers = spec.workers.model_copy(update={"replicas": replicas})
        values = Values(spec.model_copy(update={"workers": workers}))
        return replicas >= 1 and not any(rule.broken(values) for rule in sizing)

    return allowed


def _whole_numbers(value: Any) -> Any:
    """JSON values where 1e6 is a whole number, as it is for the API server."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
