"""The domain check, on numbers alone: its promise and the threshold's hold together, and nothing slips through.

Pictures are rows of made-up numbers, strangers are rows drawn otherwise; no model is loaded.
"""

from __future__ import annotations

import json
import math
import pickle
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.stats import binomtest

from latent_tool.calibration.calibration import Calibration
from latent_tool.calibration.domain import DomainCheck, NoDomainCheck, held_back_needed, round_off
from latent_tool.calibration.domain_fit import LEVELS, MIN_REFERENCE, fit_domain, needed_questions, shares
from latent_tool.calibration.fit import fit
from latent_tool.calibration.threshold import passing_threshold
from latent_tool.cannot_tell import CANNOT_TELL_REASON
from latent_tool.errors import CalibrationError, CalibrationMismatchError
from latent_tool.schema import Domain, ReasoningResult, Scores

SIZE, PIXELS = 12, 4  # numbers of a picture, and how many of them are of its pixels
Table = NDArray[np.float64]


def like(rng: np.random.Generator, count: int, pictures: int = 1) -> list[list[list[float]]]:
    """Questions of the calibration's kind: correlated numbers with a heavy tail."""
    mix = np.random.default_rng(5).normal(size=(SIZE, SIZE))
    rows = (rng.standard_t(5, size=(count, pictures, SIZE)) @ mix) + 3
    return rows.tolist()


def damaged(rng: np.random.Generator, questions: list[list[list[float]]]) -> dict[str, list[list[float]]]:
    rows = np.array([picture for pictures in questions for picture in pictures])
    return {"shrunk": (rows * 0.6).tolist()}


def check_of(
    rng: np.random.Generator, reference: int = 150, held: int = 299, level: float | None = 0.01
) -> DomainCheck:
    known = like(rng, reference)
    found = fit_domain(known, damaged(rng, known), like(rng, held), PIXELS, level)
    assert isinstance(found, DomainCheck)
    return found


@pytest.mark.slow
def test_neither_promise_is_violated_more_often_than_stated() -> None:
    """200 times: a check and a threshold from 1,000 items, judged on a large population of questions like them.

    The rate of false alarms is promised in the mean over checks; that of errors among the accepted, at 90 % confidence.
    The score is higher on strange pictures, so that a check that refused in vain would be seen in the errors, too.
    """
    rng = np.random.default_rng(0)
    population = np.array(like(rng, 6_000))
    strange = np.abs(population[:, 0] - population[:, 0].mean(0)).max(1)
    strange /= np.quantile(strange, 0.99)
    chance = np.clip(0.97 - 0.25 * strange**2, 0.05, 0.99)
    scores = np.clip(chance + 0.2 * np.minimum(strange, 1) ** 4 + rng.normal(0, 0.02, len(chance)), 0.001, 0.999)
    right = rng.random(len(chance)) < chance
    level, target = 0.02, 0.1
    alarms, violated, found = [], 0, 0
    for split in range(200):
        order = np.random.default_rng(split).permutation(len(population))
        reference, held, own, fresh = np.split(order[:3000], [150, 300, 1000])
        known = population[reference].tolist()
        check = fit_domain(
            known, damaged(np.random.default_rng(split), known), population[held].tolist(), PIXELS, level
        )
        assert isinstance(check, DomainCheck)
        refused = naive_verdicts(check, population[:, 0])
        if split < 3:
            assert all(check.verdict(population[at].tolist()).refused == refused[at] for at in fresh[:200])
        alarms.append(refused[fresh].mean())
        gated = np.where(refused[own], math.nan, scores[own])
        threshold = passing_threshold(gated, right[own], target, 0.9, split)
        if threshold is not None:
            found += 1
            accepted = (scores >= threshold.score) & ~refused
            violated += bool(accepted.any() and (~right[accepted]).mean() > target)
    deviation = np.std(alarms) / math.sqrt(len(alarms))
    assert np.mean(alarms) <= level + 2 * deviation, (np.mean(alarms), deviation)
    assert np.mean(alarms) >= level / 4  # it is no promise to refuse nothing
    assert found >= 60
    assert binomtest(violated, found, 0.1, alternative="greater").pvalue > 0.01, (violated, found)


