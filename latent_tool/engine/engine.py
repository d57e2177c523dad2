"""One question, one outcome: images, model, search, decoding and grounding in the order the method needs them.

``Engine`` owns a loaded model; ``get_engine`` shares one engine per model in a process. Engines may be used from any
thread. This module knows nothing of LangChain, of files or of URLs: images arrive opened.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from latent_tool.errors import CancelledError, ContextLengthError, DeadlineError, NotEnoughMemoryError, SettingsError
from latent_tool.method import search as method
from latent_tool.method.grounding import add_noise, visual_dependency
from latent_tool.method.reward import read_reward
from latent_tool.models.decoding import Decoded, ExtractedAnswer, extract_answer, generation_rules
from latent_tool.models.families import answer_marks
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.requests import (
    Attend,
    Decode,
    Prefill,
    Reason,
    Request,
    Sample,
    Score,
    TokenEntropies,
    TokenLogProbabilities,
    contained,
    never,
    together,
)
from latent_tool.models.vlm import Inputs, Prefix, VisionLanguageModel
from latent_tool.schema import (
    CellAttention,
    ControlAnswer,
    Controls,
    GeneratedToken,
    Grounding,
    InjectedCell,
    MeasuredConfidence,
    Patch,
    ReasoningResult,
    ReasoningStep,
    Scores,
    TokenDependency,
    TraceRow,
    Usage,
)
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SamplingSettings, SearchSettings

__all__ = [
    "Engine",
    "Examined",
    "InStep",
    "Job",
    "Member",
    "Outcome",
    "Sampled",
    "get_engine",
    "use_threads",
]

# Tokens of the answer that the search leaves time for when there is a deadline.
_RESERVED_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """Everything one question needs.

    ``attention``, ``grounding`` (with its noise) and ``controls`` say what to measure once there is an answer;
    ``deadline`` is a time of the engine's clock (``time.monotonic`` unless replaced); ``cancelled`` is looked at before
    every forward pass; ``images_first`` puts the images before the question; ``image_seconds`` is what opening the
    images took, ``queue_seconds`` the wait before that.
    """

    images: tuple[Image, ...]
    question: str
    system: str | None = None
    settings: SearchSettings = field(default_factory=SearchSettings)
    budget: Budget = field(default_factory=Budget)
    generation: GenerationSettings | None = None
    images_first: bool = True
    seed: int = 0
    confidence: MeasuredConfidence = "pooled_probability"
    min_confidence: float | None = None
    attention: bool = False
    grounding: NoiseSettings | None = None
    controls: bool = False
    deadline: float | None = None
    cancelled: threading.Event | None = None
    image_seconds: float = 0.0
    queue_seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one question led to, tensors included.

    ``latents``: ``(L, d)`` of the decoded state, or ``None`` for the plain model; ``patches``: its injected cells;
    ``plain_probability``: of the answer by the model without either, see ``Scores``; ``attention``: of the latents to
    every image cell, if that was measured.
    """

    job: Job
    inputs: Inputs
    latents: Tensor | None
    patches: tuple[int, ...]
    search: method.Outcome | None
    decoded: Decoded
    answer: ExtractedAnswer
    plain_probability: float | None
    attention: tuple[float, ...] | None
    grounding: Grounding | None
    controls: Controls | None
    usage: Usage
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """How much an answer depends on the image.

    ``grounding``: visual dependency of its tokens, ``None`` if there are none; ``masked_entropy_gain``: by how many
    nats the answer's tokens, in the mean, are less certain with the image masked (processed pixels 0).
    """

    grounding: Grounding | None
    masked_entropy_gain: float | None
    seconds: float


@dataclass(frozen=True)
class Sampled:
    """Several drawn answers to one question, and what they cost together."""

    job: Job
    decoded: tuple[Decoded, ...]
    answers: tuple[ExtractedAnswer, ...]
    usage: Usage

    @property
    def probabilities(self) -> list[float]:
        """Joint probability of every answer's tokens given the reasoning before them, in [0, 1]."""
        return [
            _joint(decoded.log_probabilities, answer) or 0.0
            for decoded, answer in zip(self.decoded, self.answers, strict=True)
        ]


