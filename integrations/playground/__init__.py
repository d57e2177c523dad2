"""A page to try a reasoner on: drop a picture, ask, watch the search, move the threshold, copy the Python.

    uvicorn.run(create_playground(LatentReasoner()), host="127.0.0.1", port=8766)

The page is three static files beside this module and the style of the report. It asks through the HTTP service, behind
the same gate, and loads nothing from elsewhere: its content security policy forbids it. Pictures come from the visitor
or are drawn here (``latent_tool.scenes``); they are opened as those of strangers are.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latent_tool.about import model_name, what_it_is
from latent_tool.errors import InputError
from latent_tool.images.load import load_image
from latent_tool.integrations.http_gate import JSON_KEY
from latent_tool.integrations.http_service import ServiceLimits, create_app
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.scenes import SEEDS_PER_SPLIT, generate
from latent_tool.scenes.wording import ENDINGS, OPENINGS
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy
from latent_tool.validation import explain_validation
from latent_tool.views.heat import HEAT_OPACITY, HEAT_STOPS
from latent_tool.views.report import SHARED_STYLE, report_html

# Without Starlette the import of the service above has failed with an error that names the extra.
from fastapi import FastAPI  # isort: skip
from starlette.requests import Request  # isort: skip
from starlette.responses import JSONResponse, Response  # isort: skip
from starlette.routing import Route  # isort: skip

__all__ = ["create_playground"]

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FILES = {
    "/": ("page.html", "text/html", ""),
    "/play/play.js": ("play.js", "text/javascript", ""),
    "/play/play.css": ("play.css", "text/css", SHARED_STYLE),
}
LIMITS = ServiceLimits(
    budget=Budget(iterations=200, max_patches=256, max_views=64, max_new_tokens=2048, deadline_s=3600.0),
    max_images=1,
    max_requests=8,
    max_values=100_000,  # a result that comes back for its report
)


class _Asked(BaseModel):
    """What a report is about: the question as it was asked, and its result."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="The picture as a data URI.")
    name: str = Field("picture.png", max_length=500)
    question: str = Field(max_length=100_000)
    result: ReasoningResult


def create_playground(
    reasoner: LatentReasoner, *, policy: ImagePolicy | None = None, limits: ServiceLimits = LIMITS
) -> FastAPI:
    """Return the HTTP service with the page at ``/``, for this machine alone.

    Args:
        reasoner: who answers.
        policy: which images may be opened; ``None``: ``ImagePolicy.server()``.
        limits: what a visitor may ask for.

    Raises ``SettingsError`` as ``create_app`` does.
    """
    policy = ImagePolicy.server() if policy is None else policy
    setup = _setup(reasoner, policy, limits)

    async def describe(_request: Request) -> Response:
        return JSONResponse(setup, headers=HEADERS)

    async def scene(request: Request) -> Response:
        kind, seed = request.query_params.get("kind"), request.query_params.get("seed", "0")
        if not (seed.isascii() and seed.isdigit() and len(seed) <= 9):
            raise InputError("The seed of a scene is no number.", f"Give a whole number below {SEEDS_PER_SPLIT}.")
        return JSONResponse(await asyncio.to_thread(_scene, kind, int(seed)), headers=HEADERS)

    async def report(request: Request) -> Response:
        try:
            asked = _Asked.model_validate(request.scope.get(JSON_KEY))
        except ValidationError as error:
            raise InputError(
                f"This is no question with its result: {explain_validation(error)}.", "Send what the page sends."
            ) from None

        def write() -> str:
            image = load_image(asked.image, policy).image
            return report_html(asked.result, image, question=asked.question, names=[asked.name])

        return Response(await asyncio.to_thread(write), media_type="text/html", headers=HEADERS)

    return create_app(
        reasoner,
        policy=policy,
        limits=limits,
        extra_routes=[
            *(Route(path, _static(*file)) for path, file in FILES.items()),
            Route("/play/setup", describe),
            Route("/play/scene", scene),
            Route("/play/report", report, methods=["POST"]),
        ],
    )


