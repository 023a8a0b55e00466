"""Click segmenters: the protocol, the built-in network and GrabCut, and plugin look-up.

A click says that a pixel belongs to the object (positive) or not (negative). Whoever points sees the mask
after each click and adds another one where it is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PromptError, UsageError
from pipeline.base.plugins import load_plugin
from pipeline.prompts.clicks import MOST_CLICKS, Click, Mask

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "MOST_CLICKS",
    "Click",
    "ClickSegmenter",
    "GrabCutClicks",
    "Mask",
    "load_click_segmenter",
    "segment_clicks",
]

ENTRY_POINT_GROUP = "xmem.click_segmenters"
logger = logging.getLogger(__name__)

BUILT_IN = ("xmem-click", "grabcut")


@runtime_checkable
class ClickSegmenter(Protocol):
    """Segments the object that clicks point at.

    `segment` gets an H x W x 3 uint8 RGB frame, which it must not modify, clicks inside it in the order in
    which they were made, at least one of them positive, and the H x W bool mask that the clicks correct, or
    None. It returns an H x W bool mask. Equal input must give equal masks, in any process.
    """

    def segment(
        self, frame: NDArray[np.uint8], clicks: Sequence[Click], previous: Mask | None
    ) -> NDArray[np.bool_]: ...


class GrabCutClicks:
    """A watershed between the clicks, refined by GrabCut; parts without a positive click are dropped.

    It knows colours and edges, not objects: a person in clothes of several colours takes several clicks.

    Args:
        reach: how far from the clicks the object may extend, as a share of the frame's shorter side.
        disc: radius around each click that certainly belongs to it, as a share of the shorter side.
        iterations: rounds of GrabCut.
        max_side: larger neighbourhoods are scaled down to this many pixels first.
    """

    def __init__(
        self, reach: float = 0.45, disc: float = 0.02, iterations: int = 3, max_side: int = 320
    ) -> None:
        self._reach, self._disc, self._iterations, self._max_side = reach, disc, iterations, max_side

    def segment(
        self, frame: NDArray[np.uint8], clicks: Sequence[Click], previous: Mask | None
    ) -> NDArray[np.bool_]:
        """Return the mask; it contains the positive clicks and none of the negative ones."""
        height, width = frame.shape[:2]
        reach = max(8, round(self._reach * min(height, width)))
        xs, ys = [c.x for c in clicks if c.positive], [c.y for c in clicks if c.positive]
        if previous is not None and previous.any():
            rows, columns = np.flatnonzero(previous.any(1)), np.flatnonzero(previous.any(0))
            xs, ys = [*xs, int(columns[0]), int(columns[-1])], [*ys, int(rows[0]), int(rows[-1])]
            reach //= 2
        left, right = max(0, min(xs) - reach), min(width, max(xs) + reach + 1)
        top, bottom = max(0, min(ys) - reach), min(height, max(ys) + reach + 1)
        crop = np.ascontiguousarray(frame[top:bottom, left:right])
        scale = min(1.0, self._max_side / max(crop.shape[:2]))
        size = (max(2, round(crop.shape[1] * scale)), max(2, round(crop.shape[0] * scale)))
        small = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA), np.uint8)
        radius = max(1, round(self._disc * min(height, width) * scale))
        before = None
        if previous is not None and previous.any():
            part = previous[top:bottom, left:right].astype(np.uint8)
            before = np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_NEAREST)) != 0
        inside = [
            Click(
                min(size[0] - 1, max(0, round((c.x - left) * size[0] / crop.shape[1]))),
                min(size[1] - 1, max(0, round((c.y - top) * size[1] / crop.shape[0]))),
                c.positive,
            )
            for c in clicks
            if left <= c.x < right and top <= c.y < bottom
        ]
        borders = (top > 0, bottom < height, left > 0, right < width)
        cut = self._cut(small, inside, before, radius, borders)
        whole = cv2.resize(cut.astype(np.float32), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        found = np.zeros((height, width), np.bool_)
        found[top:bottom, left:right] = np.asarray(whole) >= 0.5
        for click in clicks:
            found[click.y, click.x] = click.positive
        return found

    def _cut(
        self,
        image: NDArray[np.uint8],
        clicks: Sequence[Click],
        before: Mask | None,
        radius: int,
        borders: tuple[bool, bool, bool, bool],
    ) -> Mask:
        sure = np.zeros(image.shape[:2], np.uint8)
        for click in clicks:
            cv2.circle(sure, (click.x, click.y), radius, 1 if click.positive else 2, -1)
        # Where the crop ends inside the frame, the object has ended before.
        edge = np.zeros_like(sure)
        for is_border, line in zip(borders, (edge[:1], edge[-1:], edge[:, :1], edge[:, -1:]), strict=True):
            line[:] |= np.uint8(is_border)
        if before is None:
            markers = sure.astype(np.int32)
            # Without any background a watershed floods all: the frame's corners and edges are a guess.
            if not edge.any():
                edge[0], edge[-1], edge[:, 0], edge[:, -1] = 1, 1, 1, 1
            markers[(edge == 1) & (sure == 0)] = 2
            smooth = np.asarray(cv2.bilateralFilter(image, 7, 40, 5), np.uint8)
            likely = np.asarray(cv2.watershed(smooth, markers)) == 1
        else:
            likely = before
        labels = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        labels[(edge == 1) & (sure == 0)] = cv2.GC_BGD
        labels[sure == 1], labels[sure == 2] = cv2.GC_FGD, cv2.GC_BGD
        if np.isin(labels, (cv2.GC_BGD, cv2.GC_PR_BGD)).any():
            # Its k-means draws from OpenCV's generator, whose state persists between calls.
            cv2.setRNGSeed(0)
            models = np.zeros((1, 65)), np.zeros((1, 65))
            cv2.grabCut(image, labels, (0, 0, 1, 1), *models, self._iterations, cv2.GC_INIT_WITH_MASK)
        cut = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
        opened = np.asarray(cv2.morphologyEx(cut.astype(np.uint8), cv2.MORPH_OPEN, disk))
        opened[sure == 1] = 1
        _, pieces = cv2.connectedComponents(opened, connectivity=8)
        pointed = np.unique(pieces[sure == 1])
        kept: Mask = np.isin(pieces, pointed[pointed > 0])
        kept = _filled(kept)
        kept[sure == 2] = False
        return kept


def load_click_segmenter(name: str | None = None) -> ClickSegmenter:
    """Create a click segmenter by name: built in, or an entry point of the group `xmem.click_segmenters`.

    Args:
        name: None for the bundled network, or GrabCut if the installation lacks its weights.

    Raises:
        UsageError: no such segmenter is installed, it cannot be loaded, or it has no `segment`.
    """
    if name == "grabcut":
        return GrabCutClicks()
    if name is None or name == BUILT_IN[0]:
        # Imported here: whoever names another segmenter needs no torch.
        from pipeline.prompts.click_network import ClickNetwork
        from xmem_core.weight_files import WeightsError

        try:
            return ClickNetwork()
        except WeightsError as error:
            if name is not None:
                raise UsageError(f"click segmenter {name!r}: {error}") from error
            logger.warning("clicks are segmented by GrabCut: %s", error)
            return GrabCutClicks()
    segmenter: ClickSegmenter = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="click segmenter",
        protocol=ClickSegmenter,
        lacking="has no method segment(frame, clicks, previous)",
        built_in=BUILT_IN,
    )
    return segmenter


def segment_clicks(
    segmenter: ClickSegmenter,
    frame: NDArray[np.uint8],
    clicks: Sequence[Click],
    previous: Mask | None = None,
) -> Mask:
    """The mask of clicks, checked before and after.

    Raises:
        PromptError: no click is positive, there are too many or one lies outside the frame; or the segmenter
            returned something else than a mask of the frame's size.
    """
    height, width = frame.shape[:2]
    if not any(c.positive for c in clicks):
        raise PromptError("clicks: at least one must be positive, on the object")
    if len(clicks) > MOST_CLICKS:
        raise PromptError(f"clicks: {len(clicks)} were given, {MOST_CLICKS} are allowed")
    for c in clicks:
        if not (0 <= c.x < width and 0 <= c.y < height):
            raise PromptError(f"click {c.x},{c.y} lies outside the frame of {width}x{height}")
    mask = segmenter.segment(frame, clicks, previous)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (height, width):
        raise PromptError(
            f"the click segmenter {type(segmenter).__name__} returned no bool mask of {height}x{width}"
        )
    return mask


def _filled(mask: Mask) -> Mask:
    """Fill the holes that are smaller than a twentieth of the mask."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = np.asarray(stats[:, cv2.CC_STAT_AREA]) < 0.05 * mask.sum()
    small[np.unique(np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1])))] = False
    small[0] = False
    filled: Mask = mask | small[labels]
    return filled
