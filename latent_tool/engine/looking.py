"""Look again: windows of the picture, encoded at their own resolution, stay only if the answer becomes surer.

    repeat for every level
        1  attention of the last position to the cells, relative to a neutral question     (method/views.py)
        2  windows of several sizes where it is densest
        3  answer with each of them beside the picture
        4  keep the surest if it is surer by enough; the next level looks inside it for a smaller one in its place

Where no window of the first level is surer by enough, the next looks inside the surest all the same: what is asked
about may be too small for them. An answer that is sure enough is not looked into.

The whole picture always stays. Deciding beforehand whether a window would help is worth little; so every window is
looked at first, and accepted, or not, by what the model says then.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor

from latent_tool.cannot_tell import says_cannot_tell
from latent_tool.engine.choosing import Said, best_option
from latent_tool.engine.in_step import Tell
from latent_tool.engine.job import joint
from latent_tool.engine.question import Question
from latent_tool.errors import (
    ContextLengthError,
    DeadlineError,
    ImageError,
    LatentToolError,
    ModelLoadError,
    ModelNotSupportedError,
    NotEnoughMemoryError,
    NumericalError,
)
from latent_tool.method.views import density, is_surer, propose_windows, random_windows, relative_attention, support
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.models.prefix_cache import PER_TOKEN, image_key
from latent_tool.models.requests import DecodeEach, Prefill, PrefillEach
from latent_tool.models.windows import Window
from latent_tool.schema import ReasoningStep, View
from latent_tool.settings import Budget

__all__ = [
    "IMPOSSIBLE",
    "READ",
    "UNHEARD",
    "Looked",
    "Seen",
    "hides_pixels",
    "look_again",
    "reward_of",
    "times_smaller",
]

# What keeps one window from being looked at, and the question from nothing.
IMPOSSIBLE = (
    ContextLengthError,
    ImageError,
    ModelLoadError,
    ModelNotSupportedError,
    NotEnoughMemoryError,
    NumericalError,
)
UNHEARD = ("\0", 1.0)  # what was to be said and could not: an objection, as sure as can be; no answer is this text
NEUTRAL = "Describe the picture."
# A picture whose sides were made smaller by this factor, or more, is looked at again.
SHRUNK = 1.2
_SURE = 0.7  # an answer that is as sure by now is not looked into: a part of its window may lack what it needs
READ = 64  # tokens of an answer that is compared with others, at most: a longer one does not replace the one before


@dataclass(frozen=True)
class Seen:
    """An answer of the plain model, and what it was read from."""

    prefix: Prefix
    said: Said
    answer: str
    reward: float


@dataclass(frozen=True)
class Looked:
    """What looking again led to.

    ``best``: the answer with the window that was accepted last, ``None`` if none was; ``encoded``: windows and pictures
    that went through the vision tower; ``warnings``: why some could not be looked at; ``shrunk``: how many times
    smaller the picture was made; ``unheard``: windows that were to be looked at and could not be, or not to the end
    of their answer; ``late``: whether the deadline left no time for something; ``whole``: what was answered without a
    window, and how sure that was, where the best answer was compared with it.
    """

    best: Seen | None = None
    views: tuple[View, ...] = ()
    encoded: int = 0
    warnings: tuple[str, ...] = ()
    shrunk: float = 1.0
    unheard: int = 0
    late: bool = False
    whole: tuple[tuple[str, float], ...] = ()

    @property
    def support(self) -> float:
        """How far all that was said supports the best answer, in [0, 1]; 1 where no window was accepted."""
        if self.best is None:
            return 1.0
        windows = [(view.answer_after, view.reward_after) for view in self.views]
        return support(self.best.answer, [*windows, *[UNHEARD] * self.unheard], self.whole, self.shrunk)


def hides_pixels(images: Sequence[Image], inputs: Inputs) -> bool:
    """Say whether the processor made the pictures so much smaller that windows of them have something new to show.

    Ordinary scenes lose by windows that hold nothing new: the answer changes, and is not better for it.
    """
    return times_smaller(images, inputs) >= SHRUNK


def times_smaller(images: Sequence[Image], inputs: Inputs) -> float:
    """Return how many times smaller the processor made the sides of the pictures, of those that it made smallest.

    Compared are the pixels of the pictures with those that the vision tower is given, ``inputs`` having no windows.
    Where that cannot be known, they count as made smaller by ``SHRUNK``.
    """
    pixels = inputs.tensors.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return SHRUNK
    given = pixels.numel() / 3 / (2 if pixels.dim() == 2 else 1)  # rows of patches hold every pixel for two frames
    sizes = [image.width * image.height for image in images]
    if pixels.dim() != 2:  # every picture has the same number, so that small ones must not hide a large one
        return math.sqrt(max(sizes) * len(images) / given)
    return math.sqrt(sum(sizes) / given)


def reward_of(text: str, probability: float | None, phrases: Sequence[str]) -> float:
    """Return how sure an answer is, in [0, 1]: its joint probability, or 0 if it is empty or cannot be told.

    ``phrases``: answers that mean that it cannot be told, see ``says_cannot_tell``.
    """
    return 0.0 if not text or says_cannot_tell(text, phrases) else probability or 0.0


async def look_again(question: Question, inputs: Inputs, answer: str, reward: float, budget: Budget) -> Looked:
    """Look at windows of the pictures while the answer becomes surer.

    Args:
        inputs: of the question, without windows; the prefix cache has their pictures.
        answer: the answer so far.
        reward: how sure it is, see ``reward_of``; what a window has to exceed by more than ``min_gain``.
        budget: ``max_views`` windows at most.
    """
    settings = question.job.settings
    looked = _Looking(question, inputs, budget)
    best: Seen | None = None
    inside: tuple[Window, Seen] | None = None
    for depth in range(1, settings.view_depth + 1):
        if depth > 1 and reward >= _SURE:
            break
        proposals = (await looked.proposals(inside))[: budget.max_views - len(looked.views)]
        if not proposals or looked.time_is_up():
            looked.unheard += len(proposals) or int(looked.late)  # where there was no time to propose any, one at least
            break
        began = question.now()
        seen = await looked.read(proposals)
        looked.unheard += len(proposals) - len(seen)
        if not seen:
            break
        share = (question.now() - began) * 1000 / len(seen)
        before = answer, reward
        index = max(range(len(seen)), key=lambda at: seen[at][1].reward)
        blind = says_cannot_tell(answer, question.job.cannot_tell)
        accepted = is_surer(seen[index][1].reward, reward, blind, settings.min_gain)
        for at, (window, one) in enumerate(seen):
            view = View(
                image=window.image,
                box=tuple(map(float, window.box)),
                depth=depth,
                accepted=accepted and at == index,
                answer_before=before[0],
                answer_after=one.answer,
                reward_before=before[1],
                reward_after=one.reward,
                milliseconds=share,
            )
            looked.views.append(view)
            await Tell(ReasoningStep(phase="look", view=view, iterations=budget.iterations))
        if not accepted and best is not None:
            break
        inside = seen[index]  # accepted or not: what is asked about may be too small for windows of the first level
        if accepted:
            best = seen[index][1]
            answer, reward = best.answer, best.reward
    return Looked(
        best=best,
        views=tuple(looked.views),
        encoded=looked.encoded,
        warnings=looked.warnings,
        shrunk=times_smaller(question.job.images, inputs),
        unheard=looked.unheard,
        late=looked.late,
    )


class _Looking:
    """One question's looking: what was looked at, and what it cost."""

    def __init__(self, question: Question, inputs: Inputs, budget: Budget) -> None:
        self.question = question
        self.inputs = inputs
        self.budget = budget
        self.views: list[View] = []
        self.encoded = 0
        self.warnings: tuple[str, ...] = ()
        self.late = False  # whether time ran out
        self.unheard = 0  # windows that were not read, or not to the end of their answer
        self._random = random.Random(question.job.seed)

    async def proposals(self, within: tuple[Window, Seen] | None) -> list[Window]:
        """Propose windows of the picture that is attended to most, or inside one that was looked at."""
        job = self.question.job
        inside, before = (None, None) if within is None else (within[0], within[1].prefix)
        if job.settings.variant.view_source == "random":
            image = self._random.randrange(len(job.images)) if inside is None else inside.image
            area = (0, 0, *job.images[image].size) if inside is None else inside.box
            return [Window(image, box) for box in random_windows(area, inside is None, self._random)]
        prefix = (await self._attended(self.inputs))[0] if before is None else before
        if prefix is None or prefix.attention is None:
            return []
        number = None if inside is None else 0  # of the one window beside the pictures
        shown = [at for at, cell in enumerate(prefix.inputs.cells) if cell.window == number]
        weights = relative_attention(prefix.attention[shown], await self._neutral() if inside is None else None)
        cells = [prefix.inputs.cells[at] for at in shown]
        if inside is None:
            held = [0.0] * len(job.images)
            for weight, cell in zip(weights.tolist(), cells, strict=True):
                held[cell.image] += weight
            image = held.index(max(held))
            area = (0, 0, *job.images[image].size)
        else:
            image, area = inside.image, inside.box
        layout = density(weights, [cell.box if cell.image == image else None for cell in cells], area)
        return [Window(image, box) for box in propose_windows(layout, area, second=inside is None)]

    def time_is_up(self) -> bool:
        """Tell whether there is no time to look at more, and keep it in mind."""
        self.late = self.late or self.question.clock.search_must_end() is not None
        return self.late

    def warn(self, error: LatentToolError) -> None:
        """Note why a window could not be looked at; the answer without it stands."""
        self.warnings = (f"Not every window could be looked at again: {error.message}",)

    async def _attended(self, *asked: Inputs, begins: Inputs | None = None) -> list[Prefix | None]:
        """Compute prefixes with the attention of their last position; ``None`` for one that cannot be computed."""
        clock = self.question.clock

        def check() -> None:
            clock.require_time("the picture was looked at again")

        found: list[Prefix | None] = []
        for one in await PrefillEach([Prefill(each, check, attend=True, begins=begins) for each in asked]):
            if isinstance(one, Prefix):
                clock.calls += 1
                self.encoded += one.encoded
            elif isinstance(one, IMPOSSIBLE):
                self.warn(one)
            elif isinstance(one, DeadlineError):  # there is an answer already
                self.late = True
            else:
                raise one
            found.append(one if isinstance(one, Prefix) else None)
        return found

    async def _neutral(self) -> Tensor | None:
        """Return the attention under a neutral question, computed once per picture."""
        vlm, job = self.question.vlm, self.question.job
        pixels = {name: value for name, value in self.inputs.tensors.items() if name not in PER_TOKEN}
        key = f"{image_key(pixels)} {(job.system, job.images_first, job.settings.variant.latent_position)}"
        known = vlm.neutral_attention.find(key)
        if known is None:
            try:
                inputs = self.question.inputs(text=NEUTRAL)
            except IMPOSSIBLE:
                return None
            (prefix,) = await self._attended(inputs)
            if prefix is None or prefix.attention is None or len(prefix.attention) != len(self.inputs.cells):
                return None
            known = prefix.attention
            vlm.neutral_attention.put(key, known)
        return known

    async def read(self, windows: Sequence[Window]) -> list[tuple[Window, Seen]]:
        """Answer with each window beside the pictures; those that do not fit the model are left out."""
        shown: list[tuple[Window, Inputs]] = []
        most = min(self.budget.max_new_tokens, READ)
        for window in windows:
            if self.time_is_up():
                break
            try:
                inputs = self.question.inputs([window])
                fits, _ = self.question.fit_context(inputs)
                most = min(most, fits.max_new_tokens)
            except IMPOSSIBLE as error:
                self.warn(error)
                continue
            shown.append((window, inputs))
        if not shown:
            return []
        computed = await self._attended(*(inputs for _, inputs in shown), begins=self.inputs)
        prefixes = [(window, one) for (window, _), one in zip(shown, computed, strict=True) if one is not None]
        if not prefixes:
            return []
        job, clock = self.question.job, self.question.clock
        if job.options is not None:
            return await self._choose(prefixes)
        try:
            decoded = await DecodeEach([prefix for _, prefix in prefixes], most, clock.expired, job.generation)
        except IMPOSSIBLE as error:
            self.warn(error)
            return []
        seen = []
        for (window, prefix), one in zip(prefixes, decoded, strict=True):
            if isinstance(one, IMPOSSIBLE):
                self.warn(one)
                continue
            if isinstance(one, Exception):
                raise one
            answer = self.question.extract(prefix, one)
            late = one.finish_reason == "deadline"
            self.late, self.unheard = self.late or late, self.unheard + late
            # One that was read in part cannot be compared with answers that were read to their end.
            probability = joint(one.log_probabilities, answer) if one.finish_reason == "stop" else 0.0
            reward = reward_of(answer.text, probability, job.cannot_tell)
            seen.append((window, Seen(prefix, one, answer.text, reward)))
        clock.calls += max((len(one.tokens) for one in decoded if not isinstance(one, Exception)), default=0)
        return seen

    async def _choose(self, prefixes: Sequence[tuple[Window, Prefix]]) -> list[tuple[Window, Seen]]:
        """Choose among the options with each window beside the pictures."""
        seen: list[tuple[Window, Seen]] = []
        for window, prefix in prefixes:
            if self.time_is_up():
                break
            try:
                scored = await self.question.score_options(prefix, None, ())
            except IMPOSSIBLE as error:
                self.warn(error)
                continue
            answer = self.question.text_of(prefix, scored)
            reward = reward_of(answer, best_option(scored)[1], self.question.job.cannot_tell)
            seen.append((window, Seen(prefix, scored, answer, reward)))
        return seen
