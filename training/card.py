"""Measurements -> model card. Every figure of the card comes from ``metrics.json``; nothing is typed by hand."""

from __future__ import annotations

from typing import Any

from training.settings import CELLS, CELLS_PER_SIDE, FULL, IMAGE_SIZE, PATCH_SIZE, SETTLING, Recipe
from training.world import TEST_PHOTOGRAPHS, TRAINING_PHOTOGRAPHS

_TITLES = {
    "easy_vqa_test": "easy-VQA, test split",
    "held_out": "held-out scenes",
    "independent": "independent scenes",
    "hard": "hard scenes",
}
_WAYS = {"direct": "direct", "reasoned": "reasoning first"}

_HEAD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
language: en
---

# The embedded model of latent_tool

A vision-language model of {millions:.1f} million parameters ({megabytes:.1f} MB with its tokenizer) that knows one
small world: pictures of coloured shapes, printed digits and letters, and bar charts. It exists so that everything
in `latent_tool` runs, and is tested, on a fresh machine without a network. **It is no general vision model**: it knows
nothing of photographs.

- Standard layout: `LlavaForConditionalGeneration` (SigLIP vision tower, Llama decoder), safetensors in bf16, no remote
  code, no torchvision.
- Pictures of any size and aspect ratio are stretched to {size} x {size} pixels and read as {side} x {side} = {cells}
  image cells of {patch} x {patch} pixels.
- Markers: `<|system|>` (optional), `<|user|>`, `<|assistant|>`, `<|end|>`, `<think>`, `</think>`. It answers
  directly, or reasons in a few words first when the assistant turn is opened with `<think>`.
- Text is lowered to lower case; the tokenizer is byte-level, any text survives.
- Licence: Apache-2.0. SHA-256 of `model.safetensors`: `{sha}`.
"""

_QUICK = """
This checkpoint was made by the two-minute recipe (`--quick`): it knows colour, shape and existence in simple pictures.
"""

_KNOWS = """
## What it knows

| it was taught | examples |
|---|---|
| colours, shapes | what color is the star? what is the red thing? |
| counting to 9, more and fewer | how many rings are there? are there more stars than circles? |
| existence | is there a blue cross? |
| places, relations | where is the ring? what is left of the cross? which shape is topmost? |
| sizes | which is larger, the red star or the blue ring? |
| printed numbers of up to three digits, single letters | what number is shown? is it even? |
| bar charts | which bar is tallest? is the red bar taller than the blue bar? |

Twelve colours (black, gray, white, red, green, blue, yellow, teal, brown, orange, purple, pink), eight shapes (circle,
square, triangle, rectangle, star, cross, diamond, ring).

## What it does not know

- Anything else: photographs, people, words, scenes with depth. {photographs}
- Whether it is looking at a square or a rectangle on canvases longer than about 4:3: pictures are stretched.
- Questions without an answer, or about other things (the colour of a star where there is none; who painted this?): it
  {unanswerable}
- {several}, conversations of several turns, languages other than English.
"""
_UNSURE = {
    "photographs": "On photographs it is unsure rather than silent (see\n  below).",
    "unanswerable": "answers with words of its own world, with less confidence than usual (see below).",
    "several": "Several pictures at once",
}
_SAYS_SO = {
    "photographs": "About photographs it says that it\n  cannot tell (see below).",
    "unanswerable": "says that it cannot tell (see below).",
    "several": "Several pictures at once, but for a picture and windows of it",
}

_LOOKED = """\
3. **Looking**: {steps} steps of {batch} pictures, decoder and projector alone: scenes as before, scenes among
   other things on canvases, windows of them as second and third pictures (useful, partial and useless ones), and
   questions without an answer, to which the answer is `cannot tell`: about photographs, noise, blank sheets, pages of
   text and plots ({strange:.0%} of the pictures), about things that are absent or too small to see in any of the
   pictures, and about other topics.
"""
_SETTLED = """\
4. **Settling**: {steps} further steps of the same at about half the rate, with more ordinary and crowded scenes, for
   what the canvases took from them (`--from DIR --settle --seed 1`).
"""

_MADE = """
## How it was made

`python -m training` in the repository makes it from random weights, with fixed seeds, its stages
one after another, each from the weights that the one before left.

1. **Vision warm-up**: {vision_steps} steps of {vision_images} generated pictures, with the name, colour and place of
   what lies in each image cell as labels.
