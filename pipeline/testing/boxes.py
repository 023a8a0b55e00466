"""Conformance check for box segmenters."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.prompts.box_segmenters import BoxSegmenter


def check_box_segmenter(segmenter: BoxSegmenter) -> None:
    """Conformance test for authors of box segmenters: tries small, large and border-touching boxes on drawn
    frames.

    Raises:
        AssertionError: it violates the protocol of `BoxSegmenter`; the message says how, and on which box.
    """
    generator = np.random.default_rng(0)
    for height, width in ((48, 64), (61, 37), (300, 401)):
        frame = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        cv2.circle(frame, (width // 2, height // 2), min(height, width) // 4, (200, 150, 90), -1)
        whole = (0, 0, width, height)
        middle = (width // 5, height // 5, width * 3 // 5, height * 3 // 5)
        for box in (middle, whole, (0, 0, 1, 1), (width - 2, height - 3, 2, 3), (3, 0, 1, height)):
            given = frame.copy()
            mask = segmenter.segment(given, box)
            where = f"on a {width}x{height} frame with box {box}"
            assert isinstance(mask, np.ndarray), f"segment returned {type(mask).__name__}, no array, {where}"
            assert mask.dtype == np.bool_, f"the mask is {mask.dtype}, not bool, {where}"
            assert mask.shape == (height, width), f"the mask has shape {mask.shape} {where}"
            assert np.array_equal(given, frame), f"the frame was changed {where}"
            x, y, w, h = box
            outside = mask.copy()
            outside[y : y + h, x : x + w] = False
            assert not outside.any(), f"{int(outside.sum())} pixels lie outside the box {where}"
            again = segmenter.segment(frame.copy(), box)
            assert np.array_equal(mask, again), f"a second call returned another mask {where}"
        assert segmenter.segment(frame, middle).any(), f"nothing was found {where}"
