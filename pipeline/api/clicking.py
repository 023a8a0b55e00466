"""Masks of clicks on a picture of a live stream."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from pipeline.api import models
from pipeline.base.errors import PromptError, XmemError
from pipeline.prompts.click_segmenters import ClickSegmenter, load_click_segmenter, segment_clicks
from pipeline.prompts.clicks import Click, Stroke, joined
from pipeline.tracks.masks import mask_to_rle


def outline(jpeg: bytes, given: models.Clicks, segmenter: str | None = None) -> models.Outline:
    """The mask that clicks and strokes give on a picture; takes around 0.1 s.

    Args:
        jpeg: the picture, not scaled down.
        segmenter: name of what makes the mask, see `load_click_segmenter`.

    Raises:
        UsageError: there is no such segmenter.
        PromptError: no click is positive, one lies outside the picture, or the mask is empty.
    """
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise XmemError("the newest frame could not be read: try again")
    image = np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
    clicks = [Click(c.x, c.y, c.positive) for c in given.clicks]
    strokes = [Stroke(tuple(s.points), s.positive) for s in given.strokes]
    mask = segment_clicks(_segmenter(segmenter), image, joined(clicks, strokes, image.shape[:2]))
    if not mask.any():
        raise PromptError("the clicks give an empty mask: click on the object")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return models.Outline(
        rle={"size": list(mask.shape), "counts": mask_to_rle(mask)},
        area=int(mask.sum()),
        bbox=[x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
    )


@cache
def _segmenter(name: str | None) -> ClickSegmenter:
    """One for the process: it keeps what it has computed of the newest pictures."""
    return load_click_segmenter(name)