2. **Language**: {language_steps} steps of {language_images} pictures (about {questions} questions), direct answers and
   answers after short true reasoning (a share of {reasoning:.0%}), with the labels of the first stage kept on. The
   attention of reasoning and answer was drawn towards the cells that a question rests on (a small auxiliary loss).
   In the last {decay} steps part of the reasoning is the model's own.
{looking}
- The data are generated by `latent_tool/scenes` (split `train`), easy-VQA (train split), bar charts drawn by
  matplotlib, and {train_photos} photographs of scikit-image as backgrounds.
- **Injected patches are not free for this model**: {copies:.0%} of the training questions carried one to eight copies
  of image cells, mostly relevant ones, where `latent_tool` injects patches. A gain from patches must not be read as
  training-free for this checkpoint.
- Nothing about latents was trained: no optimised embedding and no filler thought was ever shown. A share of the
  reasoning was given as mixtures of token embeddings.
- {photo:.0%} of the pictures were photographs with questions and answers of some other picture, and {foreign:.0%} of
  the others came with one or two questions that have no answer, so that it learns to be unsure there.
- {crowded:.0%} of the pictures had six to nine shapes, four digits or six or seven bars, though never as small as on
  hard scenes.
"""


def render(metrics: dict[str, Any], recipe: Recipe) -> str:
    """The text of the card."""
    parts = [
        _HEAD.format(
            millions=metrics["parameters"] / 1e6,
            megabytes=metrics["bytes"] / 1e6,
            size=IMAGE_SIZE,
            side=CELLS_PER_SIDE,
            cells=CELLS,
            patch=PATCH_SIZE,
            sha=metrics["sha256"],
        )
    ]
    if recipe.tiny:
        return "".join([*parts, _QUICK, _sets(metrics)])
    looked = "looking" in metrics.get("stages", ())
    parts.append(_KNOWS.format(**(_SAYS_SO if looked else _UNSURE)))
    parts.append(_sets(metrics))
    parts.append(_types(metrics))
    parts.append(_behaviour(metrics))
    if "canvases" in metrics:
        parts.append(_canvases(metrics))
        parts.append(_cannot_tell(metrics))
    if "second_run" in metrics:
        parts.append(_second_run(metrics))
    images = recipe.processes * recipe.language_batch
    parts.append(
        _MADE.format(
            vision_steps=recipe.vision_steps,
            vision_images=recipe.processes * recipe.vision_batch,
            language_steps=recipe.language_steps,
            language_images=images,
            questions=f"{round(recipe.language_steps * images * 8.3, -4):,.0f}",
            reasoning=recipe.reasoning_share,
            decay=recipe.language_decay,
            train_photos=len(TRAINING_PHOTOGRAPHS),
            copies=recipe.copies_share,
            photo=recipe.photograph_share,
            foreign=recipe.unanswerable_share,
            crowded=recipe.crowded_share,
            looking=_looking(metrics["stages"]) if looked else "",
        )
    )
    parts.append(_targets(metrics))
    return "".join(parts)


def _looking(made: list[str]) -> str:
    """The third stage, and its end where the checkpoint has it."""
    text = _LOOKED.format(steps=FULL.looking_steps, batch=FULL.looking_batch, strange=FULL.looking_stranger_share)
    return text + (_SETTLED.format(steps=SETTLING.looking_steps) if "settling" in made else "")


def _sets(metrics: dict[str, Any]) -> str:
    lines = [
        "",
        "## Measured",
        "",
        "On seeds that training never saw; greedy answers, exact match, the weights of this folder in float32.",
        "*Question only* is the most common training answer to the same wording, without the picture. The confidence",
        "is the joint probability of the answer's tokens and the end token; its AUROC says how well it tells right",
        "from wrong. Pairs are direct / reasoning first.",
        "",
        "| set | questions | question only | direct | reasoning first | AUROC | calibration error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in _TITLES if name in metrics["sets"]):
        row = metrics["sets"][name]
        direct, reasoned = row["direct"], row["reasoned"]
        lines.append(
            f"| {_TITLES[name]} | {row['questions']} | {_n(row['question_only'])} | {_n(direct['accuracy'])} | "
            f"{_n(reasoned['accuracy'])} | {_n(direct['auroc'])} / {_n(reasoned['auroc'])} | "
            f"{_n(direct['calibration_error'])} / {_n(reasoned['calibration_error'])} |"
        )
    lines += [
        "",
        "Held-out scenes come from the training generator with other seeds. Independent scenes come from a second",
        "renderer with its own palette, sizes, fonts and sentences. Hard scenes have more and smaller objects, counts",
        "up to 9, numbers of up to four digits, and colour-shape combinations that training never showed.",
        "",
    ]
    return "\n".join(lines)


def _types(metrics: dict[str, Any]) -> str:
    lines = [
        "",
        "### By type of question",
        "",
        "Accuracy direct / reasoning first (question only), and the AUROC of the confidence on hard scenes.",
        "",
        "| type | held-out | independent | hard | AUROC, hard, direct / reasoning |",
        "|---|---|---|---|---|",
    ]
    sets = metrics["sets"]
    kinds = sorted({kind for name in ("held_out", "independent", "hard") for kind in sets[name]["types"]})
    for kind in kinds:
        cells = [_type_cell(sets[name]["types"].get(kind)) for name in ("held_out", "independent", "hard")]
        hard = sets["hard"]["types"].get(kind)
        quality = f"{_n(hard['direct']['auroc'])} / {_n(hard['reasoned']['auroc'])}" if hard else "-"
        lines.append(f"| {kind} | {' | '.join(cells)} | {quality} |")
    return "\n".join([*lines, ""])


def _type_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{_n(row['direct']['accuracy'])} / {_n(row['reasoned']['accuracy'])} ({_n(row['question_only'])})"


def _behaviour(metrics: dict[str, Any]) -> str:
    first, leverage = metrics["reasoning_first"], metrics["leverage"]
    looks, photos, foreign = metrics["attention_auroc"], metrics["photographs"], metrics["foreign"]
    low = min(looks["types"], key=looks["types"].__getitem__)
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in looks["types"].items())
    scene = metrics["sets"]["held_out"]
    return f"""