def _static(name: str, kind: str, before: str) -> Callable[[Request], Awaitable[Response]]:
    content = before.encode() + files(__name__).joinpath(name).read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": PAGE_POLICY}

    async def send(_request: Request) -> Response:
        return Response(content, media_type=kind, headers=headers)

    return send


def _threshold(reasoner: LatentReasoner) -> float:
    """Where the page's threshold begins, in steps of 0.01; of a calibration's own, the next step above it."""
    if reasoner.min_confidence != "calibrated":
        return 0.5 if reasoner.min_confidence is None else reasoner.min_confidence
    assert reasoner.calibration is not None
    return min(1.0, math.floor(100 * reasoner.calibration.require_threshold().probability + 1) / 100)


def _setup(reasoner: LatentReasoner, policy: ImagePolicy, limits: ServiceLimits) -> dict[str, Any]:
    """What the page needs to know of the reasoner: its name, the levels of budgets, ceilings, and its constructor."""
    levels = {name: Budget.level(name).model_dump(mode="json") for name in get_args(BudgetLevel)}
    own = reasoner.budget.model_dump(mode="json")
    known = {"model": "embedded", "device": "auto", "dtype": "auto", "compile": "auto"} | dict.fromkeys(
        ("attention", "grounding", "controls"), False
    )
    given = {name: getattr(reasoner, name) for name, default in known.items() if getattr(reasoner, name) != default}
    return {
        "model": model_name(reasoner.model),
        "about": what_it_is(reasoner.model),
        "arguments": given,
        "level": next((name for name, level in levels.items() if level == own), "standard"),
        "levels": levels,
        "ceilings": limits.budget.model_dump(mode="json"),
        "seed": reasoner.seed,
        "min_confidence": _threshold(reasoner),
        "max_bytes": min(policy.max_bytes, limits.max_body_bytes * 3 // 4 - 10_000),
        "heat": {"stops": HEAT_STOPS, "opacity": HEAT_OPACITY},
        "kinds": {"shapes": "shapes", "bars": "a bar chart", "text": "characters"},
    }


def _scene(kind: str | None, seed: int) -> dict[str, Any]:
    """A drawn picture with questions whose answers are known. Raises ``SettingsError`` for an unknown kind."""
    drawn = generate(seed, kind=kind)  # type: ignore[arg-type]
    stream = io.BytesIO()
    drawn.image.save(stream, "PNG")
    return {
        "image": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"),
        "kind": drawn.kind,
        "seed": seed,
        "questions": [
            {"text": text, "answer": each.answer}
            for each in drawn.questions
            if (text := _well_put(each.text)) is not None
        ][:5],
    }


# The scenes' questions are as varied as people's; a page that proposes them shows those that are good English.
_AWKWARD = re.compile(
    r"share (?:a )?(?:shape|colou?r)|number (?:more|less|bigger|smaller) than|Is [a-z0-9]+ the |under it\?", re.I
)
_HALF_ARTICLE = re.compile(r"[,:] (?!the )[\w ]+ or the |[,:] the \w+ or (?!the )|[,:] (?!the )\w+ or \w+ \w+ \w+\?")
_ORDERS = ("Compare", "Count", "Describe", "Find", "Give", "Name", "Read", "Tell")


def _well_put(text: str) -> str | None:
    """The question without what people say around it, with its sign at the end; ``None`` if it is no good English."""
    for opening in OPENINGS:
        if text.lower().startswith(opening):
            text = text[len(opening) :]
    for ending in ENDINGS:
        text = text.removesuffix(ending)
    text = re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda found: found[0].upper(), text)
    if text[-1] not in ".?!":
        text += "." if text.startswith(_ORDERS) else "?"
    return None if _AWKWARD.search(text) or _HALF_ARTICLE.search(text) else text
