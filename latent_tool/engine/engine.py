"""The engine: one loaded model that answers questions, one at a time or many in step.

``Engine`` owns a loaded model; ``get_engine`` shares one engine per model in a process. Engines may be used from any
thread. This module knows nothing of LangChain, of files or of URLs: images arrive opened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from latent_tool.engine.choosing import best_option
from latent_tool.engine.examine import attention_later, examine_later, examine_sampled
from latent_tool.engine.in_step import InStep, Tell
from latent_tool.engine.job import Examined, Job, Outcome, Sampled, joint
from latent_tool.engine.looking import reward_of
from latent_tool.engine.question import Question
from latent_tool.engine.result import as_result
from latent_tool.engine.running import note
from latent_tool.engine.work import answer, sample
from latent_tool.errors import SettingsError
from latent_tool.method.asking import Asking, Work
from latent_tool.method.reward import Logits, read_reward
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.options import score_options
from latent_tool.models.requests import ScoreOptions
from latent_tool.models.serving import together
from latent_tool.models.threads import use_threads
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.schema import Grounding, ReasoningResult, ReasoningStep
from latent_tool.settings import NoiseSettings, SamplingSettings

__all__ = ["Engine", "get_engine", "use_threads"]

T = TypeVar("T")


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

    # ------------------------------------------------------------------ one question, or many in step

    def run(self, job: Job) -> Generator[ReasoningStep, None, Outcome]:
        """Answer one question, yielding a ``ReasoningStep`` per phase and round, and returning the ``Outcome``.

        Raises ``QuestionError``, ``ContextLengthError``, ``DeadlineError`` (nothing was scored in time),
        ``CancelledError``, ``NotEnoughMemoryError`` and ``NumericalError``. Whatever is raised, the engine can be used
        again.
        """
        asking = Asking(self.work(job))
        try:
            while (request := asking.request) is not None:
                reply: object = None
                if isinstance(request, Tell):
                    yield request.step
                else:
                    (reply,) = together(self.vlm, [request])
                asking.advance(reply)
            return asking.outcome()
        finally:
            asking.close()
            del asking  # an error's traceback must not lead back to it: that would keep tensors alive

    def work(self, job: Job) -> Work[Outcome]:
        """Return the work of one question, for a driver; its forward passes are awaited."""
        return answer(self._question(job))

    def answer(self, job: Job) -> Outcome:
        """Answer one question without looking at the steps; raises what ``run`` raises."""
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
        return self._in_step((job, self.work(job)) for job in jobs)

    def sample_many(self, jobs: Sequence[Job], sampling: SamplingSettings) -> list[Sampled | Exception]:
        """Draw several answers to each of several questions from the plain model, in one batch.

        Of a job's settings only those of the prompt count. Errors as in ``answer_many``.
        """
        return self._in_step((job, sample(self._question(job), sampling)) for job in jobs)

    # ------------------------------------------------------------------ about answers that were found before

    def examine_many(self, outcomes: Sequence[Outcome], noise: NoiseSettings) -> list[Examined | Exception]:
        """Measure how much answers depend on their images; errors as in ``answer_many``."""
        return self._in_step(
            (outcome.job, examine_later(self._timeless(outcome.job), outcome, noise)) for outcome in outcomes
        )

    def dependency_many(
        self, sampled: Sequence[Sampled], noise: NoiseSettings, think: bool = True
    ) -> list[tuple[Grounding | None, ...] | Exception]:
        """Measure how much the tokens of drawn answers, reasoning included, depend on the image.

        Args:
            think: as in the sampling settings that the answers were drawn with.

        Errors as in ``answer_many``.
        """
        return self._in_step(
            (drawn.job, examine_sampled(self._timeless(drawn.job), drawn, noise, think)) for drawn in sampled
        )

    def attention_many(self, outcomes: Sequence[Outcome]) -> list[list[float] | Exception]:
        """Read the attention of decoded states' latents to every image cell, mean over latents, heads and layers.

        Empty for the plain model; errors as in ``answer_many``.
        """
        return self._in_step((outcome.job, attention_later(outcome)) for outcome in outcomes)

    def rescore(self, outcome: Outcome) -> float:
        """Score the outcome's state again, from the images on: what a reported reward must be reproducible with.

        Nothing that was computed before is used.
        """
        looked = any(view.accepted for view in outcome.views)
        if outcome.latents is None and not looked:
            raise SettingsError("The plain model has no reward.", "Use settings with latents >= 1.")
        prefix = self.vlm.prefill(outcome.inputs, cached=False)
        if outcome.latents is None and outcome.chosen is not None:  # the reward is that of looking again
            spelled = self._question(outcome.job).spellings
            scored = score_options(self.vlm, ScoreOptions(prefix, None, ((),), spelled))
            best, probability = best_option(scored)
            return reward_of(outcome.chosen.options[best], probability, outcome.job.cannot_tell)
        if outcome.latents is None:
            log_p = self.vlm.token_log_probabilities(prefix, None, (), outcome.decoded.tokens[: outcome.answer.stop])
            return reward_of(outcome.answer.text, joint(log_p, outcome.answer), outcome.job.cannot_tell)
        latents, patches = outcome.latents[None], (outcome.patches,)
        if outcome.job.settings.reward_position == "options":
            spelled = self._question(outcome.job).spellings
            scored = score_options(self.vlm, ScoreOptions(prefix, latents, patches, spelled))
            logits = Logits(scored.answer[:, None][:, :0], scored.answer, options=scored.log_probabilities)
        else:
            logits = self.vlm.score(prefix, latents, patches)
        return float(read_reward(logits, outcome.job.settings).reward[0])

    def result(self, outcome: Outcome) -> ReasoningResult:
        """Return the outcome as plain JSON types."""
        return as_result(self.vlm, outcome)

    def _question(self, job: Job) -> Question:
        return Question(self.vlm, job, self.clock)

    def _timeless(self, job: Job) -> Question:
        """A question whose answer is there already, so that its deadline has no meaning any more."""
        return self._question(replace(job, deadline=None))

    def _in_step(self, works: Iterable[tuple[Job, Work[T]]]) -> list[T | Exception]:
        """Do several works in step; results in their order. A work is made only when it joins, and then begun."""
        batch = InStep(self.vlm)
        members = [batch.join(job, work) for job, work in works]
        while batch.members:
            batch.step()
        return [member.asking.ended() for member in members]


_engines: dict[ModelSpec, Engine] = {}
_loading: dict[ModelSpec, threading.Lock] = {}
_registry_lock = threading.Lock()


def get_engine(spec: ModelSpec) -> Engine:
    """Return the process's engine for a model; loaded once, however many threads ask."""
    if spec.compile == "auto" and not torch.cuda.is_available():  # the same model
        spec = replace(spec, compile=False)
    with _registry_lock:
        lock = _loading.setdefault(spec, threading.Lock())
    with lock:
        if spec not in _engines:
            _engines[spec] = Engine(load(spec))
            note(spec.model, _engines[spec])
        return _engines[spec]