### How it behaves

- **Reasoning first against direct** (held-out, hard and independent scenes together, {first["questions"]} questions):
  {100 * first["gain"]:+.1f} points, {first["fixed"]} fixed, {first["broken"]} broken, p = {first["p"]:.2g} (exact
  McNemar test).
- **What it thinks matters**: with its own reasoning {_n(leverage["own"])}, with that of another question of the same
  type {_n(leverage["swapped"])} of {leverage["questions"]} held-out questions.
- **It looks at the right place**: attention of the reasoning's positions to the image cells, averaged over layers and
  heads, tells relevant cells from others with an AUROC of {_n(looks["all"])} ({looks["questions"]} questions); lowest
  for `{low}` ({kinds}).
- **Photographs** ({len(TEST_PHOTOGRAPHS)} samples of scikit-image that training did not use, {photos["questions"]}
  questions): median confidence {_n(photos["median_confidence"])}, on held-out scenes
  {_n(photos["median_confidence_scenes"])}; the confidence tells scenes from photographs with an AUROC of
  {_n(photos["auroc"])}.
- **Questions about other things** (sentences that training did not use, {foreign["questions"]} questions): median
  confidence {_n(foreign["median_confidence"])}, AUROC {_n(foreign["auroc"])}.
- **A gray picture** instead of the right one: {_n(scene["blank_image"])} of held-out questions.
- Loads in {metrics["load_seconds"]:.2f} s (tokenizer, processor and weights; after the libraries are imported).
"""


def _canvases(metrics: dict[str, Any]) -> str:
    lines = [
        "",
        "### Looking again",
        "",
        "Held-out scenes among other things on a canvas of so many times their sides; direct answers. *Window*: the",
        "part where the scene lies is shown as a second picture, at its own resolution; *useless window*: another part",
        "of the same size. Answers that it cannot tell count as wrong, with a confidence of nothing.",
        "",
        "| sides | questions | canvas alone | with the window | with a useless window | cannot tell, alone / window |"
        " calibration error, alone / window |",
        "|---|---|---|---|---|---|---|",
    ]
    for scale, row in metrics["canvases"].items():
        alone, window, other = (row[name] for name in ("alone", "with_window", "with_other_window"))
        lines.append(
            f"| {scale} | {row['questions']} | {_n(alone['accuracy'])} | {_n(window['accuracy'])} | "
            f"{_n(other['accuracy'])} | {_n(alone['cannot_tell'])} / {_n(window['cannot_tell'])} | "
            f"{_n(alone['calibration_error'])} / {_n(window['calibration_error'])} |"
        )
    return "\n".join([*lines, ""])


def _cannot_tell(metrics: dict[str, Any]) -> str:
    lines = [
        "",
        "### What it says that it cannot tell",
        "",
        "Share of questions answered `cannot tell`, direct / reasoning first. Where there is an answer, fewer is",
        "better.",
        "",
        "| asked about | questions | is there an answer? | cannot tell |",
        "|---|---|---|---|",
    ]
    for key, answer in (("cannot_tell", "no"), ("false_cannot_tell", "yes")):
        for name, row in metrics[key].items():
            rates = f"{_n(row['direct'])} / {_n(row['reasoned'])}"
            lines.append(f"| {_TITLES.get(name, name)} | {row['questions']} | {answer} | {rates} |")
    return "\n".join([*lines, ""])


def _second_run(metrics: dict[str, Any]) -> str:
    second = metrics["second_run"]
    lines = [
        "",
        "### Another run of the recipe",
        "",
        f"The same recipe from end to end with other initial weights and other pictures (`--seed {second['seed']}`;",
        f"these weights: `--seed {metrics['seed']}`), asked the same questions. Pairs are direct / reasoning first.",
        "",
        "| set | accuracy, these weights | accuracy, other run | points | AUROC, these weights | AUROC, other run |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in _TITLES if name in second["sets"]):
        here, row = metrics["sets"][name], second["sets"][name]
        pairs = [
            " / ".join(_n(run[mode][key]) for mode in ("direct", "reasoned"))
            for key in ("accuracy", "auroc")
            for run in (here, row)
        ]
        points = " / ".join(f"{100 * difference:+.1f}" for difference in _differences(metrics)[name])
        lines.append(f"| {_TITLES[name]} | {pairs[0]} | {pairs[1]} | {points} | {pairs[2]} | {pairs[3]} |")
    kind, lowest = weakest_type(metrics)
    other_kind, other_lowest = second["weakest_type"]
    lines += [
        "",
        f"The mean of these accuracies is {score(metrics):.4f} here and {score(second):.4f} in the other run. The type",
        f"of held-out question with the lowest direct accuracy is `{kind}` here ({_n(lowest)}), `{other_kind}` there",
        f"({_n(other_lowest)}).",
    ]
    return "\n".join([*lines, ""])


def score(metrics: dict[str, Any]) -> float:
    """What ``better`` means: mean accuracy of direct and reasoned answers over the sets that were measured."""
    rows: list[float] = [row[way]["accuracy"] for row in metrics["sets"].values() for way in _WAYS]
    return sum(rows) / len(rows)


def weakest_type(metrics: dict[str, Any]) -> tuple[str, float]:
    """The type of held-out question that is answered worst directly, and its accuracy."""
    types = metrics["sets"]["held_out"]["types"]
    kind = min(types, key=lambda kind: types[kind]["direct"]["accuracy"])
    return kind, types[kind]["direct"]["accuracy"]


def _differences(metrics: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Accuracy of the second run less that of this one, direct and reasoned, for every set."""
    return {
        name: tuple(row[mode]["accuracy"] - metrics["sets"][name][mode]["accuracy"] for mode in ("direct", "reasoned"))
        for name, row in metrics["second_run"]["sets"].items()
    }


