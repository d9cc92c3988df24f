"""Refusals of single fields, in the words of the API: where, what is wrong, what to write."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dstrain_api.patterns import HELP

_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string; put it in quotes",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map of fields",
    "model_attributes_type": "a map of fields",
}
# A default that depends on a field which is reported itself.
_CONSEQUENCE: Final = "default_factory_not_called"


def field_problems(error: ValidationError, model: type[BaseModel]) -> tuple[str, ...]:
    """One sentence per refused field of a spec of type `model`."""
    return tuple(_sentences(error.errors(include_url=False), model))


def _sentences(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> Iterator[str]:
    for error in errors:
        if error["type"] != _CONSEQUENCE:
            yield f"{_path(error['loc'])}: {_what(error, model)}"


def _path(loc: tuple[int | str, ...]) -> str:
    text = "spec"
    for part in loc:
        if part != "[key]":
            text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text


def _what(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, given = error["type"], error["input"]
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown field{_suggestion(error['loc'], model)}; remove it or correct its name"
    if kind == "missing":
        return "required; add it"
    if kind == "literal_error":
        return f"{given!r} is not supported; write {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"{given!r}: {HELP[context['pattern']]}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {given!r}"
    limit = error["msg"].removeprefix("Input should be ")
    return f"must be {limit}, not {given!r}" if limit != error["msg"] else error["msg"]


def _suggestion(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """` (did you mean x?)` where a field of that struct has a similar name."""
    *parents, name = loc
    struct: Any = model
    for part in parents:
        if isinstance(part, int):
            continue
        fields = {field.alias: field.annotation for field in struct.model_fields.values()}
        struct = struct_of(fields[str(part)])
    names = [field.alias or "" for field in struct.model_fields.values()]
    close = get_close_matches(str(name), names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def struct_of(annotation: Any) -> Any:
    """The model inside an optional or a list of it."""
    while not hasattr(annotation, "model_fields"):
        annotation = annotation.__args__[0]
    return annotation
