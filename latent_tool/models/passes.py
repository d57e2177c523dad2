"""Passes over prompts and over what follows them, of several questions in one pass where they are of one shape.

A pass is exact for each of its questions: rows do not see one another, and what is filled up on the right of a shorter
row stands behind all that is read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_tool.errors import ModelNotSupportedError
from latent_tool.method.asking import contained
from latent_tool.models.attention import AttentionTap, tap_attention
from latent_tool.models.cache import fork_cache, join_caches, new_cache
from latent_tool.models.decoder import Decoder
from latent_tool.models.prefix import Prefix, Suffix
from latent_tool.models.prefix_cache import ImagePrefix, cut_cache
from latent_tool.models.prompts import Markers
from latent_tool.models.shared_prefix import layers_fit
from latent_tool.models.watch import watched

__all__ = ["Check", "Continued", "Given", "Passes", "Ran"]

# Called before every layer; may raise to give up.
Check = Callable[[], object] | None


class Ran(NamedTuple):
    """What a pass over a prompt gave: its cache, its last logits ``(vocabulary,)``, the attention ``(C,)`` of its last
    position to the image cells if it was read, and how many pictures went through the vision tower."""

    prefix: ImagePrefix
    logits: Tensor
    attention: Tensor | None
    encoded: int


@dataclass(frozen=True)
class Given:
    """A prompt to be run, from the start or from what stands before it.

    ``columns``: ``(C,)``, where the image cells stand among these inputs. ``encoded``: pictures among them.
    """

    tensors: Mapping[str, Any]
    columns: Tensor
    encoded: int
    check: Check = None
    attend: bool = False
    before: ImagePrefix | None = None

    @property
    def kind(self) -> str:
        """What has to be the same in one pass as one by one."""
        return "prompt" if self.before is None else "further pictures"

    @property
    def shape(self) -> object:
        """What prompts that are run in one pass have in common."""
        tensors = [
            (name, value.dtype, value.shape) for name, value in self.tensors.items() if isinstance(value, Tensor)
        ]
        before = None if self.before is None else self.before.cache.get_seq_length()
        return tuple(sorted(tensors, key=str)), tuple(self.columns.tolist()), before, self.attend

    def like(self, other: Given) -> bool:
        """Tell whether another prompt of this shape has the same tokens and pictures."""
        return all(
            torch.equal(value, other.tensors[name]) for name, value in self.tensors.items() if isinstance(value, Tensor)
        )

    @property
    def length(self) -> int:
        """Tokens, those before it among them."""
        before = 0 if self.before is None else int(self.before.cache.get_seq_length())
        return before + int(self.tensors["input_ids"].shape[1])


@dataclass(frozen=True)
class Continued:
    """Tokens that follow what was computed up to the end of a picture; ``encoded``: pictures computed for it."""

    image: ImagePrefix
    tokens: tuple[int, ...]
    encoded: int = 0
    check: Check = None
    attend: bool = False

    @property
    def kind(self) -> str:
        """What has to be the same in one pass as one by one."""
        return "rest"

    @property
    def shape(self) -> object:
        """What rows that are run in one pass have in common; without attention to be read, any number of tokens."""
        read = (len(self.tokens), tuple(self.image.columns.tolist())) if self.attend else None
        return self.image.cache.get_seq_length(), read

    def like(self, other: Continued) -> bool:
        """Tell whether another row has the same tokens after the same picture."""
        return self.tokens == other.tokens and self.image is other.image

    @property
    def length(self) -> int:
        """Tokens, those before it among them."""
        return int(self.image.cache.get_seq_length()) + len(self.tokens)


class _Checks:
    """The checks of several questions in one pass: what one raises ends its own question; the last one ends the pass.

    Attributes:
        failed: what was raised, by row.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self.failed: dict[int, Exception] = {}

    @property
    def every(self) -> Check:
        """One check in place of all; ``None`` if there is none."""
        return self if any(self._checks) else None

    @property
    def over(self) -> bool:
        """Whether nobody waits for the pass any more."""
        return len(self.failed) == len(self._checks)

    def __call__(self) -> None:
        for row, check in enumerate(self._checks):
            if check is not None and row not in self.failed:
                try:
                    check()
                except BaseException as error:
                    self.failed[row] = contained(error)
        if self.over:
            raise next(iter(self.failed.values()))


