"""What an answer rests on: visual dependency of its tokens, controls, and the attention of its latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_tool.engine.choosing import choose
from latent_tool.engine.job import Examined, Outcome, Sampled, joint
from latent_tool.engine.question import Question
from latent_tool.errors import DeadlineError
from latent_tool.method.grounding import add_noise, visual_dependency
from latent_tool.models.decoding import Decoded, ExtractedAnswer
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.models.requests import Attend, Prefill, TokenEntropies, TokenLogProbabilities
from latent_tool.schema import ControlAnswer, Controls, Grounding, TokenDependency
from latent_tool.settings import Budget, NoiseSettings

__all__ = ["attention_later", "attention_of", "examine", "examine_later", "examine_sampled"]


async def _noised(question: Question, inputs: Inputs, noise: NoiseSettings, draw: int) -> Prefix:
    """Compute the prefix of the noised image; its cells' features are those of the noised image, too."""
    generator = torch.Generator().manual_seed(noise.seed + draw)
    noised = inputs.changed(
        lambda name, value: add_noise(value, noise, generator) if name.startswith("pixel_values") else value
    )
    prefix = await Prefill(noised, lambda: question.clock.require_time("the noised image was read"), cached=False)
    question.clock.calls += 1
    return prefix


async def examine(
    question: Question,
    prefix: Prefix,
    budget: Budget,
    latents: Tensor | None,
    patches: tuple[int, ...],
    decoded: Decoded,
    answer: ExtractedAnswer,
) -> tuple[Grounding | None, Controls | None, list[str]]:
    """Measure visual dependency and controls, ``None`` where the deadline left no time; a warning if it left some."""
    job = question.job
    noise = job.grounding or NoiseSettings()
    grounding = controls = None
    noised: Prefix | None = None
    warnings: list[str] = []
    if job.grounding is not None and decoded.tokens:
        noised, rows = await _forced(question, prefix.inputs, latents, patches, decoded, noise)
        if rows:
            dependency = visual_dependency(decoded.log_probabilities, torch.stack(rows))
            grounding = _grounding(question, decoded, answer, dependency, noise)
        if 0 < len(rows) < noise.draws:
            warnings.append(f"The deadline left time for {len(rows)} of {noise.draws} noised images (grounding).")
    if job.controls:
        controls = await _controls(question, prefix, noised, noise, budget, latents, patches, answer)
    return grounding, controls, warnings


async def _forced(
    question: Question,
    inputs: Inputs,
    latents: Tensor | None,
    patches: tuple[int, ...],
    decoded: Decoded,
    noise: NoiseSettings,
) -> tuple[Prefix | None, list[Tensor]]:
    """Return the decoded tokens' log-probabilities ``(n,)`` for every noised image there was time for, and the last."""
    noised: Prefix | None = None
    rows: list[Tensor] = []
    for draw in range(noise.draws):
        try:
            noised = await _noised(question, inputs, noise, draw)
        except DeadlineError:
            break
        if question.clock.expired():
            break
        rows.append(await TokenLogProbabilities(noised, latents, patches, decoded.tokens))
        question.clock.calls += 1
    return noised, rows


async def _controls(
    question: Question,
    prefix: Prefix,
    noised: Prefix | None,
    noise: NoiseSettings,
    budget: Budget,
    latents: Tensor | None,
    patches: tuple[int, ...],
    answer: ExtractedAnswer,
) -> Controls | None:
    """Answer without latents and without the image, or return ``None`` when time is up: half an answer is none."""
    answers = []
    try:
        question.clock.require_time("the controls were answered")
        if noised is None:
            noised = await _noised(question, prefix.inputs, noise, 0)
        for state in ((prefix, None, ()), (noised, latents, patches)):
            question.clock.require_time("the controls were answered")
            if question.job.options is not None:
                scored = await question.score_options(*state)
                chosen, _, found = choose(question.job.options, scored, scored)
                answers.append(_control(found.text, chosen.probability, answer.text))
                continue
            decoded = await question.decode(*state, budget)
            if decoded.finish_reason == "deadline":
                return None
            found = question.extract(prefix, decoded)
            answers.append(_control(found.text, joint(decoded.log_probabilities, found), answer.text))
    except DeadlineError:
        return None
    return Controls(latents_off=answers[0], image_noised=answers[1])


