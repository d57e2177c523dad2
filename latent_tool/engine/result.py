"""From the outcome to what crosses the API: plain JSON types, without tensors."""

from __future__ import annotations

import math

from latent_tool.about import model_name
from latent_tool.cannot_tell import CANNOT_TELL_REASON, says_cannot_tell
from latent_tool.engine.choosing import Chosen
from latent_tool.engine.job import Job, Outcome, joint, pooled
from latent_tool.engine.rounds import trace_row
from latent_tool.errors import SettingsError
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.schema import CellAttention, Choice, ConfidenceSource, GeneratedToken, Patch, ReasoningResult, Scores

__all__ = ["as_result"]


def as_result(vlm: VisionLanguageModel, outcome: Outcome) -> ReasoningResult:
    """Return the outcome as plain JSON types."""
    job, searched = outcome.job, outcome.search
    chosen = outcome.chosen
    if chosen is None:
        probability = joint(outcome.decoded.log_probabilities, outcome.answer)
    else:  # all spellings of the option
        probability = min(1.0, float(chosen.log_probabilities[chosen.best].double().exp()))
    plain = outcome.plain_probability
    answer_log_p = outcome.decoded.log_probabilities[outcome.answer.start : outcome.answer.stop]
    support = outcome.support
    scores = Scores(
        reward=searched.best.reward if searched else None,
        initial_reward=searched.initial_reward if searched else None,
        top_k_mass=searched.best.top_k_mass if searched else None,
        answer_probability=probability,
        plain_probability=plain,
        pooled_probability=None if probability is None or plain is None else pooled(probability, plain, support),
        mean_token_probability=float(answer_log_p.mean().exp()) if len(answer_log_p) else None,
        first_token_entropy=float(outcome.decoded.entropies[outcome.answer.start])
        if outcome.answer.start < len(outcome.decoded.entropies)
        else None,
        option_probability=None if chosen is None else chosen.probability,
    )
    source: ConfidenceSource = job.confidence
    if job.confidence == "reward":
        if searched is None:
            raise SettingsError("Without latents there is no reward.", "Gate on the answer probability instead.")
        confidence: float | None = _reward_confidence(searched.best.reward, job, vlm)
    elif chosen is not None:
        source, confidence = "option_probability", chosen.probability
    else:
        confidence = getattr(scores, job.confidence)
        if confidence is not None and job.confidence == "answer_probability":
            confidence *= support  # as it is in the pooled probability
    accepted = None
    if job.min_confidence is not None:
        accepted = confidence is not None and confidence >= job.min_confidence
    result = ReasoningResult(
        answer=outcome.answer.text,
        raw_text=outcome.answer.raw_text,
        confidence=confidence,
        confidence_source=source if confidence is not None else "unscored",
        scores=scores,
        choices=None if chosen is None else _choices(chosen),
        mass=None if chosen is None else chosen.mass,
        tokens=_tokens(vlm, outcome),
        patches=_patches(outcome),
        views=list(outcome.views),
        image_sizes=[(image.width, image.height) for image in job.images],
        trace=[trace_row(row) for row in searched.rounds] if searched else [],
        attention=_cell_attention(outcome),
        grounding=outcome.grounding,
        controls=outcome.controls,
        usage=outcome.usage,
        stop_reason=outcome.stop_reason,
        finish_reason=outcome.decoded.finish_reason,
        model=model_name(vlm.name),
        settings=job.settings,
        budget=job.budget,
        seed=job.seed,
        warnings=[*outcome.warnings, *_small_mass(chosen)],
    ).decided(accepted, job.min_confidence)
    untold = chosen is not None and chosen.unsure and chosen.best == len(chosen.options) - 1
    untold = untold or says_cannot_tell(result.answer, job.cannot_tell)
    if untold:
        return result.abstaining(CANNOT_TELL_REASON)
    # The beginning of an answer says nothing of its end: "can" may become "cannot tell", and "4" may become "42".
    return result.abstaining(result.barred or "") if result.cut and result.accepted else result


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


def _small_mass(chosen: Chosen | None) -> list[str]:
    """A warning where the model would rather answer with something else."""
    if chosen is None or chosen.mass >= 0.5:
        return []
    return [f"The model gives all options together a probability of {chosen.mass:.2g}: perhaps none of them fits."]


def _choices(chosen: Chosen) -> list[Choice]:
    """The options in the order they were given."""
    return [
        Choice(
            text=text,
            log_probability=min(0.0, float(chosen.log_probabilities[option])),
            plain_log_probability=min(0.0, float(chosen.plain[option])),
            probability=chosen.probabilities[option],
            unsure=chosen.unsure and option == len(chosen.options) - 1,
        )
        for option, text in enumerate(chosen.options)
    ]


def _reward_confidence(reward: float, job: Job, vlm: VisionLanguageModel) -> float:
    """The reward rescaled from its range to [0, 1]."""
    settings = job.settings
    if settings.reward == "neg_log_probability":
        raise SettingsError(
            "The reward neg_log_probability has no upper bound, so it is no confidence.",
            "Gate on the answer probability, or choose another reward.",
        )
    tokens = settings.top_k
    if settings.reward_position == "options" and job.options is not None:
        tokens = min(tokens, len(job.options))
    low = 0.0 if settings.reward == "entropy" else 1 - math.log(tokens)
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
