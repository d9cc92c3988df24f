"""dstrain for Python: what a training script reports, and the command line.

    from dstrain import report
    report(step=12, loss=4.2, tokens=24_576)

Nothing is imported before it is used: `dstrain` starts at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_trainer.reporting import report, report_done, section

__all__ = ["report", "report_done", "section"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from deepseek_trainer import reporting

        return getattr(reporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
