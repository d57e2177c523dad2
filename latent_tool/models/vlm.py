"""One loaded vision-language model, and what the method asks of it for one image and question.

``VisionLanguageModel.prefill`` computes the prefix once; ``VisionLanguageModel.score``, ``attend``, ``decode`` and
``token_log_probabilities`` continue from forks of its cache. All calls are exact: they equal one full forward over
``[prefix | V | opening | T | closing, tail | answer]``. This module knows nothing of rewards or of the search.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.errors import ContextLengthError, ImageError, ModelLoadError, ModelNotSupportedError, NumericalError
from latent_tool.method.asking import contained
from latent_tool.method.reward import Logits, entropy, entropy_of
from latent_tool.models.attention import tap_attention
from latent_tool.models.cache import fork_cache
from latent_tool.models.cells import View, cell_boxes
from latent_tool.models.decoding import Decoded, generation_rules, greedy, sampler
from latent_tool.models.families import family
from latent_tool.models.memory import out_of_memory
from latent_tool.models.prefill import Prefilling, Suffix
from latent_tool.models.prefix import Cell, Computed, Inputs, Prefix, Stem, Stems, common_length
from latent_tool.models.prompts import find_markers, render_prompt
from latent_tool.models.requests import (
    Attend,
    Decode,
    Reason,
    Sample,
    Score,
    TokenEntropies,
    TokenLogProbabilities,
    never,
)
from latent_tool.models.shared_prefix import (
    SuffixBatch,
    hides_exactly,
    install,
    installed,
    layers_fit,
)
from latent_tool.models.windows import Window, beside, cut_out, moved
from latent_tool.settings import PREFIX_CACHE_BYTES, GenerationSettings

__all__ = ["VisionLanguageModel"]


Decoding = Generator[int | None, "_Next", Decoded]

# Logits that teacher forcing holds at once: of several questions, if all fit, else of some tokens of one.
_MOST_LOGITS = 2**26

# Tokens that a decoding writes at least before it can be paused.
_SLICE = 16


class _Next(NamedTuple):
    """What a model says of the next token of one row: logits and log-probabilities ``(vocabulary,)``, float32, entropy
    ``()``, and the most probable token."""

    logits: Tensor
    log_p: Tensor
    entropy: Tensor
    best: int


@dataclass(frozen=True)
class _Row:
    """A decoding, and what it begins after: a prefix, what is known of its cells, and the suffix still to be run."""

    prefix: Prefix
    stem: Stem | None
    suffix: Suffix
    decoding: Decoding


class VisionLanguageModel(Prefilling):
    """A frozen vision-language model and its processor.

    Calls may come from any thread: one lock lets one forward pass run at a time, and no state of a question is kept on
    the model between calls; what was computed of the last images is kept (``prefix_cache``).

    Args:
        prefix_cache_bytes: what the prefixes of images may take together, so that another question about the same
            image does not compute them again; 0: nothing is kept.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, name: str, prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    ) -> None:
        super().__init__(model, prefix_cache_bytes)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        self._processor_lock = threading.Lock()
        # None: not known before the first question.
        per_layer = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None)
        self._shares: bool | None = None if not per_layer and install(model) else False

    # ------------------------------------------------------------------ facts about the model

    @property
    def context_length(self) -> int | None:
        """Positions the decoder was made for, or ``None`` if the checkpoint does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text that stands alone, without what a tokenizer adds to every text."""
        with self._processor_lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    # ------------------------------------------------------------------ from a question to the cache

    def prepare(
        self,
        images: Sequence[Image],
        question: str,
        *,
        system: str | None = None,
        position: Literal["generation_start", "user_turn"] = "generation_start",
        thinking_markers: Literal["auto"] | tuple[str, str] | None = "auto",
        images_first: bool = True,
        windows: Sequence[Window] = (),
    ) -> Inputs:
        """Render and tokenise a question about images, which stand before it or after it.

        ``windows``: parts of the images that are shown beside them, as the family's row says.

        Raises ``QuestionError``, ``ContextLengthError`` (before any image is processed if the text alone is too long),
        ``ImageError`` if the processor does not take the images, or ``ModelLoadError`` if the template or processor
        loses them.
        """
        row = family(self.model.config.model_type)
        if windows and row is not None and row.views == "cells":
            ask = partial(
                self.prepare,
                system=system,
                position=position,
                thinking_markers=thinking_markers,
                images_first=images_first,
            )
            parts = [ask([part], question) for part in cut_out(images, windows)]
            return beside(ask(images, question), parts, windows)
        pictures, images = len(images), [*images, *cut_out(images, windows)]
        # Tokenizers and processors keep state (padding, truncation), so one thread at a time.
        with self._processor_lock, self.few_threads():
            prompt = render_prompt(
                self.processor,
                question,
                len(images),
                system,
                position,
                images_first=images_first,
                needs_template=row is None or row.chat_template,
            )
            self.require_context(len(self.tokenizer(prompt.prefix, add_special_tokens=False, verbose=False).input_ids))
            bos = self.tokenizer.bos_token
            special = not (bos is not None and prompt.prefix.startswith(bos))
            try:
                tensors = dict(
                    self.processor(
                        text=[prompt.prefix],
                        images=[list(images)],
                        return_tensors="pt",
                        add_special_tokens=special,
                        return_text_replacement_offsets=True,
                    )
                )
            except (ValueError, IndexError, StopIteration, ZeroDivisionError) as error:
                if self._takes([new_image("RGB", (256, 256))]) and not self._takes(images):
                    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
                    raise ImageError(
                        f"The model's processor does not take an image of this size ({sizes}): {error}",
                        "Crop the image, pad it to a less extreme shape, or make it larger.",
                    ) from error
                raise ModelLoadError(
                    f"The model's processor cannot handle this question ({error}).",
                    "Check the checkpoint's chat template and processor configuration.",
                ) from error
            tail = tuple(self.tokenizer(prompt.tail, add_special_tokens=False).input_ids) if prompt.tail else ()
            markers = find_markers(self.tokenizer, thinking_markers, prompt)
        for name in ("labels", "num_crops"):  # for training, or for the processor itself
            tensors.pop(name, None)
        written = tensors.pop("text_replacement_offsets", None) or [[]]
        texts = [item["replacement"] for item in written[0] if item["type"] == "image"]
        self.require_context(tensors["input_ids"].shape[1])
        cells, warnings = self._cells(tensors, images, texts)
        return Inputs(tensors, tail, markers, moved(cells, pictures, windows), prompt.warnings + warnings, len(images))

    def _takes(self, images: Sequence[Image]) -> bool:
        """Whether the image processor takes images, whatever stands in the prompt."""
        try:
            self.processor.image_processor(images=[list(images)], return_tensors="pt")
        except (ValueError, IndexError, StopIteration, ZeroDivisionError):
            return False
        return True

    def require_context(self, tokens: int) -> None:
        """Raise ``ContextLengthError`` if so many tokens, and one more, do not fit the model's context."""
        limit = self.context_length
        if limit is not None and tokens >= limit:
            raise ContextLengthError(
                f"Image and question take {tokens} tokens; the model's context has {limit}.",
                "Shorten the question or make the image smaller.",
            )

    def _cells(
        self, tensors: Mapping[str, Any], images: Sequence[Image], texts: Sequence[str]
    ) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
        """The image cells of the prompt, and warnings.

        ``texts``: per image, what the processor wrote in its place; empty if it does not say.
        """
        total = int((tensors["input_ids"] == self.image_token).sum())
        if total == 0:
            raise ModelLoadError(
                "The prompt has no image cells: the chat template or the processor drops the image.",
                "Mend the checkpoint's chat_template.jinja so that an image content part becomes the image token.",
            )
        token = self.tokenizer.convert_ids_to_tokens(self.image_token)
        counts = [text.count(token) for text in texts]
        if len(counts) != len(images) or sum(counts) != total:
            texts = ()
            counts = [total // len(images)] * len(images)
        if sum(counts) != total:
            raise ModelNotSupportedError(
                f"The {total} image cells of the prompt cannot be told apart by image.",
                "Ask about one image at a time.",
            )
        row = family(self.model.config.model_type)
        cells: list[Cell] = []
        known = True
        for index, (image, count) in enumerate(zip(images, counts, strict=True)):
            view = View(
                self.model.config,
                self.processor.image_processor,
                tensors,
                index,
                image.width,
                image.height,
                count,
                texts,
            )
            boxes = None if row is None else cell_boxes(row.cells, view)
            known = known and boxes is not None
            cells += [Cell(index, box) for box in boxes or [None] * count]
        if known:
            return tuple(cells), ()
        kind = self.model.config.model_type
        return tuple(cells), (f"The cell geometry of model family {kind!r} is not known: patches carry no boxes.",)

    # ------------------------------------------------------------------ scoring

    def score(self, prefix: Prefix, latents: Tensor, patches: Sequence[Sequence[int]]) -> Logits:
        """Logits of ``N`` states at the latents and where the answer begins; latents ``(N, L, d)``."""
        return self.score_many([Score(prefix, latents, patches)])[0]

    def score_many(self, requests: Sequence[Score]) -> list[Logits]:
        """``score`` for several questions: in one batch where prefixes can be shared, else one after another."""
        if self.shares_prefixes(requests[0].prefix):
            return self._score_shared(requests)
        return [self._score_plain(each.prefix, each.latents, each.patches, each.answer_only) for each in requests]

    def _score_shared(self, requests: Sequence[Score]) -> list[Logits]:
        prefixes: list[Prefix] = []
        stems: list[Stem | None] = []
        parts: list[Tensor] = []
        taps: dict[int, slice] = {}
        places = {-1}
        asked: list[tuple[int, Stem | None, list[int], range]] = []
        for request in requests:
            cells = [tuple(each) for each in request.patches]
            stem = request.prefix.stems.find(min(cells, key=len)[: common_length(cells)])
            known = 0 if stem is None else len(stem.cells)
            groups = _by_length(cells)
            for members in groups:
                latents = request.latents if len(groups) == 1 else request.latents[members]
                parts.append(self._suffix(request.prefix, latents, [cells[row][known:] for row in members]).embeddings)
            inputs = request.prefix.inputs
            after = len(inputs.markers.closing) + len(inputs.tail)
            at_latents = range(-after - request.latents.shape[1], -after)
            if not request.answer_only:
                places.update(at_latents)
            asked.append((len(prefixes), stem, [row for members in groups for row in members], at_latents))
            for row in range(len(prefixes), len(prefixes) + len(cells)):
                if request.attention:
                    taps[row] = slice(at_latents.start, at_latents.stop or None)
            prefixes += [request.prefix] * len(cells)
            stems += [stem] * len(cells)
        added = any(
            len(cells) > (0 if stem is None else len(stem.cells))
            for request, (_, stem, _, _) in zip(requests, asked, strict=True)
            for cells in request.patches
        )
        keep = sorted(places)
        batch = SuffixBatch(self, prefixes, stems, keep=added)
        batch.taps = taps
        logits = batch.extend(parts, keep)
        found = []
        for request, (first, stem, order, at_latents) in zip(requests, asked, strict=True):
            self._remember(batch, request, first, stem, order)
            rows = logits[first : first + len(order)]
            read = None
            if request.attention:
                read = torch.stack([batch.attention(first + row) for row in range(len(order))])
            if order != sorted(order):
                back = torch.tensor(order, device=rows.device).argsort()
                rows, read = rows[back], None if read is None else read[back]
            begin = 0 if request.answer_only else keep.index(at_latents.start)
            count = 0 if request.answer_only else len(at_latents)
            found.append(Logits(rows[:, begin : begin + count], rows[:, -1], read))
        return found

    def _remember(
        self, batch: SuffixBatch, request: Score, first: int, stem: Stem | None, order: Sequence[int]
    ) -> None:
        """Keep what a batch computed of cells that were not in the stem."""
        known = 0 if stem is None else len(stem.cells)
        rows = {tuple(request.patches[index]): first + place for place, index in enumerate(order)}
        layers = [(layer.keys, layer.values) for layer in batch.cache.layers]
        if any(len(cells) > known for cells in rows) and len({(keys.shape, keys.device) for keys, _ in layers}) == 1:
            request.prefix.stems.add(
                [
                    Computed(layers, row, batch.column(row, known), cells, stem)
                    for cells, row in rows.items()
                    if len(cells) > known
                ]
            )

    def _score_plain(
        self, prefix: Prefix, latents: Tensor, patches: Sequence[Sequence[int]], answer_only: bool = False
    ) -> Logits:
        """One batch per number of injected cells, each with its own view of the prefix."""
        rows: list[Tensor | None] = [None] * len(patches)
        for members in _by_length(patches):
            suffix = self._suffix(prefix, latents[members], [patches[index] for index in members])
            keep = [] if answer_only else list(range(suffix.latents.start, suffix.latents.stop))
            logits, _ = self._continue(prefix, suffix, [*keep, suffix.length - 1])
            for row, index in zip(logits, members, strict=True):
                rows[index] = row
        stacked = torch.stack([row for row in rows if row is not None])
        return Logits(stacked[:, :-1], stacked[:, -1])

    def shares_prefixes(self, prefix: Prefix) -> bool:
        """Whether rows of this model can share a prefix without copying it; checked against the plain path once."""
        if self._shares is False or not installed(self.model):
            return False
        with self._lock:
            if self._shares is None:
                self._shares = self._sharing_is_exact(prefix)
        return self._shares and layers_fit(prefix.cache)

    def _sharing_is_exact(self, prefix: Prefix) -> bool:
        """Compare both paths on states of different length, then on one that begins with cells seen before."""
        if not layers_fit(prefix.cache):
            return False
        tokens = prefix.inputs.tensors["input_ids"][0, :2].tolist()
        latents = self.embed(tokens)[None]
        prefix = replace(prefix, stems=Stems())
        windows = getattr(self.model.config.get_text_config(), "sliding_window", None) is not None
        for patches in ([(), (0,)], [(0, 0)]):
            request = Score(prefix, latents.expand(len(patches), -1, -1), patches)
            expected = self._score_plain(request.prefix, request.latents, request.patches).answer.float()
            try:
                (logits,) = self._score_shared([request])
                if windows and not hides_exactly(prefix.cache):
                    return False
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if out_of_memory(error):
                    raise
                return False
            tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
            tolerance *= max(1.0, float(expected.abs().max()))
            if not bool((logits.answer.float() - expected).abs().max() <= tolerance):
                return False
        return True

    # ------------------------------------------------------------------ attention

    def attend(self, prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> Tensor:
        """Attention ``(L, C)`` of the latents ``(L, d)`` to the image cells, mean over heads and layers, float32."""
        return self.attend_many([Attend(prefix, latents, patches)])[0]

    def attend_many(self, requests: Sequence[Attend]) -> list[Tensor]:
        """``attend`` for several questions."""
        if self.shares_prefixes(requests[0].prefix):
            known = [self._begin(each.prefix, each.patches) for each in requests]
            batch = SuffixBatch(self, [each.prefix for each in requests], [stem for stem, _ in known], keep=False)
            parts = []
            for at, (each, (_, cells)) in enumerate(zip(requests, known, strict=True)):
                suffix = self._suffix(each.prefix, each.latents[None], [cells])
                parts.append(suffix.embeddings)
                after = suffix.latents.stop - suffix.length
                batch.taps[at] = slice(after - len(each.latents), after or None)
            batch.extend(parts, [-1])
            return [batch.attention(row) for row in range(len(requests))]
        rows = [self._suffix(each.prefix, each.latents[None], [each.patches]) for each in requests]
        found = []
        for each, row in zip(requests, rows, strict=True):
            with self._lock, tap_attention(self.model, row.latents, each.prefix.columns) as tap:
                given = {} if tap.switched else {"output_attentions": True}
                output = self._run(each.prefix, row, [row.length - 1], **given)
            if not tap.switched:
                for layer in output.attentions or ():
                    if layer is not None:
                        tap.add(layer[:, :, tap.rows].float())
            if not tap.layers:
                raise ModelNotSupportedError(
                    f"{type(self.model).__name__} does not show its attention.",
                    "Load it with attn_implementation='eager', or search without patches.",
                )
            found.append(tap.mean()[0])
        return found

    def _begin(self, prefix: Prefix, patches: Sequence[int]) -> tuple[Stem | None, Sequence[int]]:
        """What is known of a state's cells, and the cells that remain to be run."""
        stem = prefix.stems.find(tuple(patches))
        return stem, patches if stem is None else patches[len(stem.cells) :]

    # ------------------------------------------------------------------ decoding

    def decode(
        self,
        prefix: Prefix,
        latents: Tensor | None,
        patches: Sequence[int],
        max_new_tokens: int,
        stop: Callable[[], bool] = never,
        generation: GenerationSettings | None = None,
    ) -> Decoded:
        """Decode greedily from exactly the state that was scored, with the model's own generation rules.

        Args:
            latents: ``(L, d)``, or ``None`` for the plain model.
            patches: injected cells.
            max_new_tokens: tokens at most.
            stop: asked before every token; ``True`` ends the decoding with ``finish_reason="deadline"``.
            generation: what is changed of those rules.
        """
        (decoded,) = self.decode_many([Decode(prefix, latents, patches, max_new_tokens, stop, generation)])
        if isinstance(decoded, Exception):
            raise decoded
        return decoded

    def decode_many(self, requests: Sequence[Decode]) -> list[Decoded | Exception]:
        """``decode`` for several questions; those that finish early leave the batch, those that fail harm no other."""
        shared = bool(requests) and self.shares_prefixes(requests[0].prefix)
        rows = []
        for each in requests:
            stem: Stem | None = None
            cells, latents = each.patches, None if each.latents is None else each.latents[None]
            if shared and latents is not None:
                stem, cells = self._begin(each.prefix, cells)
            written = each.begun.tokens if each.begun is not None else ()
            suffix = self._suffix(each.prefix, latents, [cells], written)
            decoding = self._decoding(
                each.prefix,
                each.max_new_tokens,
                each.stop,
                generation=each.generation,
                pause=each.pause,
                begun=each.begun,
                floor=each.floor,
            )
            rows.append(_Row(each.prefix, stem, suffix, decoding))
        return self._run_decodings(rows)

    def sample_many(self, requests: Sequence[Sample]) -> list[list[Decoded] | Exception]:
        """``sample`` for several questions; the ``k``-th answer to a question depends on its seed and ``k`` alone."""
        rows = []
        for each in requests:
            opening = each.prefix.inputs.markers.opening if each.sampling.think else ()
            suffix = self._suffix(each.prefix, None, [()], opening)
            for k in range(each.sampling.samples):
                choose = sampler(each.sampling, each.seed, k)
                decoding = self._decoding(
                    each.prefix, each.max_new_tokens, each.stop, generation=each.generation, choose=choose
                )
                rows.append(_Row(each.prefix, None, suffix, decoding))
        drawn = iter(self._run_decodings(rows))
        found: list[list[Decoded] | Exception] = []
        for each in requests:
            answers = [next(drawn) for _ in range(each.sampling.samples)]
            failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
            found.append(failed or [answer for answer in answers if not isinstance(answer, Exception)])
        return found

    def reason(self, prefix: Prefix, max_tokens: int, stop: Callable[[], bool] = never) -> tuple[tuple[int, ...], int]:
        """The model's own greedy thinking text after the opening marker, and the forward passes it took.

        At most ``max_tokens`` ids; none without thinking markers.
        """
        (found,) = self.reason_many([Reason(prefix, max_tokens, stop)])
        if isinstance(found, Exception):
            raise found
        return found

    def reason_many(self, requests: Sequence[Reason]) -> list[tuple[tuple[int, ...], int] | Exception]:
        """``reason`` for several questions."""
        asked = [each for each in requests if each.prefix.inputs.markers.closing]
        rows = []
        for each in asked:
            markers = each.prefix.inputs.markers
            ends = frozenset(markers.closing[:1])
            decoding = self._decoding(each.prefix, each.max_tokens, each.stop, ends)
            rows.append(_Row(each.prefix, None, self._written(markers.opening), decoding))
        decoded = dict(zip(map(id, asked), self._run_decodings(rows), strict=True))
        found: list[tuple[tuple[int, ...], int] | Exception] = []
        for each in requests:
            text = decoded.get(id(each))
            if text is None:
                found.append(((), 0))
            elif isinstance(text, Exception):
                found.append(text)
            else:
                markers = each.prefix.inputs.markers
                silent = {*markers.closing[:1], *generation_rules(self.model, each.prefix.length).stop_tokens}
                # The last token is not run; without an opening marker the first one comes from the prefix.
                calls = max(len(text.tokens) - (0 if markers.opening else 1), 0)
                found.append((tuple(token for token in text.tokens if token not in silent), calls))
        return found

    def _decoding(
        self,
        prefix: Prefix,
        max_new_tokens: int,
        stop: Callable[[], bool],
        ends: frozenset[int] = frozenset(),
        generation: GenerationSettings | None = None,
        pause: Callable[[], bool] = never,
        begun: Decoded | None = None,
        choose: Callable[[Tensor], int] | None = None,
        floor: float = 0.0,
    ) -> Decoding:
        """One decoding: is sent what the model says at every step, yields the token that is chosen next.

        ``choose``: from scores ``(vocabulary,)``; by default the most probable one. ``floor``: see ``Decode``.
        """
        # What the logits processors see: the prompt and the tail, as in `generate`; latents and patches have no ids.
        written = [*prefix.inputs.tensors["input_ids"][0].tolist(), *prefix.inputs.tail]
        rules = generation_rules(self.model, len(written), generation)
        ids: Tensor | None = None  # the same tokens for the logits processors, with room for those to come
        empty = torch.zeros(0)
        before = Decoded((), empty, empty, "paused") if begun is None else begun
        tokens = list(before.tokens)
        log_probabilities: list[Tensor] = []
        entropies: list[Tensor] = []
        finish_reason = "length"
        joint = math.exp(float(before.log_probabilities.sum()))
        while len(tokens) < max_new_tokens:
            if stop():
                finish_reason = "deadline"
                break
            if len(entropies) >= _SLICE and pause():
                finish_reason = "paused"
                break
            said = yield tokens[-1] if tokens else None
            scores, token = said.logits, said.best
            if rules.processors:
                count = len(written) + len(tokens)
                if ids is None:
                    ids = torch.zeros(1, len(written) + max_new_tokens, dtype=torch.long, device=scores.device)
                    ids[0, :count] = torch.tensor(written + tokens)
                elif tokens:
                    ids[0, count - 1] = tokens[-1]
                scores = rules.processors(ids[:, :count], scores[None].clone())[0]
            if choose is not None or rules.processors:
                token = (choose or greedy)(scores)
            tokens.append(token)
            log_probabilities.append(said.log_p[token].clone())  # a view would hold the whole vocabulary's
            entropies.append(said.entropy)
            if token in rules.stop_tokens or token in ends or self._spells(tokens, rules.stop_strings):
                finish_reason = "stop"
                break
            if floor:
                joint *= math.exp(float(log_probabilities[-1]))
                if joint < floor:
                    finish_reason = "unsure"
                    break
        if not entropies:
            return Decoded(tuple(tokens), before.log_probabilities, before.entropies, finish_reason)
        log_p = torch.cat([before.log_probabilities, torch.stack(log_probabilities).cpu()])
        if not bool(log_p.isfinite().all()):
            raise NumericalError(
                "The model's logits are not finite while it answers.", "Load the model in float32 or bfloat16."
            )
        return Decoded(tuple(tokens), log_p, torch.cat([before.entropies, torch.stack(entropies).cpu()]), finish_reason)

    def _run_decodings(self, rows: Sequence[_Row]) -> list[Decoded | Exception]:
        """Feed decodings from forward passes, together where prefixes can be shared; results in the order of rows."""
        if not rows:
            return []
        if not self.shares_prefixes(rows[0].prefix):
            return [self._run_decoding(row.prefix, row.suffix, row.decoding) for row in rows]
        live = _grouped([row.prefix for row in rows])
        results: list[Decoded | Exception | None] = [None] * len(rows)
        ordered = [rows[index] for index in live]
        batch = SuffixBatch(self, [row.prefix for row in ordered], [row.stem for row in ordered])
        logits = torch.stack([row.prefix.last_logits for row in ordered])  # (R, vocabulary)
        if any(row.suffix.length for row in ordered):
            after = batch.extend([row.suffix.embeddings for row in ordered], [-1])[:, -1]
            begun = torch.tensor([row.suffix.length > 0 for row in ordered], device=after.device)
            logits = torch.where(begun[:, None], after, logits)
        for row, index in zip(ordered, live, strict=True):
            results[index] = _step(row.decoding, None)[1]  # to its first question for logits
        while True:
            steps = [
                (None, results[index]) if results[index] is not None else _step(rows[index].decoding, row)
                for index, row in zip(live, _read(logits), strict=True)
            ]
            going = [place for place, (token, _) in enumerate(steps) if token is not None]
            for index, (_, result) in zip(live, steps, strict=True):
                results[index] = result
            if not going:
                break
            if len(going) < len(live):
                batch.select(going)
                live = [live[place] for place in going]
            chosen = [steps[place][0] for place in going]
            embeddings = self.embed([token for token in chosen if token is not None])
            logits = batch.extend([embeddings[:, None]], [-1])[:, -1]
        return [result for result in results if result is not None]

    def _run_decoding(self, prefix: Prefix, suffix: Suffix, decoding: Decoding) -> Decoded | Exception:
        """Feed one decoding from a cache of its own."""
        _, result = _step(decoding, None)
        if result is not None:
            return result
        if suffix.length:
            rows, cache = self._continue(prefix, suffix, [suffix.length - 1])
            logits = rows[0]
        else:
            logits, cache = prefix.last_logits[None], fork_cache(prefix.cache)
        start = suffix.length
        while True:
            (said,) = _read(logits)
            token, result = _step(decoding, said)
            if token is None:
                assert result is not None
                return result
            rows, cache = self._continue(prefix, self._written([token]), [0], cache, start)
            logits = rows[0]
            start += 1

    def _spells(self, tokens: Sequence[int], strings: Sequence[str]) -> bool:
        """Whether the text of the tokens contains one of the strings."""
        if not strings:
            return False
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in strings)

    def token_log_probabilities(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Teacher-forced log-probabilities ``(n,)`` of tokens after a state, float32 on the CPU."""
        return self.token_log_probabilities_many([TokenLogProbabilities(prefix, latents, patches, tokens)])[0]

    def token_log_probabilities_many(self, requests: Sequence[TokenLogProbabilities]) -> list[Tensor]:
        """``token_log_probabilities`` for several questions."""

        def read(logits: Tensor, tokens: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

        return self._teacher_forced(requests, read)

    def token_entropies_many(self, requests: Sequence[TokenEntropies]) -> list[Tensor]:
        """Teacher-forced entropies ``(n,)`` in nats of the distributions before tokens, float32 on the CPU."""
        return self._teacher_forced(requests, lambda logits, _: entropy(logits))

    def _teacher_forced(
        self,
        requests: Sequence[TokenLogProbabilities | TokenEntropies],
        read: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """What is read of the logits that predict the tokens of every request after its state, ``(n,)`` on the CPU.

        Args:
            read: is given logits ``(m, vocabulary)``, float32, and the tokens ``(m,)`` they predict; gives ``(m,)``.

        Raises ``NumericalError`` if that is not finite.
        """
        suffixes = [
            self._suffix(
                each.prefix, None if each.latents is None else each.latents[None], [each.patches], each.tokens[:-1]
            )
            for each in requests
        ]
        # Of a suffix that begins with the answer, the first token is predicted by the prefix.
        counts = [min(len(each.tokens), suffix.length) for each, suffix in zip(requests, suffixes, strict=True)]
        # A row without a suffix has nothing to run.
        asked = [row for row in _grouped([each.prefix for each in requests]) if counts[row]]
        most = max(counts, default=0)
        vocabulary = requests[0].prefix.last_logits.shape[-1]
        logits: dict[int, Iterable[Tensor]] = {}
        if (
            len(asked) > 1
            and len(asked) * most * vocabulary <= _MOST_LOGITS
            and self.shares_prefixes(requests[0].prefix)
        ):
            batch = SuffixBatch(self, [requests[row].prefix for row in asked], keep=False)
            together = batch.extend([suffixes[row].embeddings for row in asked], range(-most, 0))
            logits = {row: [together[place, most - counts[row] :]] for place, row in enumerate(asked)}
        found = []
        for row, (each, suffix, count) in enumerate(zip(requests, suffixes, counts, strict=True)):
            pieces = logits[row] if row in logits else self._in_pieces(each.prefix, suffix, count)
            if count < len(each.tokens):
                pieces = chain([each.prefix.last_logits[None]], pieces)
            tokens = torch.tensor(list(each.tokens), dtype=torch.long)
            values = [torch.zeros(0)]
            for piece in pieces:
                ahead, tokens = tokens[: len(piece)], tokens[len(piece) :]
                values.append(read(piece.float(), ahead.to(piece.device)).cpu())
            found.append(torch.cat(values))
            if not bool(found[-1].isfinite().all()):
                raise NumericalError(
                    "The model's logits are not finite for this answer.", "Load the model in float32 or bfloat16."
                )
        return found

    def _in_pieces(self, prefix: Prefix, suffix: Suffix, count: int) -> Iterator[Tensor]:
        """Logits ``(m, vocabulary)`` at the last ``count`` positions of one suffix, some positions at a time."""
        most = max(1, _MOST_LOGITS // prefix.last_logits.shape[-1])
        first = suffix.length - count
        ends = [*range(first + most, suffix.length, most), suffix.length] if count else []
        cache = None
        for begin, end in pairwise([0, *ends]):
            part = Suffix(suffix.embeddings[:, begin:end], suffix.tokens[begin:end])
            keep = range(max(first - begin, 0), end - begin)
            logits, cache = self._continue(prefix, part, keep, cache, begin)
            yield logits[0]


def _grouped(prefixes: Sequence[Prefix]) -> list[int]:
    """Indices in an order in which equal prefixes stand together; the same order whenever it is asked for."""
    first: dict[int, int] = {}
    for index, prefix in enumerate(prefixes):
        first.setdefault(id(prefix), index)
    return sorted(range(len(prefixes)), key=lambda index: first[id(prefixes[index])])


def _by_length(patches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of states that inject the same number of cells."""
    groups: dict[int, list[int]] = {}
    for index, cells in enumerate(patches):
        groups.setdefault(len(cells), []).append(index)
    return list(groups.values())


def _read(logits: Tensor) -> list[_Next]:
    """What logits ``(R, vocabulary)`` say; one transfer from the device for all rows."""
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    return list(map(_Next, logits, log_p, entropy_of(log_p), logits.argmax(-1).tolist()))


def _step(decoding: Decoding, said: _Next | None) -> tuple[int | None, Decoded | Exception | None]:
    """Advance a decoding: the next token, or else its result, or what it raised."""
    try:
        return (next(decoding) if said is None else decoding.send(said)), None
    except StopIteration as end:
        decoded: Decoded = end.value
        return None, decoded
    except BaseException as error:
        return None, contained(error)
