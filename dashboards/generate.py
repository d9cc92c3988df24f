"""Writes what is generated here: `python -m dashboards.generate`, from the repository's root."""

from __future__ import annotations

from pathlib import Path

from dashboards.metrics_table import metrics_page
from dashboards.training import TRAINING

ROOT = Path(__file__).resolve().parent.parent


def outputs() -> dict[Path, str]:
    """What every generated file should contain."""
    return {
        ROOT / "dashboards" / "json" / "training.json": TRAINING.as_json(),
        ROOT / "docs" / "metrics.md": metrics_page(),
    }


def main() -> None:
    """Write the files that are not as they should be."""
    for path, content in outputs().items():
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
