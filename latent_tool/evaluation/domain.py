"""Fit a domain check from the pictures of a run: which questions fit it, which are held back, which are left.

The pictures are looked at with the run's own model, up to where its decoder would begin; no question is answered. This
module knows runs, data sets and engines; ``latent_tool.calibration.domain_fit`` knows how a check is fitted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latent_tool.calibration.configuration import configuration
from latent_tool.calibration.domain import DomainCheck, NoDomainCheck
from latent_tool.calibration.domain_fit import LEVELS, fit_domain, needed_questions, parts_of, shares
from latent_tool.errors import CalibrationMismatchError, LatentToolError, SettingsError
from latent_tool.evaluation.datasets import Item, load_dataset
from latent_tool.evaluation.runs import Row, Run
from latent_tool.images.appearance import PIXEL_NUMBERS
from latent_tool.images.damage import DAMAGES

if TYPE_CHECKING:
    from latent_tool.engine.engine import Engine

__all__ = ["Checked", "check_of_run", "distinct", "items_of_run", "look_at", "numbers_of", "one_each"]

Numbers = tuple[tuple[float, ...], ...]  # of every picture of one question
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checked:
    """A domain check, and what it makes of the run it was fitted for.

    ``fitted``: ids of the run's questions that had a part in it, which no threshold may be found on; ``refused``: ids
    of the other ones that it refuses, those whose pictures cannot be looked at included.
    """

    check: DomainCheck | NoDomainCheck
    fitted: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def items_of_run(
    run: Run, data: str | None = None, *, images: str | Path | None = None, preset: str | None = None
) -> list[Item]:
    """Return the run's questions with their pictures, from where it says that its data set lies.

    Args:
        data, images, preset: as in ``load_dataset``, each instead of what the run says: what was moved alone is named.

    Raises ``SettingsError`` when there is no such data set, or when it is another one: one with other questions, or
    with other pictures under the same names.
    """
    source = run.manifest.dataset.source
    where: dict[str, Any] = {} if source is None else source.arguments(run.path)
    moved = {"spec": data, "images": images, "preset": preset}
    where |= {key: value for key, value in moved.items() if value is not None}
    name = where.setdefault("spec", run.manifest.dataset.name)
    hint = "Name the data set that the run was made of with --data, and a benchmark's pictures with --images."
    try:
        found = load_dataset(**where, question="?", unlabelled=True, keep_going=True)
        known = {item.id: item for item in found}
    except LatentToolError as error:
        raise SettingsError(f"The pictures of the run are not found: {error.message}", hint) from None
    asked = {row.id: row for row in run.rows}
    lost = [
        row.id
        for row in asked.values()
        if row.id not in known or (row.content is None and _other_names(row, known[row.id]))
    ]
    if lost:
        raise SettingsError(f"{len(lost)} questions of the run are not in {name!r}, such as {lost[0]!r}.", hint)
    # Names tell little: what the files hold tells pictures of the same names apart.
    other = [row.id for row in asked.values() if row.content not in (None, known[row.id].digest)]
    if other:
        why = known[other[0]].problem
        raise SettingsError(
            f"The pictures of {len(other)} questions of the run are not those in {name!r}, such as {other[0]!r}"
            f"{'' if why is None else f' ({why})'}.",
            f"{hint} For these pictures, run latent-tool eval again, in another folder.",
        )
    return [known[name] for name in asked]


def _other_names(row: Row, item: Item) -> bool:
    if not row.images or not item.images:
        return False
    return len(row.images) != len(item.images) or not all(map(_same_name, row.images, item.images))


def _same_name(old: str, new: str) -> bool:
    """Whether a picture's name in a run is its name in the data: older runs have the whole path of a benchmark's."""
    if old == new:
        return True
    old, new = (name.replace("\\", "/") for name in (old, new))
    return bool(new) and (old.startswith("/") or old[1:3] == ":/") and old.endswith(f"/{new}")


def engine_of_run(run: Run) -> Engine:
    """Return the engine of the run's model. Raises ``CalibrationMismatchError`` when the model was changed since."""
    from latent_tool.langchain.reasoner import LatentReasoner

    facts = run.manifest.model
    named = {"model": facts.get("name", "embedded"), "revision": facts.get("revision")}
    loading = {"dtype": facts.get("dtype", "auto"), "quantization_config": facts.get("quantization")}
    engine = LatentReasoner(**named, **loading).engine()
    found = configuration(score="reward", **named)["model"]
    if any(facts.get(name) != value for name, value in found.items() if name != "name"):
        raise CalibrationMismatchError(
            "The model is not the one that the run was made with.", "Run latent-tool eval again, in another folder."
        )
    return engine


def numbers_of(engine: Engine, images: Sequence[Any], question: str = "?", system: str | None = None) -> Numbers:
    """Return every picture of a question in the numbers that a domain check compares; the decoder is not run."""
    from latent_tool.models.looks import look, picture_numbers

    inputs = engine.vlm.prepare(images, question, system=system)
    return picture_numbers(look(engine.vlm, inputs), inputs.cells, images)


