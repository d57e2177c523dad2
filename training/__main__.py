"""``python -m training``: train the embedded model, measure it, write its card, put it in place.

    python -m training --out latent_tool/models/embedded      the whole recipe, one to two hours on two cores
    python -m training --out DIR --quick                      two minutes: a smaller model of simple scenes
    python -m training --out DIR --seed 1                     the whole recipe with other weights and other pictures
    python -m training --out DIR --from latent_tool/models/embedded   its third stage alone, from those weights on
    python -m training --out DIR --from DIR --settle --seed 1         its end, from the third stage on
    python -m training --out DIR --resume                     continue a run that was stopped
    python -m training --out DIR --evaluate-only              measure DIR again and rewrite its card
    python -m training --out DIR --second-run OTHER           set the figures of another run beside those of DIR's card

Exit codes: 0 done, 1 the checkpoint in place is better (see ``--force``), 2 something is missing or wrong, 3 the
training broke off (a full disk, a kill; ``--resume`` continues from the state that was saved last).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_tool.errors import LatentToolError, MissingExtraError, SettingsError
from latent_tool.files import write_whole
from training import settings
from training.settings import Recipe

SEEDS = 50  # parts of the training stream
NEEDED = ("torch", "transformers", "PIL", "numpy", "scipy", "matplotlib", "skimage", "easy_vqa")
METRICS = "metrics.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(f"Training the embedded model ({', '.join(missing)})", "train")
        if options.settle and not options.start:
            raise SettingsError("There is nothing to settle.", "Name the third stage's checkpoint with --from DIR.")
        chosen = settings.QUICK if options.quick else settings.SETTLING if options.settle else settings.FULL
        recipe = replace(chosen, seed=options.seed)
        recipe = replace(recipe, processes=options.processes or recipe.processes)
        if options.second_run:
            return _note_second_run(options.out, options.second_run, recipe)
        if options.evaluate_only:
            return _measure(options.out, recipe)
        return _run(options.out, options.run, recipe, options.resume, options.force, options.start)
    except LatentToolError as error:
        print(error, file=sys.stderr)
        return 2
    except ChildProcessError as error:
        print(error, "The state that was saved last is whole: --resume continues from it.", sep="\n", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m training", description="Train, measure and export the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--run", type=Path, help="folder of states and logs (default: training/runs/full or quick)")
    parser.add_argument("--from", type=Path, dest="start", metavar="DIR", help="run the third stage alone, from DIR on")
    parser.add_argument(
        "--settle", action="store_true", help="with --from: a shorter third stage, mostly ordinary scenes"
    )
    parser.add_argument("--processes", type=int, choices=range(1, 9), help="that share the pictures of a step")
    parser.add_argument("--quick", action="store_true", help="a two-minute recipe")
    parser.add_argument("--seed", type=int, choices=range(SEEDS), metavar="N", default=0, help=f"0 to {SEEDS - 1}")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint even if it is better or unknown")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    only.add_argument(
        "--second-run", type=Path, metavar="OTHER", help="write into the card what another run's folder measured"
    )
    return parser


def _measurer(recipe: Recipe) -> Callable[[Path], dict[str, Any]]:
    from training import evaluate

    return evaluate.measure_quick if recipe.tiny else evaluate.measure


def _measure(out: Path, recipe: Recipe) -> int:
    """Measure the checkpoint that is there, and rewrite its card."""
    if not (out / "model.safetensors").exists():
        raise SettingsError(f"There is no checkpoint in {out}.", "Train one first, without --evaluate-only.")
    metrics = {"seed": recipe.seed} | _measurer(recipe)(out)
    with suppress(SettingsError):
        old = _read(out)
        if old["sha256"] == metrics["sha256"]:  # of the same weights: their seed, stages and second run stay
            metrics |= {key: old[key] for key in ("seed", "stages", "second_run") if key in old}
    _write(out, metrics, recipe)
    return 0


def _run(out: Path, run: Path | None, recipe: Recipe, resume: bool, force: bool, start: Path | None) -> int:
    """Train, measure and put in place."""
    from training import card, checkpoint, stages

    run = run or Path("training/runs") / ("quick" if recipe.tiny else "full")
    if (out / "model.safetensors").exists() and not (out / METRICS).exists() and not force:
        raise SettingsError(f"{out} holds a checkpoint that was never measured.", "Use --force to replace it.")
    model = stages.train(recipe, run, resume, start)
    candidate = run / "candidate"
    with checkpoint.replacing(candidate) as folder:
        checkpoint.export(model, checkpoint.build_processor(recipe), folder)
        made = [stage for stage in stages.STAGES if getattr(recipe, f"{stage}_steps")]
        made += (
            ["settling"] if recipe == replace(settings.SETTLING, seed=recipe.seed, processes=recipe.processes) else []
        )
        metrics = _measurer(recipe)(folder) | {"seed": recipe.seed, "stages": made}
        _write(folder, metrics, recipe)
    if (out / METRICS).exists() and not force:
        old = _read(out)
        if card.score(old) > card.score(metrics):
            print(
                f"{out} is better ({card.score(old):.4f}) than this run ({card.score(metrics):.4f}),"
                f" which stays in {candidate}."
                " Use --force to replace it.",
                file=sys.stderr,
            )
            return 1
    with checkpoint.replacing(out) as folder:
        shutil.copytree(candidate, folder, dirs_exist_ok=True)
    print(f"{out}: score {card.score(metrics):.4f}")
    return 0


def _note_second_run(out: Path, other: Path, recipe: Recipe) -> int:
    """Set the accuracies and AUROCs of another run beside those of ``out``, and rewrite the card of ``out``."""
    from training import card

    metrics, second = _read(out), _read(other)
    if metrics["sha256"] == second["sha256"]:
        raise SettingsError(f"{other} holds the weights of {out}.", "Name the folder of another run of the recipe.")
    for folder, one in ((out, metrics), (other, second)):
        if "seed" not in one:
            raise SettingsError(f"{folder} does not say its seed.", "Measure it with --evaluate-only --seed N.")
    asked = [{name: row["questions"] for name, row in one["sets"].items()} for one in (metrics, second)]
    if asked[0] != asked[1]:
        raise SettingsError(f"{other} was not asked the questions of {out}.", "Measure both with --evaluate-only.")
    metrics["second_run"] = {
        "seed": second["seed"],
        "sha256": second["sha256"],
        "weakest_type": card.weakest_type(second),
        "sets": {
            name: {mode: {key: row[mode][key] for key in ("accuracy", "auroc")} for mode in ("direct", "reasoned")}
            for name, row in second["sets"].items()
        },
    }
    _write(out, metrics, recipe)
    return 0


def _read(folder: Path) -> dict[str, Any]:
    """What was measured of the checkpoint in a folder."""
    try:
        return dict(json.loads((folder / METRICS).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{folder / METRICS} cannot be read ({error}).",
            "Name a checkpoint's folder; measure it with --evaluate-only.",
        ) from error


def _write(folder: Path, metrics: dict[str, Any], recipe: Recipe) -> None:
    """The measurements, and the card that is written from them."""
    from training import card

    write_whole(folder / METRICS, (json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    write_whole(folder / "README.md", card.render(metrics, recipe).encode())


if __name__ == "__main__":
    sys.exit(main())
