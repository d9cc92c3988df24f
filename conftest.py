"""Lets a folder be called `operator`.

pytest imports `operator/tests/test_x.py` as `operator.tests.test_x` and, to have a parent package
of that name, puts an empty module in place of the standard library's `operator`; what imports from
it later breaks. A module with a `__path__` is package enough for pytest to leave it there.
"""

import operator
from pathlib import Path

operator.__path__ = [str(Path(__file__).parent / "operator")]  # type: ignore[attr-defined]