async def examine_later(question: Question, outcome: Outcome, noise: NoiseSettings) -> Examined:
    """Measure visual dependency and masked entropy of an answer that was found before."""
    began = question.now()
    inputs, state, decoded = outcome.inputs, (outcome.latents, outcome.patches), outcome.decoded
    if not decoded.tokens:
        return Examined(None, None, 0.0)
    _, rows = await _forced(question, inputs, *state, decoded, noise)
    dependency = visual_dependency(decoded.log_probabilities, torch.stack(rows))
    grounding = _grounding(question, decoded, outcome.answer, dependency, noise)
    hidden = inputs.changed(lambda name, value: torch.zeros_like(value) if name.startswith("pixel_values") else value)
    masked = await Prefill(hidden, question.clock.expired, cached=False)
    entropies = await TokenEntropies(masked, *state, decoded.tokens)
    gains = (entropies - decoded.entropies)[outcome.answer.start : outcome.answer.stop]
    gain = float(gains.mean()) if len(gains) else None
    return Examined(grounding, gain, question.now() - began)


async def examine_sampled(
    question: Question, sampled: Sampled, noise: NoiseSettings, think: bool
) -> tuple[Grounding | None, ...]:
    """Measure how much the tokens of drawn answers depend on the image; ``think`` as when they were drawn."""
    inputs = question.inputs()
    opening = inputs.markers.opening if think else ()
    rows: list[list[Tensor]] = [[] for _ in sampled.decoded]
    for draw in range(noise.draws):
        noised = await _noised(question, inputs, noise, draw)
        for row, decoded in zip(rows, sampled.decoded, strict=True):
            forced = await TokenLogProbabilities(noised, None, (), (*opening, *decoded.tokens))
            row.append(forced[len(opening) :])
    dependencies: list[Grounding | None] = []
    for row, decoded, answer in zip(rows, sampled.decoded, sampled.answers, strict=True):
        dependency = visual_dependency(decoded.log_probabilities, torch.stack(row))
        dependencies.append(_grounding(question, decoded, answer, dependency, noise) if decoded.tokens else None)
    return tuple(dependencies)


async def attention_later(outcome: Outcome) -> list[float]:
    """Return the attention of an answer that was found before; empty for the plain model."""
    if outcome.attention is not None or outcome.latents is None:
        return list(outcome.attention or ())
    prefix = await Prefill(outcome.inputs)
    weights = await attention_of(prefix, outcome.latents, outcome.patches)
    return list(weights)


async def attention_of(prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> tuple[float, ...]:
    """Read the attention of the latents ``(L, d)`` to every image cell, mean over latents, heads and layers."""
    attention = await Attend(prefix, latents, patches)
    return tuple(attention.mean(0).tolist())


def _control(found: str, confidence: float | None, answer: str) -> ControlAnswer:
    same = " ".join(found.lower().split()) == " ".join(answer.lower().split())
    return ControlAnswer(answer=found, confidence=confidence, agrees=same)


def _grounding(
    question: Question, decoded: Decoded, answer: ExtractedAnswer, dependency: Tensor, noise: NoiseSettings
) -> Grounding:
    values = dependency.tolist()
    tokens = [
        TokenDependency(
            token=question.vlm.tokenizer.decode([token]),
            probability=math.exp(log_p),
            dependency=value,
            in_answer=answer.start <= index < answer.stop,
        )
        for index, (token, log_p, value) in enumerate(
            zip(decoded.tokens, decoded.log_probabilities.tolist(), values, strict=True)
        )
    ]
    return Grounding(
        tokens=tokens,
        mean=sum(values) / len(values),
        share_above=sum(value > noise.threshold for value in values) / len(values),
        noise=noise,
    )
