"""What a run says, as one plain JSON object: the only thing the reports are made from.

Per method: accuracy, the paired comparison with greedy, cost, and every score as a confidence; and every pair of
methods compared on the questions that both were asked. Errors of a method count
as wrong answers and are never accepted; answers that say that it cannot be told are never accepted either, are not
wrong, and are counted beside the share that was answered and the share of errors in it; rows that could not be asked
(of no use, or with images that cannot be opened) and unlabelled ones are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from latent_tool import statistics
from latent_tool.about import model_name
from latent_tool.errors import MissingExtraError
from latent_tool.evaluation.measures import benchmark_measures
from latent_tool.evaluation.runs import Row, Run
from latent_tool.scores import COMPARED

__all__ = ["GATED", "TARGET_ERROR", "confidence_of", "fused_score", "summarise"]

TARGET_ERROR = 0.05
# Fewer labelled answers, or fewer wrong or right ones, and a fused score is not tried.
FUSED_ITEMS, FUSED_CLASS = 100, 20
# Fewer wrong (or right) answers, and the interval of an AUROC is marked as rough.
FEW = 30
_CURVE = 60
# What a method's confidence is: the first of these scores that it has.
GATED = ("option_probability", "pooled_probability", "answer_probability", "agreement")
WRONG_SHOWN = 100  # wrong answers in the reports, at most


def summarise(run: Run) -> dict[str, Any]:
    """Return the summary of a run, complete or not. Raises ``MissingExtraError`` without scipy and scikit-learn."""
    facts = run.manifest
    base = next((name for name, method in facts.methods.items() if name.partition(":")[0] == "greedy"), None)
    return {
        "schema_version": "1",
        "latent_tool": facts.latent_tool,
        "dataset": facts.dataset.model_dump(mode="json", exclude={"source"}),
        "model": {**facts.model, "name": model_name(str(facts.model.get("name")))},
        "seed": facts.seed,
        "batch": facts.batch,
        "complete": run.complete,
        "target_error": TARGET_ERROR,
        "baseline": base,
        "methods": {name: _method(run, name, base) for name in run.methods if run.of(name)},
        "pairs": _pairs(run),
        "scores": {name: score.meaning for name, score in COMPARED.items()},
        "wrong": _wrong(run),
        "errors": _errors(run),
    }


def _right(row: Row) -> bool:
    return row.correct is True


def _errors(run: Run) -> list[dict[str, Any]]:
    """Every row with an error, with its line where it is known."""
    return [
        {"id": row.id, "method": row.method, "line": row.details.get("line"), **row.error.model_dump()}
        for row in run.rows
        if row.error is not None
    ]


def _wrong(run: Run) -> dict[str, Any]:
    """The questions that some method answered wrongly: the surest wrong answer first, and what all methods said."""
    by_item: dict[str, list[Row]] = {}
    for row in run.rows:
        if row.usable:
            by_item.setdefault(row.id, []).append(row)
    found = []
    for name, rows in by_item.items():
        wrong = [row for row in rows if row.correct is False]
        if wrong:
            sure = max((confidence_of(row)[0] or 0.0 for row in wrong), default=0.0)
            found.append((sure, name, rows))
    found.sort(key=lambda entry: -entry[0])
    return {"count": len(found), "shown": [_shown(rows) for _, _, rows in found[:WRONG_SHOWN]]}


def _shown(rows: Sequence[Row]) -> dict[str, Any]:
    """One question with every method's answer."""
    first = rows[0]
    answers = []
    for row in rows:
        confidence, source = confidence_of(row)
        error = None if row.error is None else f"{row.error.type}: {row.error.message}"
        answers.append(
            {
                "method": row.method,
                "answer": row.answer,
                "correct": row.correct,
                "confidence": confidence,
                "source": source,
                "error": error,
            }
        )
    return {
        "id": first.id,
        "line": first.details.get("line"),
        "type": first.type,
        "images": list(first.images),
        "question": first.question,
        "label": first.label,
        "answers": answers,
    }


