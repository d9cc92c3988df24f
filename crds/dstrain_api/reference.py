"""The field reference: what `kubectl explain` says, and the rules, on one page.

`python -m dstrain_api.reference` prints docs/reference/deepseektraining.md.
"""

import re
import sys
from collections.abc import Iterator
from typing import Final, TextIO

from dstrain_api import constants
from dstrain_api.rules import NAME_MESSAGE, RULES, TRANSITIONS
from dstrain_api.schema import Schema, custom_resource_definition

_PARTS: Final = re.compile(
    r"(?P<text>.*) (?:Default: (?P<default>.*)|(?P<required>Required.*))\. "
    r"Example: (?P<example>.*)\."
)
_SHORT: Final = constants.SHORT_NAMES[0]
_INTRODUCTION: Final = f"""\
<!-- Made by `make generate` from crds/dstrain_api. Change it there. -->
# {constants.KIND}

`apiVersion: {constants.API_VERSION}`, `kind: {constants.KIND}`. `kubectl get {_SHORT}` lists them,
`kubectl explain {_SHORT}.spec` tells what this page tells. A default is part of the API version: it
is not stored with a training, and it does not change within {constants.VERSION}.

`metadata.name`: {NAME_MESSAGE}.
"""
_RULES: Final = """\
## Rules

The API server refuses a training that breaks one of these, and so do local runs and the client.
"""
_CHANGES: Final = """\
## Changes

What is not listed here may be edited at any time. What concerns pods (image, resources, template)
holds for the pods that are made from then on.
"""


def field_parts(description: str) -> dict[str, str]:
    """A field's `text`, its `default` or `required`, and its `example`.

    Raises:
        ValueError: the description does not name them.
    """
    match = _PARTS.fullmatch(description)
    if not match:
        raise ValueError(f"a description ends with its default and an example: {description!r}")
    return {key: value or "" for key, value in match.groupdict().items()}


def structs(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every struct of a structural schema with its path, parents first."""
    yield path, schema
    for name, field in schema["properties"].items():
        inner = field.get("items", field)
        if "properties" in inner:
            yield from structs(inner, f"{path}.{name}" + ("[]" if inner is not field else ""))


def page() -> str:
    """The page as Markdown."""
    version = custom_resource_definition()["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]["properties"]
    return "\n".join(
        [
            _INTRODUCTION,
            *(_section(*struct) for part in root for struct in structs(root[part], part)),
            _RULES,
            *(_rule(rule.field, rule.message) for rule in RULES),
            "",
            _CHANGES,
            *(_rule(change.field, change.message) for change in TRANSITIONS),
            "",
        ]
    )


def _section(path: str, schema: Schema) -> str:
    lines = [f"## {path}", "", _PARTS.sub(r"\g<text>", schema["description"]), ""]
    lines += ["| field | type | default | what | example |", "|---|---|---|---|---|"]
    for name, field in schema["properties"].items():
        parts = field_parts(field["description"])
        default = parts["default"] or parts["required"][0].lower() + parts["required"][1:]
        cells = (f"`{name}`", _type(field), default, parts["text"], f"`{parts['example']}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join((*lines, ""))


def _type(field: Schema) -> str:
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "x-kubernetes-int-or-string" in field:
        return "number or text"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    if "items" in field:
        return f"list of {_type(field['items'])}"
    return str(field["type"]) + _range(field)


def _range(field: Schema) -> str:
    above = "above " if field.get("exclusiveMinimum") else "from "
    below = "below " if field.get("exclusiveMaximum") else "to "
    low = f" {above}{field['minimum']}" if "minimum" in field else ""
    high = f" {below}{field['maximum']}" if "maximum" in field else ""
    return low + high


def _rule(field: str, message: str) -> str:
    path = f"spec.{field}" if field else "spec"
    words = re.sub(r"(?<!\{)\{(\w+)\}", r"*\1*", message).replace("{{", "{").replace("}}", "}")
    return f"- `{path}`: {words}"


def main(out: TextIO = sys.stdout) -> None:
    """Print the page."""
    out.write(page())


if __name__ == "__main__":
    main()
