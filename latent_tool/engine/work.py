"""The way of one question, from its images to its outcome; ``ladder``, ``question`` and ``examine`` have the steps."""

from __future__ import annotations

from dataclasses import replace

from latent_tool.engine.examine import attention_of, examine
from latent_tool.engine.in_step import Tell
from latent_tool.engine.job import Outcome, Sampled
from latent_tool.engine.ladder import climb
from latent_tool.engine.question import Question
from latent_tool.models.looks import picture_numbers
from latent_tool.models.requests import Prefill, Sample
from latent_tool.schema import ReasoningStep, Usage
from latent_tool.settings import SamplingSettings

__all__ = ["answer", "sample"]


async def answer(question: Question) -> Outcome:
    """Answer one question: everything that it does, without calling the model."""
    job, clock = question.job, question.clock
    clock.require_time("the image was read")
    await Tell(ReasoningStep(phase="prefill", iterations=job.budget.iterations))
    question.check_options()
    inputs = question.inputs()
    budget, warnings = question.fit_context(inputs)
    clock.require_time("the image was read")
    prefix = await Prefill(inputs, lambda: clock.require_time("the image was read"))
    clock.calls += 1
    clock.phase_done("prefill")
    clock.require_time("anything was scored")

    reached = await climb(question, prefix, budget)
    latents, patches, searched, decoded = reached.latents, reached.patches, reached.search, reached.decoded
    encoded = prefix.encoded + reached.looked.encoded
    pictures = picture_numbers(prefix.features, inputs.cells, job.images)  # without windows of them
    prefix, inputs = reached.prefix, reached.prefix.inputs
    warnings += reached.looked.warnings

    attention: tuple[float, ...] | None = None
    if job.attention and latents is None:
        warnings.append("Without latents there is no attention to the image cells that could be measured.")
        if any(view.accepted for view in reached.looked.views):
            warnings.append("A window made the answer surer before there were any; Budget(max_views=0) looks at none.")
        if reached.stop_reason == "confident":
            warnings.append(
                "The model was sure without them; Budget(target_confidence=None, max_views=0) always searches."
            )
    elif job.attention and latents is not None and not clock.expired():
        attention = await attention_of(prefix, latents, patches)
        clock.calls += 1
        clock.phase_done("attention")
    grounding = controls = None
    if job.grounding is not None or job.controls:
        grounding, controls, cut = await examine(question, prefix, budget, latents, patches, decoded, reached.answer)
        warnings += cut
        clock.phase_done("grounding")
    late = [
        name
        for name, missing in (
            ("attention", job.attention and latents is not None and attention is None),
            ("grounding", job.grounding is not None and bool(decoded.tokens) and grounding is None),
            ("controls", job.controls and controls is None),
        )
        if missing
    ]
    if late:
        warnings.append(f"The deadline left no time to measure: {', '.join(late)}.")
    if decoded.finish_reason != "stop":
        warnings.append(
            f"The answer was cut ({decoded.finish_reason}); its probability lacks the token that would end it."
        )
    usage = Usage(
        candidates=searched.candidates if searched else 0,
        discarded=searched.discarded if searched else 0,
        decoder_calls=clock.calls,
        prompt_tokens=inputs.length,
        image_cells=len(inputs.cells),
        latent_tokens=0 if latents is None else len(latents),
        patch_tokens=len(patches),
        generated_tokens=len(decoded.tokens),
        views=len(reached.looked.views),
        vision_passes=encoded,
        seconds=clock.seconds,
    )
    return Outcome(
        latents=latents,
        patches=patches,
        search=searched,
        decoded=decoded,
        answer=reached.answer,
        plain_probability=reached.plain_probability,
        stop_reason=reached.stop_reason,
        chosen=reached.chosen,
        job=replace(job, budget=budget),
        inputs=inputs,
        attention=attention,
        grounding=grounding,
        controls=controls,
        usage=usage,
        views=reached.looked.views,
        warnings=(*job.warnings, *inputs.warnings, *warnings),
        pictures=pictures,
        support=1.0 if reached.chosen else reached.looked.support,
    )


async def sample(question: Question, sampling: SamplingSettings) -> Sampled:
    """Draw several answers to one question."""
    job, clock = question.job, question.clock
    clock.require_time("the image was read")
    inputs = question.inputs()
    budget, _ = question.fit_context(inputs)
    prefix = await Prefill(inputs, lambda: clock.require_time("the image was read"))
    clock.phase_done("prefill")
    clock.require_time("anything was decoded")
    drawn = await Sample(prefix, budget.max_new_tokens, sampling, job.seed, clock.expired, job.generation)
    clock.phase_done("decode")
    usage = Usage(
        candidates=0,
        decoder_calls=1 + max((len(each.tokens) for each in drawn), default=0),
        prompt_tokens=inputs.length,
        image_cells=len(inputs.cells),
        latent_tokens=0,
        patch_tokens=0,
        generated_tokens=sum(len(each.tokens) for each in drawn),
        seconds=clock.seconds,
    )
    return Sampled(job, tuple(drawn), tuple(question.extract(prefix, each) for each in drawn), usage)
