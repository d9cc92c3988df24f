"""The pinned packages of each image."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "constraints"


def pins(name: str) -> dict[str, str]:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_the_operator_holds_no_torch_and_the_trainer_no_kubernetes() -> None:
    assert "torch" not in pins("operator")
    assert not {"kopf", "kubernetes", "fastapi"} & pins("trainer").keys()


def test_a_package_has_one_version_in_all_lists() -> None:
    lists = [pins(name) for name in ("operator", "trainer", "dev")]
    for package in set().union(*lists):
        assert len({each[package] for each in lists if package in each}) == 1, package


def test_no_list_names_an_address() -> None:
    for path in FOLDER.glob("*.txt"):
        assert "://" not in path.read_text()
