"""What the plug-ins for lmms-eval and VLMEvalKit share: a question in their words, the confidence beside an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_tool.errors import QuestionError, UnsupportedError
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import Budget

__all__ = ["as_question", "make_reasoner", "record"]


def make_reasoner(model: str, budget: str, **fields: Any) -> LatentReasoner:
    """Make the reasoner that answers; raises ``SettingsError`` for what it does not take."""
    given = {name: value for name, value in fields.items() if value is not None}
    return LatentReasoner(model=model, budget=budget, **given)


def as_question(
    parts: Sequence[tuple[str, Any]], system: str | None, max_new_tokens: int | None, budget: Budget | None = None
) -> ReasoningRequest:
    """Make a request of texts and pictures in the order in which they are shown.

    Pictures stand before the text; where they were shown in between, the text says which one stood there.

    Args:
        parts: ``("text", text)`` or ``("image", picture)``, where a picture is whatever ``load_image`` opens.
        system: system text.
        max_new_tokens: tokens of the answer at most; ``None``: as the reasoner's budget says.
        budget: the reasoner's, of which all else is kept.

    Raises ``UnsupportedError`` for parts of another kind and ``QuestionError`` without a picture.
    """
    images: list[Any] = []
    texts: list[str] = []
    kinds = [kind for kind, _ in parts]
    first_text = kinds.index("text") if "text" in kinds else len(kinds)
    between = "image" in kinds[first_text:]
    for kind, value in parts:
        if kind == "text":
            texts.append(str(value))
        elif kind == "image":
            images.append(value)
            if between:
                texts.append(f"(picture {len(images)})")
        else:
            raise UnsupportedError(f"{kind[:40]!r} is not understood here.", "Evaluate tasks of pictures and text.")
    if not images:
        raise QuestionError("The question has no picture.", "Evaluate tasks that have one.")
    asked = None if max_new_tokens is None else (budget or Budget()).but(max_new_tokens=max_new_tokens)
    return ReasoningRequest(images=images, question="\n".join(texts), system=system or None, budget=asked)


def record(result: ReasoningResult) -> Mapping[str, Any]:
    """Return what is kept beside an answer: plain JSON. An answer that no confidence makes acceptable has none."""
    return {
        "confidence": None if result.barred is not None else result.confidence,
        "barred": result.barred,
        "confidence_source": result.confidence_source,
        "accepted": result.accepted,
        "scores": result.scores.model_dump(exclude_none=True),
        "patches": len(result.patches),
        "warnings": list(result.warnings),
    }
