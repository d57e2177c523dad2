"""The time of one question: its phases, its deadline, and whether it was cancelled."""

from __future__ import annotations

from collections.abc import Callable

from latent_tool.engine.job import Job
from latent_tool.errors import CancelledError, DeadlineError

__all__ = ["Clock"]


class Clock:
    """Measures phases, counts forward passes, and knows when the job must stop."""

    def __init__(self, job: Job, now: Callable[[], float]) -> None:
        self.job = job
        self.now = now
        self.seconds: dict[str, float] = {"queue": job.queue_seconds, "images": job.image_seconds}
        self.reserve = 0.0
        self.calls = 0  # forward passes of the decoder
        self._phase_began = now()

    def phase_done(self, name: str) -> None:
        """Close a phase; the next one begins now."""
        now = self.now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._phase_began
        self._phase_began = now

    def expired(self, reserve: float = 0.0) -> bool:
        """Tell whether the deadline, less a reserve in seconds, has passed. Raises ``CancelledError`` when
        cancelled.
        """
        if self.job.cancelled is not None and self.job.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        return self.job.deadline is not None and self.now() >= self.job.deadline - reserve

    def require_time(self, doing: str) -> None:
        """Raise ``DeadlineError`` if there is nothing to return yet and no time left."""
        if self.expired():
            raise DeadlineError(
                f"The deadline passed before {doing}, so there is no answer.",
                "Allow more seconds (deadline_s), use a smaller image or a smaller model.",
            )

    def search_must_end(self) -> str | None:
        """``"deadline"`` when only the time for decoding an answer is left."""
        return "deadline" if self.expired(self.reserve) else None
