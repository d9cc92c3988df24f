"""One job at a time on a thread of its own."""

import threading
from collections.abc import Callable


class Background:
    """Runs jobs, one after the other, beside the training thread.

    A job that raises ends it: the error is raised by the next call.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        with self._changed:
            return self._job is not None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, after the one before."""
        self.wait()
        with self._changed:
            self._job = job
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._job is None)
            if self._failure:
                raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                while (job := self._job) is None:
                    self._changed.wait()
            try:
                job()
            except Exception as error:  # noqa: BLE001  (handed to the training thread)
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._job = None
                self._changed.notify_all()
