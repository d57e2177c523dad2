"""What crosses the API: the request (``latent_tool.request``), the result and its parts, as plain JSON types.

This module knows nothing of torch, of models or of LangChain; tensors stay in the engine's outcome.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from latent_tool.cannot_tell import CANNOT_TELL_REASON
from latent_tool.request import ReasoningRequest
from latent_tool.settings import Budget, NoiseSettings, SearchSettings
from latent_tool.words import confidence_text, plain_text

__all__ = [
    "CONFIDENCE_SOURCES",
    "KNOWN_PICTURES",
    "NOT_CHECKED",
    "CellAttention",
    "Choice",
    "ControlAnswer",
    "Controls",
    "Domain",
    "GeneratedToken",
    "Grounding",
    "InjectedCell",
    "Patch",
    "ReasoningRequest",
    "ReasoningResult",
    "ReasoningStep",
    "RouteStep",
    "Scores",
    "TokenDependency",
    "TraceRow",
    "Usage",
    "View",
    "below_reason",
]

# Why an answer is abstained from when its calibration has a domain check, and nobody made it.
NOT_CHECKED = "the domain check of the calibration was not made"
# What a question may be unlike, where a model has a domain check of its own and no calibration is used.
KNOWN_PICTURES = "what this model knows"

Box = tuple[float, float, float, float]
MeasuredConfidence = Literal["pooled_probability", "answer_probability", "reward"]
ConfidenceSource = Literal[
    "calibrated", "pooled_probability", "answer_probability", "option_probability", "reward", "unscored"
]
CONFIDENCE_SOURCES = {
    "calibrated": "probability of being right, fitted on held-out questions",
    "pooled_probability": "joint probability of the answer's tokens, pooled over the model with and without latents",
    "answer_probability": "joint probability of the answer's tokens",
    "option_probability": "probability of the answer among the options that were given",
    "reward": "reward of the search, rescaled to 0 to 1",
    "unscored": "this answer was not scored",
}
_UNSURE = 0.5  # below, the model holds its own answer for more likely wrong than right

StopReason = Literal[
    "confident",
    "looked",
    "undecided",
    "iterations",
    "max_candidates",
    "deadline",
    "target_reward",
    "patience",
    "no_latents",
]
FinishReason = Literal["stop", "length", "deadline"]


class Plain(BaseModel):
    """Base of everything in a result: frozen, no unknown keys, JSON types only."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(Plain):
    """One of the options of a question, and how probable the model holds it."""

    text: str
    log_probability: float = Field(
        le=0,
        description="Joint log-probability, in nats, of the option's tokens and of the token that ends an answer, "
        "summed over the spellings of the option; of the state that was decoded.",
    )
    plain_log_probability: float | None = Field(
        None, le=0, description="The same by the plain model, which has no latents and no injected patches."
    )
    probability: float = Field(
        ge=0, le=1, description="Among the options: theirs sum to 1. Pooled over both, unless the confidence is not."
    )
    unsure: bool = Field(False, description="This is the option that says that the image does not tell.")


class Patch(Plain):
    """One image cell that was injected next to the latents."""

    rank: int = Field(ge=0, description="Place in the order of injection, from 0.")
    image: int = Field(ge=0, description="Which of the request's images, from 0.")
    cell: int = Field(ge=0, description="Index of the image cell among all cells of the prompt, from 0.")
    box: Box | None = Field(description="Left, top, right, bottom in pixels of the upright image; None if not known.")
    attention: float = Field(ge=0, description="Attention of the latent that proposed it, mean over heads and layers.")
    gain: float = Field(description="Rise of the reward when its group was accepted.")
    latent: int = Field(ge=0, description="The latent that proposed it, from 0.")


class View(Plain):
    """One window of a picture that was looked at again, encoded at its own resolution."""

    image: int = Field(ge=0, description="Which of the request's images, from 0.")
    box: Box = Field(description="Left, top, right, bottom of the window in pixels of the upright image.")
    depth: int = Field(ge=1, description="1: a window of the picture; 2: a window inside the surest of those.")
    accepted: bool = Field(description="Whether the answer became surer with it, so that it stayed.")
    answer_before: str = Field(description="The answer without it.")
    answer_after: str = Field(description="The answer with it.")
    reward_before: float = Field(
        description="How sure the answer was without it: the joint probability of its tokens, in [0, 1]; 0 for an "
        "answer that means that it cannot be told."
    )
    reward_after: float = Field(
        description="The same with it; it is accepted if this is higher by 15 percent and by more than min_gain."
    )
    milliseconds: float = Field(ge=0, description="What looking at it took; of windows looked at together, its share.")

    @property
    def where(self) -> str:
        """The window as text: left, top and right, bottom, as in "412,80-520,190"."""
        left, top, right, bottom = (f"{edge:.0f}" for edge in self.box)
        return f"{left},{top}-{right},{bottom}"


