"""The table of model families: what differs between them, and how well each was verified.

To add a family: one row here, and one builder of a tiny checkpoint in ``tests/support/tiny_checkpoints.py``;
the tests of every family then run on it. A causal decoder over image tokens that is not in the table works too, but
its patches carry no boxes. This module needs neither torch nor transformers to be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_tool.models import cells
from latent_tool.models.cells import Recipe

__all__ = ["AnswerMarks", "Family", "answer_marks", "answers_behind_words", "family", "markdown_table", "supported"]


@dataclass(frozen=True)
class AnswerMarks:
    """The marks that models write around their answers, beside LaTeX's ``\\boxed{}``.

    Args:
        pairs: opening and closing marks, the innermost pair first.
        reasoning_ends: marks that end the reasoning; the answer follows the last of them.
    """

    pairs: tuple[tuple[str, str], ...] = (("<answer>", "</answer>"),)
    reasoning_ends: tuple[str, ...] = ("</think>",)


@dataclass(frozen=True)
class Family:
    """One model family, as ``config.model_type`` names it.

    Args:
        model_type: ``model_type`` in the checkpoint's ``config.json``.
        example: a checkpoint of this family on the hub.
        cells: recipe for the boxes of its image cells.
        exact_prefix: tests show that scoring from the prefix cache equals one naive forward pass.
        boxes_verified: tests find every cell by changing the pixels at the centre of its box.
        decoding_verified: tests show that decoding equals the model's own ``generate``.
        needs: packages its processor needs beside those of ``latent_tool`` itself.
        own_processor: the tests use the family's own processor; otherwise it cannot run without torchvision, and they
            use inputs made by hand.
        chat_template: its checkpoints have a chat template; otherwise the question follows the image directly.
        answer_marks: pairs of marks around its answers, beside ``<answer>`` and ``\\boxed{}``, which prompts ask for.
        reasoning_end: the mark that ends its reasoning.
        views: how a window of the picture is shown beside it: as a further picture of the prompt, or, to a family made
            for one picture, as injected cells.
        note: what a user should know.
    """

    model_type: str
    example: str
    cells: Recipe
    exact_prefix: bool = True
    boxes_verified: bool = True
    decoding_verified: bool = True
    needs: tuple[str, ...] = ()
    own_processor: bool = True
    chat_template: bool = True
    answer_marks: tuple[tuple[str, str], ...] = ()
    reasoning_end: str = "</think>"
    views: Literal["picture", "cells"] = "picture"
    note: str = ""


_TABLE = (
    Family("llava", "llava-hf/llava-1.5-7b-hf", cells.resized_and_cropped, note="what is cropped away has no cell"),
    Family("llava_next", "llava-hf/llava-v1.6-mistral-7b-hf", cells.overview_then_unpadded_grid),
    Family("llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf", cells.overview_then_unpadded_grid),
    Family("qwen2_vl", "Qwen/Qwen2-VL-7B-Instruct", cells.merged_grid),
    Family("qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct", cells.merged_grid),
    Family("qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct", cells.merged_grid),
    Family("qwen3_5", "Qwen/Qwen3.5-9B", cells.merged_grid, note="linear-attention hybrid"),
    Family(
        "glm4v",
        "zai-org/GLM-4.1V-9B-Thinking",
        cells.merged_grid,
        answer_marks=(("<|begin_of_box|>", "<|end_of_box|>"),),
    ),
    Family("smolvlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", cells.named_tiles_then_global, needs=("num2words",)),
    Family("idefics3", "HuggingFaceM4/Idefics3-8B-Llama3", cells.named_tiles_then_global),
    Family("internvl", "OpenGVLab/InternVL3-8B-hf", cells.tiles_then_thumbnail),
    Family("gemma3", "google/gemma-3-4b-it", cells.whole_square, note="boxes of pan-and-scan crops are not known"),
    Family(
        "gemma4",
        "google/gemma-4-e2b-it",
        cells.pooled_grid,
        reasoning_end="<channel|>",
        note="latents get the padding token's layer inputs",
    ),
    Family(
        "paligemma",
        "google/paligemma2-3b-mix-448",
        cells.whole_square,
        chat_template=False,
        views="cells",
        note="the prompt is read in both directions, latents and answer are causal",
    ),
    Family(
        "mistral3",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        cells.sized_grid,
        needs=("torchvision",),
        own_processor=False,
        reasoning_end="[/THINK]",
    ),
    Family(
        "lfm2_vl",
        "LiquidAI/LFM2-VL-1.6B",
        cells.spatial_shapes,
        needs=("torchvision",),
        own_processor=False,
        note="convolution hybrid; boxes verified for images of one tile",
    ),
    Family("ovis2", "thisisiron/Ovis2-1B-hf", cells.global_then_tiles),
    Family("aya_vision", "CohereForAI/aya-vision-8b", cells.tiles_then_thumbnail),
)
_BY_TYPE = {row.model_type: row for row in _TABLE}


def supported() -> tuple[Family, ...]:
    """Return every family of the table, in its order."""
    return _TABLE


def family(model_type: str) -> Family | None:
    """Return the row of a model type, or ``None`` for a family that is not in the table."""
    return _BY_TYPE.get(model_type)


def answer_marks(model_type: str) -> AnswerMarks:
    """Collect the marks of a model type; a family that is not in the table may write those of any family."""
    row = family(model_type)
    rows = _TABLE if row is None else (row,)
    common = AnswerMarks()
    pairs = dict.fromkeys(pair for each in rows for pair in each.answer_marks)
    ends = dict.fromkeys(each.reasoning_end for each in rows)
    return AnswerMarks(tuple(pairs | dict.fromkeys(common.pairs)), tuple(dict.fromkeys(common.reasoning_ends) | ends))


def answers_behind_words(model_type: str, prompt: str) -> bool:
    """Say whether a reply may hold its answer between marks, or behind reasoning whose end is no thinking marker.

    Then the first words of a reply say nothing of how sure the answer is. That is so where the family writes such marks
    of its own accord, and where a prompt names one: LaTeX's ``\\boxed``, or the opening mark of a pair.
    """
    row = family(model_type)
    own = row is not None and bool(row.answer_marks or row.reasoning_end not in AnswerMarks().reasoning_ends)
    named = ("\\boxed", *(opening for opening, _ in answer_marks(model_type).pairs))
    return own or any(mark in prompt for mark in named)


def markdown_table() -> str:
    """Return the table as Markdown, for docs/models.md."""
    head = ["family", "for example", "exact prefix cache", "boxes verified", "decoding verified", "needs", "note"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in _TABLE:
        marks = ("yes" if flag else "no" for flag in (row.exact_prefix, row.boxes_verified, row.decoding_verified))
        parts = (f"`{row.model_type}`", f"`{row.example}`", *marks, ", ".join(row.needs) or "-", row.note or "-")
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)