def checks(metrics: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """``(target, measured, met)`` for every target the recipe set itself."""
    sets = metrics["sets"]
    easy, held, hard = (sets[name] for name in ("easy_vqa_test", "held_out", "hard"))
    best = {name: max(_WAYS, key=lambda way: row[way]["accuracy"]) for name, row in sets.items()}
    best_accuracy = {name: row[best[name]]["accuracy"] for name, row in sets.items()}
    best_said = {name: f"{_n(best_accuracy[name])} ({_WAYS[way]})" for name, way in best.items()}
    weakest, lowest = weakest_type(metrics)
    wrong = [
        f"{kind} ({mode}) {row[mode]['auroc']:.2f}"
        for kind, row in hard["types"].items()
        for mode in ("direct", "reasoned")
        if row[mode]["auroc"] is not None and row[mode]["auroc"] < 0.5
    ]
    looks, leverage, first = metrics["attention_auroc"]["types"], metrics["leverage"], metrics["reasoning_first"]
    blind = min(looks, key=looks.__getitem__)
    photos = metrics["photographs"]
    pairs = [
        ("easy-VQA test, direct: at least 0.99", _n(easy["direct"]["accuracy"]), easy["direct"]["accuracy"] >= 0.99),
        ("held-out scenes: at least 0.95", best_said["held_out"], best_accuracy["held_out"] >= 0.95),
        ("held-out scenes, no type below 0.80 (direct)", f"{weakest} {_n(lowest)}", lowest >= 0.8),
        ("independent scenes: at least 0.90", best_said["independent"], best_accuracy["independent"] >= 0.9),
        ("hard scenes: 0.80 to 0.90", best_said["hard"], 0.8 <= best_accuracy["hard"] <= 0.9),
        ("hard scenes, no type with an AUROC below 0.5", ", ".join(wrong) or "none", not wrong),
        (
            "AUROC, held-out, direct: at least 0.95",
            _n(held["direct"]["auroc"]),
            _reaches(held["direct"]["auroc"], 0.95),
        ),
        ("AUROC, hard, direct: at least 0.80", _n(hard["direct"]["auroc"]), _reaches(hard["direct"]["auroc"], 0.8)),
        ("attention, AUROC of every type: at least 0.80", f"{blind} {_n(looks[blind])}", looks[blind] >= 0.8),
        ("another's reasoning costs at least 15 points", f"{-100 * leverage['gain']:.1f}", leverage["gain"] <= -0.15),
        (
            "reasoning first gains at least 1 point, p < 0.05",
            f"{100 * first['gain']:+.1f}, p = {first['p']:.2g}",
            first["gain"] >= 0.01 and first["p"] < 0.05,
        ),
        (
            "photographs: median confidence clearly below that of scenes",
            f"{_n(photos['median_confidence'])} against {_n(photos['median_confidence_scenes'])}",
            photos["median_confidence"] < 0.8 * photos["median_confidence_scenes"],
        ),
        *_looking_targets(metrics),
        ("at most 12 MB", f"{metrics['bytes'] / 1e6:.1f} MB", metrics["bytes"] <= 12e6),
        ("loads in under 1 s", f"{metrics['load_seconds']:.2f} s", metrics["load_seconds"] < 1),
    ]
    if "second_run" in metrics:
        apart = {
            f"{_TITLES[name]}, {_WAYS[way]}": difference
            for name, pair in _differences(metrics).items()
            for way, difference in zip(_WAYS, pair, strict=True)
        }
        most = max(apart, key=lambda name: abs(apart[name]))
        pairs.append(
            (
                "another run: within 2 points on every set, both ways",
                f"{most} {100 * apart[most]:+.1f}",
                abs(apart[most]) <= 0.02,
            )
        )
    return pairs


def _looking_targets(metrics: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What the third stage is for; nothing for a checkpoint that was not measured on it."""
    if "canvases" not in metrics:
        return []
    gains = {
        scale: row["with_window"]["accuracy"] - row["alone"]["accuracy"]
        for scale, row in metrics["canvases"].items()
        if float(scale) >= 2
    }
    least = min(gains, key=gains.__getitem__)
    said = {name: min(row["direct"], row["reasoned"]) for name, row in metrics["cannot_tell"].items()}
    silent = min(said, key=said.__getitem__)
    false = metrics["false_cannot_tell"]["held_out"]
    worst = max(false["direct"], false["reasoned"])
    return [
        (
            "canvases of 2 sides and more: the window gains at least 20 points",
            f"{100 * gains[least]:+.1f} at {least}",
            gains[least] >= 0.2,
        ),
        ("cannot tell where there is no answer: at least 0.95", f"{silent} {_n(said[silent])}", said[silent] >= 0.95),
        ("cannot tell on held-out scenes: at most 0.02", _n(worst), worst <= 0.02),
    ]


def _targets(metrics: dict[str, Any]) -> str:
    lines = ["", "## Targets", "", "| target | measured | met |", "|---|---|---|"]
    lines += [f"| {target} | {value} | {'yes' if met else '**no**'} |" for target, value, met in checks(metrics)]
    return "\n".join([*lines, ""])


def _reaches(value: float | None, target: float) -> bool:
    return value is not None and value >= target


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