@dataclass(frozen=True)
class _Tap:
    """The attention of a pass's last position, if it is wanted."""

    tap: AttentionTap | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What the model is told: to give its attention, where it cannot be tapped."""
        return {} if self.tap is None or self.tap.switched else {"output_attentions": True}

    def read(self, output: Any) -> list[Tensor] | None:
        """Return the mean over layers and heads, ``(C,)`` a row; ``None`` if not wanted or the model shows none."""
        if self.tap is None:
            return None
        for layer in () if self.tap.switched else output.attentions or ():
            if layer is not None:
                self.tap.add(layer[:, :, self.tap.rows].float())
        return list(self.tap.mean()[:, 0].float().cpu()) if self.tap.layers else None


class Passes(Decoder):
    """Forward passes of a frozen model: over prompts, and on from their caches."""

    # ------------------------------------------------------------------ over prompts

    def model_inputs(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a processor gave, as the model takes it: tensors alone, on its device and of its type."""
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        }

    @contextmanager
    def decoder_input(self, *, run: bool = True) -> Iterator[dict[str, Any]]:
        """Capture what the decoder is given in the passes inside the ``with``; without ``run`` it is not run.

        Raises ``ModelNotSupportedError`` at the end for a model that does not merge image features into it.
        """
        given: dict[str, Any] = {}

        def capture(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            given.update(kwargs)
            if not run:
                raise _SeenError

        handle = self.model.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
        try:
            yield given
        except _SeenError:
            pass
        finally:
            handle.remove()
        if given.get("inputs_embeds") is None:
            raise ModelNotSupportedError(
                f"{type(self.model).__name__} does not merge image features into its decoder's input.",
                "Use a model that does, such as LLaVA, Qwen-VL, SmolVLM or InternVL.",
            )

    def image_features(self, given: Mapping[str, Any], columns: Tensor, row: int = 0) -> Tensor:
        """Return merged image features ``(C, d)`` of one row of what the decoder was given."""
        embeddings: Tensor = given["inputs_embeds"]
        return embeddings[row, columns.to(embeddings.device)].to(self.device)

    def _run_prompts(self, rows: Sequence[Given]) -> list[Ran | Exception]:
        """Run prompts of one shape in one pass, pictures included; what a row's check raises takes its place.

        Raises ``RuntimeError`` if there are several and the model does not keep plain keys and values of them.
        """
        first, checks = rows[0], _Checks([row.check for row in rows])
        tensors = self.model_inputs(_stacked([row.tensors for row in rows]))
        columns = first.columns.to(self.device)
        try:
            with (
                self.forward_pass(),
                watched(self.model, checks.every),
                self._tapped(columns if first.attend else None) as tap,
                self.decoder_input() as given,
            ):
                before = [row.before.cache for row in rows if row.before is not None]
                cache = {self.cache_name: join_caches(before) if before else new_cache(self.model)}
                output = self.model(**tensors, **cache, use_cache=True, logits_to_keep=1, **tap.asked)
        except BaseException:
            if checks.over:
                return list(map(checks.failed.__getitem__, range(len(rows))))
            raise
        cache, positions = getattr(output, self.cache_name), given.get("position_ids")
        attention = tap.read(output)
        _require_plain(cache, rows)
        found: list[Ran | Exception] = []
        for row in range(len(rows)):
            if row in checks.failed:
                found.append(checks.failed[row])
                continue
            own = positions
            if positions is not None and len(rows) > 1 and positions.shape[-2] > 1:
                own = positions[..., row : row + 1, :]
            following = tensors["input_ids"].shape[1] if own is None else int(own.max()) + 1
            features = self.image_features(given, columns, row)
            if len(rows) > 1 and own is not None:  # a view would keep the whole batch in memory
                own = own.clone()
            kept = cache if len(rows) == 1 else cut_cache(cache, cache.get_seq_length(), row)
            found.append(
                Ran(
                    ImagePrefix(kept, features, own, columns, following),
                    output.logits[row, -1].clone() if len(rows) > 1 else output.logits[row, -1],
                    None if attention is None else attention[row],
                    rows[row].encoded,
                )
            )
        return found

    # ------------------------------------------------------------------ continuing from the cache

    def _after_images(self, rows: Sequence[Continued]) -> list[Ran | Exception]:
        """The whole prefixes and their last logits, from what was computed up to the end of the pictures.

        A shorter row is filled up on its right; that stands behind everything that is read of it.
        """
        checks = _Checks([row.check for row in rows])
        longest = max(len(row.tokens) for row in rows)
        filled = [token for row in rows for token in (*row.tokens, *row.tokens[-1:] * (longest - len(row.tokens)))]
        written = tuple(tuple(filled[at : at + longest]) for at in range(0, len(filled), longest))
        rest = Suffix(self.embed(filled).view(len(rows), longest, -1), written[0])
        places = sorted({len(row.tokens) - 1 for row in rows})
        more = [self._positions(row.image, 0, longest, 1) for row in rows]
        columns = rows[0].image.columns if rows[0].attend else None
        try:
            with watched(self.model, checks.every), self._tapped(columns) as tap:
                cache = join_caches([row.image.cache for row in rows])
                stacked = (
                    torch.cat([each for each in more if each is not None], dim=-2) if more[0] is not None else None
                )
                output = self._pass(rest, places, cache, stacked, written, **tap.asked)
        except BaseException:
            if checks.over:
                return list(map(checks.failed.__getitem__, range(len(rows))))
            raise
        cache, attention = getattr(output, self.cache_name), tap.read(output)
        _require_plain(cache, rows)
        found: list[Ran | Exception] = []
        for at, (row, positions) in enumerate(zip(rows, more, strict=True)):
            if at in checks.failed:
                found.append(checks.failed[at])
                continue
            image, length = row.image, len(row.tokens)
            if positions is not None:
                assert image.positions is not None
                positions = torch.cat([image.positions, positions[..., :length]], dim=-1)
            logits = output.logits[at, places.index(length - 1)]
            found.append(
                Ran(
                    ImagePrefix(
                        cache if len(rows) == 1 else cut_cache(cache, row.length, at),
                        image.features,
                        positions,
                        image.columns,
                        image.next_position + length,
                    ),
                    logits.clone() if len(rows) > 1 else logits,
                    None if attention is None else attention[at],
                    row.encoded,
                )
            )
        return found

    @contextmanager
    def _tapped(self, columns: Tensor | None) -> Iterator[_Tap]:
        """Read the attention of the last position of a pass to some columns ``(C,)``; ``None``: read nothing."""
        if columns is None:
            yield _Tap()
            return
        with self._lock, tap_attention(self.model, slice(-1, None), columns) as tap:
            yield _Tap(tap)

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
        **given: Any,
    ) -> Any:
        """Return the model's own output for a suffix, its logits ``(N, len(keep), vocabulary)`` at positions to keep.

        Args:
            prefix: what the suffix follows.
            suffix: embeddings of ``N`` rows.
            keep: positions of the suffix, ascending.
            cache: of the prefix and what was run after it, which is changed; ``None``: a copy of the prefix's.
            start: tokens between the prefix and the suffix that are in the cache already.
            given: what else the model is told.
        """
        batch = len(suffix.embeddings)
        cache = fork_cache(prefix.cache, batch) if cache is None else cache
        return self._pass(suffix, keep, cache, self._positions(prefix, start, suffix.length, batch), **given)

    def _pass(
        self,
        suffix: Suffix,
        keep: Sequence[int],
        cache: DynamicCache,
        positions: Tensor | None,
        written: Sequence[Sequence[int]] = (),
        **given: Any,
    ) -> Any:
        """The model's own output for what follows a cache, which it changes.

        ``written``: the tokens of every row, where they differ.
        """
        with self.forward_pass():
            if getattr(self.model.config.get_text_config(), "hidden_size_per_layer_input", None):
                # Gemma 4 feeds a second embedding of the token ids to every layer.
                ids = torch.tensor(written or [suffix.tokens], device=self.device)
                layers = self.model.get_decoder().get_per_layer_inputs(ids)
                given["per_layer_inputs"] = layers.expand(len(suffix.embeddings), *layers.shape[1:])
            return self.model(
                inputs_embeds=suffix.embeddings,
                **{self.cache_name: cache},
                position_ids=positions,
                use_cache=True,
                # A tensor: with a number, Gemma 4 drops the other rows in its upper layers, the tapped ones too.
                logits_to_keep=self.places(keep),
                **given,
            )


class _SeenError(Exception):
    """The decoder was about to begin."""


def _stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The inputs of several prompts as those of one pass: pictures one after another, tokens row by row."""
    return {
        name: torch.cat([row[name] for row in rows], dim=-2 if name == "position_ids" else 0)
        if len(rows) > 1
        else value
        for name, value in rows[0].items()
        if isinstance(value, Tensor)
    }


def _require_plain(cache: DynamicCache, rows: Sequence[object]) -> None:
    if len(rows) > 1 and not layers_fit(cache):
        raise RuntimeError("Caches with layers of other kinds than plain ones cannot be taken apart by row.")