class _Clock:
    """Measures phases, counts forward passes, and knows when the job must stop."""

    def __init__(self, job: Job, now: Callable[[], float]) -> None:
        self.job = job
        self.now = now
        self.seconds: dict[str, float] = {"queue": job.queue_seconds, "images": job.image_seconds}
        self.reserve = 0.0
        self.calls = 0  # forward passes of the decoder
        self._phase_began = now()

    def phase_done(self, name: str) -> None:
        """Close a phase; the next one begins now."""
        now = self.now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._phase_began
        self._phase_began = now

    def expired(self, reserve: float = 0.0) -> bool:
        """Whether the deadline, less a reserve in seconds, has passed. Raises ``CancelledError`` when cancelled."""
        if self.job.cancelled is not None and self.job.cancelled.is_set():
            raise CancelledError("The question was cancelled.")
        return self.job.deadline is not None and self.now() >= self.job.deadline - reserve

    def require_time(self, doing: str) -> None:
        """Raise ``DeadlineError`` if there is nothing to return yet and no time left."""
        if self.expired():
            raise DeadlineError(
                f"The deadline passed before {doing}, so there is no answer.",
                "Allow more seconds (deadline_s), use a smaller image or a smaller model.",
            )

    def search_must_end(self) -> str | None:
        """``"deadline"`` when only the time for decoding an answer is left."""
        return "deadline" if self.expired(self.reserve) else None


T = TypeVar("T")
# What a question does: it yields steps for the caller and requests for the model, and is sent the replies.
Work = Generator[ReasoningStep | Request, Any, T]
# The order in which requests of several questions are served: whoever is behind catches up first ...
_ORDER = (Prefill, Reason, Score, Attend, Decode, Sample, TokenLogProbabilities, TokenEntropies)
# ... but nobody is passed over more often than this.
_PATIENCE = 16


@dataclass(eq=False)
class Member:
    """A question in an ``InStep``: what it asks of the model next, or its result once it has left."""

    job: Job
    work: Work[Any]
    pause: Callable[[], bool] = never
    on_step: Callable[[ReasoningStep], None] | None = None
    request: Request | None = None
    waited: int = 0  # steps in which others were served
    result: Any = None  # what the work returns, or the exception it ended with

    def advance(self, reply: Any) -> None:
        """Send a reply (or raise it, if it is an exception) and go on to the next request, or to the result."""
        self.request = None
        try:
            item = self.work.throw(reply) if isinstance(reply, Exception) else self.work.send(reply)
            while isinstance(item, ReasoningStep):
                if self.on_step is not None:
                    self.on_step(item)
                item = self.work.send(None)
            self.request = replace(item, pause=self.pause) if isinstance(item, Decode) else item
        except StopIteration as end:
            self.result = end.value
        except BaseException as error:
            self.result = contained(error)


class InStep:
    """Questions that are answered in step, their forward passes in one batch; a question may join at any time.

    For one thread at a time.

    Args:
        engine: who answers.
        awaited: whether others wait to join; then a long decoding is paused.
    """

    def __init__(self, engine: Engine, awaited: Callable[[], bool] = never) -> None:
        self.engine = engine
        self.members: list[Member] = []
        self._awaited = awaited

    def join(
        self,
        job: Job,
        on_step: Callable[[ReasoningStep], None] | None = None,
        work: Work[Any] | None = None,
    ) -> Member:
        """Take in a question, or other work about it, which goes as far as it gets without the model."""
        member = Member(job, work or self.engine._work(job), self._others_wait, on_step)
        member.advance(None)
        self.members.append(member)
        return member

    def _others_wait(self) -> bool:
        """Whether a decoding should make way for a while."""
        return self._awaited() or any(
            member.result is None and not isinstance(member.request, Decode) for member in self.members
        )

    def step(self) -> list[Member]:
        """Serve some requests in one batch; returns the questions that have their result, which are members no more.

        Whoever is behind catches up first, which makes batches large; nobody is passed over more than ``_PATIENCE``
        times, and answers are decoded some tokens at a time while others search.
        """
        for member in self.members:
            if member.request is not None and member.job.cancelled is not None and member.job.cancelled.is_set():
                member.advance(CancelledError("The question was cancelled."))
        asking = [member for member in self.members if member.request is not None]
        if asking:
            oldest = max(asking, key=lambda member: member.waited)
            behind = min(asking, key=lambda member: _ORDER.index(type(member.request)))
            kind = type((oldest if oldest.waited >= _PATIENCE else behind).request)
            chosen = [member for member in asking if type(member.request) is kind]
            replies = together(self.engine.vlm, [member.request for member in chosen if member.request is not None])
            for member in asking:
                member.waited += 1
            for member, reply in zip(chosen, replies, strict=True):
                member.waited = 0
                if isinstance(member.request, Decode) and getattr(reply, "finish_reason", None) == "paused":
                    member.request = replace(member.request, begun=reply)
                else:
                    member.advance(reply)
        done = [member for member in self.members if member.result is not None]
        self.members = [member for member in self.members if member.result is None]
        return done


