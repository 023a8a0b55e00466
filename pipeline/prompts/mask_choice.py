"""Chooses among several mask proposals by the user's clicks and the network's confidence in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.clicks import Click, Mask
from pipeline.prompts.mask_parts import clicked_part, tidied, without_crumbs

FEATURES = ("depth", "least_depth", "likely", "level")
"""What is known of a mask, see `features`."""

# How much each counts. Fitted on simulated clicks on 70 objects of training pictures, by a prototype of
# tests/benchmarks/mask_choice.py, which fits them anew.
WEIGHTS = (1.8, 1.85, 2.0, -0.35)

# Longer side, in pixels, at which depths are measured.
_SIDE = 128
# Of a long history: this many rounds, the first and the newest.
_MOST_ROUNDS = 5
# Masks of the mean logits are those above these.
_LEVELS = (0.0, -1.0, 1.0)
# Logits beyond these count as these.
_MOST_LOGIT = 6.0


class Candidate(NamedTuple):
    """A mask that may be meant.

    Args:
        mask: in the window that was looked at.
        logits: of the window's pixels.
        level: those above it are in the mask, but for what was tidied away.
    """

    mask: Mask
    logits: NDArray[np.float32]
    level: float


class Round(NamedTuple):
    """Clicks that were made at once, and the mask that was shown before; both of the whole frame."""

    clicks: Sequence[Click]
    shown: Mask


def candidates(
    logits: NDArray[np.float32], clicks: Sequence[Click], height: int, width: int, parts: bool
) -> list[Candidate]:
    """The masks that looks at a window give: of their mean logits at several levels, and of each look.

    Args:
        logits: looks x H x W, of the window.
        clicks: in pixels of the window.
        height: the frame's.
        width: the frame's.
        parts: whether parts without a click on the object may be left out: those behind a neck, all pieces.

    Returns:
        no two of them with equal masks; that of the mean first
    """
    found: list[Candidate] = []

    def add(mask: Mask, of: NDArray[np.float32], level: float) -> None:
        if not any(np.array_equal(mask, other.mask) for other in found):
            found.append(Candidate(mask, of, level))

    for of, levels in ((logits.mean(0), _LEVELS), *((each, _LEVELS[:1]) for each in logits)):
        for level in levels:
            mask = tidied(of > level, clicks, height, width)
            add(mask, of, level)
            if parts and not level:
                add(tidied(clicked_part(mask, clicks), clicks, height, width), of, level)
                add(without_crumbs(mask, clicks, crumb=1.0), of, level)
    return found


def best(candidates: Sequence[Candidate], left: int, top: int, rounds: Sequence[Round]) -> int:
    """The index of the candidate that is most probably meant; the first of equals. See `features`."""
    return int(np.argmax(features(candidates, left, top, rounds) @ np.array(WEIGHTS)))


def features(
    candidates: Sequence[Candidate], left: int, top: int, rounds: Sequence[Round]
) -> NDArray[np.float64]:
    """What is known of each candidate: one row each, columns as in `FEATURES`.

    Whoever clicks clicks deep in what is wrong with the mask that is shown. If a candidate were what is
    meant, its difference from that mask would be what is wrong: `depth` is how deep in it the newest click
    lies, as a share of the deepest place, `least_depth` the least of all clicks. `likely` is how certain the
    mask's pixels are, from -1 to 1, in the mean; `level` is the candidate's.

    Args:
        candidates: all of one window.
        left: the window's place in the frame, in pixels.
        top: likewise.
        rounds: of all clicks so far, oldest first; at least one.
    """
    rows = []
    for mask, logits, level in candidates:
        depths = [_depth(mask, left, top, each) for each in _some(rounds)]
        certain = np.tanh(np.clip(logits[mask], -_MOST_LOGIT, _MOST_LOGIT) / 2)
        rows.append((depths[-1], min(depths), float(certain.mean()) if len(certain) else 0.0, level))
    return np.array(rows)


def _some(rounds: Sequence[Round]) -> Sequence[Round]:
    return [rounds[0], *rounds[1 - _MOST_ROUNDS :]] if len(rounds) > _MOST_ROUNDS else rounds


def _depth(mask: Mask, left: int, top: int, given: Round) -> float:
    """How deep in the error of the shown mask the clicks are, if a mask is meant; of several the deepest.

    Returns:
        0, where nothing is wrong, to 1, the deepest place of all that is wrong
    """
    height, width = mask.shape
    shown = given.shown
    rows, columns = _extent(shown)
    ys = [*rows, top, top + height - 1, *(c.y for c in given.clicks)]
    xs = [*columns, left, left + width - 1, *(c.x for c in given.clicks)]
    y0, x0, high, wide = min(ys), min(xs), max(ys) + 1 - min(ys), max(xs) + 1 - min(xs)
    meant = np.zeros((high, wide), np.bool_)
    meant[top - y0 : top - y0 + height, left - x0 : left - x0 + width] = mask
    before = shown[y0 : y0 + high, x0 : x0 + wide]
    either = meant | before
    if not either.any():
        return 0.0
    rows, columns = _extent(either)
    ys, xs = [*rows, *(c.y - y0 for c in given.clicks)], [*columns, *(c.x - x0 for c in given.clicks)]
    cut = np.s_[min(ys) : max(ys) + 1, min(xs) : max(xs) + 1]
    missing, excess = _depths((meant & ~before)[cut]), _depths((before & ~meant)[cut])
    deepest = max(float(missing.max()), float(excess.max()))
    if not deepest:
        return 0.0
    scale = missing.shape[0] / (max(ys) + 1 - min(ys)), missing.shape[1] / (max(xs) + 1 - min(xs))
    places = [
        (missing if c.positive else excess)[
            int((c.y - y0 - min(ys)) * scale[0]), int((c.x - x0 - min(xs)) * scale[1])
        ]
        for c in given.clicks
    ]
    return float(max(places)) / deepest


def _extent(mask: Mask) -> tuple[list[int], list[int]]:
    """The first and the last row and column of a mask; nothing of an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return ([], []) if not len(rows) else ([int(rows[0]), int(rows[-1])], [int(columns[0]), int(columns[-1])])


def _depths(region: Mask) -> NDArray[np.float32]:
    """Distances to the border, in pixels of a picture whose longer side is `_SIDE` at most."""
    height, width = region.shape
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    padded = cv2.distanceTransform(np.pad(small, 1), cv2.DIST_L2, 3)
    return np.asarray(padded, np.float32)[1:-1, 1:-1]
