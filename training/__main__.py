"""``python -m training``: train the embedded model, measure it, write its card, put it in place.

    python -m training --out latent_tool/models/embedded      the whole recipe, one to two hours on two cores
    python -m training --out /tmp/model --quick               two minutes: a smaller model of simple scenes
    python -m training --out DIR --seed 1                     the whole recipe with other weights and other pictures
    python -m training --out DIR --resume                     continue a run that was stopped
    python -m training --out DIR --evaluate-only              measure DIR again and rewrite its card

Exit codes: 0 done, 1 the checkpoint in place is better (see ``--force``), 2 something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_tool.errors import LatentToolError, MissingExtraError, SettingsError
from training import settings
from training.settings import Recipe

SEEDS = 50  # parts of the training stream
NEEDED = ("torch", "transformers", "PIL", "numpy", "matplotlib", "skimage", "easy_vqa")
METRICS = "metrics.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(f"Training the embedded model ({', '.join(missing)})", "train")
        recipe = replace(settings.QUICK if options.quick else settings.FULL, seed=options.seed)
        return _run(options.out, options.run, recipe, options.resume, options.force, options.evaluate_only)
    except LatentToolError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m training", description="Train, measure and export the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--run", type=Path, help="folder of states and logs (default: training/runs/full or quick)")
    parser.add_argument("--quick", action="store_true", help="a two-minute recipe")
    parser.add_argument("--seed", type=int, choices=range(SEEDS), metavar="N", default=0, help=f"0 to {SEEDS - 1}")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint even if it is better or unknown")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    return parser


def _run(out: Path, run: Path | None, recipe: Recipe, resume: bool, force: bool, evaluate_only: bool) -> int:
    from training import card, checkpoint, evaluate, stages

    measure = evaluate.measure_quick if recipe.tiny else evaluate.measure
    run = run or Path("training/runs") / ("quick" if recipe.tiny else "full")
    if evaluate_only:
        if not (out / "model.safetensors").exists():
            raise SettingsError(f"There is no checkpoint in {out}.", "Train one first, without --evaluate-only.")
        metrics = measure(out)
        _write(out, metrics, card.render(metrics, recipe))
        return 0
    if (out / "model.safetensors").exists() and not (out / METRICS).exists() and not force:
        raise SettingsError(f"{out} holds a checkpoint that was never measured.", "Use --force to replace it.")
    model = stages.train(recipe, run, resume)
    candidate = run / "candidate"
    with checkpoint.replacing(candidate) as folder:
        checkpoint.export(model, checkpoint.build_processor(recipe), folder)
        metrics = measure(folder)
        _write(folder, metrics, card.render(metrics, recipe))
    there = out / METRICS
    if there.exists() and not force:
        old = json.loads(there.read_text())
        if score(old) > score(metrics):
            print(
                f"{out} is better ({score(old):.4f}) than this run ({score(metrics):.4f}), which stays in {candidate}."
                " Use --force to replace it.",
                file=sys.stderr,
            )
            return 1
    with checkpoint.replacing(out) as folder:
        shutil.copytree(candidate, folder, dirs_exist_ok=True)
    print(f"{out}: score {score(metrics):.4f}")
    return 0


def score(metrics: dict[str, Any]) -> float:
    """What ``better`` means: mean accuracy of direct and reasoned answers over the sets that were measured."""
    rows = [row[mode]["accuracy"] for row in metrics["sets"].values() for mode in ("direct", "reasoned")]
    return sum(rows) / len(rows)


def _write(folder: Path, metrics: dict[str, Any], text: str) -> None:
    (folder / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
