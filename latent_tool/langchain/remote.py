"""``RemoteReasoner``: a reasoner that runs as an HTTP service, with the interface of one that runs here.

It sends the request to ``latent-tool serve`` (or Ray Serve) and gives back the same result, steps and errors. Asking
changes nothing on the other side, so that what got lost on the way is asked again.

This module knows HTTP and what LangChain wants of a Runnable. It loads no model; files are read here and sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict, Field, SecretStr, ValidationError, field_validator

from latent_tool import errors
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
from latent_tool.langchain.messages import as_request, shown_input
from latent_tool.langchain.reasoner import OPTIONS_KEY, CallOptions, announce, announce_async, graph_writer
from latent_tool.langchain.runnable import RequestRunnable
from latent_tool.schema import ReasoningResult, ReasoningStep
from latent_tool.settings import Budget, ImagePolicy, Positive, settings_error

if TYPE_CHECKING:
    import httpx

__all__ = ["RemoteReasoner"]

Item = ReasoningStep | ReasoningResult
M = TypeVar("M", ReasoningStep, ReasoningResult)

# Seconds before a request is sent again, doubled every time, unless the service says when to come back.
_FIRST_WAIT = 0.2
# Seconds that a service may answer late when its deadline has passed.
_GRACE = 5.0


class RemoteReasoner(RequestRunnable):
    """Asks a reasoner that runs as an HTTP service.

        reasoner = RemoteReasoner(url="http://127.0.0.1:8000", token="...")

    Input, output, options of a call and errors are those of ``LatentReasoner``; model and search settings are the
    service's. Files, bytes and Pillow images are sent as bytes. A URL is left to the service to download, by its own
    policy, unless ``image_policy`` names hosts.

    A request that was lost (no connection, a replica that died, a service that is full) is sent again until
    ``retries`` or the time runs out. A stream that broke goes on after the steps that were already given.

    Raises:
        SettingsError: a field is out of its range or not known.

    Calls raise what the service's reasoner raises, and ``ServiceUnavailableError`` when it cannot be reached,
    ``AccessError`` when the token is wrong, ``OverloadedError`` when it stays full, ``ServiceError`` when it answers
    with something that is no result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="Where the service is, for example http://127.0.0.1:8000.")
    token: SecretStr | None = Field(None, description="Sent as a bearer token.")
    budget: Budget | None = Field(None, description="How much work per question; None: the service's own.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the search; None: the service's own.")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="Abstain below this confidence; None: the service's own."
    )
    image_policy: ImagePolicy = Field(ImagePolicy.local(), description="Which images may be read here.")
    timeout_s: Positive = Field(120.0, description="Seconds for a call at most, everything included.")
    connect_s: Positive = Field(5.0, description="Seconds to connect at most.")
    retries: int = Field(5, ge=0, le=100, description="How often a request that was lost is sent again.")

    def __init__(self, url: str | None = None, **values: Any) -> None:
        try:
            super().__init__(**(values if url is None else {"url": url, **values}))
        except ValidationError as error:
            raise settings_error(type(self), error) from None

    @field_validator("url")
    @classmethod
    def _a_url(cls, value: str) -> str:
        import httpx

        try:
            url = httpx.URL(value.strip())
        except (httpx.InvalidURL, TypeError):
            raise ValueError("is not a URL") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("must begin with http:// or https:// and name a host")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("must have no user name, query or fragment; pass the token as token")
        return str(url).rstrip("/")

    @field_validator("token")
    @classmethod
    def _printable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
            raise ValueError("must be printable ASCII")
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _coerce_budget(cls, value: Any) -> Budget | None:
        return None if value is None else Budget.coerce(value)

    def with_budget(self, budget: Budget | Literal["quick", "standard", "thorough"] | Mapping[str, Any]) -> Self:
        """The same reasoner with another budget: a ``Budget``, its fields, or the name of a level."""
        return type(self)(**{**dict(self), "budget": budget})

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "LATENT_TOOL_TOKEN"}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The settings as plain JSON, from which the constructor makes them again."""
        values: dict[str, Any] = {"image_policy": self.image_policy.model_dump(mode="json", exclude_defaults=True)}
        if self.budget is not None:
            values["budget"] = self.budget.model_dump(mode="json", exclude_defaults=True)
        return values

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return [
            ConfigurableFieldSpec(
                id=OPTIONS_KEY,
                annotation=CallOptions | None,
                name="Options of a call",
                description="Budget, seed, threshold and stop event of one call of a reasoner.",
                is_shared=True,
            )
        ]

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """Ask one question; the steps go out as events if anybody listens."""
        call = _Call(self)

        def answer(value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> ReasoningResult:
            call.open(input, config, listening=_listening(run_manager))
            *_, result = self._items(call, config)
            return cast(ReasoningResult, result)

        return self._call_with_config(answer, shown_input(input), config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ReasoningResult:
        """``invoke`` without a thread; cancelling the task stops the search on the other side."""
        call = _Call(self)

        async def answer(
            value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> ReasoningResult:
            await run_in_executor(config, call.open, input, config, listening=_listening(run_manager))
            items = [item async for item in self._aitems(call, config)]
            return cast(ReasoningResult, items[-1])

        return await self._acall_with_config(answer, shown_input(input), config, **kwargs)

    def stream(  # type: ignore[override]  # steps come before the result, which is what the type parameter names
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Item]:
        """Yield every step of the search, then the result. Closing the iterator stops the search."""
        call = _Call(self)

        def steps(
            values: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
        ) -> Iterator[Any]:
            call.open(input, config, listening=True)
            yield from self._items(call, config)

        yield from self._transform_stream_with_config(iter([shown_input(input)]), steps, config, **kwargs)

    async def astream(  # type: ignore[override]
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Item]:
        """``stream`` without a thread."""
        call = _Call(self)

        async def steps(
            values: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> AsyncIterator[Any]:
            await run_in_executor(config, call.open, input, config, listening=True)
            items = self._aitems(call, config)
            try:
                async for item in items:
                    yield item
            finally:
                await items.aclose()

        async def only() -> AsyncIterator[Any]:
            yield shown_input(input)

        async for step in self._atransform_stream_with_config(only(), steps, config, **kwargs):
            yield step

    # ------------------------------------------------------------------ the work

    def _items(self, call: _Call, config: RunnableConfig) -> Iterator[Item]:
        """Steps, if they are listened to, and the result; what got lost is asked again."""
        seen = 0
        while True:
            try:
                for number, item in enumerate(self._exchange(call)):
                    if isinstance(item, ReasoningResult):
                        yield call.finish(item)
                        return
                    if number >= seen:  # the search is deterministic: a second one repeats the first
                        seen += 1
                        announce(item, config)
                        yield item
            except (ServiceUnavailableError, OverloadedError) as error:
                call.wait(call.pause_after(error))

    async def _aitems(self, call: _Call, config: RunnableConfig) -> AsyncGenerator[Item, None]:
        seen = 0
        while True:
            number = 0
            exchange = self._aexchange(call)
            try:
                async for item in exchange:
                    if isinstance(item, ReasoningResult):
                        yield call.finish(item)
                        return
                    number += 1
                    if number > seen:
                        seen = number
                        await announce_async(item, config)
                        yield item
            except (ServiceUnavailableError, OverloadedError) as error:
                pause = call.pause_after(error)
            finally:
                await exchange.aclose()
            await asyncio.sleep(pause)
            call.check()

    def _exchange(self, call: _Call) -> Iterator[Item]:
        """One request and its reply."""
        import httpx

        try:
            with (
                httpx.Client(verify=_ssl_context(), timeout=call.timeouts()) as client,
                client.stream("POST", **call.request()) as reply,
            ):
                if reply.status_code != 200 or not call.listening:
                    yield call.read(reply, reply.read())
                    return
                for line in reply.iter_lines():
                    call.check()
                    yield call.read_line(line)
                    call.check()
        except httpx.HTTPError as error:
            raise call.lost(error) from None
        raise ServiceUnavailableError("The service broke its answer off.", "Ask again.")

    async def _aexchange(self, call: _Call) -> AsyncGenerator[Item, None]:
        import httpx

        try:
            async with (
                httpx.AsyncClient(verify=_ssl_context(), timeout=call.timeouts()) as client,
                client.stream("POST", **call.request()) as reply,
            ):
                if reply.status_code != 200 or not call.listening:
                    yield call.read(reply, await reply.aread())
                    return
                async for line in reply.aiter_lines():
                    call.check()
                    yield call.read_line(line)
                    call.check()
        except httpx.HTTPError as error:
            raise call.lost(error) from None
        raise ServiceUnavailableError("The service broke its answer off.", "Ask again.")


class _Call:
    """One call: what is sent, what is left of its time, and what a reply means. It sends nothing itself."""

    def __init__(self, reasoner: RemoteReasoner) -> None:
        self.reasoner = reasoner
        self.began = time.monotonic()
        self.attempts = 0
        self.retry_after_s = 0.0
        self.listening = False
        self.cancelled: threading.Event | None = None
        self.budget: Budget | None = None  # None, or a level's name among the fields: the service's own limits
        self.fields: dict[str, Any] = {}
        self.warnings: list[str] = []

    def open(self, value: Any, config: RunnableConfig, *, listening: bool) -> None:
        """Read the request, its images and the options of the call."""
        reasoner, request, options = self.reasoner, as_request(value), CallOptions.of(config)
        self.cancelled = options.cancelled
        self.listening = listening or self.cancelled is not None  # between two lines a call can be stopped
        level: str | None = None
        self.budget = reasoner.budget
        for wanted in (options.budget, request.budget):
            if self.budget is None and isinstance(wanted, str):
                level = wanted  # beside which the limits of the service's reasoner hold
            elif wanted is not None:
                self.budget = Budget.coerce(wanted) if self.budget is None else self.budget.replaced_by(wanted)
        self.check()
        images = []
        for reference in request.image_references:
            image, warnings = portable_picture(reference, reasoner.image_policy, deadline=self._deadline())
            images.append(image)
            self.warnings += warnings
        given = {
            "question": request.question,
            "system": request.system,
            "budget": level,  # a whole budget is sent with what is left of its deadline
            "seed": _first_given(request.seed, options.seed, reasoner.seed),
            "min_confidence": _first_given(request.min_confidence, options.min_confidence, reasoner.min_confidence),
        }
        self.fields = {"images": images, **{name: value for name, value in given.items() if value is not None}}

    def _deadline(self) -> float | None:
        return None if self.budget is None or self.budget.deadline_s is None else self.began + self.budget.deadline_s

    def _end(self) -> float:
        """When this side gives up: the time limit, or the deadline and a little more."""
        deadline, end = self._deadline(), self.began + self.reasoner.timeout_s
        return end if deadline is None else min(end, deadline + _GRACE)

    def check(self) -> None:
        """Raise when the call was stopped, or its time is over."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        if time.monotonic() >= self._end():
            raise self._too_late()

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"The service did not answer within {self._end() - self.began:g} s.",
            "Allow more time (deadline_s of the budget, timeout_s of the RemoteReasoner).",
        )

    # ------------------------------------------------------------------ what is sent

    def timeouts(self) -> httpx.Timeout:
        import httpx

        self.check()
        left = max(0.001, self._end() - time.monotonic())
        return httpx.Timeout(left, connect=min(left, self.reasoner.connect_s))

    def request(self) -> dict[str, Any]:
        """The arguments of the request, with what is left of the deadline."""
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
        return {"url": self.reasoner.url + path, "content": json.dumps(fields).encode(), "headers": headers}

    # ------------------------------------------------------------------ what comes back

    def read(self, reply: httpx.Response, body: bytes) -> ReasoningResult:
        """The result of a reply, or its error raised."""
        if reply.status_code == 200:
            return _parse(ReasoningResult, _from_json(body))
        wanted = reply.headers.get("retry-after", "")
        self.retry_after_s = float(wanted) if wanted.isdigit() else 0.0
        raise _error(reply.status_code, _from_json(body) if "json" in reply.headers.get("content-type", "") else {})

    def read_line(self, line: str) -> Item:
        """What one line of a stream holds, or its error raised."""
        found = _from_json(line)
        if found.get("error") is not None:
            raise _error(500, found["error"])
        if found.get("result") is not None:
            return _parse(ReasoningResult, found["result"])
        return _parse(ReasoningStep, found.get("step"))

    def finish(self, result: ReasoningResult) -> ReasoningResult:
        """The result with the deadline that was asked for, and what was changed of the images here."""
        changes: dict[str, Any] = {}
        if result.budget is not None and self._deadline() is not None:
            assert self.budget is not None
            changes["budget"] = result.budget.but(deadline_s=self.budget.deadline_s)
        if self.warnings:
            changes["warnings"] = [*self.warnings, *result.warnings]
        return result.model_copy(update=changes) if changes else result

    def lost(self, error: httpx.HTTPError) -> LatentToolError:
        """What to raise for a request that got no reply."""
        import httpx

        if isinstance(error, httpx.TimeoutException) and time.monotonic() >= self._end() - 0.01:
            return self._too_late()
        return ServiceUnavailableError(
            f"The service cannot be reached or broke off ({type(error).__name__}).",
            "See whether it runs and whether its URL is right.",
        )

    def pause_after(self, error: LatentToolError) -> float:
        """Seconds to wait before asking again. Raises the error when there are no tries or no time left."""
        pause = max(_FIRST_WAIT * 2.0**self.attempts, self.retry_after_s) * random.uniform(1.0, 1.5)
        self.attempts += 1
        if self.attempts > self.reasoner.retries or time.monotonic() + pause >= self._end():
            raise error
        return pause

    def wait(self, seconds: float) -> None:
        if self.cancelled is None:
            time.sleep(seconds)
        else:
            self.cancelled.wait(seconds)
        self.check()


def _listening(run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun) -> bool:
    """Whether anybody wants the steps: a callback, or the graph this runs in."""
    return bool(run_manager.handlers) or graph_writer() is not None


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _from_json(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _no_result()
    return found


def _parse(model: type[M], value: Any) -> M:
    try:
        return model.model_validate(value)
    except ValidationError:
        raise _no_result() from None


def _no_result() -> ServiceError:
    return ServiceError(
        "The service answered with something that is no result.",
        "See whether the URL is that of latent-tool serve, and whether both sides have the same version.",
    )


def _error(status: int, problem: dict[str, Any]) -> LatentToolError:
    """The error that a reply stands for: of the class that was raised there, if this side knows it."""
    message, hint = (str(problem.get(name) or "") for name in ("message", "hint"))
    kind = getattr(errors, str(problem.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, CancelledError):  # not by us
        return ServiceUnavailableError("The service stopped the search.", "Ask again.")
    if isinstance(kind, type) and issubclass(kind, LatentToolError) and kind is not MissingExtraError:
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


@cache
def _ssl_context() -> ssl.SSLContext:
    """Made once: reading the certificates takes longer than asking."""
    import httpx

    return httpx.create_ssl_context()
