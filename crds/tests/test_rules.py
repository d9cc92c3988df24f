"""The rules of a spec as Python reads them; e2e/test_api.py asks an API server the same."""

from typing import Any

import pytest
from dstrain_api.model import PRESETS
from dstrain_api.rules import RULES, InvalidSpec, Rule, allowed_replicas, validate, validate_name
from dstrain_api.spec import DeepSeekTrainingSpec
from dstrain_api.terms import Values
from pydantic import ValidationError

from .cases import CASES, by_name, patched


def well_typed(spec: dict[str, Any]) -> bool:
    try:
        DeepSeekTrainingSpec.model_validate(spec)
    except ValidationError:
        return False
    return True


@by_name("good")
def test_a_good_spec_is_accepted(case: dict[str, Any]) -> None:
    validate(patched(CASES["base"], case["change"]))


@by_name("bad")
def test_a_bad_spec_is_refused_with_its_field_and_what_to_change(case: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        validate(patched(CASES["base"], case["change"]))
    said = case.get("says") or case["python"]
    assert any(p.startswith(case["field"]) for p in refusal.value.problems), refusal.value.problems
    assert any(said in p for p in refusal.value.problems), refusal.value.problems


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.name))
def test_a_case_breaks_the_rule(rule: Rule) -> None:
    specs = [patched(CASES["base"], case["change"]) for case in CASES["bad"]]
    parsed = [DeepSeekTrainingSpec.model_validate(spec) for spec in specs if well_typed(spec)]
    assert any(rule.broken(Values(spec)) for spec in parsed)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidSpec) as refusal:
        validate({})
    assert len(refusal.value.problems) == 3


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.data\.sources\[0\]\.url: .*did you mean uri"):
        validate(patched(CASES["base"], {"data": {"sources": [{"url": "builtin://mini"}]}}))


def test_processes_follow_gpus_unless_they_are_given() -> None:
    spec = validate(patched(CASES["base"], {"workers": {"gpusPerWorker": 4}}))
    assert spec.workers.processes_per_worker == 4
    assert validate(CASES["base"]).workers.processes_per_worker == 1


def test_allowed_replicas_are_those_that_batch_and_parallelism_divide() -> None:
    spec = validate(
        patched(CASES["base"], {"parallelism": {"tensor": 2}, "training": {"globalBatch": 48}})
    )
    allowed = allowed_replicas(spec)
    assert [n for n in range(30) if allowed(n)] == [2, 4, 6, 8, 12, 16, 24]


def test_any_number_of_replicas_may_run_another_program() -> None:
    change = {"model": None, "data": None, "training": None, "entrypoint": {"module": "m"}}
    allowed = allowed_replicas(validate(patched(CASES["base"], change)))
    assert [n for n in range(5) if allowed(n)] == [1, 2, 3, 4]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_together(preset: str) -> None:
    validate(patched(CASES["base"], {"model": {"preset": preset}}))


@pytest.mark.parametrize("name", ["mini", "a", "run-7", "a" * 40])
def test_a_name_that_pods_can_carry_is_accepted(name: str) -> None:
    validate_name(name)


@pytest.mark.parametrize("name", ["", "Mini", "7b", "a.b", "run-", "a" * 41, "a\n"])
def test_a_name_that_pods_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec, match="use at most 40 lower-case letters"):
        validate_name(name)
