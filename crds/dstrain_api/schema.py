"""The CustomResourceDefinition, made from the pydantic models and the rules.

`python -m dstrain_api.schema` prints it. pydantic speaks JSON Schema, the API server wants the
"structural" subset: references inlined, no null, no title, bounds on everything that a rule reads.
"""

import sys
from collections.abc import Mapping
from string import Formatter
from typing import Any, Final, TextIO

import yaml
from pydantic import BaseModel

from dstrain_api import constants
from dstrain_api.patterns import AUTO_PATTERN, HELP, NAME_LIMIT, NAME_PATTERN, QUANTITY_PATTERN
from dstrain_api.rules import NAME_MESSAGE, RULES, TRANSITIONS, Rule, Transition
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.status import DeepSeekTrainingStatus
from dstrain_api.terms import TERMS, literal

Schema = dict[str, Any]

HEADER: Final = "# Made by `make generate` from crds/dstrain_api. Change it there.\n"

# (column, type, path, priority); priority 1 is shown by `kubectl get -o wide`.
COLUMNS: Final = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.summary.progress", 0),
    ("Step", "string", ".status.summary.step", 0),
    ("Tok/s", "string", ".status.summary.tokensPerSecond", 0),
    ("MFU", "string", ".status.summary.mfu", 0),
    ("ETA", "string", ".status.summary.eta", 0),
    ("Workers", "string", ".status.summary.workers", 0),
    ("Restarts", "string", ".status.summary.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Loss", "string", ".status.summary.loss", 1),
    ("Checkpoint", "string", ".status.summary.checkpoint", 1),
    ("Message", "string", ".status.summary.message", 1),
)

# Keywords that mean the same in both dialects.
_KEPT: Final = (
    "type",
    "description",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
)


def custom_resource_definition() -> Schema:
    """The CRD of DeepSeekTraining as a manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{constants.PLURAL}.{constants.GROUP}"},
        "spec": {
            "group": constants.GROUP,
            "names": {
                "kind": constants.KIND,
                "listKind": f"{constants.KIND}List",
                "plural": constants.PLURAL,
                "singular": constants.SINGULAR,
                "shortNames": list(constants.SHORT_NAMES),
                "categories": list(constants.CATEGORIES),
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": constants.VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.workers.replicas",
                            "statusReplicasPath": ".status.workers.ready",
                            "labelSelectorPath": ".status.workers.selector",
                        },
                    },
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model.

    Raises:
        ValueError: the model says something that a CRD cannot.
    """
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}))


def _root() -> Schema:
    spec = structural(DeepSeekTrainingSpec)
    spec["x-kubernetes-validations"] = [
        *map(_rule_validation, RULES),
        *map(_transition_validation, TRANSITIONS),
    ]
    # `kubectl scale` needs a stored number; every other default lives in the code.
    spec["properties"]["workers"]["default"] = {}
    spec["properties"]["workers"]["properties"]["replicas"]["default"] = 1
    return {
        "type": "object",
        "description": "A training of a DeepSeek-style model, or of any torchrun program, "
        "by a gang of worker pods.",
        "required": ["spec"],
        "properties": {"spec": spec, "status": structural(DeepSeekTrainingStatus)},
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.size() <= {NAME_LIMIT} && "
                f"self.metadata.name.matches({literal(NAME_PATTERN)})",
                "message": f"metadata.name: {NAME_MESSAGE}",
            }
        ],
    }


def _column(name: str, kind: str, path: str, priority: int) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    return column | {"priority": priority} if priority else column


def _rule_validation(rule: Rule) -> Schema:
    cel = _expand(rule.cel)
    if rule.when:
        spoken_of = " && ".join(TERMS[term].cel for term in rule.when)
        cel = f"!({spoken_of}) || ({cel})"
    return {"rule": cel, **_message(rule.message)} | _field_path(rule.field)


def _transition_validation(transition: Transition) -> Schema:
    validation = {"rule": transition.cel, "message": transition.message}
    return validation | _field_path(transition.field)


def _field_path(field: str) -> Schema:
    return {"fieldPath": f".{field}"} if field else {}


def _expand(template: str) -> str:
    """A rule's expression with the CEL of its terms."""
    return "".join(
        text + (TERMS[term].cel if term else "") for text, term, _, _ in Formatter().parse(template)
    )


def _message(template: str) -> Schema:
    """A message; as an expression where it tells values."""
    parts = list(Formatter().parse(template))
    if not any(term for _, term, _, _ in parts):
        return {"message": "".join(text for text, _, _, _ in parts)}
    text = "".join(text.replace("%", "%%") + ("%s" if term else "") for text, term, _, _ in parts)
    values = ", ".join(TERMS[term].cel for _, term, _, _ in parts if term)
    # `format`, since the cost of joining strings is estimated by the length they might have.
    return {"messageExpression": f"{literal(text)}.format([{values}])"}


def _convert(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    schema = _inlined(schema, definitions)
    made: Schema = {key: schema[key] for key in _KEPT if key in schema}
    made |= {key: value for key, value in schema.items() if key.startswith("x-kubernetes-")}
    if "const" in schema:
        made["enum"] = [schema["const"]]
    for bound, exclusive in (
        ("minimum", "exclusiveMinimum"),
        ("maximum", "exclusiveMaximum"),
    ):
        if exclusive in schema:
            made |= {bound: schema[exclusive], exclusive: True}
    if "pattern" in schema:
        made |= _pattern(schema)
    if "items" in schema:
        made["items"] = _convert(schema["items"], definitions)
    if "properties" in schema:
        made["properties"] = {
            name: _convert(field, definitions) for name, field in schema["properties"].items()
        }
    elif schema.get("additionalProperties"):
        made["additionalProperties"] = _convert(schema["additionalProperties"], definitions)
    return made


def _inlined(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema without `$ref` and without the null of an optional field: it is absent instead."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].removeprefix("#/$defs/")]
        return _inlined(target, definitions) | {k: v for k, v in schema.items() if k != "$ref"}
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        if len(choices) != 1:
            raise ValueError(f"a CRD has no union types: {schema}")
        return _inlined(choices[0], definitions) | {k: v for k, v in schema.items() if k != "anyOf"}
    return schema


def _pattern(schema: Schema) -> Schema:
    """A pattern as a rule, since the API server's own message would only show the expression."""
    pattern = schema["pattern"]
    if "x-kubernetes-int-or-string" not in schema:
        return {
            "x-kubernetes-validations": [
                {"rule": f"self.matches({literal(pattern)})", "message": HELP[pattern]}
            ]
        }
    # To the cost estimate such a field is a string of any length, and `matches` in a map too dear.
    checks = {QUANTITY_PATTERN: "isQuantity(self)", AUTO_PATTERN: "self == 'auto'"}
    rule = f"type(self) == int || {checks[pattern]}"
    return {
        "pattern": pattern,
        "x-kubernetes-validations": [{"rule": rule, "message": HELP[pattern]}],
    }


def main(out: TextIO = sys.stdout) -> None:
    """Print the CRD as YAML."""
    out.write(HEADER)
    yaml.safe_dump(custom_resource_definition(), out, sort_keys=False, width=10**6)


if __name__ == "__main__":
    main()
