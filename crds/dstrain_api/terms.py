"""The values that rules speak of, each with its CEL over `self` (the spec) and its Python."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic.alias_generators import to_camel

from dstrain_api.model import PRESETS, Architecture
from dstrain_api.patterns import DURATION_PATTERN
from dstrain_api.problems import struct_of
from dstrain_api.spec import DeepSeekTrainingSpec

Value = Any  # an int, a str or a bool, as the term says


@dataclass(frozen=True)
class Term:
    """A named value: as CEL over `self`, and as Python over the parsed spec."""

    cel: str
    value: Callable[[DeepSeekTrainingSpec], Value]


@dataclass(frozen=True)
class Values:
    """The terms of one spec, computed when a rule asks for them."""

    spec: DeepSeekTrainingSpec

    def __getitem__(self, term: str) -> Value:
        return TERMS[term].value(self.spec)


def literal(value: Value) -> str:
    """A number, string or boolean as CEL writes it."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def _camel(path: str) -> list[str]:
    return [to_camel(part) for part in path.split(".")]


def present(path: str, root: str = "self") -> str:
    """CEL: whether the field at this path is written, and all structs on the way."""
    names = _camel(path)
    return " && ".join(
        f"has({'.'.join((root, *names[: depth + 1]))})" for depth in range(len(names))
    )


def chosen(path: str, otherwise: str) -> str:
    """CEL: the field at this path, or another value where it is not written.

    Written without optional types: the cost estimate loses the bounds of what goes through them.
    """
    return f"({present(path)} ? self.{'.'.join(_camel(path))} : {otherwise})"


def _default(path: str) -> Value:
    """Default of a field of the spec, by its Python path."""
    model: Any = DeepSeekTrainingSpec
    *parents, leaf = path.split(".")
    for part in parents:
        model = struct_of(model.model_fields[part].annotation)
    return model.model_fields[leaf].default


def _field(path: str) -> Term:
    """A field with its default, by its Python path such as `workers.replicas`."""

    def value(spec: DeepSeekTrainingSpec) -> Value:
        found: Any = spec
        for part in path.split("."):
            found = getattr(found, part)
            if found is None:  # an absent struct has its fields' defaults
                return _default(path)
        return found

    return Term(chosen(path, literal(_default(path))), value)


def _given(path: str) -> Term:
    """Whether the user wrote this part of the spec."""

    def value(spec: DeepSeekTrainingSpec) -> bool:
        found: Any = spec
        for part in path.split("."):
            if part not in found.model_fields_set or getattr(found, part) is None:
                return False
            found = getattr(found, part)
        return True

    return Term(f"({present(path)})", value)


def _dimension(path: str) -> Term:
    """A dimension of the model, after preset and overrides are joined."""

    def of(architecture: Architecture) -> int:
        found: Any = architecture
        for part in path.split("."):
            found = getattr(found, part)
        return int(found)

    def value(spec: DeepSeekTrainingSpec) -> int:
        if spec.model is None:
            raise LookupError(f"{path}: a rule about the model must be limited to specs with one")
        return of(spec.model.resolve())

    presets = ", ".join(f"{literal(name)}: {of(preset)}" for name, preset in PRESETS.items())
    preset = f"{{{presets}}}[self.model.preset]"
    return Term(chosen(f"model.overrides.{path}", preset), value)


def _all_given(*parts: str) -> Term:
    terms = [_given(part) for part in parts]
    return Term(" && ".join(t.cel for t in terms), lambda spec: all(t.value(spec) for t in terms))


def _groups_fit(spec: DeepSeekTrainingSpec) -> bool:
    experts, groups, top_k = (t.value(spec) for t in (_EXPERTS, _GROUPS, _TOP_K))
    return bool(experts % groups == 0 and top_k <= experts)


