"""One loaded vision-language model, and what the method asks of it for one image and question.

``VisionLanguageModel.prefill`` computes the prefix once; ``VisionLanguageModel.score``, ``attend``, ``decode`` and
``token_log_probabilities`` continue from forks of its cache. All calls are exact: they equal one full forward over
``[prefix | V | opening | T | closing, tail | answer]``. This module knows nothing of rewards or of the search.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from latent_tool.errors import ContextLengthError, ModelLoadError, ModelNotSupportedError, NumericalError
from latent_tool.method.reward import Logits, entropy
from latent_tool.models.attention import tap_attention
from latent_tool.models.cache import fork_cache, new_cache
from latent_tool.models.cells import Box, View, cell_boxes
from latent_tool.models.decoding import Decoded, generation_rules
from latent_tool.models.families import family
from latent_tool.models.prompts import Markers, find_markers, render_prompt

__all__ = ["Cell", "Inputs", "LatentView", "Prefix", "VisionLanguageModel"]


_SHOW_ATTENTION: dict[str, Any] = {"output_attentions": True}


@dataclass(frozen=True)
class Cell:
    """One image cell of the prompt: which image it belongs to, and its box in pixels of the upright image."""

    image: int
    box: Box | None


@dataclass(frozen=True)
class Inputs:
    """Processed inputs of one question, before the model has seen them."""

    tensors: Mapping[str, Any]
    tail: tuple[int, ...]
    markers: Markers
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return int(self.tensors["input_ids"].shape[1])


@dataclass(frozen=True)
class Prefix:
    """The prefix in the cache.

    ``features``: ``(C, d)``, merged image features at the image cells. ``last_logits``: ``(vocabulary,)`` after the
    prefix. ``positions``: position ids the decoder was given, ``(..., P)``, or ``None`` if it counts by itself.
    """

    inputs: Inputs
    cache: DynamicCache
    features: Tensor
    last_logits: Tensor
    positions: Tensor | None
    columns: Tensor

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return self.inputs.length


@dataclass(frozen=True)
class _Suffix:
    """What follows the prefix: embeddings ``(N, S, d)``, and the token id of every position (a filler where V and T
    stand, which have none)."""

    embeddings: Tensor
    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.tokens)


class VisionLanguageModel:
    """A frozen vision-language model and its processor.

    Calls may come from any thread: one lock lets one forward pass run at a time, and no state of a question is kept on
    the model between calls.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        self._lock = threading.RLock()
        self._processor_lock = threading.Lock()
        self._embedding_rms: float | None = None

    # ------------------------------------------------------------------ facts about the model

    @property
    def _embeddings(self) -> Tensor:
        """The table of input embeddings, ``(vocabulary, d)``."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self._embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's activations."""
        return self._embeddings.dtype

    @property
    def context_length(self) -> int | None:
        """Positions the decoder was made for, or ``None`` if the checkpoint does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def image_token(self) -> int:
        """Id of the token that stands for one image cell."""
        config = self.model.config
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        raise ModelNotSupportedError(
            f"{type(self.model).__name__} has no image token in its prompt.",
            "Use a model that puts image tokens into the decoder's input, such as LLaVA or Qwen-VL.",
        )

    @property
    def _decoder(self) -> Any:
        return self.model.get_decoder()  # type: ignore[no-untyped-call]

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Input embeddings ``(n, d)`` of tokens."""
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            return cast(Tensor, self.model.get_input_embeddings()(ids))

    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings' entries (over at most 4,096 tokens spread over the vocabulary)."""
        if self._embedding_rms is None:
            size = len(self._embeddings)
            tokens = range(0, size, max(1, size // 4096))
            self._embedding_rms = float(self.embed(tokens).float().pow(2).mean().sqrt())
        return self._embedding_rms

    def mean_embedding(self) -> Tensor:
        """Mean input embedding ``(d,)`` over the same tokens."""
        size = len(self._embeddings)
        return self.embed(range(0, size, max(1, size // 4096))).float().mean(0)

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
    ) -> Inputs:
        """Render and tokenise a question about images, which stand before it or after it.

        Raises ``QuestionError``, ``ContextLengthError`` (before any image is processed if the text alone is too long),
        or ``ModelLoadError`` if the template or processor loses the images.
        """
        row = family(self.model.config.model_type)
        # Tokenizers and processors keep state (padding, truncation), so one thread at a time.
        with self._processor_lock:
            prompt = render_prompt(
                self.processor,
                question,
                len(images),
                system,
                position,
                images_first=images_first,
                needs_template=row is None or row.chat_template,
            )
            self.require_context(len(self.tokenizer(prompt.prefix, add_special_tokens=False).input_ids))
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
            except (ValueError, IndexError, StopIteration) as error:
                raise ModelLoadError(
                    f"The model's processor cannot handle this question ({error}).",
                    "Check the checkpoint's chat template and processor configuration, or make the image larger.",
                ) from error
            tail = tuple(self.tokenizer(prompt.tail, add_special_tokens=False).input_ids) if prompt.tail else ()
            markers = find_markers(self.tokenizer, thinking_markers, prompt)
        for name in ("labels", "num_crops"):  # for training, or for the processor itself
            tensors.pop(name, None)
        written = tensors.pop("text_replacement_offsets", None) or [[]]
        texts = [item["replacement"] for item in written[0] if item["type"] == "image"]
        self.require_context(tensors["input_ids"].shape[1])
        cells, warnings = self._cells(tensors, images, texts)
        return Inputs(tensors, tail, markers, cells, prompt.warnings + warnings)

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

    def prefill(self, inputs: Inputs) -> Prefix:
        """Run the prefix through the model once.

        Raises ``NumericalError`` when the model's output is not finite.
        """
        captured: dict[str, Any] = {}

        def capture(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)

        tensors = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for key, value in inputs.tensors.items()
            if isinstance(value, Tensor)
        }
        with self._forward_pass():
            handle = self._decoder.register_forward_pre_hook(capture, with_kwargs=True)
            try:
                output = self.model(**tensors, past_key_values=new_cache(self.model), use_cache=True, logits_to_keep=1)
            finally:
                handle.remove()
        last = output.logits[0, -1]
        if not bool(last.isfinite().all()):
            raise NumericalError(
                "The model's logits are not finite for this image and question.",
                "Load the model in float32 or bfloat16.",
            )
        embeddings = captured.get("inputs_embeds")
        if embeddings is None:
            raise ModelNotSupportedError(
                f"{type(self.model).__name__} does not merge image features into its decoder's input.",
                "Use a model that does, such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
            )
        columns = (tensors["input_ids"][0] == self.image_token).nonzero()[:, 0]
        features = embeddings[0, columns.to(embeddings.device)].to(self.device)
        return Prefix(inputs, output.past_key_values, features, last, captured.get("position_ids"), columns)

    # ------------------------------------------------------------------ continuing from the cache

    @contextmanager
    def _forward_pass(self) -> Iterator[None]:
        with self._lock, torch.inference_mode():
            yield

    def _positions(self, prefix: Prefix, start: int, length: int, batch: int) -> Tensor | None:
        """Position ids of ``length`` tokens that stand ``start`` tokens after the prefix."""
        if prefix.positions is None:
            return None
        following = prefix.positions.max() + 1 + start + torch.arange(length, device=prefix.positions.device)
        return following.expand(*prefix.positions.shape[:-2], batch, length)

    def _suffix(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[Sequence[int]], answer: Sequence[int] = ()
    ) -> _Suffix:
        """``[V | opening | T | closing, tail | answer]`` of ``N`` states; all V of the same length."""
        markers = prefix.inputs.markers if latents is not None else Markers()
        after = (*markers.closing, *prefix.inputs.tail, *answer)
        filler = self.model.config.get_text_config().pad_token_id or 0
        injected, count = len(patches[0]), 0 if latents is None else latents.shape[1]
        tokens = (*[filler] * injected, *markers.opening, *[filler] * count, *after)
        cells = torch.tensor([list(chosen) for chosen in patches], dtype=torch.long, device=self.device)
        parts = [
            prefix.features[cells],
            self.embed(markers.opening).expand(len(patches), -1, -1),
            *([] if latents is None else [latents.to(self.device)]),
            self.embed(after).expand(len(patches), -1, -1),
        ]
        return _Suffix(torch.cat([part.to(self.dtype) for part in parts], dim=1), tokens)

    def _written(self, tokens: Sequence[int]) -> _Suffix:
        """Plain tokens as something that follows the prefix."""
        return _Suffix(self.embed(tokens)[None], tuple(tokens))

    def _continue(
        self, prefix: Prefix, suffix: _Suffix, keep: Sequence[int], cache: DynamicCache | None = None, start: int = 0
    ) -> tuple[Tensor, DynamicCache]:
        """Logits ``(N, len(keep), vocabulary)`` at the positions to keep, and the cache they leave behind.

        ``start``: tokens between the prefix and the suffix that are in the cache already.
        """
        output = self._run(prefix, suffix, keep, cache, start)
        return output.logits, output.past_key_values

    def _run(
        self,
        prefix: Prefix,
        suffix: _Suffix,
        keep: Sequence[int],
        cache: DynamicCache | None = None,
        start: int = 0,
        **given: Any,
    ) -> Any:
        """The model's own output for a suffix; see ``_continue``."""
        batch = len(suffix.embeddings)
        with self._forward_pass():
            if getattr(self.model.config.get_text_config(), "hidden_size_per_layer_input", None):
                # Gemma 4 feeds a second embedding of the token ids to every layer.
                ids = torch.tensor([suffix.tokens], device=self.device)
                layers = self._decoder.get_per_layer_inputs(ids)
                given["per_layer_inputs"] = layers.expand(batch, *layers.shape[1:])
            return self.model(
                inputs_embeds=suffix.embeddings,
                past_key_values=fork_cache(prefix.cache, batch) if cache is None else cache,
                position_ids=self._positions(prefix, start, suffix.length, batch),
                use_cache=True,
                # A tensor: with a number, Gemma 4 drops the other rows in its upper layers, the tapped ones too.
                logits_to_keep=torch.tensor(list(keep), device=self.device),
                **given,
            )

    def score(self, prefix: Prefix, latents: Tensor, patches: Sequence[Sequence[int]]) -> Logits:
        """Logits of ``N`` states at the latents and where the answer begins; latents ``(N, L, d)``.

        States that inject different numbers of cells are run in one batch per number.
        """
        count = latents.shape[1]
        after = len(prefix.inputs.markers.closing) + len(prefix.inputs.tail)
        before = len(prefix.inputs.markers.opening)
        groups: dict[int, list[int]] = {}
        for index, cells in enumerate(patches):
            groups.setdefault(len(cells), []).append(index)
        rows: list[Tensor | None] = [None] * len(patches)
        for length, members in groups.items():
            suffix = self._suffix(prefix, latents[members], [patches[index] for index in members])
            first = length + before
            keep = [*range(first, first + count)] + ([suffix.length - 1] if after else [])
            logits, _ = self._continue(prefix, suffix, keep)
            for row, index in zip(logits, members, strict=True):
                rows[index] = row
        stacked = torch.stack([row for row in rows if row is not None])
        return Logits(stacked[:, :count], stacked[:, -1])

    def attend(self, prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> Tensor:
        """Attention ``(L, C)`` of the latents ``(L, d)`` to the image cells, mean over heads and layers, float32."""
        suffix = self._suffix(prefix, latents[None], [patches])
        first = len(patches) + len(prefix.inputs.markers.opening)
        with self._lock, tap_attention(self.model, slice(first, first + len(latents)), prefix.columns) as tap:
            output = self._run(prefix, suffix, [suffix.length - 1], **({} if tap.switched else _SHOW_ATTENTION))
        if not tap.switched:
            shown = [layer for layer in output.attentions or () if layer is not None]
            tap.layers += [layer[:, :, tap.rows].float()[..., prefix.columns] for layer in shown]
        if not tap.layers:
            raise ModelNotSupportedError(
                f"{type(self.model).__name__} does not show its attention.",
                "Load it with attn_implementation='eager', or search without patches.",
            )
        return tap.mean()[0]

    def decode(
        self,
        prefix: Prefix,
        latents: Tensor | None,
        patches: Sequence[int],
        max_new_tokens: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> Decoded:
        """Decode greedily from exactly the state that was scored, with the model's own generation rules.

        Args:
            latents: ``(L, d)``, or ``None`` for the plain model.
            patches: injected cells.
            max_new_tokens: tokens at most.
            stop: asked before every token; ``True`` ends the decoding with ``finish_reason="deadline"``.
        """
        suffix = self._suffix(prefix, None if latents is None else latents[None], [patches])
        last, cache = self._after(prefix, suffix)
        return self._decode_from(prefix, last, cache, suffix.length, max_new_tokens, stop)

    def _after(self, prefix: Prefix, suffix: _Suffix) -> tuple[Tensor, DynamicCache]:
        """Logits ``(vocabulary,)`` after a suffix of one state, which may be empty, and the cache it leaves behind."""
        if not suffix.length:
            return prefix.last_logits, fork_cache(prefix.cache)
        logits, cache = self._continue(prefix, suffix, [suffix.length - 1])
        return logits[0, -1], cache

    def reason(
        self, prefix: Prefix, max_tokens: int, stop: Callable[[], bool] = lambda: False
    ) -> tuple[tuple[int, ...], int]:
        """The model's own greedy thinking text after the opening marker, and the forward passes it took.

        At most ``max_tokens`` ids; none without thinking markers.
        """
        markers = prefix.inputs.markers
        if not markers.closing:
            return (), 0
        opening = self._written(markers.opening)
        last, cache = self._after(prefix, opening)
        ends = frozenset(markers.closing[:1])
        decoded = self._decode_from(prefix, last, cache, opening.length, max_tokens, stop, ends)
        ends |= generation_rules(self.model, prefix.length).stop_tokens
        return tuple(token for token in decoded.tokens if token not in ends), 1 + len(decoded.tokens)

    def _decode_from(
        self,
        prefix: Prefix,
        last: Tensor,
        cache: DynamicCache,
        length: int,
        max_new_tokens: int,
        stop: Callable[[], bool],
        ends: frozenset[int] = frozenset(),
    ) -> Decoded:
        """Greedy decoding from the logits ``last`` of a suffix of ``length`` tokens in ``cache``."""
        # What the logits processors see: the prompt and the tail, as in `generate`; latents and patches have no ids.
        written = [*prefix.inputs.tensors["input_ids"][0].tolist(), *prefix.inputs.tail]
        rules = generation_rules(self.model, len(written))
        tokens: list[int] = []
        log_probabilities: list[Tensor] = []
        entropies: list[Tensor] = []
        finish_reason = "length"
        while len(tokens) < max_new_tokens:
            if stop():
                finish_reason = "deadline"
                break
            raw = last.float()
            scores = raw
            if rules.processors:
                ids = cast(torch.LongTensor, torch.tensor([written + tokens], device=raw.device))
                scores = rules.processors(ids, cast(torch.FloatTensor, raw[None].clone()))[0]
            token = int(scores.argmax())
            tokens.append(token)
            log_probabilities.append(raw.log_softmax(-1)[token])
            entropies.append(entropy(raw))
            if token in rules.stop_tokens or token in ends or self._spells(tokens, rules.stop_strings):
                finish_reason = "stop"
                break
            if len(tokens) < max_new_tokens:
                logits, cache = self._continue(prefix, self._written([token]), [0], cache, length + len(tokens) - 1)
                last = logits[0, -1]
        empty = torch.zeros(0)
        return Decoded(
            tuple(tokens),
            torch.stack(log_probabilities).cpu() if tokens else empty,
            torch.stack(entropies).cpu() if tokens else empty,
            finish_reason,
        )

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
        if not tokens:
            return torch.zeros(0)
        suffix = self._suffix(prefix, None if latents is None else latents[None], [patches], tokens[:-1])
        before = suffix.length - (len(tokens) - 1)
        rows = prefix.last_logits[None]
        if suffix.length:
            logits, _ = self._continue(prefix, suffix, range(max(before - 1, 0), suffix.length))
            rows = logits[0] if before else torch.cat([rows, logits[0]])
        log_p = rows.float().log_softmax(-1)
        return log_p[torch.arange(len(tokens)), torch.tensor(list(tokens), device=log_p.device)].cpu()


@dataclass
class LatentView:
    """One prefix seen as the method sees a model (``LatentModel``), counting its calls."""

    vlm: VisionLanguageModel
    prefix: Prefix
    calls: int = field(default=0)

    def logits(self, latents: Tensor, patches: tuple[tuple[int, ...], ...]) -> Logits:
        """See ``VisionLanguageModel.score``."""
        self.calls += len({len(cells) for cells in patches})
        return self.vlm.score(self.prefix, latents, patches)

    def attention(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        """See ``VisionLanguageModel.attend``."""
        self.calls += 1
        return self.vlm.attend(self.prefix, latents, patches)
