"""The folder of a run: its manifest, one line for every answer, and how both are read back.

    OUT/run.json       what was run on what: data set, model, methods and their fingerprints
    OUT/items.jsonl    one line for every (item, method), only ever appended to
    OUT/summary.json   report.md   report.html      made from those

A run that was killed may end in a torn line, which is not counted. This module knows no model and runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latent_tool.calibration.configuration import digest
from latent_tool.cannot_tell import says_cannot_tell
from latent_tool.errors import DatasetError, MissingExtraError, SettingsError
from latent_tool.evaluation.datasets import is_built_in
from latent_tool.evaluation.journal import Journal
from latent_tool.files import expanded
from latent_tool.scores import COMPARED
from latent_tool.validation import explain_validation

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ITEMS",
    "MANIFEST",
    "DatasetFacts",
    "Failure",
    "Manifest",
    "MethodFacts",
    "Row",
    "Run",
    "Source",
    "load_run",
]

MANIFEST, ITEMS = "run.json", "items.jsonl"


class Part(BaseModel):
    """Base of what is stored: frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Failure(Part):
    """Why there is no answer."""

    type: str
    message: str


class Row(Part):
    """One method's answer to one question."""

    id: str
    method: str
    type: str | None = None
    question: str
    images: tuple[str, ...] = Field((), description="What the pictures are called in the data.")
    content: str | None = Field(None, description="SHA-256 that tells the pictures from others; None: not known.")
    label: str | None = None
    answer: str | None = None
    correct: bool | None = Field(None, description="None: no label, or no answer (one that cannot tell is none).")
    credit: float | None = Field(None, ge=0, le=1, description="Score by the data's rule, where that is graded.")
    group: str | None = Field(None, description="Name of the items that count together.")
    scores: dict[str, float | None] = {}
    seconds: float = Field(0.0, ge=0, description="Share of the batch's time, without the visual scores.")
    candidates: int = Field(0, ge=0, description="States scored.")
    decoder_calls: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0, description="Tokens generated.")
    error: Failure | None = None
    details: dict[str, Any] = {}

    @property
    def decided(self) -> bool:
        """Whether the answer was judged, or its error was."""
        return self.correct is not None or self.error is not None

    @property
    def abstained(self) -> bool:
        """Whether the answer says that it cannot be told: it is neither right nor wrong."""
        said = self.details.get("abstained")  # a run of an older version does not say
        return says_cannot_tell(self.answer or "") if said is None else said is True

    @property
    def asked(self) -> bool:
        """Whether the question could be asked at all: its row was of use, and its images could be opened."""
        return self.details.get("asked") is not False and (self.error is None or self.error.type != "DatasetError")

    @property
    def usable(self) -> bool:
        """Whether the row counts: it has a label, and was asked (an error may be what came of it)."""
        return self.label is not None and self.asked