_REPLICAS = _field("workers.replicas")
_GPUS = _field("workers.gpus_per_worker")
_PROCESSES = Term(
    chosen("workers.processes_per_worker", f"({_GPUS.cel} > 0 ? {_GPUS.cel} : 1)"),
    lambda spec: spec.workers.processes_per_worker,
)
_TENSOR = _field("parallelism.tensor")
_RANKS = Term(
    f"({_REPLICAS.cel} * {_PROCESSES.cel})",
    lambda spec: spec.workers.replicas * spec.workers.processes_per_worker,
)
_REPLICATE = _field("parallelism.data_replicate")
_EXPERTS = _dimension("moe.experts")
_TOP_K = _dimension("moe.top_k")
_GROUPS = _dimension("moe.groups")
_MIN = _field("elastic.min_replicas")
_MAX = _field("elastic.max_replicas")
_DATA_SHARD = _field("parallelism.data_shard")
_HEARTBEAT = _field("recovery.heartbeat_timeout")
_HANG = _field("recovery.hang_timeout")

TERMS: Final[Mapping[str, Term]] = {
    # Which parts are there.
    "entrypoint": _given("entrypoint"),
    "trainer": Term("!has(self.entrypoint)", lambda spec: spec.entrypoint is None),
    "modelGiven": _given("model"),
    "dataGiven": _given("data"),
    "trainingGiven": _given("training"),
    "optimizerGiven": _given("optimizer"),
    "precisionGiven": _given("precision"),
    "parallelismGiven": _given("parallelism"),
    "moduleGiven": _given("entrypoint.module"),
    "scriptGiven": _given("entrypoint.script"),
    "elastic": _given("elastic"),
    "uriAndClaim": _all_given("checkpoint.uri", "checkpoint.claim"),
    "knownPreset": Term(
        f"has(self.model) && self.model.preset in [{', '.join(map(literal, PRESETS))}]",
        lambda spec: spec.model is not None,
    ),
    "fixedShard": Term(
        f"type({_DATA_SHARD.cel}) == int",
        lambda spec: spec.parallelism is not None and spec.parallelism.data_shard != "auto",
    ),
    # What single fields already refuse must not make a rule fail in another way, such as x % 0.
    "positiveSizes": Term(
        " && ".join(f"{term.cel} > 0" for term in (_REPLICAS, _PROCESSES, _TENSOR, _REPLICATE)),
        lambda _: True,
    ),
    "positiveGroups": Term(f"{_GROUPS.cel} > 0", lambda _: True),
    "durationHeartbeat": Term(
        f"{_HEARTBEAT.cel}.matches({literal(DURATION_PATTERN)})", lambda _: True
    ),
    "durationHang": Term(
        f"{_HANG.cel}.matches({literal(DURATION_PATTERN)})",
        lambda spec: spec.recovery.hang_timeout != "auto",
    ),
    # Dimensions of the model.
    "layers": _dimension("layers"),
    "denseLayers": _dimension("dense_layers"),
    "heads": _dimension("heads"),
    "denseFfn": _dimension("dense_ffn"),
    "expertFfn": _dimension("moe.ffn"),
    "ropeDim": _dimension("mla.rope_dim"),
    "experts": _EXPERTS,
    "topK": _TOP_K,
    "groups": _GROUPS,
    "limitedGroups": _dimension("moe.limited_groups"),
    "groupsFit": Term(
        f"{_EXPERTS.cel} % {_GROUPS.cel} == 0 && {_TOP_K.cel} <= {_EXPERTS.cel}", _groups_fit
    ),
    # Sizes of the gang and of the batch.
    "replicas": _REPLICAS,
    "gpus": _GPUS,
    "processes": _PROCESSES,
    "ranks": _RANKS,
    "tensor": _TENSOR,
    "dataReplicate": _REPLICATE,
    "dataShard": Term(
        _DATA_SHARD.cel,
        lambda spec: spec.parallelism.data_shard if spec.parallelism else "auto",
    ),
    "globalBatch": _field("training.global_batch"),
    "minReplicas": _MIN,
    "maxReplicas": _MAX,
    "boundsInOrder": Term(
        f"{_MIN.cel} <= {_MAX.cel}",
        lambda spec: bool(_MIN.value(spec) <= _MAX.value(spec)),
    ),
    "heartbeatTimeout": _HEARTBEAT,
    "hangTimeout": _HANG,
}
