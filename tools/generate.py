"""Write everything that is made from code: `make generate`. Tests compare the files with it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TextIO

from dstrain_api import reference, schema

from dashboards import generate as dashboards

ROOT = Path(__file__).resolve().parent.parent
CHART_FILES = ROOT / "charts" / "deepseek-operator" / "files"


def outputs() -> dict[Path, str]:
    """What every generated file should contain."""
    crd = _printed(schema.main)
    made = dashboards.outputs()
    boards = {path.name: text for path, text in made.items() if path.suffix == ".json"}
    return {
        ROOT / "crds" / "deepseektrainings.yaml": crd,
        CHART_FILES / "deepseektrainings.yaml": crd,
        ROOT / "docs" / "reference" / "deepseektraining.md": _printed(reference.main),
        **made,
        **{CHART_FILES / "dashboards" / name: text for name, text in boards.items()},
    }


def main() -> None:
    """Write the files that are not as they should be, and name them."""
    for path, content in outputs().items():
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(path.relative_to(ROOT))


def _printed(prints: Callable[[TextIO], None]) -> str:
    out = StringIO()
    prints(out)
    return out.getvalue()


if __name__ == "__main__":
    main()
