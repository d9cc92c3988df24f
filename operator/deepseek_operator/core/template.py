"""Merging `spec.workers.template` into a pod, and keeping the pod away from nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Any


def merged(base: Json, patch: Json) -> Json:
    """`patch` over `base`: maps by key, lists of named items by name, other lists appended.

    A null in the patch removes the key, as in a JSON merge patch (RFC 7396).
    """
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        result = dict(base)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = merged(result[key], value) if key in result else value
        return result
    if isinstance(base, list) and isinstance(patch, list):
        return _merged_lists(base, patch)
    return patch


def _merged_lists(base: list[Json], patch: list[Json]) -> list[Json]:
    if not all(isinstance(item, Mapping) and "name" in item for item in (*base, *patch)):
        return [*base, *patch]
    patches = {item["name"]: item for item in patch}
    result = [
        _merged_item(item, patches.pop(item["name"])) if item["name"] in patches else item
        for item in base
    ]
    return [*result, *patches.values()]


def _merged_item(item: Mapping[str, Json], patch: Mapping[str, Json]) -> Json:
    if {"value", "valueFrom"} & patch.keys():  # a variable has one source
        item = {k: v for k, v in item.items() if k not in ("value", "valueFrom")}
    if {"name", "mountPath"} < patch.keys() and item.get("mountPath") != patch["mountPath"]:
        return dict(patch)
    return merged(item, patch)


def avoiding(pod: dict[str, Json], nodes: tuple[str, ...]) -> dict[str, Json]:
    """The pod with a required affinity away from `nodes`, added to each term it has already.

    Terms are alternatives, so a further term would not exclude anything. A field requirement
    takes one value, so there is one per node.
    """
    if not nodes:
        return pod
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    spec = pod["spec"]
    affinity = dict(spec.get("affinity", {}))
    node_affinity = dict(affinity.get("nodeAffinity", {}))
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = node_affinity.get(required, {}).get("nodeSelectorTerms") or [{}]
    node_affinity[required] = {
        "nodeSelectorTerms": [
            {**term, "matchFields": [*term.get("matchFields", []), *away]} for term in terms
        ]
    }
    affinity["nodeAffinity"] = node_affinity
    return {**pod, "spec": {**spec, "affinity": affinity}}