def naive_verdicts(check: DomainCheck, pictures: Table) -> NDArray[np.bool_]:
    """Whether each picture ``(n, D)`` alone is refused: it joins the held-back ones, and all are compared."""
    table = check.table(pictures)
    own, held = np.zeros(len(table)), np.zeros((len(table), check.held))
    for column, scores in zip(table.T, map(np.array, check.held_back.values()), strict=True):
        value = np.array([round_off(each) for each in column.tolist()])[:, None]
        own += 1 / (1 + (scores >= value).sum(1)) ** 2
        held += 1 / ((scores[None] >= scores[:, None]).sum(1) + (value >= scores)) ** 2
    p_values = (1 + (held >= own[:, None] * (1 - 1e-9)).sum(1)) / (check.held + 1)
    refused: NDArray[np.bool_] = p_values <= check.level * (1 + 1e-9)
    return refused


def test_a_p_value_counts_the_held_back_scores() -> None:
    """By hand, in fractions: the question is one of n + 1, of whom every one is compared with all."""
    rng = np.random.default_rng(1)
    check = check_of(rng)
    strange = [
        [[value * factor for value in picture] for picture in pictures]
        for pictures in like(rng, 12)
        for factor in (1, 1.5, 3)
    ]
    for pictures in [*like(rng, 12), *strange]:
        scores, verdict = check.scores(pictures), check.verdict(pictures)
        everyone = [(*check.held_back[part], value) for part, value in scores.items()]
        ranks = [[sum(other >= one for other in column) for one in column] for column in everyone]
        assert list(verdict.parts.values()) == [column[-1] / (check.held + 1) for column in ranks]
        sums = [sum(Fraction(1, rank**2) for rank in row) for row in zip(*ranks, strict=True)]
        assert verdict.p_value == sum(one >= sums[-1] for one in sums) / (check.held + 1)
        assert verdict.refused == (verdict.p_value <= check.level * (1 + 1e-9))


