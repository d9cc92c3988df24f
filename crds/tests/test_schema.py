"""The CRD and the field reference that are made from the models."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from dstrain_api import reference, schema
from dstrain_api.base import ApiModel
from pydantic import Field

ROOT = Path(__file__).resolve().parents[2]
VERSION = schema.custom_resource_definition()["spec"]["versions"][0]
TREE = VERSION["schema"]["openAPIV3Schema"]


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below this one, with its path."""
    yield path, node
    for name, field in node.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in node:
            yield from nodes(node[part], f"{path}[]")


ALL = list(nodes(TREE, ""))


@pytest.mark.parametrize(
    ("path", "made_by"),
    [
        ("crds/deepseektrainings.yaml", schema.main),
        ("charts/deepseek-operator/files/deepseektrainings.yaml", schema.main),
        ("docs/reference/deepseektraining.md", reference.main),
    ],
)
def test_a_file_in_the_repository_is_what_the_code_makes(path: str, made_by: Any) -> None:
    out = StringIO()
    made_by(out)
    assert (ROOT / path).read_text() == out.getvalue(), "run `make generate`"


def test_every_field_is_described_with_its_default_and_an_example() -> None:
    described = [
        (path, node["description"]) for path, node in ALL if path and not path.endswith("[]")
    ]
    assert len(described) > 150
    for path, description in described:
        if path not in (".spec", ".status"):
            assert reference.field_parts(description)["text"], path


def test_everything_that_may_grow_has_a_bound() -> None:
    for path, node in ALL:
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_only_the_pod_template_keeps_fields_that_the_schema_does_not_know() -> None:
    loose = [path for path, node in ALL if node.get("x-kubernetes-preserve-unknown-fields")]
    assert loose == [".spec.workers.template.metadata", ".spec.workers.template.spec"]


def test_only_what_kubectl_scale_needs_is_stored_as_a_default() -> None:
    assert [path for path, node in ALL if "default" in node] == [
        ".spec.workers",
        ".spec.workers.replicas",
    ]


def test_the_paths_of_columns_scale_and_rules_are_fields() -> None:
    known = {path for path, _ in ALL}
    paths = [column["jsonPath"] for column in VERSION["additionalPrinterColumns"]]
    paths += VERSION["subresources"]["scale"].values()
    rules = TREE["properties"]["spec"]["x-kubernetes-validations"]
    paths += [".spec" + rule.get("fieldPath", "") for rule in rules]
    assert set(paths) - known == {".metadata.creationTimestamp"}


def test_conditions_are_merged_by_their_type() -> None:
    conditions = dict(ALL)[".status.conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


class Sample(ApiModel):
    """A struct."""

    above: float = Field(gt=0, le=1)
    one_of_one: Literal["only"] = "only"
    perhaps: int | None = None


def test_json_schema_becomes_what_the_api_server_accepts() -> None:
    assert schema.structural(Sample) == {
        "type": "object",
        "description": "A struct.",
        "required": ["above"],
        "properties": {
            "above": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
            "oneOfOne": {"type": "string", "enum": ["only"]},
            "perhaps": {"type": "integer"},
        },
    }


class Union(ApiModel):
    """Of two types."""

    either: int | str


def test_a_union_is_refused_since_a_crd_has_none() -> None:
    with pytest.raises(ValueError, match="no union types"):
        schema.structural(Union)


def test_the_printed_crd_is_read_back_as_it_was_made() -> None:
    out = StringIO()
    schema.main(out)
    assert yaml.safe_load(out.getvalue()) == schema.custom_resource_definition()