def confidence_of(row: Row) -> tuple[float | None, str | None]:
    """Return the score that an answer is gated on, and its name: the first of ``GATED`` that it has."""
    for name in GATED:
        if (value := row.scores.get(name)) is not None:
            return value, name
    return None, None


def _method(run: Run, name: str, base: str | None) -> dict[str, Any]:
    rows = run.of(name)
    usable = [row for row in rows if row.usable]
    answered = [row for row in rows if row.error is None]
    found: dict[str, Any] = {
        "kind": run.manifest.methods[name].kind,
        "rows": len(rows),
        "labelled": len(usable),
        "unlabelled": sum(row.label is None and row.error is None for row in rows),
        "errors": len(rows) - len(answered),
        "broken_rows": sum(not row.asked for row in rows),
        "visual_errors": _visual_errors(rows),
        "accuracy": None,
        "measures": None,
        "abstained": 0,
        "answered": None,
        "error_answered": None,
        "types": {},
        "paired": None,
        "scores": {},
        "fused": None,
        "cost": {
            field: _mean([float(getattr(row, field)) for row in answered])
            for field in ("seconds", "candidates", "decoder_calls", "tokens")
        },
    }
    if not usable:
        return found
    found["accuracy"] = _share(usable)
    found["measures"] = benchmark_measures(usable)
    spoken = [row for row in usable if row.error is None and not row.abstained]
    found["abstained"] = sum(row.abstained for row in usable)
    found["answered"] = _interval(statistics.accuracy_interval(len(spoken), len(usable)))
    found["error_answered"] = None if not spoken else 1 - sum(map(_right, spoken)) / len(spoken)
    kinds = sorted({row.type for row in usable if row.type is not None})
    found["types"] = {kind: _share([row for row in usable if row.type == kind]) for kind in kinds}
    if base is not None and name != base:
        found["paired"] = _paired(run.of(base), usable)
    found["scores"] = {score: facts for score in COMPARED if (facts := _score(run, name, score)) is not None}
    found["fused"] = _fused(run, name)
    return found