class CellAttention(Plain):
    """One image cell and how much the latents of the decoded state attend to it."""

    image: int = Field(ge=0, description="Which of the request's images, from 0.")
    cell: int = Field(ge=0, description="Index of the image cell among all cells of the prompt, from 0.")
    box: Box | None = Field(description="Left, top, right, bottom in pixels of the upright image; None if not known.")
    weight: float = Field(
        ge=0,
        description="Attention to the cell, mean over latents, heads and layers; the copy that was injected of it, if "
        "any, is not counted.",
    )


class TraceRow(Plain):
    """One round of the search; round 0 is the scoring of the initial latents."""

    round: int = Field(ge=0)
    reward: float = Field(description="Reward of the current state at the end of the round.")
    best_reward: float = Field(description="Best reward so far; never falls.")
    mean_sampled_reward: float | None = Field(description="Mean reward of the round's noise samples.")
    top_k_mass: float = Field(description="Probability mass of the top k tokens at the best state, in [0, 1].")
    first_token_probability: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability of the most probable first answer token at the best state, in [0, 1].",
    )
    sigma: float | None = Field(description="Deviation of the noise, in the units of the settings.")
    accepted: list[int] = Field(description="Cells injected in this round.")
    candidates: int = Field(ge=0, description="States scored so far.")
    discarded: int = Field(0, ge=0, description="Candidates so far whose reward was not finite.")
    seconds: float = Field(ge=0, description="Seconds since the search began.")


class Scores(Plain):
    """Everything a confidence could be made from. ``None``: not measured."""

    reward: float | None = Field(None, description="Reward of the state that was decoded.")
    initial_reward: float | None = Field(None, description="Reward of the initial latents without patches.")
    top_k_mass: float | None = Field(None, description="Probability mass of the top k tokens, in [0, 1].")
    answer_probability: float | None = Field(
        None, description="Joint probability of the answer's tokens and of the token that ends it, in [0, 1]."
    )
    plain_probability: float | None = Field(
        None,
        description="The same of the same tokens by the plain model, which has no latents and no injected patches, "
        "but the window that stayed.",
    )
    pooled_probability: float | None = Field(
        None,
        description="Geometric mean of answer_probability and plain_probability (a logarithmic opinion pool). Where a "
        "window was accepted and there were no options, times the share of this answer in all that was said, to the "
        "power of 1 / s for a picture whose sides were made s times smaller: with each window, and, counting 1 / s as "
        "much, by the plain model and by its reasoning over the whole picture, if these are 0.1 sure. What was to be "
        "said and could not counts as an objection. The surest of several answers is surer than it is right.",
    )
    mean_token_probability: float | None = Field(
        None, description="Geometric mean of the same token probabilities, in [0, 1]."
    )
    first_token_entropy: float | None = Field(None, description="Entropy of the first answer token, in nats.")
    option_probability: float | None = Field(
        None,
        description="Probability of the answer among the options that were given, in [0, 1]; None without options.",
    )


class GeneratedToken(Plain):
    """One generated token."""

    token: str = Field(description="Its text; the texts of all tokens together are what was decoded.")
    probability: float = Field(description="By the model's own softmax, in [0, 1].")
    in_answer: bool = Field(description="Part of the extracted answer (or the token that ends it).")


class TokenDependency(Plain):
    """One generated token and how much it depends on the image."""

    token: str
    probability: float = Field(description="With the image, in [0, 1].")
    dependency: float = Field(description="S = log p(token | image) - log p(token | noised image), in nats.")
    in_answer: bool = Field(description="Part of the extracted answer (or the token that ends it).")


class Grounding(Plain):
    """Visual dependency of the generated tokens."""

    tokens: list[TokenDependency]
    mean: float = Field(description="Mean S over all tokens, in nats.")
    share_above: float = Field(description="Share of tokens with S above the threshold, in [0, 1].")
    noise: NoiseSettings


class ControlAnswer(Plain):
    """The answer under a control condition."""

    answer: str
    confidence: float | None = Field(
        description="Joint probability of its tokens under that condition (the answer probability), in [0, 1]."
    )
    agrees: bool = Field(description="Same answer as the real one, ignoring case and white space.")


class Controls(Plain):
    """The same question with one part taken away."""

    latents_off: ControlAnswer = Field(description="The plain model: no latents, no patches.")
    image_noised: ControlAnswer = Field(description="Same latents and cells on the noised image.")


