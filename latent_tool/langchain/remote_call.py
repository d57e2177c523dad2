"""One call of a ``RemoteReasoner``: what is sent, what is left of its time, and what a reply means.

This module sends nothing itself. It trusts no reply: what is not understood is a ``ServiceError``.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import SecretStr, ValidationError

from latent_tool.errors import (
    AccessError,
    CancelledError,
    DeadlineError,
    LatentToolError,
    MissingExtraError,
    OverloadedError,
    ServiceError,
    ServiceUnavailableError,
)
from latent_tool.images.picture import portable_picture
from latent_tool.langchain.call import first_given
from latent_tool.langchain.messages import as_request
from latent_tool.langchain.runnable import Item, Question
from latent_tool.schema import ReasoningResult, ReasoningStep
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy
from latent_tool.views.notebook import remember

if TYPE_CHECKING:
    import httpx


__all__ = ["Call"]

M = TypeVar("M", ReasoningStep, ReasoningResult)

# Seconds before a request is sent again, doubled every time, unless the service says when to come back.
_FIRST_WAIT = 0.2
# Seconds that a service's answer may be on its way when its deadline has passed.
_GRACE = 1.0
# Characters of a message or hint that are shown of a service's error.
_LONGEST = 2000


class Service(Protocol):
    """What a call needs to know of the reasoner that makes it; see the fields of ``RemoteReasoner``."""

    @property
    def url(self) -> str: ...

    @property
    def token(self) -> SecretStr | None: ...

    @property
    def budget(self) -> Budget | None: ...

    @property
    def level(self) -> BudgetLevel | None: ...

    @property
    def seed(self) -> int | None: ...

    @property
    def min_confidence(self) -> float | None: ...

    @property
    def image_policy(self) -> ImagePolicy: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def connect_s(self) -> float: ...

    @property
    def retries(self) -> int: ...


class Call:
    """A question to a service; reads the request, its images and the options of the call.

    ``listening``: whether the steps are asked for.
    """

    def __init__(self, reasoner: Service, question: Question, *, listening: bool) -> None:
        request, options = as_request(question.value), question.options()
        self.reasoner = reasoner
        self.began: float = question.call
        self.attempts = 0
        self.retry_after_s = 0.0
        self.cancelled: threading.Event | None = options.cancelled
        self.listening = listening or self.cancelled is not None  # between two lines a call can be stopped
        self.warnings: list[str] = []
        self.budget: Budget | None = reasoner.budget  # None, or a level beside it: the service's own limits
        level = reasoner.level if self.budget is None else None
        for wanted in (options.budget, request.budget):
            if self.budget is None and isinstance(wanted, str):
                level = wanted  # beside which the limits of the service's reasoner hold
            elif wanted is not None:
                self.budget = Budget.coerce(wanted) if self.budget is None else self.budget.replaced_by(wanted)
        self.check()
        images = []
        self.pictures = request.image_references
        for reference in self.pictures:
            image, warnings = portable_picture(reference, reasoner.image_policy, deadline=self.end())
            images.append(image)
            self.warnings += warnings
        given = {
            "question": request.question,
            "options": request.options,
            "unsure": request.unsure or None,
            "system": request.system,
            "budget": level,  # a whole budget is sent with what is left of its deadline
            "seed": first_given(request.seed, options.seed, reasoner.seed),
            "min_confidence": first_given(request.min_confidence, options.min_confidence, reasoner.min_confidence),
        }
        self.fields = {"images": images, **{name: value for name, value in given.items() if value is not None}}

    def _deadline(self) -> float | None:
        return None if self.budget is None or self.budget.deadline_s is None else self.began + self.budget.deadline_s

    def end(self) -> float:
        """Tell when this side gives up: the time limit, or the deadline and the way back."""
        deadline, end = self._deadline(), self.began + self.reasoner.timeout_s
        return end if deadline is None else min(end, deadline + _GRACE)

    def check(self) -> None:
        """Raise when the call was stopped, or its time is over."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        if time.monotonic() >= self.end():
            raise self.too_late()

    def left(self) -> float:
        """Return seconds before this side gives up."""
        return max(0.001, self.end() - time.monotonic())

    def too_late(self) -> DeadlineError:
        """Return what to raise when the time is over."""
        return DeadlineError(
            f"The service did not answer within {self.end() - self.began:g} s.",
            "Allow more time (deadline_s of the budget, timeout_s of the RemoteReasoner).",
        )

    # ------------------------------------------------------------------ what is sent

    def timeouts(self) -> httpx.Timeout:
        """Tell how long single operations of the network may take."""
        import httpx

        self.check()
        left = self.left()
        return httpx.Timeout(left, connect=min(left, self.reasoner.connect_s))

    def request(self) -> dict[str, Any]:
        """Return the arguments of the request, with what is left of the deadline."""
        fields = dict(self.fields)
        deadline = self._deadline()
        if self.budget is not None:
            budget = self.budget
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError("The deadline passed before the question was sent.", "Allow more time.")
                budget = budget.but(deadline_s=left)
            fields["budget"] = budget.model_dump(mode="json")
        headers = {"Content-Type": "application/json", "Accept": "application/json, application/x-ndjson"}
        if self.reasoner.token is not None:
            headers["Authorization"] = f"Bearer {self.reasoner.token.get_secret_value()}"
        path = "/v1/ask/stream" if self.listening else "/v1/ask"
        url = self.reasoner.url + path
        return {"method": "POST", "url": url, "content": json.dumps(fields).encode(), "headers": headers}

    # ------------------------------------------------------------------ what comes back

    def read(self, reply: httpx.Response, body: bytes) -> ReasoningResult:
        """Return the result of a reply, or its error raised."""
        if reply.status_code == 200:
            return _parse(ReasoningResult, _from_json(body))
        wanted = reply.headers.get("retry-after", "")
        self.retry_after_s = float(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 9 else 0.0
        raise _error(reply.status_code, _from_json(body) if "json" in reply.headers.get("content-type", "") else {})

    def read_line(self, line: bytes) -> Item:
        """Return what one line of a stream holds, or its error raised."""
        found = _from_json(line)
        if (problem := found.get("error")) is not None:
            raise _error(500, problem) if isinstance(problem, Mapping) else _no_result()
        if found.get("result") is not None:
            return _parse(ReasoningResult, found["result"])
        return _parse(ReasoningStep, found.get("step"))

    def finish(self, result: ReasoningResult) -> ReasoningResult:
        """Return the result with the deadline that was asked for, and what was changed of the images here."""
        changes: dict[str, Any] = {}
        if result.budget is not None and self._deadline() is not None:
            assert self.budget is not None
            changes["budget"] = result.budget.but(deadline_s=self.budget.deadline_s)
        if self.warnings:
            changes["warnings"] = [*self.warnings, *result.warnings]
        result = result.model_copy(update=changes) if changes else result
        return remember(result, self.pictures, self.reasoner.image_policy)

    def lost(self, error: httpx.HTTPError) -> LatentToolError:
        """Return what to raise for a request that got no reply."""
        import httpx

        if isinstance(error, httpx.TimeoutException) and time.monotonic() >= self.end() - 0.01:
            return self.too_late()
        return ServiceUnavailableError(
            f"The service cannot be reached or broke off ({type(error).__name__}).",
            "See whether it runs and whether its URL is right.",
        )

    def pause_after(self, error: LatentToolError) -> float:
        """Return seconds to wait before asking again. Raises the error when there are no tries or no time left."""
        pause = max(_FIRST_WAIT * 2.0**self.attempts, self.retry_after_s) * random.uniform(1.0, 1.5)
        self.attempts += 1
        if self.attempts > self.reasoner.retries or time.monotonic() + pause >= self.end():
            raise error
        return pause

    def wait(self, seconds: float) -> None:
        if self.cancelled is None:
            time.sleep(seconds)
        else:
            self.cancelled.wait(seconds)
        self.check()


def _text(value: Any) -> str:
    return value[:_LONGEST] if isinstance(value, str) else ""


def _kinds(base: type[LatentToolError]) -> dict[str, type[LatentToolError]]:
    """This package's errors by name: a class and all below it."""
    below = {name: kind for each in base.__subclasses__() for name, kind in _kinds(each).items()}
    return {base.__name__: base, **below} if base.__module__ == _ERRORS else below


_ERRORS = LatentToolError.__module__
_KINDS = _kinds(LatentToolError)


def _from_json(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _no_result()
    return found


def _parse(model: type[M], value: Any) -> M:
    try:
        return model.model_validate(value)
    except (ValidationError, RecursionError):
        raise _no_result() from None


def _no_result() -> ServiceError:
    return ServiceError(
        "The service answered with something that is no result.",
        "See whether the URL is that of latent-tool serve, and whether both sides have the same version.",
    )


def _error(status: int, problem: Mapping[str, Any]) -> LatentToolError:
    """The error that a reply stands for: of the class that was raised there, if this side knows it."""
    message, hint = (_text(problem.get(name)) for name in ("message", "hint"))
    kind = _KINDS.get(_text(problem.get("type")))
    if kind is CancelledError:  # not by us
        return ServiceUnavailableError("The service stopped the search.", "Ask again.")
    if kind is not None and kind is not MissingExtraError:
        return kind(message, hint)
    if message:
        return ServiceError(message, hint)
    if status in (401, 403):
        return AccessError("The service refuses access.", "Pass its token.")
    if status in (429, 503):
        return OverloadedError("The service is full.", "Ask again a little later.")
    if status >= 500:  # not the service itself: a proxy, or a replica that died
        return ServiceUnavailableError(f"The service failed (HTTP {status}).", "Ask again, and see its log.")
    return ServiceError(f"The service answered with HTTP {status}.", "See whether the URL is right.")
