"""One loaded vision-language model, and what the method asks of it for one image and question.

``VisionLanguageModel.prefill`` computes the prefix once; ``VisionLanguageModel.score``, ``attend``, ``decode`` and
``token_log_probabilities`` continue from it (``continuing``, ``generating``, ``forcing``), over rows that share it or
have a copy each (``rows``). This module knows nothing of rewards or of the search.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal

from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.errors import ContextLengthError, ImageError, ModelLoadError, ModelNotSupportedError
from latent_tool.method.reward import entropy
from latent_tool.models import generating
from latent_tool.models.cells import View, cell_boxes
from latent_tool.models.continuing import Continuing
from latent_tool.models.decoding import Decoded
from latent_tool.models.families import family
from latent_tool.models.forcing import teacher_forced
from latent_tool.models.prefix import Cell, Inputs, Prefix
from latent_tool.models.prompts import Rendered, find_markers, render_prompt
from latent_tool.models.requests import (
    Decode,
    Reason,
    Sample,
    TokenEntropies,
    TokenLogProbabilities,
    never,
)
from latent_tool.models.static_pass import Compile
from latent_tool.models.windows import Window, beside, cut_out, moved
from latent_tool.settings import PREFIX_CACHE_BYTES, GenerationSettings

__all__ = ["VisionLanguageModel"]


class VisionLanguageModel(Continuing):
    """A frozen vision-language model and its processor.

    Calls may come from any thread: one lock lets one forward pass run at a time, and no state of a question is kept on
    the model between calls; what was computed of the last images is kept (``prefix_cache``).

    Args:
        prefix_cache_bytes: what the prefixes of images may take together, so that another question about the same
            image does not compute them again; 0: nothing is kept.
        compile: whether passes after a prefix run in fixed shapes, compiled; ``"auto"``: on CUDA.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        name: str,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(model, processor, prefix_cache_bytes, compile)
        self.name = name
        self.processor_lock = threading.Lock()

    # ------------------------------------------------------------------ facts about the model

    @property
    def context_length(self) -> int | None:
        """Positions the decoder was made for, or ``None`` if the checkpoint does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def tokens(self, text: str) -> list[int]:
        """Return tokens of a text that stands alone, without what a tokenizer adds to every text."""
        with self.processor_lock:
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
        rendered: MutableMapping[tuple[str, int], Rendered] | None = None,
    ) -> Inputs:
        """Render and tokenise a question about images, which stand before it or after it.

        ``windows``: parts of the images that are shown beside them, as the family's row says. ``rendered``: what calls
        with the same keywords have rendered, by question and number of pictures; it is read, and added to.

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
                rendered=rendered,
            )
            parts = [ask([part], question) for part in cut_out(images, windows)]
            return beside(ask(images, question), parts, windows)
        pictures, images = len(images), [*images, *cut_out(images, windows)]
        # Tokenizers and processors keep state (padding, truncation), so one thread at a time.
        with self.processor_lock, self.few_threads():
            template = None if rendered is None else rendered.get((question, len(images)))
            if template is None:
                prompt = render_prompt(
                    self.processor,
                    question,
                    len(images),
                    system,
                    position,
                    images_first=images_first,
                    needs_template=row is None or row.chat_template,
                )
                written = self.tokenizer(prompt.prefix, add_special_tokens=False, verbose=False).input_ids
                self.require_context(len(written))
                tail = tuple(self.tokenizer(prompt.tail, add_special_tokens=False).input_ids) if prompt.tail else ()
                template = Rendered(prompt, tail, find_markers(self.tokenizer, thinking_markers, prompt))
                if rendered is not None:
                    rendered[question, len(images)] = template
            prompt, tail, markers = template.prompt, template.tail, template.markers
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
        for name in ("labels", "num_crops"):  # for training, or for the processor itself
            tensors.pop(name, None)
        replaced = tensors.pop("text_replacement_offsets", None) or [[]]
        texts = [item["replacement"] for item in replaced[0] if item["type"] == "image"]
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
                "Fix the checkpoint's chat_template.jinja so that an image content part becomes the image token.",
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
        return generating.decode_many(self, requests)

    def sample_many(self, requests: Sequence[Sample]) -> list[list[Decoded] | Exception]:
        """Draw answers of the plain model; the ``k``-th answer to a question depends on its seed and ``k`` alone."""
        return generating.sample_many(self, requests)

    def reason_many(self, requests: Sequence[Reason]) -> list[tuple[tuple[int, ...], int] | Exception]:
        """Return the model's own greedy thinking texts after the opening marker, and the forward passes each took.

        At most ``max_tokens`` ids each; none without thinking markers.
        """
        return generating.reason_many(self, requests)

    # ------------------------------------------------------------------ teacher forcing

    def token_log_probabilities(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Teacher-forced log-probabilities ``(n,)`` of tokens after a state, float32 on the CPU."""
        return self.token_log_probabilities_many([TokenLogProbabilities(prefix, latents, patches, tokens)])[0]

    def token_log_probabilities_many(self, requests: Sequence[TokenLogProbabilities]) -> list[Tensor]:
        """``token_log_probabilities`` for several questions."""

        def read(logits: Tensor, tokens: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

        return teacher_forced(self, requests, read)

    def token_entropies_many(self, requests: Sequence[TokenEntropies]) -> list[Tensor]:
        """Teacher-forced entropies ``(n,)`` in nats of the distributions before tokens, float32 on the CPU."""
        return teacher_forced(self, requests, lambda logits, _: entropy(logits))