class Usage(Plain):
    """What the answer cost."""

    candidates: int = Field(ge=0, description="States scored.")
    discarded: int = Field(0, ge=0, description="Candidates discarded because their reward was not finite.")
    decoder_calls: int = Field(ge=0, description="Forward passes of the decoder, a batch counting once.")
    prompt_tokens: int = Field(ge=0)
    image_cells: int = Field(ge=0)
    latent_tokens: int = Field(ge=0)
    patch_tokens: int = Field(ge=0)
    generated_tokens: int = Field(ge=0)
    views: int = Field(0, ge=0, description="Windows of the picture that were looked at again.")
    vision_passes: int = Field(
        0, ge=0, description="Pictures and windows that went through the vision tower; those known before do not count."
    )
    seconds: dict[str, float] = Field(
        description="Per phase: images, queue, prefill, look, search, decode, attention, grounding."
    )


class Domain(Plain):
    """Whether a question is like those that a threshold was made for, by the domain check of a calibration."""

    p_value: float = Field(
        ge=0,
        le=1,
        description="Share of questions like the calibration's that look at least as strange as this one.",
    )
    parts: dict[str, float] = Field(
        description="The p-value of every part of the check by itself; p_value is that of all together."
    )
    refused: bool = Field(description="p_value is at most the check's level: the question is unlike those.")

    def unlike(self, known: str = "the calibration's pictures") -> str:
        """Say what a refused question is unlike, and by which p-value."""
        return f"unlike {known} (p = {self.p_value:.{4 if self.p_value < 0.001 else 3}f})"


class RouteStep(Plain):
    """What a router did with one of its rungs."""

    rung: int = Field(ge=0, description="Place among the router's rungs, from 0.")
    name: str = Field(description="Name of the rung's Runnable.")
    decision: Literal["accepted", "unsure", "failed", "skipped"]
    reason: str = Field(description="Why, in words.")
    answer: str | None = Field(None, description="What the rung answered; None if it did not.")
    confidence: float | None = Field(None, ge=0, le=1)
    confidence_source: ConfidenceSource = "unscored"
    threshold: float | None = Field(None, description="The confidence that was asked for; None: any.")
    cost: float = Field(0.0, ge=0, description="Cost of the rung, in the router's units; 0 if it was not asked.")
    seconds: float = Field(0.0, ge=0, description="Seconds the rung took; in a batch, for all its questions together.")


class _Count(int):
    """How many entries a list has, where its entries would fill the screen."""

    def __repr__(self) -> str:
        return f"<{int(self)}>"