def _visual_errors(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How many answers have no visual scores because measuring them failed, and what the first one said."""
    said = [row.details["visual_error"] for row in rows if "visual_error" in row.details]
    return {"count": len(said), "first": said[0]} if said else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(rows: Sequence[Row]) -> dict[str, Any]:
    right = sum(map(_right, rows))
    return {"n": len(rows), **_interval(statistics.accuracy_interval(right, len(rows)))}


def _interval(interval: statistics.Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in interval._asdict().items()}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pairs(run: Run) -> list[dict[str, Any]]:
    """Every method against every other; a search against what is no search, else the later against the earlier."""
    found = []
    usable = {name: [row for row in run.of(name) if row.usable] for name in run.methods}
    for before, after in combinations(run.methods, 2):
        searches = [name.partition(":")[0] == "search" for name in (before, after)]
        if searches == [True, False]:
            before, after = after, before
        compared = _paired(usable[before], usable[after])
        if compared is not None:
            found.append({"method": after, "against": before, **compared})
    return found


def _paired(base: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any] | None:
    """The rows against those of another method, on the questions that both were asked."""
    known = {row.id: row for row in base if row.usable}
    pairs = [(_right(known[row.id]), _right(row)) for row in rows if row.id in known]
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    compared = statistics.mcnemar(before, after)
    gain = statistics.paired_bootstrap(before, after)
    return {"n": len(pairs), **compared._asdict(), "gain": _interval(gain)}


def _score(run: Run, name: str, score: str) -> dict[str, Any] | None:
    """A score as a confidence of a method's answers; ``None`` if it was measured for none."""
    values, right, missing = run.column(name, score)
    if not values:
        return None
    facts = _confidence([COMPARED[score].surer(value) for value in values], right, missing)
    if COMPARED[score].probability:
        facts |= _calibration(values, right)
    return facts


def _confidence(surer: list[float], right: list[bool], missing: int = 0) -> dict[str, Any]:
    """How well a score ranks the answers that have it; the shares that are accepted are of all, missing ones, too."""
    coverage, errors = statistics.risk_coverage(surer, right)
    share = len(surer) / (len(surer) + missing)
    wrong = right.count(False)
    places = np.unique(np.linspace(0, len(surer) - 1, _CURVE).round().astype(int))
    return {
        "n": len(surer),
        "missing": missing,
        "wrong": wrong,
        "few": min(wrong, len(right) - wrong) < FEW,
        "auroc": _interval(statistics.auroc_interval(surer, right)),
        "aurc": statistics.aurc(surer, right),
        "coverage": share * statistics.coverage_at_risk(surer, right, TARGET_ERROR),
        "curve": [[round(share * float(coverage[place]), 4), round(float(errors[place]), 4)] for place in places],
    }


def _calibration(values: list[float], right: list[bool]) -> dict[str, Any]:
    floor, high = statistics.ece_noise_floor(values)
    bins = statistics.reliability(values, right)
    return {
        "ece": statistics.ece(values, right),
        "ece_floor": floor,
        "ece_floor_95": high,
        "reliability": [[round(mean, 4), round(share, 4), count] for mean, share, count in bins],
    }


# --- the fused score ---------------------------------------------------------------------------------------------


def _fused(run: Run, name: str) -> dict[str, Any] | None:
    """A logistic regression on all scores, out of fold, against the best single one; ``None`` with too little data."""
    rows = [row for row in run.of(name) if row.correct is not None and not row.abstained]
    shares = {score: sum(row.scores.get(score) is not None for row in rows) for score in COMPARED}
    # Agreement needs other samples of the model: a fused score would not be worth their cost if it needed them, too.
    chosen = [score for score, count in shares.items() if score != "agreement" and count >= 0.99 * len(rows) > 0]
    rows = [row for row in rows if all(row.scores.get(score) is not None for score in chosen)]
    right = [bool(row.correct) for row in rows]
    few = min(sum(right), len(right) - sum(right))
    if len(chosen) < 2 or len(rows) < FUSED_ITEMS or few < FUSED_CLASS:
        return None
    features = [[COMPARED[score].surer(row.scores[score] or 0.0) for score in chosen] for row in rows]
    probability = fused_score(features, right, [COMPARED[score].probability for score in chosen])
    columns = {score: [row[place] for row in features] for place, score in enumerate(chosen)}
    singles = {score: statistics.auroc(column, right) for score, column in columns.items()}
    best = max(singles, key=lambda score: singles[score])
    gain = statistics.auroc_gain(columns[best], probability, right)
    return {
        "n": len(rows),
        "from": chosen,
        **_confidence(probability, right),
        **_calibration(probability, right),
        "best_single": best,
        "gain": _interval(gain),
        "wins": gain.low > 0,
    }


def fused_score(features: list[list[float]], right: list[bool], probability: list[bool], seed: int = 0) -> list[float]:
    """Return probabilities of being right from a logistic regression on several scores, each predicted out of fold.

    Probabilities enter as log-odds. The strength of the penalty is chosen by cross-validation inside every fold, so
    that no answer has a part in its own prediction. ``features``: one row of finite numbers per answer.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("The fused score", "evaluation") from error
    table = np.asarray(features, dtype=np.float64)
    for place, is_probability in enumerate(probability):
        if is_probability:
            clipped = table[:, place].clip(1e-6, 1 - 1e-6)
            table[:, place] = np.log(clipped / (1 - clipped))
    inner = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]},
        scoring="neg_log_loss",
        cv=StratifiedKFold(4, shuffle=True, random_state=seed + 1),
    )
    outer = StratifiedKFold(5, shuffle=True, random_state=seed)
    found = cross_val_predict(inner, table, np.asarray(right), cv=outer, method="predict_proba")[:, 1]
    return [float(value) for value in found]
