"""Metrics against values computed by hand, by other libraries, or by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from latent_tool.errors import InputError
from latent_tool.statistics import (
    accuracy_interval,
    aurc,
    auroc,
    auroc_interval,
    coverage_at_risk,
    ece,
    ece_noise_floor,
    holm,
    mcnemar,
    paired_bootstrap,
    reliability,
)

ANSWERS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


def test_accuracy_intervals() -> None:
    wilson = accuracy_interval(8, 10)
    assert wilson.value == 0.8
    assert (wilson.low, wilson.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's formula by hand
    assert accuracy_interval(10, 10, method="exact").low == pytest.approx(0.025 ** (1 / 10))
    with pytest.raises(InputError):
        accuracy_interval(1, 0)


def test_mcnemar_counts_what_differs() -> None:
    before = [True] * 5 + [False] * 8 + [True] * 2
    after = [True] * 5 + [True] * 8 + [False] * 2
    found = mcnemar(before, after)
    assert (found.fixed, found.broken) == (8, 2)
    assert found.p == pytest.approx(binomtest(8, 10).pvalue)
    assert mcnemar([True], [True]).p == 1.0


def test_paired_bootstrap_brackets_the_difference() -> None:
    rng = np.random.default_rng(1)
    before = (rng.random(400) < 0.6).tolist()
    after = [right or flip for right, flip in zip(before, rng.random(400) < 0.3, strict=True)]
    found = paired_bootstrap(before, after)
    difference = np.mean(after) - np.mean(before)
    spread = np.std(np.asarray(after, float) - np.asarray(before, float)) / 20
    assert found.value == pytest.approx(difference)
    assert found.low == pytest.approx(difference - 1.96 * spread, abs=0.01)
    assert found.high == pytest.approx(difference + 1.96 * spread, abs=0.01)
    assert paired_bootstrap([1, 0], [1, 0]) == (0.0, 0.0, 0.0)


@given(ANSWERS)
def test_auroc_is_that_of_scikit_learn(answers: list[tuple[int, bool]]) -> None:
    scores, right = zip(*answers, strict=True)
    if all(right) or not any(right):
        assert math.isnan(auroc(scores, right))
    else:
        assert auroc(scores, right) == pytest.approx(roc_auc_score(right, scores))


def test_auroc_interval_covers_the_truth() -> None:
    # Two normals one deviation apart: AUROC Phi(1 / sqrt 2) = 0.760.
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        right = rng.random(150) < 0.6
        found = auroc_interval((rng.normal(size=150) + right).tolist(), right.tolist())
        covered += found.low <= 0.7602 <= found.high
    assert covered / 200 > 0.9  # 0.95 meant; a binomial this low has a chance below 0.002


def test_a_perfect_ranking_is_not_certain() -> None:
    found = auroc_interval([0.9, 0.8, 0.7, 0.2, 0.1], [True, True, True, False, False])
    assert found.value == 1.0
    assert found.low < 0.5 and found.high == 1.0


def test_aurc_and_coverage_by_hand() -> None:
    scores, right = [0.9, 0.8, 0.7, 0.6], [True, False, True, True]
    assert aurc(scores, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert coverage_at_risk(scores, right, 0.25) == 1.0  # all four: one of four wrong
    assert coverage_at_risk(scores, right, 0.2) == 0.25
    assert coverage_at_risk([0.9, 0.8], [False, True], 0.05) == 0.0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_ties_count_as_the_mean_over_all_orders(answers: list[tuple[int, bool]]) -> None:
    scores, right = zip(*answers, strict=True)
    areas = []
    for order in itertools.permutations(range(len(answers))):
        ranked = sorted(order, key=lambda place: -scores[place])  # stable: ties stay in the order of the permutation
        wrong = np.cumsum([not right[place] for place in ranked])
        areas.append(np.mean(wrong / np.arange(1, len(wrong) + 1)))
    assert aurc(scores, right) == pytest.approx(np.mean(areas))


def test_equal_scores_are_accepted_together() -> None:
    # The right one of two equal scores cannot be had alone.
    assert coverage_at_risk([0.9, 0.9, 0.1], [True, False, False], 0.05) == 0.0


def test_ece_by_hand() -> None:
    probabilities, right = [0.95, 0.85, 0.15, 1.0], [True, False, False, True]
    # Ten bins: {0.95, 1.0} off by 0.025 at weight 2/4, {0.85} by 0.85, {0.15} by 0.15, at 1/4 each.
    assert ece(probabilities, right, bins=10) == pytest.approx((2 * 0.025 + 0.85 + 0.15) / 4)
    # Two bins: 0.95 four times with three right, 0.25 twice with none.
    assert ece([0.95] * 4 + [0.25] * 2, [True] * 3 + [False] * 3) == pytest.approx((4 * 0.2 + 2 * 0.25) / 6)
    assert ece([1.0, 0.0], [True, False]) == 0
    assert reliability(probabilities, right, bins=10)[-1] == (pytest.approx(0.975), 1.0, 2)


@pytest.mark.parametrize("scores", [[-0.3, 0.5], [0.5, 1.2], [12.0, 15.0]])
def test_scores_that_are_no_probabilities_have_no_calibration_error(scores: list[float]) -> None:
    """They would fall outside all bins, and the error would come out as 0."""
    with pytest.raises(InputError, match="outside"):
        ece(scores, [True, False])
    with pytest.raises(InputError, match="outside"):
        ece_noise_floor(scores)


@pytest.mark.parametrize("metric", [auroc, aurc, coverage_at_risk, ece])
def test_missing_scores_are_never_taken_for_numbers(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(InputError, match="missing"):
        metric([0.5, None], [True, False])
    with pytest.raises(InputError, match="finite"):
        metric([0.5, math.nan], [True, False])
    with pytest.raises(InputError, match="as many"):
        metric([0.5], [True, False])
    with pytest.raises(InputError, match="bools"):
        metric([0.5, 0.6], [1, 0])
    with pytest.raises(InputError):
        metric([], [])


def test_the_noise_floor_is_what_perfect_confidences_show() -> None:
    rng = np.random.default_rng(3)
    probabilities = rng.random(300).tolist()
    floor, high = ece_noise_floor(probabilities)
    shown = [ece(probabilities, (rng.random(300) < probabilities).tolist()) for _ in range(60)]
    assert floor == pytest.approx(np.mean(shown), rel=0.1)
    assert np.mean(np.asarray(shown) <= high) > 0.85
    # An overconfident score lies far above it.
    assert ece([0.99] * 300, (rng.random(300) < 0.6).tolist()) > 3 * ece_noise_floor([0.99] * 300)[1]


def test_holm_by_hand() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04 made non-decreasing.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_of_an_auroc_covers_it_with_few_wrong_answers() -> None:
    """448 answers, 20 of them wrong, a true area of 0.93 (two normal distributions, whose distance gives it)."""
    rng = np.random.default_rng(0)
    distance = np.sqrt(2) * norm.ppf(0.93)
    flags = [True] * 428 + [False] * 20
    inside = 0
    for _ in range(600):
        scores = np.concatenate([rng.normal(distance, 1, 428), rng.normal(0, 1, 20)])
        found = auroc_interval(scores.tolist(), flags)
        inside += found.low <= 0.93 <= found.high
    assert inside / 600 >= 0.92
