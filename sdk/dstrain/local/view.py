"""What a person reads while a training runs. Pure: status in, text out."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain_api.status import Condition, DeepSeekTrainingStatus

_TRACEBACK = "Traceback (most recent call last):"


def progress_line(status: DeepSeekTrainingStatus) -> str:
    """Everything that matters now, in one line; what is not known is left out."""
    said, progress = status.summary, status.progress
    parts: list[str] = [status.phase]
    if progress.total_steps:
        parts += [said.progress, f"step {said.step}"]
    elif progress.step:
        parts.append(f"step {progress.step}")
    if said.loss:
        parts.append(f"loss {said.loss}")
    if said.tokens_per_second:
        parts.append(f"{said.tokens_per_second} tok/s")
    if said.mfu:
        parts.append(f"MFU {said.mfu}")
    if said.eta:
        parts.append(f"ETA {said.eta}")
    parts.append(f"workers {said.workers or '0/0'}")
    if said.restarts not in ("", "0"):
        parts.append(f"restarts {said.restarts}")
    if status.checkpoint:
        parts.append(f"checkpoint {status.checkpoint.step}")
    return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is only known at the end."""

    first_loss: float | None
    first_step: int
    seconds: float


def closing(status: DeepSeekTrainingStatus, story: Story, *, checkpoints: str, logs: str) -> str:
    """The last words of a run."""
    lines = [_headline(status)]
    progress = status.progress
    if progress.loss is not None and story.first_loss is not None:
        lines.append(
            f"  loss         {story.first_loss:.3f} (step {story.first_step})"
            f" -> {progress.loss:.3f} (step {progress.step})"
        )
    if progress.tokens:
        lines.append(f"  tokens       {progress.tokens:,}")
    lines.append(f"  time         {story.seconds:.0f} s")
    restarts = status.restarts.counted
    if restarts:
        costs = [e.seconds for e in status.history if e.seconds is not None]
        slowest = f", the slowest took {max(costs):.1f} s" if costs else ""
        lines.append(f"  restarts     {restarts}{slowest}")
    if status.checkpoint:
        lines.append(f"  checkpoint   step {status.checkpoint.step} in {checkpoints}")
    lines.append(f"  logs         {logs}")
    return "\n".join(lines)


def condition(status: DeepSeekTrainingStatus, kind: str) -> Condition | None:
    """The condition of this type, if it is true."""
    return next((c for c in status.conditions if c.type == kind and c.status == "True"), None)


def brief(text: str) -> str:
    """A message in one line: of a traceback only what it ends with."""
    first, *rest = text.strip().splitlines() or [""]
    return f"{first.removesuffix(_TRACEBACK)}{rest[-1]}" if rest else first


def _headline(status: DeepSeekTrainingStatus) -> str:
    failed = condition(status, "Failed")
    if failed:
        return f"Failed ({failed.reason}): {failed.message}"
    return {"Complete": "Complete", "Suspended": "Stopped"}.get(status.phase, status.phase)
