"""A training in a YAML file, read as kubectl reads it.

PyYAML follows YAML 1.1 with additions of its own; kubectl does not share all of them. With it
`3e-4` is a number, `1:30` and `2026-11-21` are strings, and a key that is given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from dstrain_api.constants import API_VERSION, KIND

_INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_MERGE = "tag:yaml.org,2002:merge"
_OTHER_TAGS = ("int", "float", "timestamp")


class InvalidFile(ValueError):
    """The file does not hold a training; the text says what to change."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with kubectl's idea of numbers and dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- PyYAML's own way
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in _OTHER_TAGS
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A map whose keys are all different."""
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InvalidFile(f"line {line}: key {key!r} is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_documents(text: str) -> list[Any]:
    """The documents of a YAML text. Raises InvalidFile."""
    try:
        return [d for d in yaml.load_all(text, _Loader) if d is not None]
    except yaml.YAMLError as error:
        raise InvalidFile(f"not YAML: {error}") from error


def load_training(path: Path) -> dict[str, Any]:
    """The one DeepSeekTraining in a file, as kubectl would send it; its spec is not yet checked.

    Raises:
        InvalidFile: the file cannot be read, or holds none or several.
    """
    try:
        documents = load_documents(path.read_text())
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror}") from error
    except InvalidFile as error:
        raise InvalidFile(f"{path}: {error}") from error
    found = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
    if len(found) != 1:
        raise InvalidFile(f"{path}: holds {len(found)} objects of kind {KIND}; it must hold one")
    training: dict[str, Any] = found[0]
    if training.get("apiVersion") != API_VERSION:
        raise InvalidFile(
            f"{path}: apiVersion {training.get('apiVersion')!r} is not known; write {API_VERSION}"
        )
    if not isinstance(training.get("spec"), dict):
        raise InvalidFile(f"{path}: spec is missing; say there what to train")
    meta = training.get("metadata")
    if not isinstance(meta, dict) or not isinstance(meta.get("name"), str):
        raise InvalidFile(f"{path}: metadata.name is missing; give the training a name")
    return training


def checked_training(path: Path) -> dict[str, Any]:
    """The training in a file, if it can be trained.

    Raises:
        InvalidFile: see `load_training`.
        InvalidSpec: a field or a combination is refused; its problems say what to change.
    """
    from dstrain_api.rules import validate, validate_name

    training = load_training(path)
    validate_name(training["metadata"]["name"])
    validate(training["spec"])
    return training
