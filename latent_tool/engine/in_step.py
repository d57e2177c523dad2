"""Many questions in step: whoever waits for the same kind of forward pass is served in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from latent_tool.engine.job import Job
from latent_tool.errors import CancelledError
from latent_tool.method.asking import Asking, Request, Work, contained
from latent_tool.models.decoding import Decoded
from latent_tool.models.requests import (
    Attend,
    Decode,
    DecodeEach,
    Prefill,
    PrefillEach,
    Reason,
    Sample,
    Score,
    ScoreOptions,
    TokenEntropies,
    TokenLogProbabilities,
    never,
)
from latent_tool.models.serving import together
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.schema import ReasoningStep

__all__ = ["InStep", "Member", "Tell"]

T = TypeVar("T")

# The order in which requests of several questions are served: whoever is behind catches up first ...
_ORDER = (
    Prefill,
    PrefillEach,
    DecodeEach,
    Reason,
    Score,
    ScoreOptions,
    Attend,
    Decode,
    Sample,
    TokenLogProbabilities,
    TokenEntropies,
)
# ... but nobody is passed over more often than this.
_PATIENCE = 16


@dataclass(frozen=True)
class Tell(Request[None]):
    """Work tells of a step to whoever watches it; the model has no part in it."""

    step: ReasoningStep


@dataclass(eq=False)
class Member(Generic[T]):
    """A question in an ``InStep``: what it asks of the model next, or its result once it has left."""

    job: Job
    asking: Asking[T]
    pause: Callable[[], bool] = never
    on_step: Callable[[ReasoningStep], None] | None = None
    request: Request[Any] | None = None
    waited: int = 0  # steps in which others were served

    @property
    def result(self) -> T | Exception | None:
        """What the work returned, or the exception it ended with; ``None`` while it is under way."""
        return self.asking.result

    def advance(self, reply: object) -> None:
        """Hand over a reply (which is raised, if it is an exception), and go on to the next request, or the result."""
        self.asking.advance(reply)
        self.go_on()

    def go_on(self) -> None:
        """Tell the steps that the work has come to, up to its next request of the model."""
        while isinstance(told := self.asking.request, Tell):
            reply: Exception | None = None
            try:
                if self.on_step is not None:
                    self.on_step(told.step)
            except BaseException as error:
                reply = contained(error)
            self.asking.advance(reply)
        self.request = replace(told, pause=self.pause) if isinstance(told, Decode) else told


class InStep:
    """Questions that are answered in step, their forward passes in one batch; a question may join at any time.

    For one thread at a time.

    Args:
        vlm: the model that serves them.
        awaited: whether others wait to join; then a long decoding is paused.
    """

    def __init__(self, vlm: VisionLanguageModel, awaited: Callable[[], bool] = never) -> None:
        self.vlm = vlm
        self.members: list[Member[Any]] = []
        self._awaited = awaited

    def join(
        self,
        job: Job,
        work: Work[T],
        on_step: Callable[[ReasoningStep], None] | None = None,
    ) -> Member[T]:
        """Take in work about a question, which goes as far as it gets without the model."""
        member = Member(job, Asking(work), self._others_wait, on_step)
        member.go_on()
        self.members.append(member)
        return member

    def _others_wait(self) -> bool:
        """Whether a decoding should make way for a while."""
        return self._awaited() or any(
            member.result is None and not isinstance(member.request, Decode) for member in self.members
        )

    def step(self) -> list[Member[Any]]:
        """Serve some requests in one batch; returns the questions that have their result, which are members no more.

        Whoever is behind catches up first, which makes batches large; nobody is passed over more than ``_PATIENCE``
        times, and answers are decoded some tokens at a time while others search.
        """
        for member in self.members:
            if member.request is not None and member.job.cancelled is not None and member.job.cancelled.is_set():
                member.advance(CancelledError("The question was cancelled."))
        asking = [member for member in self.members if member.request is not None]
        if asking:
            oldest = max(asking, key=lambda member: member.waited)
            behind = min(asking, key=lambda member: _ORDER.index(type(member.request)))
            kind = type((oldest if oldest.waited >= _PATIENCE else behind).request)
            chosen = [member for member in asking if type(member.request) is kind]
            replies = together(self.vlm, [member.request for member in chosen if member.request is not None])
            for member in asking:
                member.waited += 1
            for member, reply in zip(chosen, replies, strict=True):
                member.waited = 0
                if (
                    isinstance(member.request, Decode)
                    and isinstance(reply, Decoded)
                    and reply.finish_reason == "paused"
                ):
                    member.request = replace(member.request, begun=reply)
                else:
                    member.advance(reply)
        done = [member for member in self.members if member.result is not None]
        self.members = [member for member in self.members if member.result is None]
        return done
