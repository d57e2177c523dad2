"""One question under way: the steps that answering it takes, each awaiting what it needs of the model.

``work`` puts them in order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from latent_tool.engine.choosing import Said, best_option
from latent_tool.engine.clock import Clock
from latent_tool.engine.in_step import Tell
from latent_tool.engine.job import Job, joint
from latent_tool.engine.rounds import search_step
from latent_tool.errors import ContextLengthError, NotEnoughMemoryError, NumericalError, SettingsError
from latent_tool.method.reward import Logits
from latent_tool.method.search import Outcome as SearchOutcome
from latent_tool.method.search import Round, State, search
from latent_tool.models.decoding import Decoded, ExtractedAnswer, extract_answer, generation_rules
from latent_tool.models.families import answer_marks, answers_behind_words
from latent_tool.models.options import spell
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.models.prompts import Rendered
from latent_tool.models.requests import (
    Attend,
    Decode,
    Reason,
    Score,
    ScoredOptions,
    ScoreOptions,
    Spellings,
    TokenLogProbabilities,
)
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.models.windows import Window
from latent_tool.settings import Budget

__all__ = ["Question"]

# Tokens of the answer that the search leaves time for when there is a deadline.
_RESERVED_TOKENS = 16


class _Latents:
    """What the search awaits (``method.search.LatentModel``), of one prefix."""

    def __init__(self, prefix: Prefix, clock: Clock, options: tuple[Spellings, ...] | None) -> None:
        self.prefix = prefix
        self.clock = clock
        self.options = options  # if the reward is read there

    async def logits(
        self,
        latents: Tensor,
        patches: tuple[tuple[int, ...], ...],
        *,
        answer_only: bool = False,
        attention: bool = False,
    ) -> Logits:
        if self.options is not None:
            scored = await ScoreOptions(self.prefix, latents, patches, self.options)
            self.clock.calls += 2
            return Logits(scored.answer[:, None][:, :0], scored.answer, options=scored.log_probabilities)
        logits = await Score(self.prefix, latents, patches, answer_only, int(attention))
        self.clock.calls += 1
        return logits

    async def attention(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        attention = await Attend(self.prefix, latents, patches)
        self.clock.calls += 1
        return attention


class Question:
    """A job, the model that does it, and the time it takes.

    Args:
        vlm: the model; facts are asked of it directly, forward passes are awaited.
        job: what to do.
        now: seconds from an arbitrary start, monotonic.
    """

    def __init__(self, vlm: VisionLanguageModel, job: Job, now: Callable[[], float]) -> None:
        self.vlm = vlm
        self.job = job
        self.now = now
        self.clock = Clock(job, now)
        self._rendered: dict[tuple[str, int], Rendered] = {}

    def inputs(self, windows: Sequence[Window] = (), text: str | None = None) -> Inputs:
        """Render the prompt as the model takes it, with windows of the images beside them.

        ``text``: another question about the same images.
        """
        try:
            return self.vlm.prepare(
                self.job.images,
                self.job.question if text is None else text,
                system=self.job.system,
                position=self.job.settings.variant.latent_position,
                thinking_markers=self.job.settings.thinking_markers,
                images_first=self.job.images_first,
                windows=windows,
                rendered=self._rendered,
            )
        except MemoryError:
            raise NotEnoughMemoryError("The images do not fit into memory.", "Use smaller images.") from None

    @cached_property
    def spellings(self) -> tuple[Spellings, ...]:
        """The token sequences that spell each option; raises ``QuestionError`` where that cannot be."""
        return spell(self.vlm, [[option] for option in self.job.options or ()])

    @property
    def answers_behind_words(self) -> bool:
        """Whether the first words of a reply say nothing of how sure its answer is."""
        prompt = f"{self.job.system or ''}\n{self.job.question}"
        return answers_behind_words(self.vlm.model.config.model_type, prompt)

    def check_options(self) -> None:
        """Raise ``SettingsError`` if the reward is read in options that there are none of."""
        if self.job.settings.reward_position == "options" and self.job.options is None:
            raise SettingsError(
                "The reward is read in the options, and the question has none.",
                "Give the question options, or read the reward elsewhere: reward_position='answer'.",
            )

    def _answer_room(self) -> int:
        """Tokens that the answer needs at least."""
        if self.job.options is None:
            return 1
        return 1 + max(len(tokens) for spellings in self.spellings for tokens in spellings)

    def fit_context(self, inputs: Inputs) -> tuple[Budget, list[str]]:
        """Cut the budget to what the model's context holds."""
        limit, budget, warnings = self.vlm.context_length, self.job.budget, list[str]()
        if limit is None:
            return budget, warnings
        fixed = inputs.length + len(inputs.tail)
        if self.job.settings.latents:
            fixed += self.job.settings.latents + len(inputs.markers.opening) + len(inputs.markers.closing)
        needed = self._answer_room()
        if fixed + needed > limit:
            options = "" if self.job.options is None else f", the longest option {needed}"
            raise ContextLengthError(
                f"Image, question and latents take {fixed} tokens{options}; the model's context has {limit}.",
                "Shorten the question or the options, make the image smaller or use fewer latents.",
            )
        if self.job.options is None:
            needed = min(budget.max_new_tokens, 32)
        patches = min(budget.max_patches, max(0, limit - fixed - needed))
        if patches < budget.max_patches:
            budget = budget.but(max_patches=patches)
            warnings.append(f"max_patches was cut to {patches} to fit the model's context of {limit} tokens.")
        room = limit - fixed - (budget.max_patches if self.job.settings.latents else 0)
        if room < budget.max_new_tokens and self.job.options is None:
            budget = budget.but(max_new_tokens=max(1, room))
            warnings.append(f"max_new_tokens was cut to {max(1, room)} to fit the model's context of {limit} tokens.")
        return budget, warnings

    async def initial_latents(self, prefix: Prefix) -> Tensor:
        """Return where the latents start, ``(L, d)`` float32."""
        start = await self._start(prefix)
        return self._noised_start(start) if self.job.settings.variant.init_noise else start

    async def _start(self, prefix: Prefix) -> Tensor:
        count, settings = self.job.settings.latents, self.job.settings
        if settings.init == "mean":
            return self.vlm.mean_embedding().expand(count, -1).clone()
        if settings.init == "reasoning":
            before = self.now()
            tokens, calls = await Reason(prefix, count, self.clock.expired)
            self.clock.calls += calls
            self.reserve_time((self.now() - before) / max(calls, 1))
            if tokens:
                return self.vlm.embed(tokens).float()
        return self.vlm.embed([self.init_token()]).float().expand(count, -1).clone()

    def _noised_start(self, start: Tensor) -> Tensor:
        """Move the initial latents once by noise, from a stream of its own."""
        variant = self.job.settings.variant
        unit = self.vlm.embedding_rms() if variant.scale == "embedding_rms" else 1.0
        generator = torch.Generator().manual_seed((self.job.seed + 2**62) % 2**63)
        noise = torch.randn(start.shape, generator=generator).to(start)
        return start + variant.init_noise * unit * noise

    def init_token(self) -> int:
        """Return the token whose embedding the latents start from, unless they start from reasoning.

        Raises ``SettingsError`` if the model has no such token.
        """
        tokenizer, wanted = self.vlm.tokenizer, self.job.settings.variant.init_token
        if wanted is not None:
            token = tokenizer.convert_tokens_to_ids(wanted)
            if token is None or token == tokenizer.unk_token_id:
                raise SettingsError(f"The model has no token {wanted!r}.", "Choose another init_token, or none.")
            return int(token)
        usual = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        if usual is not None and tokenizer.convert_ids_to_tokens(usual) != "<|endoftext|>":  # the unknown token's
            usual = None
        candidates = (usual, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        return int(next(token for token in candidates if token is not None))

    def reserve_time(self, per_call: float) -> None:
        """Keep time for decoding an answer, but never more than half of what is left."""
        if self.job.deadline is not None:
            wanted = per_call * (1 + min(self.job.budget.max_new_tokens, _RESERVED_TOKENS))  # and the plain probability
            self.clock.reserve = max(0.0, min(wanted, (self.job.deadline - self.now()) / 2))

    async def search(
        self, prefix: Prefix, start: Tensor, budget: Budget, enough: Callable[[State], Awaitable[str | None]]
    ) -> SearchOutcome:
        """Search from the initial latents ``(L, d)`` unless they are ``enough`` already, and tell every round."""
        settings, began = self.job.settings, self.now()

        async def on_round(row: Round) -> None:
            if row.number == 0 and not self.clock.reserve:
                self.reserve_time(self.now() - began)
            await Tell(search_step(row, prefix.inputs.cells, budget))

        return await search(
            _Latents(prefix, self.clock, self.spellings if settings.reward_position == "options" else None),
            start.to(self.vlm.device),
            settings,
            budget,
            generator=torch.Generator().manual_seed(self.job.seed),
            unit=self.vlm.embedding_rms() if settings.variant.scale == "embedding_rms" else 1.0,
            stop=self.clock.search_must_end,
            on_round=on_round,
            enough=enough,
        )

    async def decode(
        self,
        prefix: Prefix,
        latents: Tensor | None,
        patches: Sequence[int],
        budget: Budget,
        floor: float = 0.0,
        begun: Decoded | None = None,
    ) -> Decoded:
        """Decode, past the deadline too for the one token without which there is no answer.

        Args:
            floor: give up with ``finish_reason="unsure"`` once the joint probability of the answer's tokens is
                below this.
            begun: what was decoded of the same state before it was given up.
        """
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return self.clock.expired() and asked > 1

        decoded = await Decode(
            prefix, latents, patches, budget.max_new_tokens, stop, self.job.generation, begun=begun, floor=floor
        )
        self.clock.calls += len(decoded.tokens) - (0 if begun is None else len(begun.tokens))
        return decoded

    async def score_options(self, prefix: Prefix, latents: Tensor | None, patches: Sequence[int]) -> ScoredOptions:
        """Score the options after one state, past the deadline too: without them there is no answer.

        Raises ``NumericalError`` where the model's logits are not finite.
        """
        self.clock.expired()  # raises if the question was cancelled
        rows = None if latents is None else latents[None]
        scored = await ScoreOptions(prefix, rows, (tuple(patches),), self.spellings, tokens=True)
        self.clock.calls += 1 if latents is None else 2
        if not bool(scored.log_probabilities.isfinite().all()):
            raise NumericalError(
                "The model's logits are not finite for these options.", "Load the model in float32 or bfloat16."
            )
        return scored

    async def plain_probability(
        self,
        prefix: Prefix,
        latents: Tensor | None,
        decoded: Decoded,
        answer: ExtractedAnswer,
        plain: Decoded | None = None,
    ) -> float | None:
        """Return the joint probability of the answer's tokens by the model before it thought.

        One forward pass, unless ``plain``, what that model itself has decoded, begins with the same tokens.

        The search raises the confidence in whatever it ends with; this one it cannot raise. The pass is made past the
        deadline, too: without it an answer that was just in time would have no confidence.
        """
        if latents is None or answer.start == answer.stop:
            return joint(decoded.log_probabilities, answer)
        if plain is not None and plain.tokens[: answer.stop] == decoded.tokens[: answer.stop]:
            return joint(plain.log_probabilities, answer)
        self.clock.expired()  # raises if the question was cancelled
        log_p = await TokenLogProbabilities(prefix, None, (), decoded.tokens[: answer.stop])
        self.clock.calls += 1
        return joint(log_p, answer)

    def text_of(self, prefix: Prefix, said: Said) -> str:
        """Return the answer of what a state says: the best option, or what is found among the decoded tokens."""
        if isinstance(said, ScoredOptions):
            return (self.job.options or ())[best_option(said)[0]]
        return self.extract(prefix, said).text

    def extract(self, prefix: Prefix, decoded: Decoded) -> ExtractedAnswer:
        """Find the answer among the decoded tokens."""
        rules = generation_rules(self.vlm.model, prefix.length)
        marks = answer_marks(self.vlm.model.config.model_type)
        closing = prefix.inputs.markers.closing
        return extract_answer(decoded.tokens, self.vlm.tokenizer, closing, rules.stop_tokens, marks)
