"""The click segmenter that the package carries: a small network, `xmem_core.clicks.ClickNet`."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.clicks import Click, Mask

if TYPE_CHECKING:
    from xmem_core.clicks import ClickNet, Features

# How far a window reaches beyond the mask in it, as a factor on the mask's longer side.
_REACH = 1.4
_LEAST_SIDE = 48
# A second and third look are worth while only at windows that differ from the last.
_MOST_LOOKS = 3
_KEPT_FEATURES = 8
# Pieces without a click, as a share of the largest piece, that are dropped.
_CRUMB = 0.05


class _Window(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def cut(self) -> tuple[slice, slice]:
        return np.s_[self.top : self.bottom, self.left : self.right]

    def overlap(self, other: _Window) -> float:
        """Intersection over union."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        both = max(0, width) * max(0, height)
        return both / (self.width * self.height + other.width * other.height - both)


class ClickNetwork:
    """Segments with a network trained on simulated clicks: on the whole frame, then in a window around the
    mask found there.

    Clicks on frames seen before cost less: the network's features of the last few windows are kept. May be
    called from several threads.

    Args:
        weights: a click model's safetensors. None: the bundled one.
        size: longer side of the network's input in pixels. None: the model's.

    Raises:
        WeightsError: the weights are missing or are no click model's.
    """

    def __init__(self, weights: str | Path | None = None, size: int | None = None) -> None:
        self._net = _loaded(None if weights is None else str(weights))
        self._size = size or self._net.config.size
        self._features: OrderedDict[tuple[bytes, _Window], Features] = OrderedDict()
        self._lock = threading.Lock()

    def segment(
        self, frame: NDArray[np.uint8], clicks: Sequence[Click], previous: Mask | None
    ) -> NDArray[np.bool_]:
        """Return the mask; it contains the positive clicks and none of the negative ones."""
        height, width = frame.shape[:2]
        digest = hashlib.blake2b(np.ascontiguousarray(frame).data, digest_size=16).digest()
        whole = _Window(0, 0, width, height)
        prior: NDArray[np.float32] = np.zeros((height, width), np.float32)
        window = whole
        if previous is not None and previous.any():
            prior = previous.astype(np.float32)
            window = _around(previous, clicks)
        for look in range(_MOST_LOOKS):
            logits = self._look(frame, digest, window, clicks, prior)
            found = np.zeros((height, width), np.bool_)
            found[window.cut] = logits > 0
            found = _tidied(found, clicks, height, width)
            following = _around(found, clicks)
            if following.overlap(window) > 0.7 or look + 1 == _MOST_LOOKS:
                break
            prior = np.zeros((height, width), np.float32)
            prior[window.cut] = 1 / (1 + np.exp(-logits))
            window = following
        return found

    def _look(
        self,
        frame: NDArray[np.uint8],
        digest: bytes,
        window: _Window,
        clicks: Sequence[Click],
        prior: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Logits of the window's pixels."""
        import torch
        import torch.nn.functional as F

        from xmem_core.clicks import click_maps

        scale = self._size / max(window.width, window.height)
        columns = max(32, round(window.width * scale / 16) * 16)
        rows = max(32, round(window.height * scale / 16) * 16)
        with torch.inference_mode():
            features = self._encoded(frame, digest, window, (columns, rows))
            before = cv2.resize(prior[window.cut], (columns // 2, rows // 2), interpolation=cv2.INTER_AREA)
            points = [
                (
                    (c.x - window.left + 0.5) * columns / window.width - 0.5,
                    (c.y - window.top + 0.5) * rows / window.height - 0.5,
                    c.positive,
                )
                for c in clicks
                if window.left <= c.x < window.right and window.top <= c.y < window.bottom
            ]
            maps = click_maps([points], torch.from_numpy(np.asarray(before))[None, None], self._net.config)
            logits = self._net(features, maps.contiguous(memory_format=torch.channels_last))
            size = (window.height, window.width)
            large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return np.asarray(large[0, 0].numpy())

    def _encoded(
        self, frame: NDArray[np.uint8], digest: bytes, window: _Window, size: tuple[int, int]
    ) -> Features:
        import torch

        from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD

        with self._lock:
            if (digest, window) in self._features:
                self._features.move_to_end((digest, window))
                return self._features[digest, window]
        smaller = size[0] < window.width
        way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        cut = cv2.resize(np.ascontiguousarray(frame[window.cut]), size, interpolation=way)
        mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
        scaled = (np.asarray(cut, np.float32) / 255 - mean) / std
        # H x W x 3 in memory is channels_last as it is.
        image = torch.from_numpy(scaled).permute(2, 0, 1)[None]
        features: Features = self._net.encode(image)
        with self._lock:
            self._features[digest, window] = features
            while len(self._features) > _KEPT_FEATURES:
                self._features.popitem(last=False)
        return features


@lru_cache(maxsize=2)
def _loaded(weights: str | None) -> ClickNet:
    from xmem_core.clicks import load_click_model

    return load_click_model(weights)


def _around(mask: Mask, clicks: Sequence[Click]) -> _Window:
    """A square around a mask and the positive clicks, as far as the frame reaches."""
    height, width = mask.shape
    xs = [c.x for c in clicks if c.positive]
    ys = [c.y for c in clicks if c.positive]
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        xs, ys = [*xs, int(columns[0]), int(columns[-1])], [*ys, int(rows[0]), int(rows[-1])]
    x0, x1, y0, y1 = min(xs), max(xs) + 1, min(ys), max(ys) + 1
    half = max(_LEAST_SIDE, max(x1 - x0, y1 - y0) * _REACH) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return _Window(
        max(0, round(x - half)),
        max(0, round(y - half)),
        min(width, round(x + half)),
        min(height, round(y + half)),
    )


def _tidied(mask: Mask, clicks: Sequence[Click], height: int, width: int) -> Mask:
    """The mask without small pieces that no click is in, and right at the clicks."""
    radius = max(1, round(0.004 * min(height, width)))
    drawn = mask.astype(np.uint8)
    for c in clicks:
        if mask[c.y, c.x] != c.positive:
            cv2.circle(drawn, (c.x, c.y), radius, int(c.positive), -1)
    for c in clicks:  # a disc of a neighbour may have covered it
        drawn[c.y, c.x] = c.positive
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(drawn, connectivity=8)
    areas = np.asarray(stats[:, cv2.CC_STAT_AREA])
    areas[0] = 0
    kept = areas > _CRUMB * areas.max()
    kept[[int(pieces[c.y, c.x]) for c in clicks if c.positive]] = True
    kept[0] = False
    tidy: Mask = kept[pieces]
    return tidy
