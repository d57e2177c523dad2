"""Does the guarantee hold, and what does the shipped threshold do with pictures the model knows nothing of?

    python benchmarks/calibration.py [--pictures 11] [--write docs/measured/calibration.md]

1. *The guarantee.* 200 times, calibration items are drawn at random from a large population of scores that are
   calibrated, too sure or nearly useless; the threshold found is a violation if the error among *all* the population's
   accepted answers exceeds the target. The same items, sequence and split go to MAPIE's
   ``BinaryClassificationController`` (precision at least 1 - target, fixed sequence).
2. *With ``--run DIR``*, a run of ``latent-tool eval``: the same on its answers, by random halves. Calibrate on one
   half, count violations on the other (where the true error is itself only estimated, so that more violations show).
3. *Strange pictures.* Photographs that training never saw (scikit-image's samples) and noise, each with questions of
   the kind the model knows: the share abstained at the shipped threshold.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mapie.risk_control import BinaryClassificationController
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from latent_tool import LatentReasoner
from latent_tool.calibration.calibration import Calibration
from latent_tool.calibration.threshold import passing_threshold, split_items, threshold_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # training, for the photographs

SPLITS = 200
POPULATION = 200_000
LEVEL = 0.9
QUESTIONS = (
    "what color is the circle?",
    "how many shapes are there?",
    "is there a red square?",
    "what does it say?",
    "where is the star?",
    "which shape is leftmost?",
    "what is the blue thing?",
    "which bar is tallest?",
    "are there more circles than squares?",
    "what number is shown?",
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def calibrated(rng: np.random.Generator, count: int) -> tuple[Floats, Bools]:
    chance = rng.beta(2.2, 0.55, count)
    return chance, rng.random(count) < chance


def too_sure(rng: np.random.Generator, count: int) -> tuple[Floats, Bools]:
    """Three quarters of the scores within 1e-6 of 1, with ties, as those of a confident model."""
    chance, right = calibrated(rng, count)
    return np.round(1 - (1 - chance) ** 6, 6), right


def useless(rng: np.random.Generator, count: int) -> tuple[Floats, Bools]:
    return rng.random(count), rng.random(count) < 0.93


POPULATIONS: dict[str, Callable[[np.random.Generator, int], tuple[Floats, Bools]]] = {
    "calibrated": calibrated,
    "too sure, with ties": too_sure,
    "useless, 7 % wrong": useless,
}


def mapie_threshold(values: Floats, right: Bools, target: float, seed: int) -> float | None:
    """MAPIE's threshold on the same split and the same sequence."""
    design, test = split_items(len(values), seed)
    steps = threshold_sequence(values[design], len(test), target, LEVEL)
    if not len(steps):
        return None
    controller = BinaryClassificationController(
        lambda x: np.stack([1 - x[:, 0], x[:, 0]], 1),
        "precision",
        1 - target,
        LEVEL,
        list_predict_params=steps,
        fwer_method="fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        controller.calibrate(values[test][:, None], right[test].astype(int))
    valid = np.asarray(controller.valid_predict_params)
    return float(valid.min()) if len(valid) else None


def splits(values: Floats, right: Bools, size: int, target: float, halves: bool, seed: int) -> str:
    """The cells of one line: 200 draws of ``size`` items; violations among the rest (halves) or the population."""
    rng = np.random.default_rng(seed)
    mine: list[float | None] = []
    theirs: list[float | None] = []
    shares, found = [], {"own": 0, "MAPIE": 0}
    violated = {"own": 0, "MAPIE": 0}
    for split in range(SPLITS):
        order = rng.permutation(len(values))
        chosen, rest = order[:size], order[size:] if halves else order
        result = passing_threshold(values[chosen], right[chosen], target, LEVEL, seed=split)
        mine.append(None if result is None else result.score)
        theirs.append(mapie_threshold(values[chosen], right[chosen], target, split))
        for name, at in (("own", mine[-1]), ("MAPIE", theirs[-1])):
            if at is None:
                continue
            taken = values[rest] >= at
            found[name] += 1
            violated[name] += bool(taken.any() and (~right[rest][taken]).mean() > target)
            if name == "own":
                shares.append(float(taken.mean()))
    pairs = [pair for pair in zip(mine, theirs, strict=True) if pair != (None, None)]
    same = sum(one == other for one, other in pairs)
    cells = [f"{size}", f"{target:.0%}", f"{found['own']} / {SPLITS}", f"{np.mean(shares):.2f}" if shares else "-"]
    for name in ("own", "MAPIE"):
        bounds = binomtest(violated[name], SPLITS).proportion_ci(0.95, "exact")
        cells.append(f"{violated[name]} ({bounds.low:.3f} to {bounds.high:.3f})")
    return " | ".join([*cells, f"{same} / {len(pairs)}"])


HEADER = "| scores | items | target error | thresholds found | accepted | violations | MAPIE's | same threshold |"


def guarantee() -> list[str]:
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for name, make in POPULATIONS.items():
        values, right = make(np.random.default_rng(1), POPULATION)
        for size, target in ((300, 0.1), (1000, 0.1), (1000, 0.05), (3000, 0.05)):
            lines.append(f"| {name} | {splits(values, right, size, target, False, size)} |")
    return lines


def of_run(folder: Path, method: str | None) -> list[str]:
    from latent_tool.evaluation import load_run

    run = load_run(folder)
    scores, correct, _ = run.column(method or run.methods[0], "pooled_probability")
    values, right = np.array(scores), np.array(correct)
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for target in (0.02, 0.05):
        lines.append(f"| answers of the run, halves | {splits(values, right, len(values) // 2, target, True, 7)} |")
    return lines


def strange_pictures(count: int) -> list[str]:
    from training.world import TEST_PHOTOGRAPHS, photographs

    calibration = Calibration.load("embedded")
    wanted = "calibrated" if calibration.threshold is not None else None
    reasoner = LatentReasoner(calibration=calibration, min_confidence=wanted)
    rng = np.random.default_rng(3)
    noise = [
        Image.fromarray(rng.integers(0, 256, (96, 96, 3)).astype(np.uint8))
        if number % 2
        else Image.fromarray(np.clip(rng.normal(128, 40, (96, 96, 3)), 0, 255).astype(np.uint8))
        for number in range(count)
    ]
    lines = ["| pictures | questions | abstained | mean probability |", "|---|---|---|---|"]
    for name, pictures in (("photographs", photographs(TEST_PHOTOGRAPHS[:count])), ("noise", noise)):
        requests = [{"image": picture, "question": text} for picture in pictures for text in QUESTIONS]
        results = reasoner.batch(requests)
        abstained = sum(bool(result.abstained) for result in results)
        mean = np.mean([result.confidence or 0.0 for result in results])
        shown = f"{abstained / len(results):.2f}" if wanted else "no threshold"
        lines.append(f"| {name} | {len(results)} | {shown} | {mean:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of latent-tool eval")
    parser.add_argument("--method", help="whose answers of that run")
    parser.add_argument("--pictures", type=int, default=11, help="strange pictures of each kind; 0: none")
    parser.add_argument("--write", type=Path, help="file to write the tables to")
    given = parser.parse_args()
    lines = [
        "# Calibration, measured",
        "",
        "Written by `python benchmarks/calibration.py`. A violation is a threshold whose true error exceeds the",
        f"target; at {LEVEL:.0%} confidence at most {1 - LEVEL:.0%} of {SPLITS} are promised (the 95 % interval of the",
        "share in brackets). *accepted* is the mean share accepted where a threshold was found. *MAPIE's* are those of",
        "its thresholds on the same items and the same sequence. They are never lower, and in some draws higher, since",
        "MAPIE multiplies the share of errors by the number of items and rounds up: 10.000000000000007 counts as 11",
        "errors. *same threshold* counts equal ones among the draws in which either found one.",
        "",
        *guarantee(),
    ]
    if given.run is not None:
        lines += ["", *of_run(given.run, given.method)]
    if given.pictures:
        lines += ["", "At the threshold that ships with the embedded model:", "", *strange_pictures(given.pictures)]
        lines += ["", "The guarantee is for questions drawn like those of the calibration, which these are not."]
    page = "\n".join(lines) + "\n"
    print(page)
    if given.write:
        given.write.write_text(page)


if __name__ == "__main__":
    main()
