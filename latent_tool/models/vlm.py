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
from typing import Any, Literal

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
from latent_tool.models.prompts import Markers, find_markers, render_prompt

__all__ = ["Cell", "Inputs", "LatentView", "Prefix", "VisionLanguageModel"]


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


@dataclass
class CallCount:
    """Forward passes of the decoder; a batch counts once."""

    decoder: int = 0


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
        self._embedding_rms: float | None = None

    # ------------------------------------------------------------------ facts about the model

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's activations."""
        return self.model.get_input_embeddings().weight.dtype

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

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Input embeddings ``(n, d)`` of tokens."""
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            return self.model.get_input_embeddings()(ids)

    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings' entries (over at most 4,096 tokens spread over the vocabulary)."""
        if self._embedding_rms is None:
            size = self.model.get_input_embeddings().weight.shape[0]
            tokens = range(0, size, max(1, size // 4096))
            self._embedding_rms = float(self.embed(tokens).float().pow(2).mean().sqrt())
        return self._embedding_rms

    def mean_embedding(self) -> Tensor:
        """Mean input embedding ``(d,)`` over the same tokens."""
        size = self.model.get_input_embeddings().weight.shape[0]
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
    ) -> Inputs:
        """Render and tokenise a question about images.

        Raises ``QuestionError``, ``ContextLengthError`` (before any image is processed if the text alone is too long),
        or ``ModelLoadError`` if the template or processor loses the images.
        """
        prompt = render_prompt(self.processor, question, len(images), system, position)
        text_tokens = len(self.tokenizer(prompt.prefix, add_special_tokens=False).input_ids)
        self.require_context(text_tokens)
        bos = self.tokenizer.bos_token
        special = not (bos is not None and prompt.prefix.startswith(bos))
        try:
            tensors = dict(
                self.processor(
                    text=[prompt.prefix], images=[list(images)], return_tensors="pt", add_special_tokens=special
                )
            )
        except ValueError as error:
            raise ModelLoadError(
                f"The model's processor cannot handle this question ({error}).",
                "Check the checkpoint's chat template and processor configuration.",
            ) from error
        tail = tuple(self.tokenizer(prompt.tail, add_special_tokens=False).input_ids) if prompt.tail else ()
        input_ids = tensors["input_ids"]
        self.require_context(input_ids.shape[1])
        total = int((input_ids == self.image_token).sum())
        if total == 0:
            raise ModelLoadError(
                "The prompt has no image cells: the chat template or the processor drops the image.",
                "Mend the checkpoint's chat_template.jinja so that an image content part becomes the image token.",
            )
        cells, warnings = self._cells(tensors, images, total)
        markers = find_markers(self.tokenizer, thinking_markers)
        return Inputs(tensors, tail, markers, cells, warnings)

    def require_context(self, tokens: int) -> None:
        """Raise ``ContextLengthError`` if so many tokens, and one more, do not fit the model's context."""
        limit = self.context_length
        if limit is not None and tokens >= limit:
            raise ContextLengthError(
                f"Image and question take {tokens} tokens; the model's context has {limit}.",
                "Shorten the question or make the image smaller.",
            )

    def _cells(
        self, tensors: Mapping[str, Any], images: Sequence[Image], total: int
    ) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
        counts = [total // len(images)] * len(images)
        grid = tensors.get("image_grid_thw")
        if grid is not None:
            merge = self.model.config.vision_config.spatial_merge_size
            counts = [int(rows * columns) * int(frames) // merge**2 for frames, rows, columns in grid.tolist()]
        cells: list[Cell] = []
        known = True
        for index, (image, count) in enumerate(zip(images, counts, strict=True)):
            view = View(
                self.model.config, self.processor.image_processor, tensors, index, image.width, image.height, count
            )
            boxes = cell_boxes(self.model.config.model_type, view)
            known = known and boxes is not None
            cells += [Cell(index, box) for box in (boxes if boxes is not None else [None] * count)]
        warning = (
            f"The cell geometry of model family {self.model.config.model_type!r} is not known: patches carry no boxes."
        )
        return tuple(cells), () if known else (warning,)

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
            handle = self.model.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
            try:
                output = self.model(
                    **tensors, past_key_values=new_cache(self.model), use_cache=True, logits_to_keep=1
                )
            finally:
                handle.remove()
        last = output.logits[0, -1]
        if not bool(last.isfinite().all()):
            raise NumericalError(
                "The model's logits are not finite for this image and question.",
                "Load the model in float32 or bfloat16.",
            )
        columns = (tensors["input_ids"][0] == self.image_token).nonzero()[:, 0]
        features = captured["inputs_embeds"][0, columns]
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
    ) -> Tensor:
        """Embeddings ``(N, S, d)`` of ``[V | opening | T | closing, tail | answer]``; all V of the same length."""
        batch = len(patches)
        markers = prefix.inputs.markers if latents is not None else Markers()
        parts = [prefix.features[torch.tensor([list(cells) for cells in patches], dtype=torch.long)]]
        tokens = [self.embed(markers.opening), self.embed(markers.closing + prefix.inputs.tail + tuple(answer))]
        parts.append(tokens[0].expand(batch, -1, -1))
        if latents is not None:
            parts.append(latents.to(self.device, self.dtype))
        parts.append(tokens[1].expand(batch, -1, -1))
        return torch.cat([part.to(self.dtype) for part in parts if part.shape[1]] or [tokens[0][None]], dim=1)

    def _continue(
        self, prefix: Prefix, embeddings: Tensor, keep: Tensor | int, cache: DynamicCache | None = None, start: int = 0
    ) -> tuple[Tensor, DynamicCache]:
        """Logits at the positions to keep, and the cache they leave behind."""
        batch, length, _ = embeddings.shape
        with self._forward_pass():
            output = self.model(
                inputs_embeds=embeddings,
                past_key_values=fork_cache(prefix.cache, batch) if cache is None else cache,
                position_ids=self._positions(prefix, start, length, batch),
                use_cache=True,
                logits_to_keep=keep,
            )
        return output.logits, output.past_key_values

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
            embeddings = self._suffix(prefix, latents[members], [patches[index] for index in members])
            first = length + before
            keep = [*range(first, first + count)] + ([first + count + after - 1] if after else [])
            logits, _ = self._continue(prefix, embeddings, torch.tensor(keep, device=self.device))
            for row, index in zip(logits, members, strict=True):
                rows[index] = row
        stacked = torch.stack([row for row in rows if row is not None])
        return Logits(stacked[:, :count], stacked[:, -1])

    def attend(self, prefix: Prefix, latents: Tensor, patches: Sequence[int]) -> Tensor:
        """Attention ``(L, C)`` of the latents ``(L, d)`` to the image cells, mean over heads and layers, float32."""
        embeddings = self._suffix(prefix, latents[None], [patches])
        first = len(patches) + len(prefix.inputs.markers.opening)
        with self._lock, tap_attention(self.model, slice(first, first + len(latents)), prefix.columns) as tap:
            self._continue(prefix, embeddings, 1)
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
        embeddings = self._suffix(prefix, None if latents is None else latents[None], [patches])
        length = embeddings.shape[1]
        if length:
            logits, cache = self._continue(prefix, embeddings, 1)
            last = logits[0, -1]
        else:
            last, cache = prefix.last_logits, fork_cache(prefix.cache)
        return self._decode_from(prefix, last, cache, length, max_new_tokens, stop)

    def reason(
        self, prefix: Prefix, max_tokens: int, stop: Callable[[], bool] = lambda: False
    ) -> tuple[tuple[int, ...], int]:
        """The model's own greedy thinking text after the opening marker: at most ``max_tokens`` ids, and the calls made.

        Empty without thinking markers.
        """
        markers = prefix.inputs.markers
        if not markers.opening:
            return (), 0
        opening = self.embed(markers.opening)[None]
        logits, cache = self._continue(prefix, opening, 1)
        ends = frozenset(markers.closing[:1])
        decoded = self._decode_from(prefix, logits[0, -1], cache, opening.shape[1], max_tokens, stop, ends)
        rules = generation_rules(self.model, prefix.length)
        return tuple(token for token in decoded.tokens if token not in ends | rules.stop_tokens), 1 + len(
            decoded.tokens
        )

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
        rules = generation_rules(self.model, prefix.length)
        # What the logits processors see: the prompt and the tail, as in `generate`; latents and patches have no ids.
        written = [*prefix.inputs.tensors["input_ids"][0].tolist(), *prefix.inputs.tail]
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
                ids = torch.tensor([written + tokens], device=raw.device)
                scores = rules.processors(ids, raw[None].clone())[0]
            token = int(scores.argmax())
            tokens.append(token)
            log_probabilities.append(raw.log_softmax(-1)[token])
            entropies.append(entropy(raw))
            if token in rules.stop_tokens or token in ends:
                finish_reason = "stop"
                break
            if len(tokens) < max_new_tokens:
                logits, cache = self._continue(
                    prefix, self.embed([token])[None], 1, cache, start=length + len(tokens) - 1
                )
                last = logits[0, -1]
        empty = torch.zeros(0)
        return Decoded(
            tuple(tokens),
            torch.stack(log_probabilities).cpu() if tokens else empty,
            torch.stack(entropies).cpu() if tokens else empty,
            finish_reason,
        )

    def token_log_probabilities(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Teacher-forced log-probabilities ``(n,)`` of tokens after a state, float32 on the CPU."""
        if not tokens:
            return torch.zeros(0)
        embeddings = self._suffix(prefix, None if latents is None else latents[None], [patches], tokens[:-1])
        before = embeddings.shape[1] - (len(tokens) - 1)
        rows = prefix.last_logits[None]
        if embeddings.shape[1]:
            keep = torch.arange(max(before - 1, 0), embeddings.shape[1], device=self.device)
            logits, _ = self._continue(prefix, embeddings, keep)
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
