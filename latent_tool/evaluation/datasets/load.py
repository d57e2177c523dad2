"""Load a data set by its name: a file, a folder, easy-VQA or the embedded model's own scenes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from latent_tool.errors import DatasetError, SettingsError
from latent_tool.evaluation.datasets.benchmarks import preset_named
from latent_tool.evaluation.datasets.items import Item, sample
from latent_tool.evaluation.datasets.packaged import easy_vqa, scenes
from latent_tool.evaluation.datasets.rows import Reader
from latent_tool.evaluation.matching import Match
from latent_tool.evaluation.synonyms import Synonyms, load_synonyms
from latent_tool.files import expanded
from latent_tool.settings import ImagePolicy

__all__ = ["is_built_in", "load_dataset"]


def is_built_in(spec: str | Path) -> bool:
    """Tell whether a data set's name stands for one that is no file: scenes or easy-VQA."""
    return str(spec).partition(":")[0] in ("scenes", "easy-vqa")


def load_dataset(
    spec: str | Path,
    *,
    preset: str | None = None,
    images: str | Path | None = None,
    match: str | None = None,
    synonyms: str | Path | None = None,
    question: str | None = None,
    policy: ImagePolicy | None = None,
    keep_going: bool = False,
    unlabelled: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """Return the questions of a data set.

    Args:
        spec: a ``.jsonl``, ``.csv`` or ``.json`` file, a ``.tsv`` file as VLMEvalKit has them, a ``.parquet`` file (one
            shard stands for all of its split; needs the extra ``datasets``) or a folder of them, a folder of images
            with a file ``labels.jsonl``, ``.csv`` or ``.json`` in it, ``easy-vqa[:test|train]`` or
            ``scenes[:split[:first-last]]`` (seeds, both included; one question about each scene).
        preset: the benchmark that the file holds (``benchmarks.PRESETS``): what its columns mean, the rule its authors
            score by, and which rows count together.
        images: folder that the pictures of a benchmark are in; by default that of the file. Pictures outside of it are
            not opened.
        match: rule for rows that name none (``Match.parse``). By default multiple choice where a row or its question
            lists options that the label is one of, or where the label is a marked letter; numeric for numbers in JSON
            and in DMLR files; else exact. Rows may name any rule but a function.
        synonyms: file of words that mean the same in exact and choice matching, such as ``square = rectangle``.
        question: asked where a row has none.
        policy: which images may be opened; by default any readable file.
        keep_going: rows that cannot be used become items with a ``problem`` instead of an error.
        unlabelled: rows need no label.
        limit: at most so many items, drawn with ``seed``; they keep their order.

    Raises ``DatasetError`` (with the lines in ``problems``), ``SettingsError`` and ``MissingExtraError``.
    """
    text = str(spec)
    name, _, rest = text.partition(":")
    default = None if match is None else Match.parse(match)
    known = None if preset is None else preset_named(preset)
    if images is not None and known is None and (is_built_in(text) or not _may_be_table(text)):
        raise SettingsError(
            f"A folder of pictures changes nothing for {text[:200]!r}.",
            "Leave it out; paths in the file start at the file's own folder.",
        )
    if known is not None and is_built_in(text):
        raise SettingsError("A preset is for a benchmark's file.", f"Leave it out for {name}.")
    if name == "scenes":
        items = scenes(rest)
    elif name == "easy-vqa":
        items = easy_vqa(rest or "test")
    else:
        folder = None if images is None else expanded(images)
        reader = Reader(policy or ImagePolicy.local(), default, question, unlabelled, known, folder)
        items = reader.read(expanded(text))
    if not items:
        raise DatasetError(f"The data set {text!r} has no questions.", "Check the file, or the range of scenes.")
    if synonyms is not None:
        alike = load_synonyms(synonyms)
        items = [_with_synonyms(item, alike) for item in items]
    problems = tuple(_named(item) for item in items if item.problem)
    if problems and not keep_going:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise DatasetError(
            f"{len(problems)} of {len(items)} rows cannot be used: {shown}.",
            "Fix them, or go on with the others (keep_going, --keep-going): they are then recorded as errors.",
            problems,
        )
    return items if limit is None else sample(items, limit, seed)


def _may_be_table(spec: str) -> bool:
    """Whether it is a benchmark's file or a folder of shards, whose name may have a dot in it."""
    path = expanded(spec)
    return path.suffix.lower() in (".tsv", ".parquet", "") or os.path.isdir(path)


def _with_synonyms(item: Item, synonyms: Synonyms) -> Item:
    """An item whose rule knows synonyms; it has a problem where they make its label name no option, or two."""
    match = replace(item.match, synonyms=synonyms)
    problem = item.problem or (None if item.label is None else match.problem(item.label))
    return replace(item, match=match, problem=problem)


def _named(item: Item) -> str:
    return f"line {item.line}: {item.problem}" if item.line is not None else f"{item.id}: {item.problem}"