class ReasoningResult(Plain):
    """Answer, confidence, and what they rest on."""

    schema_version: Literal["1"] = "1"
    answer: str = Field(description="The extracted answer.")
    raw_text: str = Field(description="Everything that was decoded, special tokens left out.")
    confidence: float | None = Field(ge=0, le=1, description="What to gate on; None if nothing was scored.")
    confidence_source: ConfidenceSource
    accepted: bool | None = Field(None, description="Confidence reached min_confidence; None if no threshold was set.")
    abstained: bool | None = Field(None, description="The opposite of accepted.")
    abstain_reason: str | None = Field(
        None, description="Why the answer was abstained from, in words; None if it was not."
    )
    min_confidence: float | None = None
    domain: Domain | None = Field(
        None,
        description="Whether the question is like those that the threshold was made for; None if that was not checked.",
    )
    scores: Scores = Scores()
    choices: list[Choice] | None = Field(
        None, description="The options in the order they were given; None if the answer was free."
    )
    mass: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability that the model answers with any of the options at all, in [0, 1]: a small mass says "
        "that none of them fits.",
    )
    tokens: list[GeneratedToken] = Field([], description="Every generated token, reasoning and stop token included.")
    patches: list[Patch] = []
    views: list[View] = Field(
        [],
        description="The windows that were looked at again, in that order; what was decoded has the last one "
        "that was accepted beside the whole picture.",
    )
    image_sizes: list[tuple[int, int]] = Field([], description="Width and height of every upright image, in pixels.")
    image_numbers: list[int] = Field(
        [],
        description="Which images of an agent's conversation were asked about, numbered from 1 as it shows them; empty "
        "when the images were given otherwise.",
    )
    trace: list[TraceRow] = []
    attention: list[CellAttention] | None = Field(
        None,
        description="Attention of the decoded state's latents to every image cell, in the order of the prompt; None if "
        "it was not measured. Boxes overlap where a model sees an image in tiles.",
    )
    grounding: Grounding | None = None
    controls: Controls | None = None
    usage: Usage | None = None
    stop_reason: StopReason | None = Field(
        None,
        description="Why no more was done for the answer: it was confident, the model leaned to none, or the limit "
        "that ended the search.",
    )
    finish_reason: FinishReason | None = Field(None, description="Why the decoding ended.")
    model: str = ""
    settings: SearchSettings | None = None
    budget: Budget | None = None
    seed: int | None = None
    route: list[RouteStep] = Field([], description="The rungs a router tried, in order; the last one decided.")
    warnings: list[str] = []

    def abstaining(self, reason: str) -> Self:
        """Return a copy that is abstained from for a reason, whatever its confidence."""
        return self.model_copy(update={"accepted": False, "abstained": True, "abstain_reason": reason})

    @property
    def cut(self) -> bool:
        """Whether the answer's end was not decoded, so that its confidence is that of a beginning alone."""
        return self.choices is None and self.finish_reason in ("deadline", "length")

    @property
    def barred(self) -> str | None:
        """Why no confidence makes the answer acceptable, in words: it says that it cannot be told, it was cut, or the
        question is unlike those that the threshold was made for. ``None``: the confidence decides.
        """
        if self.abstain_reason in (CANNOT_TELL_REASON, NOT_CHECKED):
            return self.abstain_reason
        if self.cut:
            return f"the answer was cut ({self.finish_reason})"
        if self.domain is None or not self.domain.refused:
            return None
        return self.domain.unlike() if self.confidence_source == "calibrated" else self.domain.unlike(KNOWN_PICTURES)

    def decided(self, accepted: bool | None, min_confidence: float | None) -> Self:
        """Return a copy with the verdict of a threshold; the reason says what the confidence was compared with.

        Args:
            accepted: whether the confidence reaches the threshold; ``None``: there is none.
            min_confidence: the threshold, as it is shown.
        """
        reason = None if accepted is not False else below_reason(self.confidence, min_confidence)
        abstained = None if accepted is None else not accepted
        return self.model_copy(
            update={
                "accepted": accepted,
                "abstained": abstained,
                "abstain_reason": reason,
                "min_confidence": min_confidence,
            }
        )

    @property
    def unsure(self) -> bool:
        """Whether the answer should not be relied on: it was not accepted, or is more likely wrong than right.

        Nor should one that says that it cannot be told, or one about a question that the domain check refused.
        """
        if self.barred is not None:
            return True
        likely = self.confidence_source not in ("reward", "unscored")
        if self.accepted is not None or not likely or self.confidence is None:
            return self.accepted is False
        return self.confidence < _UNSURE

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        yield "answer", plain_text(self.answer, limit=60)
        yield "confidence", self.confidence if self.confidence is None else round(self.confidence, 4)
        yield "confidence_source", self.confidence_source
        if self.accepted is not None:
            yield "accepted", self.accepted
        yield "patches", _Count(len(self.patches))
        if self.warnings:
            yield "warnings", _Count(len(self.warnings))
        yield "model", plain_text(self.model, limit=40)

    _seen: Any = PrivateAttr(None)  # its pictures where they are at hand: a Seen of views/notebook.py

    def _repr_html_(self) -> str:
        """Show answer, confidence and options in a notebook, beside the picture if it was asked about here."""
        confidence = "not scored" if self.confidence is None else confidence_text(self.confidence)
        why = f": {html.escape(plain_text(self.abstain_reason))}" if self.abstain_reason else ""
        verdict = {None: "", True: ", accepted", False: f", abstained{why}"}[self.accepted]
        rows = [
            ("answer", f"<b>{html.escape(plain_text(self.answer)) or '(empty)'}</b>"),
            ("confidence", f"{confidence}{verdict} <small>({CONFIDENCE_SOURCES[self.confidence_source]})</small>"),
            ("patches", str(len(self.patches))),
            *(
                ("option", f"{html.escape(plain_text(each.text, limit=60))} {confidence_text(each.probability)}")
                for each in sorted(self.choices or [], key=lambda each: -each.probability)[:10]
            ),
            *(("warning", html.escape(plain_text(warning))) for warning in self.warnings[:10]),
        ]
        cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
        facts = f"<table>{cells}</table>"
        return facts if self._seen is None else self._seen.html(self, facts)


def below_reason(confidence: float | None, min_confidence: float | None) -> str:
    """Say why a confidence does not do."""
    if confidence is None:
        return "the answer has no confidence"
    if min_confidence is None:
        return f"the confidence {confidence_text(confidence)} is too low"
    return f"the confidence {confidence_text(confidence)} is below {min_confidence:g}"


class InjectedCell(Plain):
    """Where an image cell is that was injected in a round."""

    image: int = Field(ge=0, description="Which of the request's images, from 0.")
    cell: int = Field(ge=0, description="Index of the image cell among all cells of the prompt, from 0.")
    box: Box | None = Field(description="Left, top, right, bottom in pixels of the upright image; None if not known.")


class ReasoningStep(Plain):
    """What ``stream`` yields while the search runs; the last item of a stream is the ``ReasoningResult``."""

    phase: Literal["prefill", "look", "search", "decode"]
    trace: TraceRow | None = None
    view: View | None = Field(None, description="The window that was looked at again.")
    injected: list[InjectedCell] = Field([], description="The cells injected in this round, and where they are.")
    iterations: int = Field(0, ge=0, description="Rounds the budget allows.")