class Engine:
    """Answers questions with one loaded model.

    Args:
        vlm: the model.
        clock: seconds from an arbitrary start, monotonic; replaced in tests.
    """

    def __init__(self, vlm: VisionLanguageModel, clock: Callable[[], float] = time.monotonic) -> None:
        self.vlm = vlm
        self.clock = clock
        self.attached: dict[str, Any] = {}  # what other modules keep for as long as this engine lives

    # ------------------------------------------------------------------ drivers: one question, or many in step

    def run(self, job: Job) -> Generator[ReasoningStep, None, Outcome]:
        """Answer one question, yielding a ``ReasoningStep`` per phase and round, and returning the ``Outcome``.

        Raises ``QuestionError``, ``ContextLengthError``, ``DeadlineError`` (nothing was scored in time),
        ``CancelledError``, ``NotEnoughMemoryError`` and ``NumericalError``. Whatever is raised, the engine can be used
        again.
        """
        work = self._work(job)
        reply: Any = None
        while True:
            try:
                item = work.throw(reply) if isinstance(reply, Exception) else work.send(reply)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            except Exception:
                raise
            except BaseException as error:
                raise contained(error) from error
            reply = None
            if isinstance(item, ReasoningStep):
                yield item
            else:
                (reply,) = together(self.vlm, [item])

    def answer(self, job: Job) -> Outcome:
        """``run`` without looking at the steps."""
        steps = self.run(job)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    def answer_many(self, jobs: Sequence[Job]) -> list[Outcome | Exception]:
        """Answer several questions in step, their forward passes in one batch; results in the order of the jobs.

        Each is answered as if it were asked alone, up to near-ties of rewards. An error of one takes its place in the
        list and leaves the others alone.
        """
        return self._in_step([(job, self._work(job)) for job in jobs])

    def sample_many(self, jobs: Sequence[Job], sampling: SamplingSettings) -> list[Sampled | Exception]:
        """Draw several answers to each of several questions from the plain model, in one batch.

        Of a job's settings only those of the prompt count. Errors as in ``answer_many``.
        """
        return self._in_step([(job, self._sample(job, sampling)) for job in jobs])

    def _in_step(self, works: Sequence[tuple[Job, Work[T]]]) -> list[T | Exception]:
        """Do several works in step; results in their order."""
        batch = InStep(self)
        members = [batch.join(job, work=work) for job, work in works]
        while batch.members:
            batch.step()
        return [member.result for member in members]

    # ------------------------------------------------------------------ the whole way of one question

    def _work(self, job: Job) -> Work[Outcome]:
        """Everything one question does, without calling the model."""
        clock = _Clock(job, self.clock)
        clock.require_time("the image was read")
        yield ReasoningStep(phase="prefill", iterations=job.budget.iterations)
        inputs = self._inputs(job)
        budget, warnings = self._fit_context(inputs, job)
        clock.require_time("the image was read")
        prefix: Prefix = yield Prefill(inputs, lambda: clock.require_time("the image was read"))
        clock.calls += 1
        clock.phase_done("prefill")
        clock.require_time("anything was scored")

        latents: Tensor | None = None
        patches: tuple[int, ...] = ()
        found: method.Outcome | None = None
        if job.settings.latents:
            start = yield from self._initial_latents(prefix, job, clock)
            if job.settings.init_noise:
                start = self._noised_start(start, job)
            found = yield from self._search(prefix, start, job, budget, clock)
            latents, patches = found.best.latents, found.best.patches
        clock.phase_done("search")

        yield ReasoningStep(phase="decode", iterations=budget.iterations)
        decoded = yield from self._decode(prefix, latents, patches, budget, clock)
        answer = self._extract(prefix, decoded)
        plain = yield from self._plain_probability(prefix, latents, decoded, answer, clock)
        clock.phase_done("decode")

        attention: tuple[float, ...] | None = None
        if job.attention and latents is None:
            warnings.append("Without latents there is no attention to the image cells that could be measured.")
        elif job.attention and latents is not None and not clock.expired():
            attention = yield from self._attention(prefix, latents, patches)
            clock.calls += 1
            clock.phase_done("attention")
        grounding = controls = None
        if job.grounding is not None or job.controls:
            grounding, controls, cut = yield from self._examine(
                prefix, job, budget, latents, patches, decoded, answer, clock
            )
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
            candidates=found.candidates if found else 0,
            discarded=found.discarded if found else 0,
            decoder_calls=clock.calls,
            prompt_tokens=inputs.length,
            image_cells=len(inputs.cells),
            latent_tokens=0 if latents is None else len(latents),
            patch_tokens=len(patches),
            generated_tokens=len(decoded.tokens),
            seconds=clock.seconds,
        )
        return Outcome(
            replace(job, budget=budget),
            inputs,
            latents,
            patches,
            found,
            decoded,
            answer,
            plain,
            attention,
            grounding,
            controls,
            usage,
            (*job.warnings, *inputs.warnings, *warnings),
        )

    def _sample(self, job: Job, sampling: SamplingSettings) -> Work[Sampled]:
        """Everything that drawing several answers to one question takes."""
        clock = _Clock(job, self.clock)
        clock.require_time("the image was read")
        inputs = self._inputs(job)
        budget, _ = self._fit_context(inputs, job)
        prefix: Prefix = yield Prefill(inputs, lambda: clock.require_time("the image was read"))
        clock.phase_done("prefill")
        clock.require_time("anything was decoded")
        drawn: list[Decoded] = yield Sample(
            prefix, budget.max_new_tokens, sampling, job.seed, clock.expired, job.generation
        )
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
        return Sampled(job, tuple(drawn), tuple(self._extract(prefix, each) for each in drawn), usage)

    def rescore(self, outcome: Outcome) -> float:
        """Score the outcome's state again, from the images on: what a reported reward must be reproducible with.

        Nothing that was computed before is used.
        """
        if outcome.latents is None:
            raise SettingsError("The plain model has no reward.", "Use settings with latents >= 1.")
        prefix = self.vlm.prefill(outcome.inputs, cached=False)
        logits = self.vlm.score(prefix, outcome.latents[None], (outcome.patches,))
        return float(read_reward(logits, outcome.job.settings).reward[0])

    # ------------------------------------------------------------------ its parts

    def _inputs(self, job: Job) -> Inputs:
        """The prompt as the model takes it."""
        try:
            return self.vlm.prepare(
                job.images,
                job.question,
                system=job.system,
                position=job.settings.latent_position,
                thinking_markers=job.settings.thinking_markers,
                images_first=job.images_first,
            )
        except MemoryError:
            raise NotEnoughMemoryError("The images do not fit into memory.", "Use smaller images.") from None

    def _fit_context(self, inputs: Inputs, job: Job) -> tuple[Budget, list[str]]:
        """The budget cut to what the model's context holds."""
        limit, budget, warnings = self.vlm.context_length, job.budget, list[str]()
        if limit is None:
            return budget, warnings
        fixed = inputs.length + len(inputs.tail)
        if job.settings.latents:
            fixed += job.settings.latents + len(inputs.markers.opening) + len(inputs.markers.closing)
        if fixed + 1 > limit:
            raise ContextLengthError(
                f"Image, question and latents take {fixed} tokens; the model's context has {limit}.",
                "Shorten the question, make the image smaller or use fewer latents.",
            )
        patches = min(budget.max_patches, max(0, limit - fixed - min(budget.max_new_tokens, 32)))
        if patches < budget.max_patches:
            budget = budget.but(max_patches=patches)
            warnings.append(f"max_patches was cut to {patches} to fit the model's context of {limit} tokens.")
        room = limit - fixed - (budget.max_patches if job.settings.latents else 0)
        if room < budget.max_new_tokens:
            budget = budget.but(max_new_tokens=max(1, room))
            warnings.append(f"max_new_tokens was cut to {max(1, room)} to fit the model's context of {limit} tokens.")
        return budget, warnings

    def _initial_latents(self, prefix: Prefix, job: Job, clock: _Clock) -> Work[Tensor]:
        """Where the latents start, ``(L, d)`` float32."""
        count, settings = job.settings.latents, job.settings
        if settings.init == "mean":
            return self.vlm.mean_embedding().expand(count, -1).clone()
        if settings.init == "reasoning":
            before = self.clock()
            tokens, calls = yield Reason(prefix, count, clock.expired)
            clock.calls += calls
            self._reserve_time(clock, (self.clock() - before) / max(calls, 1), job.budget)
            if tokens:
                return self.vlm.embed(tokens).float()
        return self.vlm.embed([self._init_token(settings.init_token)]).float().expand(count, -1).clone()

    def _noised_start(self, start: Tensor, job: Job) -> Tensor:
        """The initial latents moved once by noise, from a stream of its own."""
        unit = self.vlm.embedding_rms() if job.settings.scale == "embedding_rms" else 1.0
        generator = torch.Generator().manual_seed((job.seed + 2**62) % 2**63)
        noise = torch.randn(start.shape, generator=generator).to(start)
        return start + job.settings.init_noise * unit * noise

    def _init_token(self, wanted: str | None) -> int:
        tokenizer = self.vlm.tokenizer
        if wanted is not None:
            token = tokenizer.convert_tokens_to_ids(wanted)
            if token is None or token == tokenizer.unk_token_id:
                raise SettingsError(f"The model has no token {wanted!r}.", "Choose another init_token, or none.")
            return int(token)
        candidates = (tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        return int(next(token for token in candidates if token is not None))

    def _reserve_time(self, clock: _Clock, per_call: float, budget: Budget) -> None:
        """Keep time for decoding an answer, but never more than half of what is left."""
        if clock.job.deadline is not None:
            wanted = per_call * (1 + min(budget.max_new_tokens, _RESERVED_TOKENS))  # and the plain probability
            clock.reserve = max(0.0, min(wanted, (clock.job.deadline - self.clock()) / 2))

    def _search(self, prefix: Prefix, start: Tensor, job: Job, budget: Budget, clock: _Clock) -> Work[method.Outcome]:
        """The search, its questions passed on to the model."""
        settings = job.settings
        steps = method.search(
            start.to(self.vlm.device),
            settings,
            budget,
            generator=torch.Generator().manual_seed(job.seed),
            unit=self.vlm.embedding_rms() if settings.scale == "embedding_rms" else 1.0,
            stop=clock.search_must_end,
        )
        began = self.clock()
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                found: method.Outcome = end.value
                return found
            reply = None
            if isinstance(step, method.Score):
                reply = yield Score(prefix, step.latents, step.patches, step.answer_only, step.attention)
                clock.calls += 1
            elif isinstance(step, method.Attend):
                reply = yield Attend(prefix, step.latents, step.patches)
                clock.calls += 1
            else:
                if step.number == 0 and not clock.reserve:
                    self._reserve_time(clock, self.clock() - began, budget)
                cells = ((cell, prefix.inputs.cells[cell]) for cell in step.accepted)
                yield ReasoningStep(
                    phase="search",
                    trace=_trace_row(step),
                    injected=[InjectedCell(image=place.image, cell=cell, box=place.box) for cell, place in cells],
                    iterations=budget.iterations,
                )

    def _decode(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[int], budget: Budget, clock: _Clock
    ) -> Work[Decoded]:
        """Decode, past the deadline too for the one token without which there is no answer."""
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return clock.expired() and asked > 1

        decoded: Decoded = yield Decode(prefix, latents, patches, budget.max_new_tokens, stop, clock.job.generation)
        clock.calls += len(decoded.tokens)
        return decoded

    def _plain_probability(
        self, prefix: Prefix, latents: Tensor | None, decoded: Decoded, answer: ExtractedAnswer, clock: _Clock
    ) -> Work[float | None]:
        """Joint probability of the answer's tokens by the model as it was before it thought; one forward pass.

        The search raises the confidence in whatever it ends with; this one it cannot raise. The pass is made past the
        deadline, too: without it an answer that was just in time would have no confidence.
        """
        if latents is None or answer.start == answer.stop:
            return _joint(decoded.log_probabilities, answer)
        clock.expired()  # raises if the question was cancelled
        log_p: Tensor = yield TokenLogProbabilities(prefix, None, (), decoded.tokens[: answer.stop])
        clock.calls += 1
        return _joint(log_p, answer)

    def _extract(self, prefix: Prefix, decoded: Decoded) -> ExtractedAnswer:
        rules = generation_rules(self.vlm.model, prefix.length)
        marks = answer_marks(self.vlm.model.config.model_type)
        closing = prefix.inputs.markers.closing
        return extract_answer(decoded.tokens, self.vlm.tokenizer, closing, rules.stop_tokens, marks)

    def _noised(self, inputs: Inputs, noise: NoiseSettings, draw: int, clock: _Clock) -> Work[Prefix]:
        """The prefix of the noised image; its cells' features are those of the noised image, too."""
        generator = torch.Generator().manual_seed(noise.seed + draw)
        tensors = {
            key: add_noise(value, noise, generator) if key.startswith("pixel_values") else value
            for key, value in inputs.tensors.items()
        }
        prefix: Prefix = yield Prefill(
            replace(inputs, tensors=tensors), lambda: clock.require_time("the noised image was read"), cached=False
        )
        clock.calls += 1
        return prefix

    def _examine(
        self,
        prefix: Prefix,
        job: Job,
        budget: Budget,
        latents: Tensor | None,
        patches: tuple[int, ...],
        decoded: Decoded,
        answer: ExtractedAnswer,
        clock: _Clock,
    ) -> Work[tuple[Grounding | None, Controls | None, list[str]]]:
        """Visual dependency and controls, ``None`` where the deadline left no time; a warning if it left some."""
        noise = job.grounding or NoiseSettings()
        grounding = controls = None
        noised: Prefix | None = None
        warnings: list[str] = []
        if job.grounding is not None and decoded.tokens:
            noised, rows = yield from self._forced(prefix.inputs, latents, patches, decoded, noise, clock)
            if rows:
                dependency = visual_dependency(decoded.log_probabilities, torch.stack(rows))
                grounding = self._grounding(decoded, answer, dependency, noise)
            if 0 < len(rows) < noise.draws:
                warnings.append(f"The deadline left time for {len(rows)} of {noise.draws} noised images (grounding).")
        if job.controls:
            controls = yield from self._controls(prefix, noised, noise, budget, latents, patches, answer, clock)
        return grounding, controls, warnings

    def _forced(
        self,
        inputs: Inputs,
        latents: Tensor | None,
        patches: tuple[int, ...],
        decoded: Decoded,
        noise: NoiseSettings,
        clock: _Clock,
    ) -> Work[tuple[Prefix | None, list[Tensor]]]:
        """The decoded tokens' log-probabilities ``(n,)`` for every noised image there was time for, and the last."""
        noised: Prefix | None = None
        rows: list[Tensor] = []
        for draw in range(noise.draws):
            try:
                noised = yield from self._noised(inputs, noise, draw, clock)
            except DeadlineError:
                break
            if clock.expired():
                break
            rows.append((yield TokenLogProbabilities(noised, latents, patches, decoded.tokens)))
            clock.calls += 1
        return noised, rows

    def _controls(
        self,
        prefix: Prefix,
        noised: Prefix | None,
        noise: NoiseSettings,
        budget: Budget,
        latents: Tensor | None,
        patches: tuple[int, ...],
        answer: ExtractedAnswer,
        clock: _Clock,
    ) -> Work[Controls | None]:
        """The answer without latents and without the image, or ``None`` when time is up: half an answer is none."""
        answers = []
        try:
            clock.require_time("the controls were answered")
            if noised is None:
                noised = yield from self._noised(prefix.inputs, noise, 0, clock)
            for state in ((prefix, None, ()), (noised, latents, patches)):
                clock.require_time("the controls were answered")
                decoded = yield from self._decode(*state, budget, clock)
                if decoded.finish_reason == "deadline":
                    return None
                answers.append(self._control(prefix, decoded, answer.text))
        except DeadlineError:
            return None
        return Controls(latents_off=answers[0], image_noised=answers[1])

    def examine_many(self, outcomes: Sequence[Outcome], noise: NoiseSettings) -> list[Examined | Exception]:
        """How much answers that were found before depend on their images; errors as in ``answer_many``."""
        return self._in_step([(outcome.job, self._examination(outcome, noise)) for outcome in outcomes])

    def _examination(self, outcome: Outcome, noise: NoiseSettings) -> Work[Examined]:
        """Visual dependency and masked entropy of an answer."""
        began = self.clock()
        inputs, state, decoded = outcome.inputs, (outcome.latents, outcome.patches), outcome.decoded
        if not decoded.tokens:
            return Examined(None, None, 0.0)
        clock = _Clock(replace(outcome.job, deadline=None), self.clock)  # that of the answer, which is there already
        _, rows = yield from self._forced(inputs, *state, decoded, noise, clock)
        dependency = visual_dependency(decoded.log_probabilities, torch.stack(rows))
        grounding = self._grounding(decoded, outcome.answer, dependency, noise)
        tensors = {
            key: torch.zeros_like(value) if key.startswith("pixel_values") else value
            for key, value in inputs.tensors.items()
        }
        masked: Prefix = yield Prefill(replace(inputs, tensors=tensors), clock.expired, cached=False)
        entropies: Tensor = yield TokenEntropies(masked, *state, decoded.tokens)
        gains = (entropies - decoded.entropies)[outcome.answer.start : outcome.answer.stop]
        gain = float(gains.mean()) if len(gains) else None
        return Examined(grounding, gain, self.clock() - began)

    def dependency_many(
        self, sampled: Sequence[Sampled], noise: NoiseSettings, think: bool = True
    ) -> list[tuple[Grounding | None, ...] | Exception]:
        """How much the tokens of drawn answers, reasoning included, depend on the image; errors as in ``answer_many``.

        Args:
            think: as in the sampling settings that the answers were drawn with.
        """
        return self._in_step([(each.job, self._sampled_dependency(each, noise, think)) for each in sampled])

    def _sampled_dependency(
        self, sampled: Sampled, noise: NoiseSettings, think: bool
    ) -> Work[tuple[Grounding | None, ...]]:
        job = sampled.job
        inputs = self._inputs(job)
        opening = inputs.markers.opening if think else ()
        rows: list[list[Tensor]] = [[] for _ in sampled.decoded]
        clock = _Clock(replace(job, deadline=None), self.clock)  # that of the answers, which are there already
        for draw in range(noise.draws):
            noised = yield from self._noised(inputs, noise, draw, clock)
            for row, decoded in zip(rows, sampled.decoded, strict=True):
                forced: Tensor = yield TokenLogProbabilities(noised, None, (), (*opening, *decoded.tokens))
                row.append(forced[len(opening) :])
        found: list[Grounding | None] = []
        for row, decoded, answer in zip(rows, sampled.decoded, sampled.answers, strict=True):
            dependency = visual_dependency(decoded.log_probabilities, torch.stack(row))
            found.append(self._grounding(decoded, answer, dependency, noise) if decoded.tokens else None)
        return tuple(found)

    def attention_many(self, outcomes: Sequence[Outcome]) -> list[list[float] | Exception]:
        """Attention of the decoded state's latents to every image cell, mean over latents, heads and layers.

        Empty for the plain model; errors as in ``answer_many``.
        """
        return self._in_step([(outcome.job, self._attention_of(outcome)) for outcome in outcomes])

    def _attention_of(self, outcome: Outcome) -> Work[list[float]]:
        """The attention of an answer that was found before."""
        if outcome.attention is not None or outcome.latents is None:
            return list(outcome.attention or ())
        prefix: Prefix = yield Prefill(outcome.inputs)
        weights = yield from self._attention(prefix, outcome.latents, outcome.patches)
        return list(weights)

    def _attention(self, prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> Work[tuple[float, ...]]:
        """Attention of the latents ``(L, d)`` to every image cell, mean over latents, heads and layers."""
        attention: Tensor = yield Attend(prefix, latents, patches)
        return tuple(attention.mean(0).tolist())

    def _control(self, prefix: Prefix, decoded: Decoded, answer: str) -> ControlAnswer:
        found = self._extract(prefix, decoded)
        same = " ".join(found.text.lower().split()) == " ".join(answer.lower().split())
        return ControlAnswer(answer=found.text, confidence=_joint(decoded.log_probabilities, found), agrees=same)

    def _grounding(
        self, decoded: Decoded, answer: ExtractedAnswer, dependency: Tensor, noise: NoiseSettings
    ) -> Grounding:
        values = dependency.tolist()
        tokens = [
            TokenDependency(
                token=self.vlm.tokenizer.decode([token]),
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

    # ------------------------------------------------------------------ from the outcome to what crosses the API

    def result(self, outcome: Outcome) -> ReasoningResult:
        """The outcome as plain JSON types."""
        job, found = outcome.job, outcome.search
        probability = _joint(outcome.decoded.log_probabilities, outcome.answer)
        plain = outcome.plain_probability
        answer_log_p = outcome.decoded.log_probabilities[outcome.answer.start : outcome.answer.stop]
        scores = Scores(
            reward=found.best.reward if found else None,
            initial_reward=found.initial_reward if found else None,
            top_k_mass=found.best.top_k_mass if found else None,
            answer_probability=probability,
            plain_probability=plain,
            pooled_probability=None if probability is None or plain is None else math.sqrt(probability * plain),
            mean_token_probability=float(answer_log_p.mean().exp()) if len(answer_log_p) else None,
            first_token_entropy=float(outcome.decoded.entropies[outcome.answer.start])
            if outcome.answer.start < len(outcome.decoded.entropies)
            else None,
        )
        if job.confidence == "reward":
            if found is None:
                raise SettingsError("Without latents there is no reward.", "Gate on the answer probability instead.")
            confidence: float | None = _reward_confidence(found.best.reward, job.settings, self.vlm)
        else:
            confidence = getattr(scores, job.confidence)
        accepted = None
        if job.min_confidence is not None:
            accepted = confidence is not None and confidence >= job.min_confidence
        return ReasoningResult(
            answer=outcome.answer.text,
            raw_text=outcome.answer.raw_text,
            confidence=confidence,
            confidence_source=job.confidence if confidence is not None else "unscored",
            accepted=accepted,
            abstained=None if accepted is None else not accepted,
            min_confidence=job.min_confidence,
            scores=scores,
            tokens=self._tokens(outcome),
            patches=_patches(outcome),
            image_sizes=[(image.width, image.height) for image in job.images],
            trace=[_trace_row(row) for row in found.rounds] if found else [],
            attention=_cell_attention(outcome),
            grounding=outcome.grounding,
            controls=outcome.controls,
            usage=outcome.usage,
            stop_reason=found.stop_reason if found else "no_latents",
            finish_reason=outcome.decoded.finish_reason,
            model=self.vlm.name,
            settings=job.settings,
            budget=job.budget,
            seed=job.seed,
            warnings=list(outcome.warnings),
        )

    def _tokens(self, outcome: Outcome) -> list[GeneratedToken]:
        """The generated tokens; a token's text is what it adds to the text of the few before it."""
        tokens = outcome.decoded.tokens
        found = []
        for index, log_p in enumerate(outcome.decoded.log_probabilities.tolist()):
            begin = max(0, index - 8)
            before, text = (
                self.vlm.tokenizer.decode(tokens[begin:end], clean_up_tokenization_spaces=False)
                for end in (index, index + 1)
            )
            found.append(
                GeneratedToken(
                    token=text[len(before) :],
                    probability=min(1.0, math.exp(log_p)),
                    in_answer=outcome.answer.start <= index < outcome.answer.stop,
                )
            )
        return found


def _joint(log_probabilities: Tensor, answer: ExtractedAnswer) -> float | None:
    """Joint probability of the answer's tokens and of the token that ends it; ``None`` if nothing was decoded.

    ``log_probabilities``: ``(n,)`` of the decoded tokens, at least up to the end of the answer.
    """
    log_p = log_probabilities[answer.start : answer.stop]
    return min(1.0, float(log_p.double().sum().exp())) if len(log_p) else None


def _reward_confidence(reward: float, settings: SearchSettings, vlm: VisionLanguageModel) -> float:
    """The reward rescaled from its range to [0, 1]."""
    if settings.reward == "neg_log_probability":
        raise SettingsError(
            "The reward neg_log_probability has no upper bound, so it is no confidence.",
            "Gate on the answer probability, or choose another reward.",
        )
    low = 0.0 if settings.reward == "entropy" else 1 - math.log(settings.top_k)
    return min(1.0, max(0.0, (reward - low) / (1 - low)))


def _trace_row(row: method.Round) -> TraceRow:
    return TraceRow(
        round=row.number,
        reward=row.reward,
        best_reward=row.best_reward,
        mean_sampled_reward=row.mean_sampled_reward,
        top_k_mass=row.top_k_mass,
        # Where the reward is read at the latents alone, nothing says that the answer's logits are finite.
        first_token_probability=min(1.0, row.first_token_probability) if row.first_token_probability >= 0 else None,
        sigma=row.sigma,
        accepted=list(row.accepted),
        candidates=row.candidates,
        discarded=row.discarded,
        seconds=row.seconds,
    )


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


def use_threads(number: int) -> None:
    """Let torch compute with so many threads from now on, in the whole process."""
    torch.set_num_threads(number)


_engines: dict[ModelSpec, Engine] = {}
_loading: dict[ModelSpec, threading.Lock] = {}
_registry_lock = threading.Lock()


def get_engine(spec: ModelSpec) -> Engine:
    """The process's engine for a model; loaded once, however many threads ask."""
    with _registry_lock:
        lock = _loading.setdefault(spec, threading.Lock())
    with lock:
        if spec not in _engines:
            _engines[spec] = Engine(load(spec))
        return _engines[spec]