class Source(Part):
    """Where the data set of a run lies: files by their paths from the run's folder, so that both can be moved."""

    data: str
    preset: str | None = None
    images: str | None = None

    @classmethod
    def of(cls, folder: Path, data: str, preset: str | None = None, images: str | Path | None = None) -> Source:
        """Tell where the data set of the run in ``folder`` lies, as the arguments of ``load_dataset`` name it."""
        own = is_built_in(data)
        return cls(
            data=data if own else _from(folder, data),
            preset=preset,
            images=None if images is None else _from(folder, images),
        )

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return what ``load_dataset`` takes for it, when the run is in ``folder``."""
        there = self.data if is_built_in(self.data) else _at(folder, self.data)
        return {
            "spec": there,
            "preset": self.preset,
            "images": None if self.images is None else _at(folder, self.images),
        }


def _from(folder: Path, path: str | Path) -> str:
    """The path from the folder; links to folders are seen through, for ``..`` out of one leads elsewhere."""
    given = expanded(path)
    # A link to a file keeps its own name, whose ending says what is in it.
    plain = given.name not in ("", "..")
    there = os.path.join(os.path.realpath(given.parent), given.name) if plain else os.path.realpath(given)
    try:
        return os.path.relpath(there, os.path.realpath(folder))
    except ValueError:  # on another drive
        return there


def _at(folder: Path, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.realpath(folder), path))


class DatasetFacts(Part):
    """The data set of a run; ``problems``: rows that could not be used."""

    name: str
    fingerprint: str
    size: int = Field(ge=0)
    problems: int = Field(0, ge=0)
    source: Source | None = Field(None, description="Where it lies; None where nobody has said so.")


class MethodFacts(Part):
    """A method of a run, and the fingerprint of its configuration for every score."""

    name: str
    kind: Literal["answer", "random", "sample"]
    settings: dict[str, Any]
    budget: dict[str, Any]
    generation: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None
    matches: str | None = None
    fingerprints: dict[str, str] = {}


class Manifest(Part):
    """What was run on what."""

    schema_version: Literal["1"] = "1"
    latent_tool: str = Field(description="Version of the package.")
    software: dict[str, str] = Field({}, description="Versions of torch and transformers when the run was begun.")
    dataset: DatasetFacts
    model: dict[str, Any]
    seed: int = 0
    system: str | None = None
    batch: int = Field(ge=1)
    options: bool = Field(False, description="Questions that have options were asked by them.")
    noise: dict[str, Any] | None = None
    methods: dict[str, MethodFacts]


@dataclass(frozen=True)
class Run:
    """A run as it was read back: its manifest, and its rows in the order they were written."""

    path: Path
    manifest: Manifest
    rows: tuple[Row, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order of the manifest."""
        return tuple(self.manifest.methods)

    @property
    def complete(self) -> bool:
        """Whether every method answered every item (errors are answers, too)."""
        return len(self.rows) == self.manifest.dataset.size * len(self.manifest.methods)

    def fingerprint(self, method: str, score: str) -> str | None:
        """Of the configuration a method's score was made with; of an agreement, the sampler is part of it."""
        own = self.manifest.methods[method].fingerprints.get(score)
        sampler = _sampler(self.manifest)
        if score != "agreement" or own is None or sampler in (None, method):
            return own
        return digest({"answers": own, "samples": self.manifest.methods[str(sampler)].fingerprints.get(score)})

    @cached_property
    def _by_method(self) -> dict[str, tuple[Row, ...]]:
        return {name: tuple(row for row in self.rows if row.method == name) for name in self.methods}

    def of(self, method: str) -> tuple[Row, ...]:
        """Return the rows of a method. Raises ``SettingsError`` if the run has no such method."""
        if method not in self._by_method:
            raise SettingsError(f"The run has no method {method!r}.", f"It has: {', '.join(self.methods)}.")
        return self._by_method[method]

    def dataframe(self) -> pandas.DataFrame:
        """Return the rows as a pandas DataFrame: one for every (item, method), every score a column of its own name.

        Raises ``MissingExtraError`` without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("A DataFrame", "pandas") from error
        plain = ("id", "method", "type", "question", "label", "answer", "correct")
        cost = ("seconds", "candidates", "decoder_calls", "tokens")
        columns = [*plain, *dict.fromkeys(name for row in self.rows for name in row.scores), *cost, "error"]
        records = [
            {name: getattr(row, name) for name in (*plain, *cost)}
            | row.scores
            | {"error": None if row.error is None else f"{row.error.type}: {row.error.message}"}
            for row in self.rows
        ]
        return pandas.DataFrame(records, columns=columns)

    def column(self, method: str, score: str) -> tuple[list[float], list[bool], int]:
        """Return a score and the correctness of a method's labelled answers, and for how many more the score is
        missing.

        An answer that failed, or that cannot tell, is one without a score. The score is as it was measured;
        ``latent_tool.scores`` has its direction.
        """
        if score not in COMPARED and not any(score in row.scores for row in self.of(method)):
            raise SettingsError(f"There is no score {score!r}.", f"Known scores: {', '.join(COMPARED)}.")
        known = [row for row in self.of(method) if row.usable and (row.decided or row.abstained)]
        values = [None if row.abstained else row.scores.get(score) for row in known]
        kept = [(value, bool(row.correct)) for value, row in zip(values, known, strict=True) if value is not None]
        return [value for value, _ in kept], [right for _, right in kept], len(known) - len(kept)


def load_run(path: str | Path) -> Run:
    """Read a run's folder.

    ``agreement`` is filled in for every method where the run has self-consistency samples. Raises ``DatasetError``,
    naming the lines of ``items.jsonl`` that cannot be used, and ``SettingsError`` when the folder holds no run.
    """
    folder = expanded(path)
    manifest = read_manifest(folder)
    if manifest is None:
        raise SettingsError(f"{str(path)!r} holds no run ({MANIFEST} is missing).", "Make one with latent-tool eval.")
    rows = read_rows(Journal(folder / ITEMS).lines, manifest)
    return Run(folder, manifest, tuple(with_agreement(rows, manifest)))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in a folder, or ``None`` if there is none."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{str(folder)[:200]!r} cannot be read ({getattr(error, 'strerror', None) or error}).",
            "Give a folder that can be read.",
        ) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DatasetError(
            f"{MANIFEST} cannot be used: {explain_validation(error)}.", "It was changed, or made by another version."
        ) from None


def read_rows(lines: Sequence[bytes], manifest: Manifest) -> list[Row]:
    """Return the rows that the lines of ``items.jsonl`` hold. Raises ``DatasetError``, naming those that cannot be
    used.
    """
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    for line, content in enumerate(lines, start=1):
        try:
            row = Row.model_validate_json(content)
        except ValidationError as error:
            problems.append(f"line {line}: {explain_validation(error)}")
            continue
        key = (row.id, row.method)
        if row.method not in manifest.methods:
            problems.append(f"line {line}: the run has no method {row.method!r}")
        elif key in seen:
            problems.append(f"line {line}: {row.id!r} by {row.method} was answered on line {seen[key]} already")
        seen.setdefault(key, line)
        rows.append(row)
    if problems:
        raise DatasetError(
            f"{ITEMS} has {len(problems)} lines that cannot be used: {'; '.join(problems[:5])}.",
            "It was changed after it was written; start a new run in another folder.",
            tuple(problems),
        )
    return rows


def _sampler(manifest: Manifest) -> str | None:
    """The method whose samples the others' answers are compared with."""
    return next((name for name, method in manifest.methods.items() if method.kind == "sample"), None)


def with_agreement(rows: Sequence[Row], manifest: Manifest) -> list[Row]:
    """Return the rows, each with the share of the run's self-consistency samples that give the same answer."""
    sampler = _sampler(manifest)
    votes = {row.id: row.details["votes"] for row in rows if row.method == sampler and "votes" in row.details}
    return [_agreeing(row, votes) for row in rows]


def _agreeing(row: Row, votes: Mapping[str, Sequence[str]]) -> Row:
    drawn, answer = votes.get(row.id), row.details.get("canonical")
    if not drawn or answer is None or row.scores.get("agreement") is not None:
        return row
    return row.model_copy(update={"scores": {**row.scores, "agreement": list(drawn).count(answer) / len(drawn)}})


def extend_methods(manifest: Manifest, methods: Mapping[str, MethodFacts]) -> Manifest:
    """Return the manifest with further methods. Raises ``SettingsError`` if one of that name has other settings."""
    for name, facts in methods.items():
        if manifest.methods.get(name, facts) != facts:
            raise SettingsError(
                f"The folder holds a run in which {name!r} has other settings.", "Give another folder for this run."
            )
    return Manifest(**{**dict(manifest), "methods": {**manifest.methods, **methods}})
