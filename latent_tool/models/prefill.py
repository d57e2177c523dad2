"""From a prompt to the decoder's cache: what every other pass begins with.

The prefix is computed once; up to the end of its last picture it may have been computed for another question, and up
to the end of an earlier picture for another prompt. Prompts of several questions are computed in one pass where they
are of one shape. All of it is exact: it equals one forward pass over the whole, for every question of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tool.errors import LatentToolError, ModelNotSupportedError, NumericalError
from latent_tool.models.memory import out_of_memory
from latent_tool.models.passes import Check, Continued, Given, Passes, Ran
from latent_tool.models.prefix import Inputs, Prefix, Stems, Suffix
from latent_tool.models.prefix_cache import AttentionMemory, ImagePrefix, PrefixCache, cut_cache, cut_tensors, image_key
from latent_tool.models.requests import Prefill
from latent_tool.models.shared_prefix import layers_fit
from latent_tool.models.watch import watched
from latent_tool.models.windows import remainder

__all__ = ["Prefilling"]

# Tokens of prompts, their caches among them, that one pass takes at most: with more it is no cheaper for each.
_MOST_TOKENS = 2**12
# What a model raises that does not take its inputs in another way than the usual one.
_NOT_TAKEN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", Given, Continued)


@dataclass(frozen=True)
class _Parted:
    """A prompt that is computed in two parts: up to token ``cut``, where its last picture ends, and from there on."""

    place: int
    request: Prefill
    cut: int
    shown: Inputs
    key: str


class Prefilling(Passes):
    """A model and what it computed of the last images (``prefix_cache``)."""

    def __init__(self, model: PreTrainedModel, prefix_cache_bytes: int) -> None:
        super().__init__(model)
        self.prefix_cache = PrefixCache(prefix_cache_bytes)
        # Whether a prompt can be computed in two parts, and from an earlier picture on; None: not known yet.
        self._splits: bool | None = None
        self._goes_on: bool | None = None
        # Whether several rows of a kind are the same in one pass as one by one, as far as that is known.
        self._joins: dict[str, bool] = {}
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
        check: Check = None,
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
        (found,) = self.prefill_many([Prefill(inputs, check, cached, attend, begins)])
        if isinstance(found, Exception):
            raise found
        return found

    def prefill_many(self, requests: Sequence[Prefill]) -> list[Prefix | Exception]:
        """``prefill`` for several questions, in one pass where their prompts are of one shape.

        What a question's check raises, or a ``NumericalError``, takes its place; the others are not disturbed.
        """
        found: dict[int, Prefix | Exception] = {}
        with self._lock:  # so that questions that come together do not all compute the image
            waiting = list(enumerate(requests))
            while waiting:
                waiting = self._prefill_some(waiting, found)
        return [found[place] for place in range(len(requests))]

    def _prefill_some(
        self, asked: Sequence[tuple[int, Prefill]], found: dict[int, Prefix | Exception]
    ) -> list[tuple[int, Prefill]]:
        """Compute prefixes; returns the questions about pictures that others of them were the first to ask about."""
        whole: list[tuple[int, Prefill]] = []
        new: list[_Parted] = []
        known: list[tuple[_Parted, ImagePrefix, int]] = []
        later: list[tuple[int, Prefill]] = []
        for place, request in asked:
            inputs = request.inputs
            if inputs.injected:
                found[place] = _or_error(self._injected, request)
                continue
            cut = self._cut(inputs) if request.cached and self.prefix_cache.limit else None
            if cut is None:
                whole.append((place, request))
                continue
            shown = replace(inputs, tensors=cut_tensors(inputs.tensors, cut))
            parted = _Parted(place, request, cut, shown, image_key(shown.tensors))
            if self._splits is None:
                found[place] = _or_error(self._prefill_first, parted)
                continue
            if any(parted.key == each.key for each in new):
                later.append((place, request))
                continue
            image = self.prefix_cache.find(parted.key)
            if image is None:
                new.append(parted)
            else:
                known.append((parted, image, 0))
        computed = self._in_passes([self._given(r.inputs, r.check, r.attend) for _, r in whole], self._run_prompts)
        for (place, request), ran in zip(whole, computed, strict=True):
            found[place] = _prefix(request.inputs, ran)
        for parted, ran in zip(new, self._up_to_images(new), strict=True):
            if isinstance(ran, Exception):
                found[parted.place] = ran
            elif not _finite(ran):
                found[parted.place] = _not_finite()
            else:
                self.prefix_cache.put(parted.key, ran.prefix, window=parted.request.inputs.shows_windows)
                known.append((parted, ran.prefix, ran.encoded))
        rests = [self._rest(parted, image, encoded) for parted, image, encoded in known]
        for (parted, _, _), ran in zip(known, self._in_passes(rests, self._after_images), strict=True):
            found[parted.place] = _prefix(parted.request.inputs, ran)
        return later

    def _cut(self, inputs: Inputs) -> int | None:
        """Where the first part of a prompt ends; ``None`` if it is computed whole."""
        if self._splits is False:
            return None
        at_image = (inputs.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0].tolist()
        cut = at_image[-1] + 1 if at_image else inputs.length
        # One token is left at least, and no question of one token decides whether prompts can be split.
        return cut if inputs.length - cut >= (1 if self._splits else 2) else None

    def _rest(self, parted: _Parted, image: ImagePrefix, encoded: int) -> Continued:
        """What follows the pictures of a prompt."""
        request = parted.request
        tokens = request.inputs.tensors["input_ids"][0, parted.cut :].tolist()
        return Continued(image, tuple(tokens), encoded, request.check, request.attend)

    def _in_passes(
        self, rows: Sequence[R], run: Callable[[Sequence[R]], Sequence[Ran | Exception]]
    ) -> list[Ran | Exception]:
        """Run rows in as few passes as their shapes allow, one by one where that would not be the same."""
        found: dict[int, Ran | Exception] = {}
        for places in _of_one_shape(rows):
            some = [rows[place] for place in places]
            kind = _kind(some)
            if kind not in self._joins and (other := _another(some)):
                ran = self._join_first(kind, [some[0], some[other]], run)
                found[places[0]], found[places[other]] = ran
                some = [row for at, row in enumerate(some) if at not in (0, other)]
                places = [place for at, place in enumerate(places) if at not in (0, other)]
            for part in [some] if self._joins.get(kind) else [[row] for row in some]:
                ran = list(run(part)) if part else []
                if len(part) > 1:
                    # Values that are not finite may spread over a pass: whoever has some is asked alone.
                    ran = [one if _finite(one) else run([row])[0] for one, row in zip(ran, part, strict=True)]
                found.update(zip(places, ran, strict=False))
                places = places[len(part) :]
        return [found[place] for place in range(len(rows))]

    def _join_first(
        self, kind: str, rows: Sequence[R], run: Callable[[Sequence[R]], Sequence[Ran | Exception]]
    ) -> list[Ran | Exception]:
        """Run two rows that differ alone and in one pass, and find out whether that is the same."""
        alone = [run([row])[0] for row in rows]
        if not all(map(_usable, alone)):
            return alone  # nothing was found out
        try:
            together = run(rows)
        except _NOT_TAKEN as error:
            if out_of_memory(error):
                raise
            self._joins[kind] = False
            return alone
        if any(isinstance(ran, Exception) for ran in together):
            return alone  # given up meanwhile: nothing was found out
        self._joins[kind] = all(self._same(one, other) for one, other in zip(alone, together, strict=True))
        return alone

    def _same(self, one: Ran | Exception, other: Ran | Exception) -> bool:
        """Whether two ways of running the same inputs gave the same, up to rounding."""
        return (
            not isinstance(one, Exception)
            and not isinstance(other, Exception)
            and one.prefix.next_position == other.prefix.next_position
            and self._agree(one.logits, other.logits)
            and self._agree(one.prefix.features, other.prefix.features)
        )

    def _prefill_first(self, parted: _Parted) -> Prefix | Exception:
        """The model's first question: run it whole and in two parts, and find out whether that is the same."""
        inputs, cut, request = parted.request.inputs, parted.cut, parted.request
        ran = self._run_prompt(self._given(inputs, request.check, request.attend))
        if not _usable(ran):
            return _not_finite()  # nothing was found out
        whole = ran.prefix
        self._splits = False
        if not layers_fit(whole.cache):
            return _prefix(inputs, ran)
        positions = None if whole.positions is None else whole.positions[..., :cut]
        following = cut if positions is None else int(positions.max()) + 1
        image = ImagePrefix(cut_cache(whole.cache, cut), whole.features, positions, whole.columns, following)
        try:
            (again,) = self._after_images([replace(self._rest(parted, image, ran.encoded), check=None)])
        except _NOT_TAKEN as error:
            if out_of_memory(error):
                self._splits = None  # nothing was found out
                raise
            return _prefix(inputs, ran)
        self._splits = self._same(ran, again)
        if not self._splits or isinstance(again, Exception):
            return _prefix(inputs, ran)
        self.prefix_cache.put(parted.key, image, window=inputs.shows_windows)
        return _prefix(inputs, again)

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether values that were computed in two ways are the same, up to rounding."""
        tolerance = (1e-3 if self.dtype == torch.float32 else 5e-2) * max(1.0, float(expected.float().abs().max()))
        return found.shape == expected.shape and bool((found.float() - expected.float()).abs().max() <= tolerance)

    def _given(self, inputs: Inputs, check: Check, attend: bool = False) -> Given:
        """A prompt, whole or up to the end of its pictures, as a pass takes it."""
        columns = (inputs.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0]
        return Given(inputs.tensors, columns, inputs.pictures, check, attend)

    def _run_prompt(self, given: Given) -> Ran:
        """Run one prompt."""
        (ran,) = self._run_prompts([given])
        if isinstance(ran, Exception):
            raise ran
        return ran

    # ------------------------------------------------------------------ pictures that are new to the cache

    def _up_to_images(self, new: Sequence[_Parted]) -> list[Ran | Exception]:
        """Run prompts up to the end of their pictures, from an earlier picture on where the cache has that."""
        found: dict[int, Ran | Exception] = {}
        rows: list[tuple[int, _Further | None, Given]] = []
        for at, parted in enumerate(new):
            request = parted.request
            further = self._further(parted.shown, request.begins)
            if further is not None and self._goes_on is None:
                found[at] = _or_error(self._go_on_first, parted, further)
                continue
            if further is not None and not self._goes_on:
                further = None
            given = self._given(parted.shown, request.check) if further is None else further.given
            rows.append((at, further, replace(given, check=request.check)))
        for (at, further, _), ran in zip(
            rows, self._in_passes([row[2] for row in rows], self._run_prompts), strict=True
        ):
            found[at] = ran if further is None or isinstance(ran, Exception) else further.whole(ran)
        return [found[at] for at in range(len(new))]

    def _go_on_first(self, parted: _Parted, further: _Further) -> Ran:
        """Run a prompt whole and from an earlier picture on, and find out whether that is the same."""
        whole = self._run_prompt(self._given(parted.shown, parted.request.check))
        if not _usable(whole):
            return whole  # nothing was found out
        self._goes_on = False
        try:
            ran = further.whole(self._run_prompt(further.given))
        except _NOT_TAKEN as error:
            if out_of_memory(error):
                self._goes_on = None  # nothing was found out
                raise
            return whole
        self._goes_on = self._same(whole, ran)
        return whole

    def _further(self, shown: Inputs, begins: Inputs | None) -> _Further | None:
        """What a prompt has after an earlier picture that is in the cache; ``None``: run all of it.

        ``shown``: the prompt up to the end of its last picture.
        """
        if begins is None or self._goes_on is False:
            return None
        last = int((begins.tensors["input_ids"][0] == self.image_token).nonzero()[-1, 0]) + 1
        known = cut_tensors(begins.tensors, last)
        rest = remainder(shown.tensors, known)
        before = None if rest is None else self.prefix_cache.find(image_key(known))
        if rest is None or before is None:
            return None
        first, total = shown.length - rest["input_ids"].shape[1], shown.length
        positions = None
        if before.positions is not None:
            positions = self._all_positions(shown.tensors, before.positions, total)
            if positions is None or not torch.equal(positions[..., :first], before.positions):
                return None
            rest = {**rest, "position_ids": positions[..., first:]}
        columns = (shown.tensors["input_ids"][0] == self.image_token).nonzero()[:, 0]
        given = Given(rest, columns[columns >= first] - first, shown.pictures - begins.pictures, before=before)
        return _Further(given, before, columns.to(self.device), positions, total)

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

    # ------------------------------------------------------------------ windows as cells

    def _injected(self, request: Prefill) -> Prefix:
        """Run a prompt, and after it the cells of windows, each encoded by a prompt of its own."""
        inputs = request.inputs
        asked = [replace(request, inputs=replace(inputs, injected=()))]
        asked += [replace(request, inputs=each, begins=None) for each in inputs.injected]
        prefixes = []
        for found in self.prefill_many(asked):
            if isinstance(found, Exception):
                raise found
            prefixes.append(found)
        prefix, *windows = prefixes
        for window in windows:
            prefix = self._with_cells(prefix, window.features, request.check)
            prefix = replace(prefix, encoded=prefix.encoded + window.encoded)
        read = [each.attention for each in prefixes if each.attention is not None]
        if not bool(prefix.last_logits.isfinite().all()):
            raise _not_finite()
        return replace(
            prefix, inputs=inputs, attention=torch.cat(read) if len(read) == len(prefixes) else None, stems=Stems()
        )

    def _with_cells(self, prefix: Prefix, features: Tensor, check: Callable[[], object] | None) -> Prefix:
        """Run image features ``(n, d)`` after a prefix, as injected cells are; they become cells of the prefix."""
        filler = self.model.config.get_text_config().pad_token_id or 0
        suffix = Suffix(features[None].to(self.dtype), (filler,) * len(features))
        with watched(self.model, check):
            output = self.continue_after(prefix, suffix, [suffix.length - 1])
        cache = getattr(output, self.cache_name)
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
            last_logits=output.logits[0, -1],
            positions=positions,
            columns=torch.cat([prefix.columns, columns]),
            next_position=prefix.next_position + suffix.length,
        )


@dataclass(frozen=True)
class _Further:
    """What a prompt has after an earlier picture: as a pass takes it, and what it is put together with.

    ``columns``, ``positions`` and ``total`` are those of the prompt up to the end of its last picture.
    """

    given: Given
    before: ImagePrefix
    columns: Tensor
    positions: Tensor | None
    total: int

    def whole(self, ran: Ran) -> Ran:
        """Return what the pass gave, as if it had run the whole prompt."""
        features = torch.cat([self.before.features, ran.prefix.features])
        following = self.total if self.positions is None else int(self.positions.max()) + 1
        return ran._replace(prefix=ImagePrefix(ran.prefix.cache, features, self.positions, self.columns, following))


def _of_one_shape(rows: Sequence[R]) -> Iterator[list[int]]:
    """Places of rows that can be run in one pass, no more of them than have room in one."""
    shapes: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        shapes.setdefault(row.shape, []).append(place)
    for places in shapes.values():
        part: list[int] = []
        for place in sorted(places, key=lambda place: rows[place].length):  # the longest of a part decides its width
            if (len(part) + 1) * rows[place].length > _MOST_TOKENS and part:
                yield part
                part = []
            part.append(place)
        yield part


def _or_error(compute: Callable[P, T], *args: P.args, **given: P.kwargs) -> T | Exception:
    """What is computed for one question, or the error of that question."""
    try:
        return compute(*args, **given)
    except LatentToolError as error:
        return error


def _prefix(inputs: Inputs, ran: Ran | Exception) -> Prefix | Exception:
    """A question's prefix, or its error; that is one if the model's output is not finite."""
    if isinstance(ran, Exception):
        return ran
    if not _finite(ran):
        return _not_finite()
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


def _finite(ran: Ran | Exception) -> bool:
    """Whether a pass gave what can be used, or an error of its own."""
    return isinstance(ran, Exception) or bool(ran.logits.isfinite().all())


def _usable(ran: Ran | Exception) -> bool:
    """Whether a pass gave what can be used."""
    return not isinstance(ran, Exception) and _finite(ran)


def _kind(rows: Sequence[R]) -> str:
    """What has to be the same in one pass as one by one: filling up shorter rows is another thing than joining them."""
    several = len({row.length for row in rows}) > 1
    return f"{rows[0].kind}, filled up" if several else rows[0].kind


def _another(rows: Sequence[R]) -> int | None:
    """The first row that differs from the first, in length if any does: equal ones prove nothing."""
    first, several = rows[0], len({row.length for row in rows}) > 1
    others = (at for at, row in enumerate(rows) if (row.length != first.length if several else not first.like(row)))
    return next(others, None)


def _not_finite() -> NumericalError:
    return NumericalError(
        "The model's logits are not finite for this image and question.", "Load the model in float32 or bfloat16."
    )
