"""A pod's manifest as a command on this machine. Pure.

Inside a container, paths and addresses are the pod's own; here they are the machine's. So
`pvc://claim/path` (VOLUME_ROOT/claim/path in a pod) becomes a folder below the run, the pod's
address loopback, the metrics port any free one; images, resources and security settings have no
counterpart.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain_api.constants import ENV_METRICS_PORT, TRAINER_CONTAINER, VOLUME_ROOT

ADDRESS = "127.0.0.1"
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_LOCAL = {
    ENV_METRICS_PORT: "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
_OF_THE_IMAGE = ("HOME",)  # here a person has one


class CannotStart(ValueError):
    """The manifest asks for something that is not there; the text says what."""


@dataclass(frozen=True)
class Launch:
    """How the pod's trainer container is started here."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def launch_of(
    pod: Mapping[str, Any],
    *,
    volumes: Path,
    secret: Callable[[str], Mapping[str, Any]],
) -> Launch:
    """Command and environment of a scheduled pod's trainer container.

    Args:
        pod: the stored object; its spec has a nodeName.
        volumes: the folder that stands for VOLUME_ROOT.
        secret: the Secret of a name in the pod's namespace; KeyError if there is none.

    Raises:
        CannotStart: a secret or a field that a variable refers to does not exist.
    """
    container = trainer_of(pod)
    environment: dict[str, str] = {}
    for variable in container.get("env", ()):
        if variable["name"] in _OF_THE_IMAGE:
            continue
        value = _value(variable, pod, secret)
        environment[variable["name"]] = _expanded(value, environment)
    words = [*container.get("command", ()), *container.get("args", ())]
    if not words:
        raise CannotStart("the trainer container has no command, and here is no image to have one")

    def here(text: str) -> str:
        return text.replace(VOLUME_ROOT, str(volumes))

    return Launch(
        tuple(here(_expanded(word, environment)) for word in words),
        {name: here(value) for name, value in environment.items()} | _LOCAL,
    )


def trainer_of(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The container that trains."""
    containers: list[dict[str, Any]] = pod["spec"]["containers"]
    return next((c for c in containers if c["name"] == TRAINER_CONTAINER), containers[0])


def excluded_nodes(pod: Mapping[str, Any]) -> set[str]:
    """Nodes that the pod's required affinity rules out by name."""
    required = (
        pod["spec"]
        .get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    return {
        node
        for term in required.get("nodeSelectorTerms", ())
        for rule in (*term.get("matchExpressions", ()), *term.get("matchFields", ()))
        if rule["operator"] == "NotIn"
        for node in rule["values"]
    }


def gpus_of(pod: Mapping[str, Any]) -> int:
    """GPUs that the pod asks for."""
    return int(trainer_of(pod).get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))


def _value(
    variable: Mapping[str, Any],
    pod: Mapping[str, Any],
    secret: Callable[[str], Mapping[str, Any]],
) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable.get("value", ""))
    if "fieldRef" in source:
        return _field(source["fieldRef"]["fieldPath"], pod)
    if "secretKeyRef" in source:
        return _secret(source["secretKeyRef"], secret)
    raise CannotStart(f"variable {variable['name']}: only fieldRef and secretKeyRef work here")


def _field(path: str, pod: Mapping[str, Any]) -> str:
    if path in ("status.podIP", "status.hostIP", "status.podIPs", "status.hostIPs"):
        return ADDRESS
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str(pod["metadata"].get(keyed[1], {}).get(keyed[2], ""))
    found: Any = pod
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise CannotStart(f"the pod has no field {path}")
        found = found[part]
    return str(found)


def _secret(reference: Mapping[str, Any], secret: Callable[[str], Mapping[str, Any]]) -> str:
    name, key = reference["name"], reference["key"]
    try:
        stored = secret(name)
    except KeyError as error:
        raise CannotStart(f"secret {name!r} not found") from error
    if key in stored.get("stringData", {}):
        return str(stored["stringData"][key])
    if key not in stored.get("data", {}):
        raise CannotStart(f"secret {name!r} has no key {key!r}")
    return base64.b64decode(stored["data"][key]).decode()


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """With $(NAME) replaced as Kubernetes does; an unknown name stays as it is."""
    return _VARIABLE.sub(lambda found: environment.get(found[1], found[0]), text)
