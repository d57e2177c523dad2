"""Where windows are proposed, and what they say of an answer: against slow twins, and where it is plain to see."""

from __future__ import annotations

import math
import random

import pytest
import torch

from latent_tool.method.views import density, is_surer, propose_windows, random_windows, relative_attention, support

AREA = (0.0, 0.0, 320.0, 240.0)
GRID = [(x * 40.0, y * 30.0, x * 40.0 + 40, y * 30.0 + 30) for y in range(8) for x in range(8)]


def test_density_keeps_the_weight_of_every_cell() -> None:
    weights = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    layout = density(weights, GRID, AREA)
    assert float(layout.sum()) == pytest.approx(float(weights.sum()) / (10 * 7.5) * 10 * 7.5)
    for number, weight in enumerate(weights.tolist()):
        y, x = divmod(number, 8)
        assert float(layout[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].sum()) == pytest.approx(weight)


def test_density_of_boxes_that_overlap_and_reach_out_equals_a_count_of_points() -> None:
    source = random.Random(1)
    boxes = []
    for _ in range(12):
        left, top = source.uniform(-20, 280), source.uniform(-20, 200)
        boxes.append((left, top, left + source.uniform(5, 90), top + source.uniform(5, 90)))
    weights = torch.rand(13, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    layout = density(weights, [*boxes, None], AREA)
    naive = torch.zeros(32, 32, dtype=torch.double)
    for (left, top, right, bottom), weight in zip(boxes, weights.tolist(), strict=False):
        for row in range(32):
            for column in range(32):
                across = min(right, (column + 1) * 10) - max(left, column * 10)
                down = min(bottom, (row + 1) * 7.5) - max(top, row * 7.5)
                if across > 0 and down > 0:
                    naive[row, column] += weight * across * down / ((right - left) * (bottom - top))
    torch.testing.assert_close(layout, naive)


def test_windows_hold_the_cell_that_is_attended_to() -> None:
    for hot in range(64):
        weights = torch.zeros(64)
        weights[hot] = 1
        windows = propose_windows(density(weights, GRID, AREA), AREA, second=True)
        assert len(windows) == 3  # nothing stands out beside it
        left, top, right, bottom = GRID[hot]
        for window in windows:
            assert window[0] <= left and window[1] <= top and window[2] >= right and window[3] >= bottom
        middle = (left + right) / 2
        if 120 < middle < 200:  # not at the edge: near the window's middle
            assert abs((windows[0][0] + windows[0][2]) / 2 - middle) <= 20


def test_a_second_place_is_proposed_elsewhere() -> None:
    weights = torch.zeros(64)
    weights[9], weights[54] = 1.0, 0.8
    *_, second = propose_windows(density(weights, GRID, AREA), AREA, second=True)
    left, top, right, bottom = GRID[54]
    assert second[0] <= left and second[1] <= top and second[2] >= right and second[3] >= bottom


def test_windows_lie_in_their_area_and_are_smaller() -> None:
    source = random.Random(3)
    for _ in range(50):
        left, top = source.randrange(100), source.randrange(100)
        area = (left, top, left + source.randrange(9, 200), top + source.randrange(9, 200))
        weights = torch.rand(32, 32, generator=torch.Generator().manual_seed(source.randrange(100)), dtype=torch.double)
        for windows in (propose_windows(weights, area, True), random_windows(area, True, source)):
            assert len(windows) == len(set(windows)) <= 4
            for window in windows:
                assert area[0] <= window[0] < window[2] <= area[2]
                assert area[1] <= window[1] < window[3] <= area[3]
                assert window != area
                assert min(window[2] - window[0], window[3] - window[1]) >= 8


def test_nothing_is_proposed_where_nothing_stands_out() -> None:
    assert propose_windows(density(relative_attention(torch.ones(64)), GRID, AREA), AREA, True) == []
    assert propose_windows(torch.zeros(32, 32), AREA, True) == []
    assert propose_windows(density(torch.rand(64), GRID, (0, 0, 10, 7)), (0, 0, 10, 7), True) == []
    assert float(density(torch.ones(3), [None] * 3, AREA).sum()) == 0


def test_what_is_attended_to_whatever_is_asked_does_not_count() -> None:
    attention = torch.full((64,), 0.005)
    attention[0], attention[30] = 0.5, 0.05  # a sink, and what the question is about
    neutral = torch.full((64,), 0.005)
    neutral[0] = 0.6
    assert int(relative_attention(attention).argmax()) == 0
    assert int(relative_attention(attention, neutral).argmax()) == 30
    assert float(relative_attention(attention, neutral).min()) == 0


@pytest.mark.parametrize(
    ("reward", "before", "blind", "min_gain", "surer"),
    [
        (0.9, 0.6, False, 0.0, True),
        (0.6, 0.6, False, 0.0, False),
        (0.62, 0.6, False, 0.0, False),  # a window that shows nothing new is as much surer by chance
        (0.7, 0.6, False, 0.0, True),
        (0.7, 0.6, False, 0.2, False),
        (0.99, 0.89, False, 0.0, False),
        (0.2, 0.1, False, 0.0, True),
        (0.2, 0.0, False, 0.0, True),  # in place of no answer at all
        (0.2, 0.0, True, 0.0, False),  # in place of "cannot tell": more likely wrong than right
        (0.5, 0.0, True, 0.0, True),
        (0.0, 0.0, False, 0.0, False),
    ],
)
def test_what_stays_is_surer_by_enough(reward: float, before: float, blind: bool, min_gain: float, surer: bool) -> None:
    assert is_surer(reward, before, blind, min_gain) is surer


def test_what_was_surer_before_is_never_replaced() -> None:
    source = random.Random(4)
    for _ in range(1000):
        reward, before, gain = source.random(), source.random(), source.choice((0.0, 0.1))
        for blind in (False, True):
            if is_surer(reward, before, blind, gain):
                assert reward > before + gain
                assert is_surer(min(1.0, reward + 0.1), before, blind, gain)
                assert is_surer(reward, before * 0.5, blind, gain)


@pytest.mark.parametrize(
    ("windows", "whole", "shrunk", "expected"),
    [
        ([("red", 0.9)], [], 2.0, 1.0),
        ([("red", 0.9), ("red", 0.2)], [("red", 0.3)], 2.0, 1.0),
        ([("red", 0.9), ("cannot tell", 0.0)], [("cannot tell", 0.0)], 2.0, 1.0),  # that shows nothing of it
        ([("red", 0.9), (" Red. ", 0.9), ("blue", 0.6)], [], 1.0, 0.75),
        ([("red", 0.9), ("blue", 0.9)], [], 16.0, 0.5**0.0625),
        ([("red", 0.9), ("blue", 0.45), ("green", 0.45)], [], 16.0, 0.5**0.0625),
        ([("red", 0.9)], [("blue", 0.3)], 1.0, 0.75),  # of the whole picture, at its own size: as much as a window
        ([("red", 0.6)], [("blue", 0.8)], 2.0, 0.6**0.5),  # counts half
        ([("red", 0.4)], [("red", 0.8), ("blue", 0.4)], 2.0, 0.8**0.5),
        ([("red", 0.9), ("reddish", 0.9)], [], 0.5, 0.5),  # no exponent above 1
        ([("red", 0.9)], [("blue", 0.9)], 0.5, 0.5),  # and no weight
        ([("red", 0.0)], [], 2.0, 1.0),
    ],
)
def test_what_says_something_else_takes_support_away(
    windows: list[tuple[str, float]], whole: list[tuple[str, float]], shrunk: float, expected: float
) -> None:
    assert support("red", windows, whole, shrunk) == pytest.approx(expected)


def test_support_is_what_a_slow_count_gives() -> None:
    source = random.Random(5)

    def draw(least: int, most: int) -> list[tuple[str, float]]:
        return [(source.choice("abc"), source.randrange(1, 100) / 100) for _ in range(source.randrange(least, most))]

    for _ in range(500):
        windows, whole = draw(1, 9), draw(0, 3)
        answer, shrunk = windows[0][0], source.randrange(1, 6)
        votes = [other for other, sure in windows for _ in range(shrunk * round(100 * sure))]
        votes += [other for other, sure in whole for _ in range(round(100 * sure))]
        found = support(answer, windows, whole, shrunk)
        assert found == pytest.approx(math.exp(math.log(votes.count(answer) / len(votes)) / shrunk))
        source.shuffle(windows)
        assert support(answer, windows, whole, shrunk) == pytest.approx(found)
        more, same = ("d", 0.5), (answer, 0.5)
        assert (
            support(answer, [*windows, more], whole, shrunk) < found <= support(answer, [*windows, same], whole, shrunk)
        )
        assert (
            support(answer, windows, [*whole, more], shrunk) < found <= support(answer, windows, [*whole, same], shrunk)
        )
        # Of a smaller picture what else is said means less.
        assert support(answer, windows, [*whole, more], shrunk + 1) > support(answer, windows, [*whole, more], shrunk)