@pytest.mark.parametrize(("held", "seed"), [(299, 16), (299, 17), (299, 18), (499, 16), (700, 19)])
def test_what_is_strange_in_one_part_is_refused_and_so_is_what_is_a_little_strange_in_all(held: int, seed: int) -> None:
    """Of no more held-back questions than the level takes, and whatever the other parts say."""
    rng = np.random.default_rng(seed)
    check = check_of(rng, held=held)
    rising = {part: sorted(scores) for part, scores in check.held_back.items()}
    usual = {part: scores[held // 2] for part, scores in rising.items()}
    least = {part: scores[0] - 1 for part, scores in rising.items()}
    assert not check.verdict_of(usual).refused
    for part, scores in rising.items():
        for others in (usual, least):
            assert check.verdict_of({**others, part: scores[-1] + 1}).refused
            assert not check.verdict_of({**others, part: scores[-held // 60]}).refused
    together = check.verdict_of({part: scores[-8] for part, scores in rising.items()})
    assert together.p_value < 2 * min(together.parts.values())  # where the least p times the number of parts is 3


def test_strangers_are_refused_and_of_several_pictures_the_strangest_counts() -> None:
    rng = np.random.default_rng(2)
    check = check_of(rng)
    (known,) = like(rng, 1)
    stranger = (np.array(known) * 40 + 100).tolist()
    assert not check.verdict(known).refused and check.verdict(stranger).refused
    one, other, both = (check.verdict(each).parts for each in (known, stranger, [*known, *stranger, *known]))
    assert both == {part: min(one[part], other[part]) for part in both}


def test_the_gaussian_is_the_naive_one() -> None:
    """All directions kept: the distance is that by the inverse of the covariance, plus the ridge."""
    rng = np.random.default_rng(3)
    known, others = like(rng, 400), like(rng, 20)
    check = fit_domain(known, {}, like(rng, 200), PIXELS, 0.01)
    assert isinstance(check, DomainCheck) and len(check.usual.directions) == SIZE - PIXELS
    rows = np.array(known)[:, 0, : SIZE - PIXELS]
    z = (rows - rows.mean(0)) / (rows.std(0) + 1e-3)
    inverse = np.linalg.inv(np.cov(z.T) + 0.003 * np.eye(SIZE - PIXELS))
    for pictures in others:
        row = (np.array(pictures[0])[: SIZE - PIXELS] - rows.mean(0)) / (rows.std(0) + 1e-3)
        expected = math.sqrt(row @ inverse @ row / (SIZE - PIXELS))
        assert check.scores(pictures)["usual"] == pytest.approx(expected, rel=1e-3)


def test_the_nearest_pictures_are_found_naively() -> None:
    """The third smallest distance by the inverse of the covariance, plus the floor, over the first 500 pictures."""
    rng = np.random.default_rng(3)
    known, others = like(rng, 600), like(rng, 20)
    check = fit_domain(known, {}, like(rng, 200), PIXELS, 0.01)
    assert isinstance(check, DomainCheck) and len(check.pixels.rows) == 500
    rows = np.array(known)[:, 0, SIZE - PIXELS :]
    scale = rows.std(0) + 1e-3
    inverse = np.linalg.inv(np.cov(((rows - rows.mean(0)) / scale).T) + 0.2 * np.eye(PIXELS))
    for pictures in [*others, *known[:3]]:
        steps = (rows[:500] - np.array(pictures[0])[SIZE - PIXELS :]) / scale
        distances = sorted(math.sqrt(step @ inverse @ step) for step in steps)
        assert check.scores(pictures)["pixels"] == pytest.approx(distances[2], rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("seed", range(4, 9))
def test_numbers_that_are_none_are_refused(value: float, seed: int) -> None:
    check = check_of(np.random.default_rng(seed))
    for at in range(SIZE):
        (known,) = like(np.random.default_rng(seed), 1)
        known[0][at] = value
        assert check.verdict(known).p_value == 1 / (check.held + 1)


@pytest.mark.parametrize("pictures", [[], [[]], [[0.0] * (SIZE - 1)], [[0.0] * SIZE, [0.0] * (SIZE + 1)]])
def test_pictures_of_another_model_are_an_error(pictures: list[list[float]]) -> None:
    with pytest.raises(CalibrationMismatchError, match="numbers"):
        check_of(np.random.default_rng(4)).verdict(pictures)


def test_a_check_is_deterministic_and_survives_its_file(tmp_path: Path) -> None:
    one, other = (check_of(np.random.default_rng(6)) for _ in range(2))
    assert one == other and one != check_of(np.random.default_rng(7))
    calibration = checked(one)
    calibration.save(tmp_path / "c.json")
    read = Calibration.load(tmp_path / "c.json")
    assert read == calibration and read.domain is not None and read.schema_version == "3"
    rng = np.random.default_rng(7)
    copies = one.model_copy(), pickle.loads(pickle.dumps(one)), DomainCheck.model_validate(one.model_dump())
    (question,) = like(rng, 1)
    assert all(copy == one and copy.verdict(question) == one.verdict(question) for copy in copies)
    assert all(read.domain.verdict(each) == one.verdict(each) for each in like(rng, 50))
    assert len((tmp_path / "c.json").read_text().splitlines()) < 300  # numbers of one list on one line


def test_bounds_of_a_file_are_kept() -> None:
    """What is not whole is refused when it is read, by name."""
    good = check_of(np.random.default_rng(8)).model_dump(mode="json")
    wrongs: dict[str, dict[str, Any]] = {
        "needs 8 numbers": {"usual": {**good["usual"], "scale": good["usual"]["scale"][:-1]}},
        "needs 4 numbers": {"pixels": {**good["pixels"], "rows": [[0.0] * 5] * 4}},
        "every axis": {"pixels": {**good["pixels"], "axes": good["pixels"]["axes"][1:]}},
        "every direction": {"damages": {"shrunk": {"weights": [0.0] * 4, "intercept": 0.0}}},
        "at least 1 item": {"pixels": {"center": [], "axes": [], "rows": [[], [], []]}},
        "one variance": {"usual": {**good["usual"], "variances": good["usual"]["variances"][:-1]}},
        "held-back scores": {"held_back": {"usual": good["held_back"]["usual"]}},
        "too few": {"level": 0.001},
        "equally many": {"held_back": {**good["held_back"], "usual": good["held_back"]["usual"][1:]}},
    }
    for message, change in wrongs.items():
        with pytest.raises(ValidationError, match=message):
            DomainCheck.model_validate({**good, **change})
    wide = 5000
    row = [0.0] * wide
    big = {"center": row, "scale": [1.0] * wide, "directions": [row] * 60, "variances": [1.0] * 60, "rest": 1.0}
    many = {**good["pixels"], "rows": [[0.0] * PIXELS] * 70_000}
    for part, wrong in {"usual": big, "pixels": many}.items():
        with pytest.raises(ValidationError, match="more than"):
            DomainCheck.model_validate({**good, part: wrong})


def test_a_wide_model_gets_fewer_directions() -> None:
    """8,192 numbers a picture: the file stays bounded."""
    rng = np.random.default_rng(9)
    rows = rng.normal(size=(300, 1, 8192))
    check = fit_domain(rows[:120].tolist(), {"half": (rows[:120, 0] / 2).tolist()}, rows[120:].tolist(), 10, 0.05)
    assert isinstance(check, DomainCheck) and 1 <= len(check.usual.directions) <= 32
    assert len(check.model_dump_json()) < 4_000_000
    assert check.verdict((rows[0] * 5).tolist()).refused


def test_too_few_pictures_say_how_many_more() -> None:
    rng = np.random.default_rng(10)
    known = like(rng, 60)
    found = fit_domain(known, damaged(rng, known), like(rng, 40), PIXELS)
    assert isinstance(found, NoDomainCheck)
    assert found.needed_pictures == needed_questions(3, LEVELS[-1]) and "no labels" in found.reason
    with pytest.raises(CalibrationError, match="several sizes"):
        fit_domain([[[0.0]], [[0.0, 1.0]]] * 60, {}, like(rng, 100), 1)


@pytest.mark.parametrize("questions", range(50, 3000, 37))
def test_shares_keep_their_bounds(questions: int) -> None:
    """At least a half of labelled questions is left for the threshold, and every level has what it needs."""
    for labelled in (True, False):
        found = shares(questions, 3, labelled=labelled)
        if found is None:
            room = questions // 2 if labelled else questions
            assert room < needed_questions(3, LEVELS[-1])
            continue
        assert found.reference >= MIN_REFERENCE and found.held_back >= held_back_needed(found.level, 3)
        assert found.reference + found.held_back <= (questions / 2 if labelled else questions)


def test_the_bound_of_the_level_is_reached() -> None:
    """149 questions at 2 %, 299 at 1 %, with three parts; one fewer could refuse nothing."""
    assert [held_back_needed(level, 3) for level in (0.02, 0.01, 0.05)] == [149, 299, 59]
    rng = np.random.default_rng(11)
    known = like(rng, 120)
    assert isinstance(fit_domain(known, damaged(rng, known), like(rng, 298), PIXELS, 0.01), NoDomainCheck)
    check = fit_domain(known, damaged(rng, known), like(rng, 299), PIXELS, 0.01)
    assert isinstance(check, DomainCheck) and check.verdict([[1e6] * SIZE]).refused


# ---------------------------------------------------------------------- what a calibration makes of it


@cache
def calibrated() -> Calibration:
    rng = np.random.default_rng(12)
    chance = rng.uniform(0.3, 1, 600)
    labels = (rng.random(600) < chance).tolist()
    return fit(chance.tolist(), labels, score="pooled_probability", fingerprint="0" * 64, target_error=0.25)


@cache
def some_check() -> DomainCheck:
    return check_of(np.random.default_rng(13))


def checked(domain: DomainCheck | None = None) -> Calibration:
    """The same calibration with a domain check."""
    return Calibration(**{**dict(calibrated()), "domain": domain or some_check(), "no_domain": None})


def answered(probability: float = 0.999, **changes: Any) -> ReasoningResult:
    scores = Scores(pooled_probability=probability)
    given = {"answer": "red", "raw_text": "red", "confidence": probability, "confidence_source": "pooled_probability"}
    return ReasoningResult(**{**given, "scores": scores, **changes})


STRANGE = Domain(p_value=0.004, parts={"usual": 0.0013}, refused=True)
FAMILIAR = Domain(p_value=0.7, parts={"usual": 0.7}, refused=False)


@pytest.mark.parametrize("wanted", [None, 0.0, 0.5, "calibrated"])
def test_a_refused_question_is_never_accepted(wanted: Any) -> None:
    calibration = checked()
    found = calibration.apply(answered(domain=STRANGE), wanted)
    assert found.accepted is False and found.abstained is True and found.unsure
    assert found.abstain_reason == "unlike the calibration's pictures (p = 0.004)" == STRANGE.unlike()
    known = calibration.apply(answered(domain=FAMILIAR), wanted)
    assert known.accepted is (None if wanted is None else True) and known.abstain_reason is None


@pytest.mark.parametrize("wanted", [None, 0.0, "calibrated"])
def test_a_check_that_was_not_made_is_not_passed(wanted: Any) -> None:
    found = checked().apply(answered(), wanted)
    assert found.accepted is False and "was not made" in (found.abstain_reason or "")


def test_switched_off_it_says_so() -> None:
    calibration = checked()
    found = calibration.apply(answered(domain=STRANGE), 0.5, check_domain=False)
    assert found.accepted is True and "switched off" in found.warnings[-1]


def test_an_answer_that_cannot_be_told_is_never_accepted() -> None:
    calibration = calibrated()
    silent = answered().abstaining(CANNOT_TELL_REASON)
    for wanted in (None, 0.0, "calibrated"):
        found = calibration.apply(silent, wanted)  # type: ignore[arg-type]
        assert found.accepted is False and found.abstain_reason == CANNOT_TELL_REASON


def test_the_reason_of_a_low_confidence_names_both_numbers() -> None:
    found = calibrated().apply(answered(0.35), 0.9)
    assert found.accepted is False and "is below 0.9" in (found.abstain_reason or "")
    assert answered().decided(True, 0.5).abstain_reason is None


def test_a_file_of_format_1_is_read_and_says_what_it_lacks(tmp_path: Path) -> None:
    plain = json.loads(calibrated().model_dump_json())
    for name in ("domain", "no_domain", "refused"):
        del plain[name]
    old = Calibration.load({**plain, "schema_version": "1"})
    assert old.lacks is not None and "format 1" in old.lacks
    found = old.apply(answered(), "calibrated")
    assert found.accepted is True and old.lacks in found.warnings
    for version in ("2", "3"):
        with pytest.raises(CalibrationError, match="domain check"):
            Calibration.load({**plain, "schema_version": version})
    check = json.loads(some_check().model_dump_json())
    with pytest.raises(CalibrationError, match="format 1"):
        Calibration.load({**plain, "schema_version": "1", "domain": check})


def test_a_check_of_format_2_is_no_check_that_passes() -> None:
    """It compared other numbers: the file is refused, however it is written. Without a check it is read."""
    whole = json.loads(checked().model_dump_json())
    for domain in (whole["domain"], {"level": 0.01}, []):
        with pytest.raises(CalibrationError, match="format 2") as caught:
            Calibration.load({**whole, "schema_version": "2", "domain": domain})
        assert "latent-tool calibrate" in (caught.value.hint or "")
    bare = json.loads(calibrated().model_dump_json())
    assert Calibration.load({**bare, "schema_version": "2"}).lacks == calibrated().lacks


def test_refused_items_count_as_not_accepted() -> None:
    """All wrong answers refused: any threshold holds; none refused: it must climb above them."""
    rng = np.random.default_rng(14)
    labels = rng.random(800) < 0.7
    scores = rng.uniform(0.2, 0.99, 800)
    given: dict[str, Any] = {"score": "pooled_probability", "fingerprint": "0" * 64, "target_error": 0.05}
    assert fit(scores.tolist(), labels.tolist(), **given).threshold is None
    gated = fit(scores.tolist(), labels.tolist(), **given, refused=(~labels).tolist())
    assert gated.threshold is not None and gated.threshold.errors == 0 and gated.refused == int((~labels).sum())
    with pytest.raises(CalibrationError, match="one flag"):
        fit(scores.tolist(), labels.tolist(), **given, refused=[True])


def test_a_drift_of_the_pictures_is_seen_and_rarely_imagined() -> None:
    """Built on the same p-values: 100 times traffic like the calibration's, then pictures that are a little off."""
    rng = np.random.default_rng(15)
    check = check_of(rng)
    calibration = checked(check)
    scores = list(calibration.reference[::6])
    alarms = 0
    for _ in range(100):
        domains = [check.verdict(each) for each in like(rng, 40)]
        alarms += calibration.drift(scores, 0.05, domains=domains).drifted
    assert binomtest(alarms, 100, 0.05, alternative="greater").pvalue > 0.001, alarms
    off = (np.array(like(rng, 200)) * 1.3).tolist()
    found = calibration.drift(scores, domains=[check.verdict(each) for each in off])
    assert found.drifted and found.domain_p_value is not None and found.domain_p_value < 1e-3
    assert calibration.drift(scores).domain_p_value is None
    with pytest.raises(CalibrationError, match="not those of this"):
        calibration.drift(scores, domains=[STRANGE])


def test_ties_are_no_drift() -> None:
    """Four of ten pictures look the same to every part, in the calibration and in the traffic."""
    rng = np.random.default_rng(17)

    def tied(count: int) -> list[list[list[float]]]:
        same = like(np.random.default_rng(18), 1)[0]
        return [same if rng.random() < 0.4 else each for each in like(rng, count)]

    known = like(rng, 150)
    check = fit_domain(known, damaged(rng, known), tied(299), PIXELS, 0.01)
    assert isinstance(check, DomainCheck)
    calibration = checked(check)
    scores = list(calibration.reference[::6])
    alarms = 0
    for _ in range(100):
        domains = [check.verdict(each) for each in tied(60)]
        alarms += calibration.drift(scores, 0.05, domains=domains).drifted
    assert binomtest(alarms, 100, 0.05, alternative="greater").pvalue > 0.001, alarms
