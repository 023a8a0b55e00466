"""Which of several masks is meant, by where was clicked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.prompts import mask_choice
from pipeline.prompts.click_network import ClickNetwork
from pipeline.prompts.clicks import Click
from pipeline.prompts.mask_choice import FEATURES, Candidate, Round, best, candidates, features

Mask = NDArray[np.bool_]
SIZE = (100, 160)


def disc(x: int, y: int, radius: int, size: tuple[int, int] = SIZE) -> Mask:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


def candidate(mask: Mask, sure: float = 3.0) -> Candidate:
    return Candidate(mask, np.where(mask, sure, -sure).astype(np.float32), 0.0)


NOTHING = np.zeros(SIZE, np.bool_)
LEFT, RIGHT = disc(45, 50, 30), disc(105, 50, 30)


def of(name: str, found: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in found[:, FEATURES.index(name)]]


def test_a_click_that_takes_away_the_right_one_of_two_leaves_the_left_one() -> None:
    shown = LEFT | RIGHT
    rounds = [Round([Click(45, 50)], NOTHING), Round([Click(105, 50, False)], shown)]
    beside = shown.copy()
    beside[:, 103:] = False  # whoever meant this had clicked farther to the right
    masks = [candidate(beside), candidate(LEFT), candidate(disc(105, 50, 20))]
    assert best(masks, 0, 0, rounds) == 1


def test_a_click_that_adds_the_right_one_to_the_left_one() -> None:
    rounds = [Round([Click(45, 50)], NOTHING), Round([Click(105, 50)], LEFT)]
    beside = LEFT | RIGHT
    beside[:, 107:] = False
    masks = [candidate(beside), candidate(LEFT | RIGHT), candidate(RIGHT)]
    assert best(masks, 0, 0, rounds) == 1


def test_of_equal_masks_the_one_that_the_network_is_sure_of() -> None:
    rounds = [Round([Click(45, 50)], NOTHING), Round([Click(60, 50)], disc(45, 50, 10))]
    assert best([candidate(LEFT, 0.3), candidate(LEFT, 4.0)], 0, 0, rounds) == 1


@pytest.mark.parametrize("way", [1, -1])
def test_depth_is_a_share_of_the_deepest_place_of_what_would_be_wrong(way: int) -> None:
    """Of a disc, at its centre, half way out and outside; to be added or taken away."""
    shown, mask = (NOTHING, LEFT) if way > 0 else (LEFT | RIGHT, RIGHT)
    for x, depth in ((45, 1.0), (30, 0.5), (142, 0.0)):
        found = features([candidate(mask)], 0, 0, [Round([Click(x, 50, way > 0)], shown)])
        assert of("depth", found) == [pytest.approx(depth, abs=0.06)]


def test_the_least_depth_is_that_of_all_clicks_and_a_stroke_counts_where_it_is_deepest() -> None:
    stroke = [Click(20, 50), Click(45, 50), Click(75, 50)]
    found = features([candidate(LEFT)], 0, 0, [Round([Click(30, 50)], NOTHING), Round(stroke, NOTHING)])
    assert of("depth", found) == [pytest.approx(1, abs=0.06)]
    assert of("least_depth", found) == [pytest.approx(0.5, abs=0.06)]


def test_what_is_known_does_not_depend_on_the_window() -> None:
    """Nor on the scale, but for the rounding of depths; the shown mask reaches beyond the window."""
    rounds = [Round([Click(45, 50)], NOTHING), Round([Click(105, 50, False)], LEFT | RIGHT)]
    whole = features([candidate(LEFT)], 0, 0, rounds)
    cut = features([candidate(np.ascontiguousarray(LEFT[12:90, 8:80]))], 8, 12, rounds)
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    large = [
        Round([Click(3 * c.x, 3 * c.y, c.positive) for c in r.clicks], r.shown.repeat(3, 0).repeat(3, 1))
        for r in rounds
    ]
    big = features([candidate(LEFT.repeat(3, 0).repeat(3, 1))], 0, 0, large)
    np.testing.assert_allclose(big, whole, atol=0.06)


def test_candidates_differ_and_hold_the_clicks() -> None:
    """Of two looks; those behind a neck and those without a click are left out only where they may be."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    bridge = (abs(rows - 50) < 3) & (columns > 45) & (columns < 105)
    speck = disc(80, 12, 11)
    joined = np.where(LEFT | RIGHT | bridge | speck, 3.0, -3.0).astype(np.float32)
    alone = np.where(LEFT, 0.5, -3.0).astype(np.float32)
    clicks = [Click(45, 50), Click(150, 90, False)]
    for parts in (True, False):
        found = [c.mask for c in candidates(np.stack([joined, alone]), clicks, *SIZE, parts=parts)]
        assert all(mask[50, 45] and not mask[90, 150] for mask in found)
        assert not any(np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])
        assert any(mask[50, 105] and mask[12, 80] for mask in found)
        assert any(np.array_equal(mask, LEFT) for mask in found)
        assert any(mask[50, 105] and not mask[12, 80] for mask in found) == parts


def test_later_clicks_choose_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round's outcome is what was chosen, and the next round knows that it was shown."""
    image = np.full((*SIZE, 3), 40, np.uint8)
    image[LEFT | RIGHT] = (220, 60, 50)
    asked: list[tuple[list[Mask], list[Round]]] = []

    def last(found: Sequence[Candidate], left: int, top: int, rounds: Sequence[Round]) -> int:
        height, width = found[0].mask.shape
        mask = np.zeros(SIZE, np.bool_)
        mask[top : top + height, left : left + width] = found[-1].mask
        asked.append(([mask], list(rounds)))
        return len(found) - 1

    monkeypatch.setattr(mask_choice, "best", last)
    network = ClickNetwork()
    clicks = [Click(45, 50), Click(105, 50), Click(80, 10, False)]
    shown = [network.segment(image, clicks[:count], None) for count in (1, 2, 3)]
    assert len(asked) == 2
    for (chosen, rounds), mask, before in zip(asked, shown[1:], shown, strict=False):
        assert np.array_equal(mask, chosen[0])
        assert np.array_equal(rounds[-1].shown, before)
    assert not asked[0][1][0].shown.any()
    assert [list(each.clicks) for each in asked[1][1]] == [[click] for click in clicks]
