"""One labelled question, and what can be said of many: a sample, a fingerprint. Knows nothing of files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from latent_tool.errors import DatasetError, SettingsError
from latent_tool.evaluation.matching import Match, options_in
from latent_tool.request import checked_options
from latent_tool.settings import ImagePolicy

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Box", "Item", "StoredImage", "broken_item", "dataset_fingerprint", "open_images", "sample", "sound"]

Box = tuple[float, float, float, float]
Loader = Callable[[], "tuple[Image, ...]"]


@dataclass(frozen=True)
class Item:
    """One question with what is known about it.

    Args:
        id: its name, unique in the data set.
        question: what is asked.
        label: the right answer; ``None`` if there is none.
        loader: opens the images; may raise an ``ImageError``.
        type: kind of question, for tables by kind.
        match: when an answer is right.
        boxes: what the answer rests on, in pixels of the first image; ``None`` if not known.
        reasoning: a true reasoning that leads to the answer; ``None`` if not known.
        line: line of the data set's file, from 1.
        problem: why the row cannot be used; such an item is never asked.
        content: identifies the images in the data set's fingerprint.
        images: what the images are called in the files of a run: never their bytes, credentials or queries.
        group: name of the items that count together, such as a pair; ``None``: it counts alone.
    """

    id: str
    question: str
    label: str | None
    loader: Loader
    type: str | None = None
    match: Match = field(default_factory=Match)
    boxes: tuple[Box, ...] | None = None
    reasoning: str | None = None
    line: int | None = None
    problem: str | None = None
    content: str = ""
    images: tuple[str, ...] = ()
    group: str | None = None

    @property
    def options(self) -> tuple[str, ...] | None:
        """What the question is asked with as options, in the order of their letters; ``None``: it is asked freely.

        These are the letters where the question lists the options by letter, and the options' texts elsewhere.
        """
        texts = self.match.options
        if self.match.kind != "choice" or not texts:
            return None
        if options_in(self.question):
            return tuple(chr(ord("A") + place) for place in range(len(texts)))
        try:
            return tuple(checked_options(texts))
        except ValueError:  # one option alone, or two that read the same
            return None

    @property
    def digest(self) -> str | None:
        """What tells the item's images from others, as a SHA-256; ``None`` where their content is not known."""
        return hashlib.sha256(self.content.encode()).hexdigest() if self.content else None

    def load(self) -> tuple[Image, ...]:
        """Return the images, upright RGB."""
        return self.loader()


def sample(items: Sequence[Item], number: int, seed: int = 0) -> list[Item]:
    """At most ``number`` items drawn without replacement, in their own order; groups are drawn whole.

    Raises ``SettingsError`` if not one group fits.
    """
    if number < 1:
        raise SettingsError("A sample has at least one item.", "Use a number of 1 or more.")
    if number >= len(items):
        return list(items)
    if any(item.group is not None for item in items):
        return _sample_of_groups(items, number, seed)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), number))]


def _sample_of_groups(items: Sequence[Item], number: int, seed: int) -> list[Item]:
    members: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        members.setdefault(f"alone {place}" if item.group is None else f"group {item.group}", []).append(place)
    names = list(members)
    random.Random(seed).shuffle(names)
    chosen: list[int] = []
    for name in names:
        if len(chosen) + len(members[name]) <= number:
            chosen += members[name]
    if not chosen:
        least = min(map(len, members.values()))
        raise SettingsError(f"A group has {least} items at least, more than {number}.", "Draw more.")
    return [items[place] for place in sorted(chosen)]


def dataset_fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of everything about the items that a result depends on, the content of the images included."""
    whole = hashlib.sha256()
    for item in items:
        match = item.match
        facts: list[object] = [item.id, item.question, item.label, item.type, str(match), match.options, item.problem]
        facts += [match.synonyms] if match.synonyms else []
        facts += [match.answers, item.group] if match.answers or item.group else []
        whole.update(json.dumps([*facts, item.content], ensure_ascii=True).encode() + b"\n")
    return whole.hexdigest()


def broken_item(name: str, line: int | None, problem: str, fields: Mapping[str, object] | None = None) -> Item:
    """Return an item that stands for a row that cannot be used."""
    known = {key: sound(str(value)) for key, value in (fields or {}).items() if isinstance(value, str | int | float)}
    return Item(
        sound(name),
        known.get("question", ""),
        known.get("label"),
        partial(_refuse, sound(problem)),
        type=known.get("type"),
        line=line,
        problem=sound(problem),
    )


def sound(text: str) -> str:
    """Return a text that every file can hold: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()


def _refuse(problem: str) -> tuple[Image, ...]:
    raise DatasetError(f"The row cannot be used: {problem}.")


class StoredImage(Protocol):
    """A picture inside a file of rows, read again whenever it is opened.

    Attributes:
        size: bytes of the encoded picture.
        digest: SHA-256 of what is stored.
    """

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def read(self) -> bytes:
        """Read the encoded picture. Raises ``DatasetError`` if the file has changed."""
        ...


def open_images(references: tuple[str | StoredImage, ...], policy: ImagePolicy) -> tuple[Image, ...]:
    """Return the images of some references, upright RGB."""
    from latent_tool.images.load import load_image

    return tuple(load_image(each if isinstance(each, str) else each.read(), policy).image for each in references)