def look_at(
    engine: Engine, items: Sequence[Item], system: str | None = None, progress: Progress | None = None
) -> dict[str, Numbers]:
    """``numbers_of`` every item whose pictures can be opened and whose question fits the model."""
    found = {}
    for place, item in enumerate(items):
        with suppress(LatentToolError):  # it will be refused
            found[item.id] = numbers_of(engine, item.load(), item.question, system)
        if progress is not None:
            progress(place + 1, len(items))
    return found


def check_of_run(
    run: Run,
    rows: Sequence[Row],
    items: Sequence[Item],
    *,
    pictures: Sequence[Item] = (),
    level: float | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Fit a domain check for a method's labelled rows.

    With further ``pictures``, which need no labels and are drawn like the run's, those fit the check (but none that the
    run asks about), and all rows are left for the threshold. Without, a part of the run's own questions does, a half of
    the labelled ones at most; what has no label is taken first. A picture that is asked about several times counts
    once.

    Args:
        rows: the labelled answers that a threshold will be found on.
        items: all questions of the run with their pictures.
        level: rate of false alarms; ``None``: the smallest of 1, 2 and 5 % that there are pictures for.
    """
    parts = parts_of(DAMAGES)
    rng = np.random.default_rng([seed, 21])
    labelled = {row.id for row in rows}
    if pictures:
        source = one_each(pictures, but=items)
        room = shares(len(source), parts, level)
    else:
        asked = [item for item in items if item.id in labelled]
        own = one_each(asked)
        free = one_each([item for item in items if item.problem is None], but=asked)
        # Those without a label first; of the others a half is left for the threshold.
        source = [*_shuffled(free, rng), *_shuffled(own, rng)]
        room = shares(len(free), parts, level) or shares(2 * len(free) + len(own), parts, level, labelled=True)
    if room is None:
        least = LEVELS[-1] if level is None else level
        needed = needed_questions(parts, least)
        reason = (
            f"A domain check with {least:.0%} false alarms takes {needed} pictures beside the labelled questions, or "
            f"{2 * needed} labelled questions; there are {len(source)} different ones. More pictures need no labels."
        )
        return Checked(NoDomainCheck(reason=reason, needed_pictures=needed))
    engine = engine_of_run(run) if engine is None else engine
    source = _shuffled(source, rng) if pictures else source
    chosen = _shuffled(source[: room.reference + room.held_back], rng)
    used = frozenset(picture for item in chosen for picture in _pictures(item))
    fitted = frozenset(item.id for item in items if not used.isdisjoint(_pictures(item)))
    rest = [item for item in items if item.id in labelled - fitted]
    system = run.manifest.system
    # A question that cannot be looked at has no part in the check: it is refused, whatever the check.
    numbers = distinct(look_at(engine, chosen, system))
    seen = [item for item in chosen if item.id in numbers]
    reference = seen[: min(room.reference, max(1, len(seen) - room.held_back))]
    held_back = seen[len(reference) :]
    check = fit_domain(
        [numbers[item.id] for item in reference],
        _damaged(engine, reference, system, seed),
        [numbers[item.id] for item in held_back],
        PIXEL_NUMBERS,
        level,
    )
    provenance = {
        "pictures": "further ones" if pictures else "the run's own",
        "reference": len(reference),
        "held_back": len(held_back),
        "seed": seed,
    }
    if isinstance(check, NoDomainCheck):
        return Checked(check, provenance=provenance)
    own_numbers = look_at(engine, rest, system, progress)
    refused = {item.id for item in rest if item.id not in own_numbers or check.verdict(own_numbers[item.id]).refused}
    return Checked(check, fitted, frozenset(refused), provenance)


def distinct(numbers: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Return the first of all that look the same: the same pictures in other files are no further evidence."""
    seen: dict[Numbers, str] = {}
    for name, pictures in numbers.items():
        seen.setdefault(pictures, name)
    return {name: pictures for pictures, name in seen.items()}


def _pictures(item: Item) -> frozenset[str]:
    """What tells an item's pictures from others, each: their content where that is known."""
    return frozenset(item.content.split("|") if item.content else item.images or (item.id,))


def one_each(items: Sequence[Item], but: Sequence[Item] = ()) -> list[Item]:
    """Return one question about every picture, the first: several would make a test surer of its pictures than it may
    be.

    ``but``: without their pictures.
    """
    taken = {picture for item in but for picture in _pictures(item)}
    kept = []
    for item in items:
        if taken.isdisjoint(_pictures(item)):
            kept.append(item)
            taken |= _pictures(item)
    return kept


def _shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    return [items[place] for place in rng.permutation(len(items))]


def _damaged(
    engine: Engine, items: Sequence[Item], system: str | None, seed: int
) -> dict[str, list[tuple[float, ...]]]:
    """For every kind of damage, the numbers of every picture of the items after it."""
    rng = random.Random(seed)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in DAMAGES}
    before = items[-1].load() if items else []
    for place, item in enumerate(items):
        images = item.load()
        for name, ways in DAMAGES.items():
            damage = ways[place % len(ways)]
            damaged = [damage(image, before[0], rng) for image in images]
            found[name] += numbers_of(engine, damaged, item.question, system)
        before = images
    return found
