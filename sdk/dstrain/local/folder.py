"""The folder of a local run: what it has written, and what the next one goes on from.

training.json        the object with its status, as it was last
pods/<name>/log      what `kubectl logs` would show
volumes/<claim>/     what pvc://<claim>/ means here
operator.log         what the reconciler did
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain_api.rules import TRANSITIONS, validate
from dstrain_api.status import DeepSeekTrainingStatus

FIXED = tuple(t.field for t in TRANSITIONS if t.name.endswith("-fixed"))  # as on a cluster


class RunInUse(ValueError):
    """Another program trains in this folder."""


class AnotherTraining(ValueError):
    """The folder belongs to a training that this one cannot go on from."""


class RunFolder:
    """One folder, held by one runner at a time."""

    def __init__(self, path: Path) -> None:
        """Make it, and hold it until `close` or the end of this program. Raises RunInUse."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunInUse(
                f"another dstrain run works in {path}; stop it, or name another --dir"
            ) from error

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    @property
    def operator_log(self) -> Path:
        """Where the reconciler logs."""
        return self.path / "operator.log"

    def save(self, training: dict[str, Any]) -> None:
        """Keep the object as it is now."""
        target = self.path / "training.json"
        fresh = target.with_suffix(".new")
        fresh.write_text(json.dumps(training, indent=2))
        os.replace(fresh, target)  # noqa: PTH105 -- as one step

    def previous(self) -> DeepSeekTrainingStatus | None:
        """The status that the last run in this folder left; None in a new one."""
        stored = self._stored()
        if stored is None:
            return None
        return DeepSeekTrainingStatus.model_validate(stored.get("status", {}), extra="ignore")

    def refuse_another(self, spec: Mapping[str, Any]) -> None:
        """Raises AnotherTraining unless a run with this spec may go on from the last one here."""
        stored = self._stored()
        if stored is None:
            return
        before, now = (_complete(s) for s in (stored["spec"], spec))
        changed = [f for f in FIXED if _value(before, f) != _value(now, f)]
        if changed:
            raise AnotherTraining(
                f"{self.path} holds a run with another {', '.join(changed)}; name another --dir"
            )

    def has_completed(self, spec: Mapping[str, Any]) -> bool:
        """Whether exactly this was trained here to its end."""
        stored, previous = self._stored(), self.previous()
        if stored is None or previous is None or previous.phase != "Complete":
            return False
        return _complete({**stored["spec"], "suspend": False}) == _complete(spec)

    def _stored(self) -> dict[str, Any] | None:
        try:
            stored: dict[str, Any] = json.loads((self.path / "training.json").read_text())
        except FileNotFoundError:
            return None
        return stored


def _complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    return validate(spec).model_dump(mode="json", by_alias=True)


def _value(spec: dict[str, Any], path: str) -> Any:
    found: Any = spec
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def carried_over(status: DeepSeekTrainingStatus) -> DeepSeekTrainingStatus:
    """What the next run has to know of the last: counters, history, the checkpoint.

    How it ended does not matter: a person has asked for more. Generations must go on counting,
    because names of unfinished checkpoints hold them.
    """
    return DeepSeekTrainingStatus(
        attempt=status.attempt,
        generation=status.generation,
        restarts=status.restarts,
        history=status.history,
        progress=status.progress,
        checkpoint=status.checkpoint,
        start_time=status.start_time,
    )
