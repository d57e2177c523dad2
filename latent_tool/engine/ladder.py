"""The ladder inside one call: an answer costs more only while it is unsure.

    plain        the model's own answer; it stands if its probability reaches the budget's ``target_confidence``
    views        below ``look_below``: windows of the picture beside it; if the answer becomes surer with one, it stands
    reasoning    the answer from where the latents start; it stands unless its probability is below ``search_below``
    search       the answer from the best state that the search finds

A search sharpens what a model leans to. Where it leans to nothing, the likeliest first token having less than an even
share of the ``top_k`` that the reward looks at, there is none, and the answer is that of the reasoning: a search would
make any token sound sure. (Of random weights, one of probability 0.05 got 0.94 in ten rounds.)

All rungs share the prefix, and nothing is computed twice: a decoding is given up as soon as its probability can no
longer reach what its rung asks for, unless windows are to be compared with it; the search begins with the state that
the reasoning was decoded from, and if that stays the best one, its decoding goes on where it was given up. The ladder
does not look at ``min_confidence``: a calibrated threshold speaks of answers that all came about in one way.

Views come before the latents, and an answer that became surer by one is not thought over again: on small details a
window is what helps, and latents after it change hardly an answer, but make all of them sound sure. But what the
reasoning says of the whole picture is heard, as is what the plain model said, in how sure that answer is; what cannot
be heard counts as an objection. If no window helps and thinking ends in "cannot tell", that is the answer, whatever the
plain model said: two ways to answer that disagree are no reason to be sure.

Of a question with options every rung scores all of them in place of decoding, and goes by the best one's probability.

Without latents there is the plain model alone. There is the search alone where ``search_below`` is ``None``, where the
reward is the confidence, and without rounds, which asks for the start of the latents as such. Where
``target_confidence`` is ``None``, the search follows whatever the plain model says, unless a window helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from latent_tool.cannot_tell import says_cannot_tell
from latent_tool.engine.choosing import Said, best_option, choose
from latent_tool.engine.in_step import Tell
from latent_tool.engine.job import Reached, joint
from latent_tool.engine.looking import IMPOSSIBLE, READ, UNHEARD, Looked, hides_pixels, look_again, reward_of
from latent_tool.engine.question import Question
from latent_tool.method.search import Outcome as SearchOutcome
from latent_tool.method.search import State
from latent_tool.models.decoding import Decoded
from latent_tool.models.prefix import Prefix
from latent_tool.models.requests import ScoredOptions
from latent_tool.schema import ReasoningStep
from latent_tool.settings import Budget

__all__ = ["Climbed", "climb"]

_HEARD = 0.1  # what is said of the whole picture beside a window counts as nothing where it is less sure


@dataclass(frozen=True, kw_only=True)
class Climbed(Reached):
    """An answer, and what the ladder knows of it besides.

    ``prefix``: what it was decoded after, with the windows that stayed; ``looked``: what looking again led to.
    """

    prefix: Prefix
    looked: Looked


async def climb(question: Question, prefix: Prefix, budget: Budget) -> Climbed:
    """Answer from the first rung that is sure enough, else from the last."""
    job, clock = question.job, question.clock
    target, search_below = budget.target_confidence, job.settings.search_below
    alone = job.confidence == "reward" or not budget.iterations or search_below is None
    may_look = bool(job.settings.latents and job.settings.view_depth and budget.max_views) and not alone
    looks = may_look and hides_pixels(job.images, prefix.inputs)
    # The whole plain answer is needed to say whether a window made it surer, and to have one when time is up.
    finishes = looks or (may_look and job.deadline is not None)
    if alone or target is None:
        target = search_below = None
    question.init_token()  # a token that does not exist is refused on every rung
    clock.phase_done("search")  # every result says how long the search took, if only that there was none

    # 1. The plain model.
    plain: Said | None = None
    if not job.settings.latents or target is not None or finishes:
        await Tell(ReasoningStep(phase="decode", iterations=budget.iterations))
        floor = target if job.settings.latents and target is not None else 0.0
        plain = await _ask(question, prefix, None, (), budget, floor)
        clock.phase_done("decode")
        if not job.settings.latents:
            return await _from_state(question, prefix, plain, None, "no_latents")
        if isinstance(plain, Decoded) and plain.finish_reason == "deadline":
            return await _from_state(question, prefix, plain, None, "deadline")
        sure_of_it = target is not None and _probability(question, prefix, plain) >= target
        blind = says_cannot_tell(question.text_of(prefix, plain), job.cannot_tell)
        if sure_of_it and not (looks and blind):
            return await _from_state(question, prefix, plain, None, "confident")

    # 2. Windows of the picture beside it.
    looked = Looked()
    if finishes and plain is not None:
        if not _whole(plain):
            plain = await _ask(question, prefix, None, (), budget, begun=plain)
        answer = question.text_of(prefix, plain)
        reward = reward_of(answer, _probability(question, prefix, plain), job.cannot_tell)
        clock.phase_done("decode")
        # Reasoning in words may have hidden how sure the answer behind it is.
        if target is not None and reward >= target:
            return await _from_state(question, prefix, plain, None, "confident")
        if looks and reward < job.settings.look_below:
            looked = await look_again(question, prefix.inputs, answer, reward, budget)
            clock.phase_done("look")
        if (closer := looked.best) is not None:
            if job.options is None:  # the confidence in one of those asks nothing else
                looked = await _hear(question, prefix, plain, looked, budget)
            if looked.late:
                warning = "The deadline left no time to hear all that there is to say of the answer."
                looked = replace(looked, warnings=(*looked.warnings, warning))
            reason = "deadline" if looked.late else "looked"
            return await _from_state(question, closer.prefix, closer.said, None, reason, None, looked)
        if sure_of_it or clock.search_must_end():
            return await _from_state(
                question, prefix, plain, None, "confident" if sure_of_it else "deadline", None, looked
            )

    # 3. Where the latents start: the search asks whether that is enough, once it has scored it.
    begun: Said | None = None

    async def enough(start: State) -> str | None:
        nonlocal begun
        if search_below is None:
            return None
        clock.phase_done("search")
        begun = await _ask(question, prefix, start.latents, start.patches, budget, search_below)
        clock.phase_done("decode")
        if _probability(question, prefix, begun) >= search_below:
            return "confident"
        if job.options is not None or question.answers_behind_words:
            return None
        return "undecided" if 0 <= start.first_token_probability < 1 / job.settings.top_k else None

    # 4. The search.
    searched = await question.search(prefix, await question.initial_latents(prefix), budget, enough)
    clock.phase_done("search")

    await Tell(ReasoningStep(phase="decode", iterations=budget.iterations))
    best = searched.best
    decoded = begun if best is searched.start else None
    if decoded is None or not _whole(decoded):
        decoded = await _ask(question, prefix, best.latents, best.patches, budget, begun=decoded)
    if not _whole(decoded) and isinstance(plain, Decoded) and _whole(plain):  # a whole answer is better than a piece
        return await _from_state(question, prefix, plain, None, "deadline", None, looked)
    return await _from_state(question, prefix, decoded, searched, searched.stop_reason, plain, looked)


async def _hear(question: Question, prefix: Prefix, plain: Said, looked: Looked, budget: Budget) -> Looked:
    """Ask the reasoning over the whole picture, too, for how far an answer with a window is supported."""
    clock, reasoned, late = question.clock, UNHEARD, True
    if not clock.search_must_end():
        await Tell(ReasoningStep(phase="decode", iterations=budget.iterations))
        short = budget.but(max_new_tokens=min(budget.max_new_tokens, READ))
        try:
            latents = await question.initial_latents(prefix)
            said = None if clock.expired() else await _ask(question, prefix, latents, (), short, _HEARD)
        except IMPOSSIBLE as error:
            warning = f"What the reasoning says of the whole picture could not be heard: {error.message}"
            looked, late = replace(looked, warnings=(*looked.warnings, warning)), False
        else:
            if isinstance(said, Decoded) and said.finish_reason != "deadline":
                reasoned, late = _voice(question, prefix, said), False
        clock.phase_done("decode")
    return replace(looked, whole=(_voice(question, prefix, plain), reasoned), late=looked.late or late)


def _voice(question: Question, prefix: Prefix, said: Said) -> tuple[str, float]:
    """What is said of the whole picture, and how sure it is; 0 where it was not read to its end."""
    answer, reward = question.text_of(prefix, said), 0.0
    if isinstance(said, Decoded) and said.finish_reason == "stop":
        reward = reward_of(answer, _probability(question, prefix, said), question.job.cannot_tell)
    return answer, reward if reward >= _HEARD else 0.0


async def _ask(
    question: Question,
    prefix: Prefix,
    latents: Tensor | None,
    patches: Sequence[int],
    budget: Budget,
    floor: float = 0.0,
    begun: Said | None = None,
) -> Said:
    """Decode from a state, with ``floor`` and ``begun`` as ``Question.decode`` has them, or score the options.

    Where the answer may stand behind words that do not count, no decoding is given up.
    """
    if question.job.options is not None:
        return await question.score_options(prefix, latents, patches)
    if question.answers_behind_words:
        floor = 0.0
    assert not isinstance(begun, ScoredOptions)
    return await question.decode(prefix, latents, patches, budget, floor, begun)


def _whole(said: Said) -> bool:
    """Whether a decoding was neither given up nor cut by the deadline; options are always scored whole."""
    return isinstance(said, ScoredOptions) or said.finish_reason in ("stop", "length")


def _probability(question: Question, prefix: Prefix, said: Said) -> float:
    """How sure a state is of its answer; 0 where there is none.

    This is the joint probability of the answer's tokens, or the best option's probability among all.
    """
    if isinstance(said, ScoredOptions):
        return best_option(said)[1]
    if not _whole(said):
        return 0.0
    answer = question.extract(prefix, said)
    return (joint(said.log_probabilities, answer) or 0.0) if answer.text else 0.0


async def _from_state(
    question: Question,
    prefix: Prefix,
    said: Said,
    searched: SearchOutcome | None,
    stop_reason: str,
    plain: Said | None = None,
    looked: Looked | None = None,
) -> Climbed:
    """The answer of the best state of a search, or without one of the plain model."""
    latents, patches = (None, ()) if searched is None else (searched.best.latents, searched.best.patches)
    if isinstance(said, ScoredOptions):
        by_plain = said if latents is None else plain or await question.score_options(prefix, None, ())
        assert isinstance(by_plain, ScoredOptions)
        job = question.job
        pool = job.confidence != "answer_probability"
        chosen, decoded, answer = choose(job.options or (), said, by_plain, pool=pool, unsure=job.unsure)
        probability: float | None = float(chosen.plain[chosen.best].double().exp())
        question.clock.phase_done("decode")
        return Climbed(
            latents,
            patches,
            searched,
            decoded,
            answer,
            probability,
            stop_reason,
            chosen,
            prefix=prefix,
            looked=looked or Looked(),
        )
    assert not isinstance(plain, ScoredOptions)
    answer = question.extract(prefix, said)
    probability = await question.plain_probability(prefix, latents, said, answer, plain)
    question.clock.phase_done("decode")
    looked = looked or Looked()
    return Climbed(latents, patches, searched, said, answer, probability, stop_reason, prefix=prefix, looked=looked)
