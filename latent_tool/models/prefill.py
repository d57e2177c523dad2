"""From a prompt to the decoder's cache, and on from there: what every other pass begins with.

The prefix is computed once; up to the end of its last picture it may have been computed for another question, and up
to the end of an earlier picture for another prompt. All of it is exact: it equals one forward pass over the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from latent_tool.errors import ModelNotSupportedError, NumericalError
from latent_tool.models.attention import AttentionTap, tap_attention
from latent_tool.models.cache import fork_cache, new_cache
from latent_tool.models.decoder import Decoder
from latent_tool.models.memory import out_of_memory
from latent_tool.models.prefix import Inputs, Prefix, Stems, Suffix
from latent_tool.models.prefix_cache import AttentionMemory, ImagePrefix, PrefixCache, cut_cache, cut_tensors, image_key
from latent_tool.models.prompts import Markers
from latent_tool.models.shared_prefix import layers_fit
from latent_tool.models.watch import watched
from latent_tool.models.windows import remainder

__all__ = ["Prefilling"]


class _Ran(NamedTuple):
    """What a pass over a prompt gave: its cache, its last logits ``(vocabulary,)``, the attention ``(C,)`` of its last
    position to the image cells if it was read, and how many pictures went through the vision tower."""

    prefix: ImagePrefix
    logits: Tensor
    attention: Tensor | None
    encoded: int


@dataclass(frozen=True)
class _Tap:
    """The attention of a pass's last position, if it is wanted."""

    tap: AttentionTap | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What the model is told: to give its attention, where it cannot be tapped."""
        return {} if self.tap is None or self.tap.switched else {"output_attentions": True}

    def read(self, output: Any) -> Tensor | None:
        """Return the mean over layers and heads, ``(C,)``; ``None`` if it is not wanted or the model shows none."""
        if self.tap is None:
            return None
        for layer in () if self.tap.switched else output.attentions or ():
            if layer is not None:
                self.tap.add(layer[:, :, self.tap.rows].float())
        return self.tap.mean()[0, 0].float().cpu() if self.tap.layers else None


class Prefilling(Decoder):
    """A model and what it computed of the last images (``prefix_cache``)."""

    def __init__(self, model: PreTrainedModel, prefix_cache_bytes: int) -> None:
        super().__init__(model)
        self.prefix_cache = PrefixCache(prefix_cache_bytes)
        # Whether a prompt can be computed in two parts, and from an earlier picture on; None: not known yet.
        self._splits: bool | None = None
        self._goes_on: bool | None = None
        self.neutral_attention = AttentionMemory()

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

    def prefill(
        self,
        inputs: Inputs,
        check: Callable[[], object] | None = None,
        cached: bool = True,
        *,
        attend: bool = False,
        begins: Inputs | None = None,
    ) -> Prefix:
        """Run the prefix through the model once; up to the end of the image it may have been run for another question.

        Args:
            check: called before every layer; may raise to give up.
            cached: use what was computed before, and keep what is computed now.
            attend: read the attention of the last position, too.
            begins: a prompt with the first of the same pictures; what the cache has of them is used.

        Raises ``NumericalError`` when the model's output is not finite.
        """
        if inputs.injected:
            return self._injected(inputs, check, cached, attend)
        if not cached or not self.prefix_cache.limit or self._splits is False:
            return _prefix(inputs, self._prefill(inputs, check, attend))
        # One token is left at least, and no question of one token decides whether prompts can be split.
        at_image = (inputs.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0].tolist()
        cut = at_image[-1] + 1 if at_image else inputs.length
        if inputs.length - cut < (1 if self._splits else 2):
            return _prefix(inputs, self._prefill(inputs, check, attend))
        shown = replace(inputs, tensors=cut_tensors(inputs.tensors, cut))
        key = image_key(shown.tensors)
        with self._lock:  # so that questions that come together do not all compute the image
            if self._splits is None:
                return self._prefill_first(inputs, cut, key, check, attend)
            image, encoded = self.prefix_cache.find(key), 0
            if image is None:
                ran = self._further_pictures(shown, begins, check) or self._prefill(shown, check)
                image, encoded = ran.prefix, ran.encoded
                self.prefix_cache.put(key, image)
            return _prefix(inputs, self._after_image(inputs, image, cut, check, attend, encoded))

    def _prefill_first(
        self, inputs: Inputs, cut: int, key: str, check: Callable[[], object] | None, attend: bool
    ) -> Prefix:
        """The model's first question: run it whole and in two parts, and find out whether that is the same."""
        ran = self._prefill(inputs, check, attend)
        whole, expected = ran.prefix, ran.logits
        self._splits = False
        if not layers_fit(whole.cache):
            return _prefix(inputs, ran)
        positions = None if whole.positions is None else whole.positions[..., :cut]
        following = cut if positions is None else int(positions.max()) + 1
        image = ImagePrefix(cut_cache(whole.cache, cut), whole.features, positions, whole.columns, following)
        try:
            again = self._after_image(inputs, image, cut, None, attend, ran.encoded)
            split, found = again.prefix, again.logits
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if out_of_memory(error):
                self._splits = None  # nothing was found out
                raise
            return _prefix(inputs, ran)
        self._splits = split.next_position == whole.next_position and self._agree(found, expected)
        if not self._splits:
            return _prefix(inputs, ran)
        self.prefix_cache.put(key, image)
        return _prefix(inputs, again)

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether logits that were computed in two ways are the same, up to rounding."""
        tolerance = (1e-3 if self.dtype == torch.float32 else 5e-2) * max(1.0, float(expected.float().abs().max()))
        return bool((found.float() - expected.float()).abs().max() <= tolerance)

    def _after_image(
        self,
        inputs: Inputs,
        image: ImagePrefix,
        cut: int,
        check: Callable[[], object] | None,
        attend: bool,
        encoded: int,
    ) -> _Ran:
        """The whole prefix and its last logits, from what was computed up to the end of the image."""
        rest = self.written(inputs.tensors["input_ids"][0, cut:].tolist())
        with watched(self.model, check), self._tapped(image.columns if attend else None) as tap:
            output = self.run(image, rest, [rest.length - 1], **tap.asked)
        logits, cache = output.logits, getattr(output, self.cache_name)
        positions = image.positions
        if positions is not None:
            more = self._positions(image, 0, rest.length, 1)
            assert more is not None
            positions = torch.cat([positions, more], dim=-1)
        following = image.next_position + rest.length
        whole = ImagePrefix(cache, image.features, positions, image.columns, following)
        return _Ran(whole, logits[0, -1], tap.read(output), encoded)

    def _prefill(self, inputs: Inputs, check: Callable[[], object] | None, attend: bool = False) -> _Ran:
        """Run a prompt, whole or up to the end of its image; its last logits."""
        columns = (inputs.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0].to(self.device)
        return self._run_prompt(inputs.tensors, columns, check, inputs.pictures, attend)

    def _run_prompt(
        self,
        given: Mapping[str, Any],
        columns: Tensor,
        check: Callable[[], object] | None,
        encoded: int,
        attend: bool = False,
        before: ImagePrefix | None = None,
    ) -> _Ran:
        """Run a prompt's inputs, pictures included, from the start or from what stands before them.

        ``columns``: ``(C,)``, where the image cells stand among these inputs.
        """
        captured: dict[str, Any] = {}

        def capture(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)

        tensors = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for key, value in given.items()
            if isinstance(value, Tensor)
        }
        tapped = self._tapped(columns if attend else None)
        with self.forward_pass(), watched(self.model, check), tapped as tap:
            handle = self.model.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
            try:
                cache = {self.cache_name: new_cache(self.model) if before is None else fork_cache(before.cache, 1)}
                output = self.model(**tensors, **cache, use_cache=True, logits_to_keep=1, **tap.asked)
            finally:
                handle.remove()
        embeddings = captured.get("inputs_embeds")
        if embeddings is None:
            raise ModelNotSupportedError(
                f"{type(self.model).__name__} does not merge image features into its decoder's input.",
                "Use a model that does, such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
            )
        features = embeddings[0, columns.to(embeddings.device)].to(self.device)
        positions = captured.get("position_ids")
        following = tensors["input_ids"].shape[1] if positions is None else int(positions.max()) + 1
        cached = getattr(output, self.cache_name)
        prefix = ImagePrefix(cached, features, positions, columns, following)
        return _Ran(prefix, output.logits[0, -1], tap.read(output), encoded)

    @contextmanager
    def _tapped(self, columns: Tensor | None) -> Iterator[_Tap]:
        """Read the attention of the last position of a pass to some columns ``(C,)``; ``None``: read nothing."""
        if columns is None:
            yield _Tap()
            return
        with self._lock, tap_attention(self.model, slice(-1, None), columns) as tap:
            yield _Tap(tap)

    # ------------------------------------------------------------------ windows beside the picture

    def _further_pictures(
        self, shown: Inputs, begins: Inputs | None, check: Callable[[], object] | None
    ) -> _Ran | None:
        """Run a prompt from the end of an earlier picture on, which is in the cache; ``None``: run all of it.

        ``shown``: the prompt up to the end of its last picture. Checked against the whole pass once.
        """
        if begins is None or self._goes_on is False:
            return None
        last = int((begins.tensors["input_ids"][0] == self.image_token).nonzero()[-1, 0]) + 1
        known = cut_tensors(begins.tensors, last)
        rest = remainder(shown.tensors, known)
        before = None if rest is None else self.prefix_cache.find(image_key(known))
        if rest is None or before is None:
            return None
        if self._goes_on is None:
            whole = self._prefill(shown, check)
            self._goes_on = False
            try:
                ran = self._go_on(shown, begins, rest, before, None)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if out_of_memory(error):
                    self._goes_on = None  # nothing was found out
                    raise
                return whole
            self._goes_on = (
                ran is not None
                and ran.prefix.next_position == whole.prefix.next_position
                and self._agree(ran.logits, whole.logits)
                and self._agree(ran.prefix.features, whole.prefix.features)
            )
            return whole
        return self._go_on(shown, begins, rest, before, check)

    def _go_on(
        self,
        shown: Inputs,
        begins: Inputs,
        rest: dict[str, Tensor],
        before: ImagePrefix,
        check: Callable[[], object] | None,
    ) -> _Ran | None:
        """Run what a prompt has after what is in the cache, further pictures included."""
        first, total = shown.length - rest["input_ids"].shape[1], shown.length
        positions = None
        if before.positions is not None:
            positions = self._all_positions(shown.tensors, before.positions, total)
            if positions is None or not torch.equal(positions[..., :first], before.positions):
                return None
            rest = {**rest, "position_ids": positions[..., first:]}
        columns = (shown.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0].to(self.device)
        ran = self._run_prompt(
            rest, columns[columns >= first] - first, check, shown.pictures - begins.pictures, before=before
        )
        features = torch.cat([before.features, ran.prefix.features])
        following = total if positions is None else int(positions.max()) + 1
        return ran._replace(prefix=ImagePrefix(ran.prefix.cache, features, positions, columns, following))

    def _all_positions(self, tensors: Mapping[str, Any], before: Tensor, total: int) -> Tensor | None:
        """Position ids of a whole prompt, as the model counts them; ``None`` if it does not say how.

        ``before``: those of its first tokens.
        """
        count = torch.arange(total, device=before.device)
        if torch.equal(before, count[: before.shape[-1]].expand_as(before)) and not hasattr(
            getattr(self.model, "model", None), "get_rope_index"
        ):
            return count.expand(*before.shape[:-1], total)
        find = getattr(getattr(self.model, "model", None), "get_rope_index", None)
        if find is None:
            return None
        known = {name: tensors[name] for name in signature(find).parameters if isinstance(tensors.get(name), Tensor)}
        found: Tensor = find(**{name: value.to(before.device) for name, value in known.items()})[0]
        if before.shape[0] == found.shape[0] + 1:  # text positions stand before those of the picture
            found = torch.cat([count.expand(1, *found.shape[1:]), found])
        return found

    def _injected(self, inputs: Inputs, check: Callable[[], object] | None, cached: bool, attend: bool) -> Prefix:
        """Run a prompt, and after it the cells of windows, each encoded by a prompt of its own."""
        prefix = self.prefill(replace(inputs, injected=()), check, cached, attend=attend)
        attention = [prefix.attention]
        for each in inputs.injected:
            window = self.prefill(each, check, cached, attend=attend)
            attention.append(window.attention)
            prefix = self._with_cells(prefix, window.features, check)
            prefix = replace(prefix, encoded=prefix.encoded + window.encoded)
        read = [weights for weights in attention if weights is not None]
        if not bool(prefix.last_logits.isfinite().all()):
            raise _not_finite()
        return replace(
            prefix, inputs=inputs, attention=torch.cat(read) if len(read) == len(attention) else None, stems=Stems()
        )

    def _with_cells(self, prefix: Prefix, features: Tensor, check: Callable[[], object] | None) -> Prefix:
        """Run image features ``(n, d)`` after a prefix, as injected cells are; they become cells of the prefix."""
        filler = self.model.config.get_text_config().pad_token_id or 0
        suffix = Suffix(features[None].to(self.dtype), (filler,) * len(features))
        with watched(self.model, check):
            logits, cache = self.continue_after(prefix, suffix, [suffix.length - 1])
        positions = prefix.positions
        if positions is not None:
            more = self._positions(prefix, 0, suffix.length, 1)
            assert more is not None
            positions = torch.cat([positions, more], dim=-1)
        count = int(cache.get_seq_length())
        columns = torch.arange(count - suffix.length, count, device=prefix.columns.device)
        return replace(
            prefix,
            cache=cache,
            features=torch.cat([prefix.features, features]),
            last_logits=logits[0, -1],
            positions=positions,
            columns=torch.cat([prefix.columns, columns]),
            next_position=prefix.next_position + suffix.length,
        )

    # ------------------------------------------------------------------ continuing from the cache

    def _positions(self, prefix: Prefix | ImagePrefix, start: int, length: int, batch: int) -> Tensor | None:
        """Position ids of ``length`` tokens that stand ``start`` tokens after the prefix."""
        if prefix.positions is None:
            return None
        following = prefix.next_position + start + torch.arange(length, device=prefix.positions.device)
        return following.expand(*prefix.positions.shape[:-2], batch, length)

    def suffix(
        self, prefix: Prefix, latents: Tensor | None, patches: Sequence[Sequence[int]], answer: Sequence[int] = ()
    ) -> Suffix:
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
        first = injected + len(markers.opening)
        return Suffix(torch.cat([part.to(self.dtype) for part in parts], dim=1), tokens, slice(first, first + count))

    def written(self, tokens: Sequence[int]) -> Suffix:
        """Plain tokens as something that follows the prefix."""
        return Suffix(self.embed(tokens)[None], tuple(tokens))

    def continue_after(
        self,
        prefix: Prefix | ImagePrefix,
        suffix: Suffix,
        keep: Sequence[int],
        cache: DynamicCache | None = None,
        start: int = 0,
    ) -> tuple[Tensor, DynamicCache]:
        """Logits ``(N, len(keep), vocabulary)`` at the positions to keep, and the cache they leave behind.

        ``start``: tokens between the prefix and the suffix that are in the cache already.
        """
        output = self.run(prefix, suffix, keep, cache, start)
        return output.logits, getattr(output, self.cache_name)

    def run(
        self,
        prefix: Prefix | ImagePrefix,
        suffix: Suffix,
        keep: Sequence[int],
        cache: DynamicCache | None = None,
        start: int = 0,
        **given: Any,
    ) -> Any:
        """The model's own output for a suffix; see ``continue_after``."""
        batch = len(suffix.embeddings)
        with self.forward_pass():
            if getattr(self.model.config.get_text_config(), "hidden_size_per_layer_input", None):
                # Gemma 4 feeds a second embedding of the token ids to every layer.
                ids = torch.tensor([suffix.tokens], device=self.device)
                layers = self.model.get_decoder().get_per_layer_inputs(ids)
                given["per_layer_inputs"] = layers.expand(batch, *layers.shape[1:])
            return self.model(
                inputs_embeds=suffix.embeddings,
                **{self.cache_name: fork_cache(prefix.cache, batch) if cache is None else cache},
                position_ids=self._positions(prefix, start, suffix.length, batch),
                use_cache=True,
                # A tensor: with a number, Gemma 4 drops the other rows in its upper layers, the tapped ones too.
                logits_to_keep=self.places(keep),
                **given,
            )


def _prefix(inputs: Inputs, ran: _Ran) -> Prefix:
    """A question's prefix, unless the model's output is not finite."""
    if not bool(ran.logits.isfinite().all()):
        raise _not_finite()
    image = ran.prefix
    return Prefix(
        inputs,
        image.cache,
        image.features,
        ran.logits,
        image.positions,
        image.columns,
        image.next_position,
        attention=ran.attention,
        encoded=ran.encoded,
    )


def _not_finite() -> NumericalError:
    return NumericalError(
        "The model's logits are not finite for this image and question.", "Load the model in float32 or bfloat16."
    )
