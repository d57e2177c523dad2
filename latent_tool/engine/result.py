"""From the outcome to what crosses the API: plain JSON types, without tensors."""

from __future__ import annotations

import math

from latent_tool.cannot_tell import CANNOT_TELL_REASON, says_cannot_tell
from latent_tool.engine.job import Outcome, joint, pooled
from latent_tool.engine.rounds import trace_row
from latent_tool.errors import SettingsError
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.schema import CellAttention, GeneratedToken, Patch, ReasoningResult, Scores
from latent_tool.settings import SearchSettings

__all__ = ["as_result"]


def as_result(vlm: VisionLanguageModel, outcome: Outcome) -> ReasoningResult:
    """Return the outcome as plain JSON types."""
    job, searched = outcome.job, outcome.search
    probability = joint(outcome.decoded.log_probabilities, outcome.answer)
    plain = outcome.plain_probability
    answer_log_p = outcome.decoded.log_probabilities[outcome.answer.start : outcome.answer.stop]
    scores = Scores(
        reward=searched.best.reward if searched else None,
        initial_reward=searched.initial_reward if searched else None,
        top_k_mass=searched.best.top_k_mass if searched else None,
        answer_probability=probability,
        plain_probability=plain,
        pooled_probability=None if probability is None or plain is None else pooled(probability, plain),
        mean_token_probability=float(answer_log_p.mean().exp()) if len(answer_log_p) else None,
        first_token_entropy=float(outcome.decoded.entropies[outcome.answer.start])
        if outcome.answer.start < len(outcome.decoded.entropies)
        else None,
    )
    if job.confidence == "reward":
        if searched is None:
            raise SettingsError("Without latents there is no reward.", "Gate on the answer probability instead.")
        confidence: float | None = _reward_confidence(searched.best.reward, job.settings, vlm)
    else:
        confidence = getattr(scores, job.confidence)
    accepted = None
    if job.min_confidence is not None:
        accepted = confidence is not None and confidence >= job.min_confidence
    result = ReasoningResult(
        answer=outcome.answer.text,
        raw_text=outcome.answer.raw_text,
        confidence=confidence,
        confidence_source=job.confidence if confidence is not None else "unscored",
        scores=scores,
        tokens=_tokens(vlm, outcome),
        patches=_patches(outcome),
        image_sizes=[(image.width, image.height) for image in job.images],
        trace=[trace_row(row) for row in searched.rounds] if searched else [],
        attention=_cell_attention(outcome),
        grounding=outcome.grounding,
        controls=outcome.controls,
        usage=outcome.usage,
        stop_reason=outcome.stop_reason,
        finish_reason=outcome.decoded.finish_reason,
        model=vlm.name,
        settings=job.settings,
        budget=job.budget,
        seed=job.seed,
        warnings=list(outcome.warnings),
    ).decided(accepted, job.min_confidence)
    return result.abstaining(CANNOT_TELL_REASON) if says_cannot_tell(result.answer, job.cannot_tell) else result


def _tokens(vlm: VisionLanguageModel, outcome: Outcome) -> list[GeneratedToken]:
    """The generated tokens; a token's text is what it adds to the text of the few before it."""
    tokens = outcome.decoded.tokens
    found = []
    for index, log_p in enumerate(outcome.decoded.log_probabilities.tolist()):
        begin = max(0, index - 8)
        before, text = (
            vlm.tokenizer.decode(tokens[begin:end], clean_up_tokenization_spaces=False) for end in (index, index + 1)
        )
        found.append(
            GeneratedToken(
                token=text[len(before) :],
                probability=min(1.0, math.exp(log_p)),
                in_answer=outcome.answer.start <= index < outcome.answer.stop,
            )
        )
    return found


def _reward_confidence(reward: float, settings: SearchSettings, vlm: VisionLanguageModel) -> float:
    """The reward rescaled from its range to [0, 1]."""
    if settings.reward == "neg_log_probability":
        raise SettingsError(
            "The reward neg_log_probability has no upper bound, so it is no confidence.",
            "Gate on the answer probability, or choose another reward.",
        )
    low = 0.0 if settings.reward == "entropy" else 1 - math.log(settings.top_k)
    return min(1.0, max(0.0, (reward - low) / (1 - low)))


def _cell_attention(outcome: Outcome) -> list[CellAttention] | None:
    if outcome.attention is None:
        return None
    return [
        CellAttention(image=place.image, cell=cell, box=place.box, weight=weight)
        for cell, (place, weight) in enumerate(zip(outcome.inputs.cells, outcome.attention, strict=True))
    ]


def _patches(outcome: Outcome) -> list[Patch]:
    if outcome.search is None:
        return []
    found = {
        cell: (group, weight)
        for group in outcome.search.injections
        for cell, weight in zip(group.cells, group.attention, strict=True)
    }
    patches = []
    for rank, cell in enumerate(outcome.patches):
        group, weight = found[cell]
        place = outcome.inputs.cells[cell]
        patches.append(
            Patch(
                rank=rank,
                image=place.image,
                cell=cell,
                box=place.box,
                attention=weight,
                gain=group.gain,
                latent=group.latent,
            )
        )
    return patches
