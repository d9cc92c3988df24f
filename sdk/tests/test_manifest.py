"""YAML as kubectl reads it, and refusals that say what to change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from dstrain.manifest import InvalidFile, checked_training, load_documents, load_training
from dstrain_api.rules import InvalidSpec

GOOD = """
apiVersion: dstrain.dev/v1alpha1
kind: DeepSeekTraining
metadata: {name: mini}
spec:
  model: {preset: mini}
  data: {sources: [{uri: "builtin://mini"}]}
  training: {total: {tokens: 1000000}}
  optimizer: {lr: 3e-4}
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "training.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        ("1.5", 1.5),
        ("-.5", -0.5),
        (".inf", math.inf),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("-12", -12),
        ("0", 0),
        ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"),
        ("12h", "12h"),
        ("1.2.3", "1.2.3"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ('"3e-4"', "3e-4"),
    ],
)
def test_a_scalar_is_what_kubectl_makes_of_it(text: str, value: Any) -> None:
    (read,) = load_documents(f"x: {text}")
    assert read == {"x": value}
    assert type(read["x"]) is type(value)


def test_a_key_that_is_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(InvalidFile, match="line 3: key 'a' is given twice"):
        load_documents("a: 1\nb: 2\na: 3\n")


def test_merged_maps_may_share_keys() -> None:
    assert load_documents("base: &b {x: 1, y: 2}\nmade: {<<: *b, y: 3}")[0]["made"] == {
        "x": 1,
        "y": 3,
    }


def test_a_good_file_is_taken_as_it_is(tmp_path: Path) -> None:
    training = checked_training(file(tmp_path, GOOD))
    assert training["spec"]["optimizer"] == {"lr": 3e-4}


def test_other_objects_in_the_file_do_not_matter(tmp_path: Path) -> None:
    text = f"{GOOD}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\n"
    assert load_training(file(tmp_path, text))["metadata"]["name"] == "mini"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds 0 objects of kind DeepSeekTraining"),
        (f"{GOOD}\n---\n{GOOD}", "holds 2 objects"),
        (GOOD.replace("v1alpha1", "v9"), "write dstrain.dev/v1alpha1"),
        (GOOD.replace("metadata: {name: mini}", "metadata: {}"), "metadata.name is missing"),
        (GOOD.split("spec:")[0], "spec is missing"),
        ("a: [", "not YAML"),
    ],
)
def test_a_file_without_a_training_is_told_what_it_lacks(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(InvalidFile) as refused:
        load_training(file(tmp_path, text))
    assert told in str(refused.value)
    assert "training.yaml" in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"nothing\.yaml: No such file"):
        load_training(tmp_path / "nothing.yaml")


def test_a_spec_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec) as refused:
        checked_training(file(tmp_path, GOOD.replace("lr:", "lrr:")))
    assert any("lrr" in problem for problem in refused.value.problems)
