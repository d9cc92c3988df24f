"""The check before the first step of a generation with new members: whether a rank's device or
network is broken, or far slower than those of the others. It takes a fraction of a second, and a
bad node would take hours of everybody.
"""

from deepseek_trainer.preflight.check import PreflightFailed, passed

__all__ = ["PreflightFailed", "passed"]
