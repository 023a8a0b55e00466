"""Masks of several like things are cut at their necks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.prompts.clicks import Click
from pipeline.prompts.mask_parts import clicked_part


def beads(count: int, bridge: int, scale: int = 1) -> NDArray[np.bool_]:
    """Discs of 30 pixels in a row, 40 apart, joined by a bridge."""
    rows, columns = np.mgrid[: 60 * scale, : (40 * count + 20) * scale] // scale
    discs = [(rows - 30) ** 2 + (columns - 30 - 40 * i) ** 2 <= 15**2 for i in range(count)]
    between = (columns >= 30) & (columns <= 40 * count - 10) & (abs(2 * (rows - 30)) <= bridge)
    return np.asarray(np.any([*discs, between], 0))


def middle_of(bead: int, scale: int = 1) -> Click:
    return Click((30 + 40 * bead) * scale, 30 * scale)


@pytest.mark.parametrize("scale", [1, 6])
def test_the_bead_that_was_clicked(scale: int) -> None:
    mask = beads(4, 8, scale)
    part = clicked_part(mask, [middle_of(1, scale), Click(140 * scale, 30 * scale, False)])
    assert not (part & ~mask).any()
    middles = [middle_of(bead, scale) for bead in range(4)]
    assert [bool(part[c.y, c.x]) for c in middles] == [False, True, False, False]
    alone = beads(1, 0, scale).sum()
    assert abs(int(part.sum()) - alone) < 0.3 * alone  # with its halves of the bridges


def test_all_beads_that_were_clicked() -> None:
    part = clicked_part(beads(4, 8), [middle_of(0), middle_of(3)])
    assert [bool(part[30, 30 + 40 * i]) for i in range(4)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("mask", "clicks"),
    [
        (beads(1, 0), [middle_of(0)]),
        (beads(3, 24), [middle_of(0)]),  # no neck
        (beads(3, 8), [Click(0, 0)]),  # beside it
        (beads(3, 8), []),
        (np.zeros((40, 50), np.bool_), [Click(3, 3)]),
        (np.ones((3, 2), np.bool_), [Click(1, 1)]),
    ],
)
def test_what_is_left_whole(mask: NDArray[np.bool_], clicks: list[Click]) -> None:
    assert np.array_equal(clicked_part(mask, clicks), mask)
