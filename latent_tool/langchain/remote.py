"""``RemoteReasoner``: a reasoner that runs as an HTTP service, with the interface of one that runs here.

It sends the request to ``latent-tool serve`` (or Ray Serve) and gives back the same result, steps and errors. Asking
changes nothing on the other side, so that what got lost on the way is asked again.

This module knows HTTP and what LangChain wants of a Runnable. It loads no model; files are read here and sent.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from langchain_core.runnables.config import ContextThreadPoolExecutor, run_in_executor
from pydantic import ConfigDict, Field, SecretStr, ValidationError, field_validator

from latent_tool.errors import OverloadedError, ServiceError, ServiceUnavailableError
from latent_tool.langchain.call import CallOptions, first_given, stricter
from latent_tool.langchain.progress import announce, announce_async, graph_writer
from latent_tool.langchain.remote_call import Call
from latent_tool.langchain.runnable import Item, Question, RequestRunnable
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy, Positive
from latent_tool.validation import settings_error

if TYPE_CHECKING:
    import httpx

__all__ = ["RemoteReasoner"]

# Bytes of a whole answer, or of one line of a stream, at most.
_LONGEST_REPLY = 64_000_000


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
    level: BudgetLevel | None = Field(
        None, description="How hard to search, beside the service's own limits; not looked at where there is a budget."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the search; None: the service's own.")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="Abstain below this confidence; None: the service's own."
    )
    image_policy: ImagePolicy = Field(ImagePolicy.local(), description="Which images may be read here.")
    timeout_s: Positive = Field(120.0, description="Seconds for a call at most, everything included.")
    connect_s: Positive = Field(5.0, description="Seconds to connect at most.")
    retries: int = Field(5, ge=0, le=100, description="How often a request that was lost is sent again.")

    _saved_as: ClassVar[tuple[str, ...]] = ("latent_tool", "remote")

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
        """Return the same reasoner with another budget: a ``Budget``, its fields, or the name of a level."""
        return type(self)(**{**dict(self), "budget": budget})

    # ------------------------------------------------------------------ what LangChain asks of a Runnable

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

    # ------------------------------------------------------------------ the work

    def _with_options(self, options: CallOptions) -> Self:
        budget, level = self.budget, self.level
        if budget is None and isinstance(options.budget, str):
            level = options.budget
        elif options.budget is not None:
            budget = Budget.coerce(options.budget) if budget is None else budget.replaced_by(options.budget)
        changes = {
            "budget": budget,
            "level": level,
            "seed": first_given(options.seed, self.seed),
            "min_confidence": stricter(self.min_confidence, options.min_confidence),
        }
        return type(self)(**{**dict(self), **changes})

    def _begin(self) -> float:
        return time.monotonic()

    def _call(self, question: Question) -> Call:
        return Call(self, question, listening=question.streaming or _listening(question))

    def _items(self, question: Question) -> Iterator[Item]:
        """Steps, if they are listened to, and the result; what got lost is asked again."""
        call = self._call(question)
        seen = 0
        while True:
            try:
                for number, item in enumerate(self._exchange(call)):
                    if isinstance(item, ReasoningResult):
                        yield call.finish(item)
                        return
                    if number >= seen:  # the search is deterministic: a second one repeats the first
                        seen += 1
                        announce(item, question.config)
                        yield item
            except (ServiceUnavailableError, OverloadedError) as error:
                call.wait(call.pause_after(error))

    async def _aitems(self, question: Question) -> AsyncGenerator[Item, None]:
        call = await run_in_executor(question.config, self._call, question)
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
                        await announce_async(item, question.config)
                        yield item
            except (ServiceUnavailableError, OverloadedError) as error:
                pause = call.pause_after(error)
            finally:
                await exchange.aclose()
            await asyncio.sleep(pause)
            call.check()

    def _answer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        """Results and errors in the order of the questions, every one asked in a thread of its own."""

        def one(question: Question) -> Exception | ReasoningResult:
            try:
                *_, result = self._items(question)
                return cast(ReasoningResult, result)
            except Exception as error:
                return error

        with ContextThreadPoolExecutor(questions[0].config.get("max_concurrency")) as pool:
            return list(pool.map(one, questions))

    async def _aanswer_all(self, questions: Sequence[Question]) -> list[Exception | ReasoningResult]:
        gate = asyncio.Semaphore(questions[0].config.get("max_concurrency") or len(questions))

        async def one(question: Question) -> Exception | ReasoningResult:
            async with gate:
                try:
                    return await self._aanswer(question)
                except Exception as error:
                    return error

        return await asyncio.gather(*map(one, questions))

    def _exchange(self, call: Call) -> Iterator[Item]:
        """``_aexchange`` for a caller without an event loop: it runs on one of its own, in a thread."""
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            exchange = self._aexchange(call)

            async def following() -> Item | None:
                return await anext(exchange, None)

            try:
                while (item := portal.call(following)) is not None:
                    yield item
            finally:
                portal.call(exchange.aclose)

    async def _aexchange(self, call: Call) -> AsyncGenerator[Item, None]:
        """Send one request and give what comes back; every wait ends when the time of the call does."""
        import httpx

        async with httpx.AsyncClient(verify=_ssl_context(), timeout=call.timeouts()) as client:
            reply: httpx.Response | None = None
            try:
                request = client.build_request(**call.request())
                reply = await asyncio.wait_for(client.send(request, stream=True), call.left())
                if reply.status_code != 200 or not call.listening:
                    body = await asyncio.wait_for(_whole(reply), call.left())
                    yield call.read(reply, body)
                    return
                lines = _lines(reply)
                while (line := await asyncio.wait_for(anext(lines, None), call.left())) is not None:
                    call.check()
                    yield call.read_line(line)
                    call.check()
            except TimeoutError:
                raise call.too_late() from None
            except httpx.HTTPError as error:
                raise call.lost(error) from None
            finally:
                if reply is not None:
                    await reply.aclose()
        raise ServiceUnavailableError("The service broke its answer off.", "Ask again.")


async def _whole(reply: httpx.Response) -> bytes:
    """The body of a reply. Raises ``ServiceError`` when it is longer than any result."""
    body = bytearray()
    async for piece in reply.aiter_bytes():
        body += piece
        _check_length(body)
    return bytes(body)


async def _lines(reply: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The lines of a reply, without their ends. Raises ``ServiceError`` when one is longer than any result."""
    rest = bytearray()
    async for piece in reply.aiter_bytes():
        rest += piece
        *lines, rest = rest.split(b"\n") if b"\n" in piece else [rest]
        for line in lines:
            yield bytes(line)
        _check_length(rest)
    if rest:
        yield bytes(rest)


def _check_length(data: bytearray) -> None:
    if len(data) > _LONGEST_REPLY:
        raise ServiceError(
            f"The service's answer has more than {_LONGEST_REPLY} bytes.", "See whether the URL is that of a service."
        )


def _listening(question: Question) -> bool:
    """Whether anybody wants the steps: a callback, or the graph this runs in."""
    return bool(question.run_manager.handlers) or graph_writer() is not None


@cache
def _ssl_context() -> ssl.SSLContext:
    """Made once: reading the certificates takes longer than asking."""
    import httpx

    return httpx.create_ssl_context()
