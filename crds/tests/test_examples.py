"""Every example can be trained, as far as the API can tell; e2e/test_api.py asks an API server."""

from pathlib import Path

import pytest
from dstrain.manifest import load_training
from dstrain_api.constants import API_VERSION, KIND
from dstrain_api.rules import validate, validate_name

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.name))
def test_an_example_can_be_trained(path: Path) -> None:
    manifest = load_training(path)
    assert (manifest["apiVersion"], manifest["kind"]) == (API_VERSION, KIND)
    validate_name(manifest["metadata"]["name"])
    validate(manifest["spec"])
