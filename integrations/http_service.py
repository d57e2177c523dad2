"""A reasoner as an HTTP service: ask, follow the search step by step, and get typed errors as problem JSON.

    uvicorn.run(create_app(LatentReasoner()), host="127.0.0.1", port=8000)

``POST /v1/ask`` answers with a ``ReasoningResult``; ``POST /v1/ask/stream`` sends newline-delimited JSON: ``{"step":
...}`` for every step of the search, then ``{"result": ...}`` or ``{"error": ...}``; ``POST /v1/ask/form`` takes a form
with image files; ``GET /health`` says whether there is room, ``GET /metrics`` counts for Prometheus, ``/`` is a page
about what is served. An error is ``application/problem+json`` with ``type`` (a class of ``latent_tool.errors``),
``message``, ``hint``, ``status`` and ``retryable``.

What strangers can reach is bounded before anything is read or opened: see ``ServiceLimits``. A client that goes away
stops its search. The same app runs under uvicorn (``latent-tool serve``) and in the replicas of Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

from langchain_core.runnables import Runnable
from pydantic import BaseModel, Field, SecretStr

from latent_tool.about import model_name, what_it_is
from latent_tool.errors import InputError, LatentToolError, MissingExtraError, SettingsError
from latent_tool.integrations.http_gate import (
    JSON_KEY,
    LOOPBACK,
    PROBLEM_JSON,
    STOPPING,
    ClientGoneError,
    Gate,
    GateLimits,
    GateMiddleware,
    Problem,
    problem_of,
    response_of,
)
from latent_tool.integrations.http_watch import Watcher, WatchMiddleware, engine_facts, front_page
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.runnable import Handover, hand_over
from latent_tool.schema import ReasoningRequest, ReasoningResult, ReasoningStep
from latent_tool.settings import Budget, ImagePolicy

try:
    from fastapi import FastAPI, Form, Request, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.openapi.utils import get_openapi
    from fastapi.responses import Response, StreamingResponse
    from fastapi.routing import APIRoute
    from starlette.exceptions import HTTPException
    from starlette.routing import BaseRoute
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("The HTTP service", "serve") from error

__all__ = ["LOOPBACK", "Asker", "Problem", "ServiceLimits", "create_app"]

LINES = "application/x-ndjson"
ERRORS_TOLD = 5  # of all that is wrong with a request

T = TypeVar("T")
Asker = Callable[[Runnable[Any, ReasoningResult], ReasoningRequest], Awaitable[ReasoningResult]]


class ServiceLimits(GateLimits):
    """What one client, and all of them together, may ask of the service."""

    budget: Budget = Field(
        Budget(iterations=100, max_patches=64, max_views=32, max_new_tokens=1024, deadline_s=60.0),
        description="Ceilings: a request that asks for more is refused; a limit it leaves open is this one.",
    )
    max_images: int = Field(8, ge=1, description="Images of a request at most.")


class Health(BaseModel):
    """Whether the service works, and how much it has in hand."""

    status: Literal["ok"] = "ok"
    version: str
    active: int = Field(description="Requests in hand.")
    capacity: int = Field(description="Requests in hand at most.")
    model: str | None = Field(None, description="Name of the model that answers, where there is one.")
    device: str | None = Field(None, description="Where it runs; until it is loaded, where it was told to.")
    loaded: bool | None = Field(None, description="Whether the model is loaded; it is when a question is asked first.")
    queue: int | None = Field(None, description="Questions that wait for their turn in the engine.")
    about: str | None = Field(None, description="What should be known of the model before it is relied on.")


class StreamLine(BaseModel):
    """One line of a stream: steps, and at last a result or an error."""

    step: ReasoningStep | None = None
    result: ReasoningResult | None = None
    error: Problem | None = None


def create_app(
    reasoner: Runnable[Any, ReasoningResult],
    *,
    policy: ImagePolicy | None = None,
    token: str | SecretStr | None = None,
    limits: ServiceLimits | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
    extra_routes: Sequence[BaseRoute] = (),
    ask: Asker | None = None,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        reasoner: who answers: a ``LatentReasoner``, a ``ConfidenceRouter`` or any Runnable that takes a
            ``ReasoningRequest`` and gives a ``ReasoningResult``.
        policy: which images may be opened, in place of the reasoner's own; ``None``: ``ImagePolicy.server()``.
        token: what clients must send as ``Authorization: Bearer ...``; ``None`` lets everyone in.
        limits: what clients may ask for.
        hosts: without a token, the host names by which the service may be called, so that no web page can reach it
            under a name of its own; ``None``: any.
        extra_routes: further routes, behind the same gate.
        ask: how the reasoner is asked one question whose steps nobody follows; ``None``: with ``ainvoke``.

    Raises ``SettingsError`` for an empty token, or a reasoner whose own budget is above the limits.
    """
    policy = ImagePolicy.server() if policy is None else policy
    limits = ServiceLimits() if limits is None else limits
    secret = token.get_secret_value() if isinstance(token, SecretStr) else token
    if secret is not None and not secret.strip():
        raise SettingsError("The token is empty.", "Give a long random text, or none to let everyone in.")
    model = reasoner.model if isinstance(reasoner, LatentReasoner) else None
    device = reasoner.device if isinstance(reasoner, LatentReasoner) else None
    gate = Gate(limits, secret, hosts, open_paths=("/", "/health"))
    watcher = Watcher(gate, model)
    desk = _Desk(reasoner, policy, limits, ask, gate, watcher)
    app = FastAPI(
        title="latent_tool",
        description="Answers questions about images, with a confidence to gate on.",
        version=version("latent-tool"),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.gate = gate
    app.router.route_class = _Route
    app.add_middleware(GateMiddleware, gate=gate)
    app.add_middleware(WatchMiddleware, watcher=watcher)

    def state() -> Health:
        engine: dict[str, Any] = (
            {}
            if model is None
            else {"model": model_name(model), "about": what_it_is(model), **engine_facts(model, device)}
        )
        return Health(version=app.version, active=gate.active, capacity=gate.places, **engine)

    @app.get("/health", summary="Whether the service works", responses=_problems(400, 403))
    async def health() -> Health:
        return state()

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return watcher.metrics()

    if not any(getattr(route, "path", None) == "/" for route in extra_routes):

        @app.get("/", include_in_schema=False)
        async def front() -> Response:
            return front_page("latent-tool", state().model_dump(), _PATHS, _CURL)

    @app.post("/v1/ask", summary="Ask one question", responses=_problems(*_ASKING), openapi_extra=_EXAMPLE)
    async def ask_json(question: ReasoningRequest, http: Request) -> ReasoningResult:
        return await desk.answer(question, http)

    @app.post("/v1/ask/form", summary="Ask one question, with image files", responses=_problems(*_ASKING))
    async def ask_form(
        http: Request,
        image: Annotated[list[UploadFile], Form(description="The images, in the order the question means.")],
        question: Annotated[str, Form(description="What to answer about them.")],
        options: Annotated[list[str] | None, Form(description="Answers to choose from, 2 or more.")] = None,
        unsure: Annotated[bool, Form(description="Add 'cannot tell' to the options.")] = False,
        system: Annotated[str | None, Form(description="System text put before the question.")] = None,
        budget: Annotated[Literal["quick", "standard", "thorough"] | None, Form(description="How much work.")] = None,
        seed: Annotated[int | None, Form(ge=0, lt=2**63, description="Seed of the search.")] = None,
        min_confidence: Annotated[float | None, Form(ge=0, le=1, description="Abstain below this.")] = None,
    ) -> ReasoningResult:
        asked = {"question": question, "options": options or None, "unsure": unsure}
        fields = {**asked, "system": system, "budget": budget, "seed": seed, "min_confidence": min_confidence}
        images = [await each.read() for each in image]
        return await desk.answer(ReasoningRequest.parse({"images": images, **fields}), http)

    @app.post(
        "/v1/ask/stream",
        summary="Ask one question and follow the search",
        response_class=Response,
        openapi_extra=_EXAMPLE,
        responses={
            200: {
                "description": "One JSON object a line: steps, then the result or an error.",
                "content": {LINES: {"schema": {"$ref": "#/components/schemas/StreamLine"}}},
            },
            **_problems(*_ASKING),
        },
    )
    async def ask_stream(question: ReasoningRequest, http: Request) -> Response:
        return await desk.stream(question, http)

    app.add_exception_handler(LatentToolError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGoneError, _on_gone)
    app.add_exception_handler(Exception, _on_bug)
    app.router.routes.extend(extra_routes)
    watcher.paths = {path for route in app.router.routes if (path := getattr(route, "path", None))}
    app.openapi = lambda: _openapi(app, secret is not None)  # type: ignore[method-assign]
    return app


_PATHS = (
    ("POST /v1/ask", "Ask one question: JSON in, a result out."),
    ("POST /v1/ask/form", "Ask one question, with image files."),
    ("POST /v1/ask/stream", "Ask one question and follow the search: a line of JSON for every step."),
    ("GET /health", "Whether the service works, and how much it has in hand."),
    ("GET /metrics", "Counts for Prometheus."),
    ("GET /openapi.json", "All of this, for generators of clients."),
)
_CURL = 'curl -F image=@chart.png -F question="Which bar is tallest?" http://127.0.0.1:8000/v1/ask/form'


class _Request(Request):
    """A request whose JSON the gate has read already."""

    async def json(self) -> Any:
        if JSON_KEY not in self.scope:
            raise json.JSONDecodeError("not JSON", "", 0)
        return self.scope[JSON_KEY]


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_json(http: Request) -> Response:
            return await handle(_Request(http.scope, http.receive))

        return with_json


# ---------------------------------------------------------------------- answering


class _Desk:
    """Takes a request that has arrived to the reasoner, within the limits."""

    def __init__(
        self,
        reasoner: Runnable[Any, ReasoningResult],
        policy: ImagePolicy,
        limits: ServiceLimits,
        ask: Asker | None,
        gate: Gate,
        watcher: Watcher,
    ) -> None:
        self.limits = limits
        self.watcher = watcher
        self.closing = gate.closing
        self.ask = ask or (lambda reasoner, request: reasoner.ainvoke(request))
        self.policy = policy
        self.budget: Budget | None = None
        if isinstance(reasoner, LatentReasoner):
            reasoner = reasoner.model_copy(update={"image_policy": policy})
            self.budget = _within(reasoner.budget, limits.budget)
        self.reasoner = reasoner

    async def answer(self, request: ReasoningRequest, http: Request) -> ReasoningResult:
        question = await self._prepare(request, http)
        result = await _while_connected(http, self.ask(self.reasoner, question.request))
        return self._finished(question, result)

    async def stream(self, request: ReasoningRequest, http: Request) -> Response:
        """Return a stream of lines. What fails before the first step is an error with its own status."""
        question = await self._prepare(request, http)
        items: asyncio.Queue[ReasoningStep | ReasoningResult | Exception] = asyncio.Queue(16)

        async def produce() -> None:
            try:
                async for item in self.reasoner.astream(question.request):
                    await items.put(self._finished(question, item) if isinstance(item, ReasoningResult) else item)
            except Exception as error:
                await items.put(error)

        producer = asyncio.create_task(produce())
        try:
            first = await _while_connected(http, items.get())
            if isinstance(first, Exception):
                raise first
        except BaseException:
            producer.cancel()
            raise
        return _LinesResponse(_lines(first, items, self.closing), producer)

    def _finished(self, question: Handover, result: ReasoningResult) -> ReasoningResult:
        self.watcher.answered(result)
        return question.with_warnings(result)

    async def _prepare(self, request: ReasoningRequest, http: Request) -> Handover:
        """The request within the limits, its images under the policy of the service."""
        images = request.image_references
        if len(images) > self.limits.max_images:
            raise InputError(
                f"The request has {len(images)} images; this service takes {self.limits.max_images}.",
                "Send fewer images.",
            )
        budget = self.budget
        if request.budget is not None:
            wanted = Budget.coerce(request.budget) if budget is None else budget.replaced_by(request.budget)
            budget = _within(wanted, self.limits.budget)
        request = request.model_copy(update={"budget": budget})
        if isinstance(self.reasoner, LatentReasoner):  # its own policy is that of the service
            return Handover(request, ())
        return await _while_connected(http, asyncio.to_thread(hand_over, self.reasoner, request, self.policy))


def _within(budget: Budget, ceiling: Budget) -> Budget:
    """The budget with its open limits filled in. Raises ``SettingsError`` for a limit above the ceiling."""
    changes = {}
    for name in ("iterations", "max_candidates", "max_patches", "max_views", "max_new_tokens", "deadline_s"):
        wanted, limit = getattr(budget, name), getattr(ceiling, name)
        if limit is None:
            continue
        if wanted is None:
            changes[name] = limit
        elif wanted > limit:
            raise SettingsError(
                f"The budget's {name} is {wanted:g}; this service allows {limit:g}.",
                f"Ask for {limit:g} or less, or raise the limits of the service.",
            )
    return budget.but(**changes) if changes else budget


async def _while_connected(http: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives; when the client goes away first, the work is cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _lines(
    first: ReasoningStep | ReasoningResult,
    items: asyncio.Queue[ReasoningStep | ReasoningResult | Exception],
    closing: asyncio.Event,
) -> AsyncIterator[str]:
    item: ReasoningStep | ReasoningResult | Exception = first
    stopped = asyncio.create_task(closing.wait())
    try:
        while isinstance(item, ReasoningStep):
            yield _line("step", item)
            following = asyncio.create_task(items.get())
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                item = STOPPING
            else:
                item = following.result()
    finally:
        stopped.cancel()
    if isinstance(item, ReasoningResult):
        yield _line("result", item)
    else:
        yield _line("error", problem_of(item))


def _line(name: str, value: BaseModel) -> str:
    return json.dumps({name: value.model_dump(mode="json")}, ensure_ascii=True, separators=(",", ":")) + "\n"


class _LinesResponse(StreamingResponse):
    """Lines as they are made; whatever ends the response ends their producer."""

    def __init__(self, lines: AsyncIterator[str], producer: asyncio.Task[None]) -> None:
        super().__init__(lines, media_type=LINES, headers={"Cache-Control": "no-store"})
        self._producer = producer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._producer.cancel()


# ---------------------------------------------------------------------- errors as problems

_ASKING = (400, 401, 403, 408, 413, 422, 500, 503, 504)


async def _on_error(http: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return response_of(problem, {"Retry-After": "1"} if problem.retryable and problem.status == 503 else None)


async def _on_invalid(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return response_of(problem_of(InputError("The body is not JSON.", "Send one JSON object."), 400))
    parts = [
        f"{'.'.join(str(part)[:60] for part in each['loc'][1:9]) or 'body'}: "
        f"{each['msg'].removeprefix('Value error, ')[:200]}"
        for each in found[:ERRORS_TOLD]
    ]
    if len(found) > ERRORS_TOLD:
        parts.append(f"and {len(found) - ERRORS_TOLD} more")
    hint = "See /openapi.json for its fields."
    if any(each["loc"] == ("body",) for each in found) and "json" not in http.headers.get("content-type", ""):
        hint = "Send one JSON object, with the header Content-Type: application/json."
    wrong = InputError(f"The request is not valid: {'; '.join(parts)}.", hint)
    return response_of(problem_of(wrong))


async def _on_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wrong = InputError(str(error.detail).rstrip(".") + ".", "See /openapi.json for what there is.")
    return response_of(problem_of(wrong, error.status_code), dict(error.headers or {}))


async def _on_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody


async def _on_bug(http: Request, error: Exception) -> Response:
    return response_of(problem_of(error))


# ---------------------------------------------------------------------- the description

_MEANINGS = {
    400: "Not JSON, or an unknown host name.",
    401: "The token is missing or wrong.",
    403: "The request comes from another web page.",
    408: "The body did not arrive in time.",
    413: "The request or an image is too large.",
    422: "The request is not valid, or an image cannot be used.",
    500: "The service or its model failed.",
    503: "Too many requests; see Retry-After.",
    504: "The deadline passed before anything was scored.",
}

_RED_SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42u3NMQEAAAQAMLTQv5YwSvBtBZbTHZ8q"
    "ngkEAoFAIBAIBIIrC1lZAU48zQieAAAAAElFTkSuQmCC"
)
_EXAMPLE = {
    "requestBody": {
        "content": {
            "application/json": {
                "example": {"image": _RED_SQUARE, "question": "What is this?", "budget": {"iterations": 1}}
            }
        }
    }
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def _openapi(app: FastAPI, protected: bool) -> dict[str, Any]:
    """The OpenAPI document, with the models that FastAPI does not see."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for model in (Problem, StreamLine):
            schema = model.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
            for name, inner in schema.pop("$defs", {}).items():
                schemas.setdefault(name, inner)
            schemas[model.__name__] = schema
        if protected:
            found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"token": []}]
            found["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = found
    return app.openapi_schema
