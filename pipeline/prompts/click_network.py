"""The bundled segmenter of clicks and boxes: a small network, `xmem_core.clicks.ClickNet`."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts import mask_choice
from pipeline.prompts.boxes import Box, inscribed_ellipse
from pipeline.prompts.clicks import Click, Mask
from pipeline.prompts.mask_choice import Candidate, Round
from pipeline.prompts.mask_parts import clicked_part, tidied, without_crumbs

if TYPE_CHECKING:
    from xmem_core.clicks import ClickNet, Features

# How far a window reaches beyond the mask in it, as a factor on the mask's longer side.
_REACH = 1.4
_LEAST_SIDE = 48
# Looks of a round; another one is worth while only at a window that differs from the last.
_MOST_LOOKS = 2
# A first mask of the whole frame that is less certain than this may be of the wrong object, a larger one
# than was pointed at: windows around the click, of these shares of the frame, are looked at, too. One of them
# must be more certain by the margin. Measured on 390 objects: mean IoU after three clicks 1.7 more.
_UNCERTAIN, _CLOSER, _MARGIN = 0.45, (0.5, 0.25), 0.05
# Windows that overlap so much (intersection over union) are taken for the same.
_SAME = 0.7
_KEPT_FEATURES = 12
_KEPT_ROUNDS = 64
_MOST_ROUNDS = 24
# A box is shown to the network as the probability of a mask so far, in the ellipse inside the box, and as
# clicks outside, at this distance as a share of its longer side. Measured on 166 objects kept out of
# training, in boxes whose sides are 5 % off: mean IoU 77, of people 88 (GrabCut: 64 and 65).
_LIKELY, _OUTSIDE = 0.5, 0.06
_BOX_LOOKS = 2
# A mask that covers a smaller share of its box is a failure.
_LEAST_SHARE = 0.12


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


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


class _Seen(NamedTuple):
    """What a round of clicks gave: the mask, and probabilities in the window that was looked at."""

    mask: Mask
    window: _Window
    probabilities: NDArray[np.float16]

    @property
    def certainty(self) -> float:
        """Share of the pixels that may be the object (probability over 1/4) that surely are (over 3/4)."""
        sure = (self.probabilities > 0.75) & self.mask[self.window.cut]
        return float(sure.sum() / max(1, (self.probabilities > 0.25).sum()))


class ClickNetwork:
    """Segments with a network trained on simulated clicks.

    Clicks are taken one after another, each on the mask of those before it: the first on the whole frame,
    then in a window around the mask found there, later ones in such a window only. If that mask is uncertain,
    the first click is looked at closer, too. Later clicks say which of several masks is meant, see
    `mask_choice`: of more or fewer pixels, with the mask so far or without it, cut at their necks, only the
    pieces with a click. What was computed for the last few windows and clicks is kept, so that a click more
    on the same frame costs only itself. May be called from several threads.

    Args:
        weights: a click model's safetensors. None: the bundled one.
        size: longer side of the network's input in pixels. None: the model's.

    Raises:
        WeightsError: the weights are missing or are no click model's.
    """

    def __init__(self, weights: str | Path | None = None, size: int | None = None) -> None:
        self._net = _loaded(None if weights is None else str(weights))
        self._size = size or self._net.config.size
        self._features: _Kept[tuple[bytes, _Window], Features] = _Kept(_KEPT_FEATURES)
        self._rounds: _Kept[tuple[bytes, bytes, tuple[Click, ...]], _Seen] = _Kept(_KEPT_ROUNDS)

    def segment(
        self, frame: NDArray[np.uint8], clicks: Sequence[Click], previous: Mask | None
    ) -> NDArray[np.bool_]:
        """Return the mask; it contains the positive clicks and none of the negative ones."""
        digest = hashlib.blake2b(np.ascontiguousarray(frame).data, digest_size=16).digest()
        if previous is not None and not previous.any():
            previous = None
        base = b"" if previous is None else hashlib.blake2b(previous.tobytes(), digest_size=16).digest()
        seen: _Seen | None = None
        rounds: list[Round] = []
        shown = np.zeros(frame.shape[:2], np.bool_) if previous is None else previous
        begin = 0
        for end in _rounds(clicks, min(frame.shape[:2])):
            rounds.append(Round(clicks[begin:end], shown))
            key = (digest, base, tuple(clicks[:end]))
            known = self._rounds.get(key)
            if known is None:
                known = self._round(frame, digest, clicks[:end], previous, seen, rounds)
                self._rounds.put(key, known)
            seen, shown, begin = known, known.mask, end
        assert seen is not None
        return seen.mask.copy()

    def _round(
        self,
        frame: NDArray[np.uint8],
        digest: bytes,
        clicks: Sequence[Click],
        previous: Mask | None,
        seen: _Seen | None,
        rounds: Sequence[Round],
    ) -> _Seen:
        height, width = frame.shape[:2]
        prior = np.zeros((height, width), np.float32)
        whole = _Window(0, 0, width, height)
        if seen is not None:
            prior[seen.window.cut] = seen.probabilities
            around = _around(seen.mask, clicks)
            again, logits = self._looks(frame, digest, clicks, around, prior, afresh=True)
            window = again.window
            inside = _inside(window, clicks)
            # Which clicks the parts of a mask given to begin with come from is not known: it stays whole.
            found = mask_choice.candidates(logits, inside, height, width, parts=previous is None)
            chosen = found[mask_choice.best(found, window.left, window.top, rounds)]
            return _seen(chosen, window, height, width)
        if previous is not None:
            prior = previous.astype(np.float32)
            return self._looks(frame, digest, clicks, _around(previous, clicks), prior)[0]
        first, _ = self._looks(frame, digest, clicks, whole, prior)
        if first.certainty < _UNCERTAIN:
            newest = next(c for c in reversed(clicks) if c.positive)
            for share in _CLOSER:
                window = _centred(newest, share * max(height, width) / 2, height, width)
                closer, _ = self._looks(frame, digest, clicks, window, prior)
                if closer.certainty > first.certainty + _MARGIN:
                    first = closer
        return _of_clicked_part(first, clicks)

    def _looks(
        self,
        frame: NDArray[np.uint8],
        digest: bytes,
        clicks: Sequence[Click],
        window: _Window,
        prior: NDArray[np.float32],
        afresh: bool = False,
    ) -> tuple[_Seen, NDArray[np.float32]]:
        """Look at a window, and then at one around the mask that was found there, if it is another one.

        Args:
            prior: H x W probabilities of the mask so far; unchanged.
            afresh: see `_logits`.

        Returns:
            the mask of the mean logits, and the logits of the last look
        """
        height, width = frame.shape[:2]
        for look in range(_MOST_LOOKS):
            logits = self._look(frame, digest, window, clicks, prior, afresh)
            mean = logits.mean(0)
            found = np.zeros((height, width), np.bool_)
            found[window.cut] = mean > 0
            found = tidied(found, clicks, height, width)
            prior = np.zeros((height, width), np.float32)
            prior[window.cut] = 1 / (1 + np.exp(-mean))
            following = _around(found, clicks)
            if following.overlap(window) > _SAME or look + 1 == _MOST_LOOKS:
                break
            window = following
        return _Seen(found, window, prior[window.cut].astype(np.float16)), logits

    def segment_box(self, frame: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]:
        """The mask of the object in a box of an H x W x 3 uint8 RGB frame; no pixel is outside the box.

        Empty if almost nothing was found.
        """
        height, width = frame.shape[:2]
        x, y, w, h = box
        window = _square((x, y, x + w, y + h), height, width)
        size = self._input_size(window)
        far = _OUTSIDE * max(w, h)
        clicks = [
            Click(round(column), round(row), False)
            for column in (x - far, x + w / 2, x + w + far)
            for row in (y - far, y + h / 2, y + h + far)
            if (column, row) != (x + w / 2, y + h / 2)
        ]
        prior = np.where(inscribed_ellipse((height, width), box), np.float32(_LIKELY), np.float32(0))
        features = self._encode(frame, window, size)
        for _ in range(_BOX_LOOKS):
            logits = self._logits(features, window, size, clicks, prior, afresh=False)[0]
            prior[window.cut] = 1 / (1 + np.exp(-logits))
        found = np.zeros((height, width), np.bool_)
        found[y : y + h, x : x + w] = prior[y : y + h, x : x + w] > 0.5
        found = without_crumbs(found, [])
        return found if found.sum() >= _LEAST_SHARE * w * h else np.zeros_like(found)

    def _look(
        self,
        frame: NDArray[np.uint8],
        digest: bytes,
        window: _Window,
        clicks: Sequence[Click],
        prior: NDArray[np.float32],
        afresh: bool,
    ) -> NDArray[np.float32]:
        """Logits of the window's pixels, from features that are kept for further clicks."""
        size = self._input_size(window)
        features = self._features.get((digest, window))
        if features is None:
            features = self._encode(frame, window, size)
            self._features.put((digest, window), features)
        return self._logits(features, window, size, clicks, prior, afresh)

    def _input_size(self, window: _Window) -> tuple[int, int]:
        """Columns and rows of the network's input for a window."""
        scale = self._size / max(window.width, window.height)
        return (
            max(32, round(window.width * scale / 16) * 16),
            max(32, round(window.height * scale / 16) * 16),
        )

    def _logits(
        self,
        features: Features,
        window: _Window,
        size: tuple[int, int],
        clicks: Sequence[Click],
        prior: NDArray[np.float32],
        afresh: bool,
    ) -> NDArray[np.float32]:
        """1 x H x W logits of the window's pixels; with `afresh` 2 x H x W, the second without a mask so far.

        A mask so far keeps what is right; without one, a wrong first mask is given up sooner.
        """
        import torch
        import torch.nn.functional as F

        from xmem_core.clicks import click_maps

        columns, rows = size
        with torch.inference_mode():
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
            so_far = torch.from_numpy(np.asarray(before))[None, None]
            if afresh:
                so_far = torch.cat([so_far, torch.zeros_like(so_far)])
            maps = click_maps([points] * len(so_far), so_far, self._net.config)
            several = tuple(f.expand(len(so_far), -1, -1, -1) for f in features)
            logits = self._net(several, maps.contiguous(memory_format=torch.channels_last))
            whole = (window.height, window.width)
            large = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
        return np.asarray(large[:, 0].numpy())

    def _encode(self, frame: NDArray[np.uint8], window: _Window, size: tuple[int, int]) -> Features:
        import torch

        from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD

        smaller = size[0] < window.width
        way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        cut = cv2.resize(np.ascontiguousarray(frame[window.cut]), size, interpolation=way)
        mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
        scaled = (np.asarray(cut, np.float32) / 255 - mean) / std
        # H x W x 3 in memory is channels_last as it is.
        with torch.inference_mode():
            features: Features = self._net.encode(torch.from_numpy(scaled).permute(2, 0, 1)[None])
        return features


class BoxNetwork:
    """A box segmenter by the same network; see `ClickNetwork` for the arguments and errors.

    Attributes:
        concurrent: it may be called from several threads at once.
    """

    concurrent = True

    def __init__(self, weights: str | Path | None = None, size: int | None = None) -> None:
        self._network = ClickNetwork(weights, size)

    def segment(self, frame: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]:
        """Return the mask of a box; empty if almost nothing was found."""
        return self._network.segment_box(frame, box)


class _Kept(Generic[_Key, _Value]):
    """The values used last. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[_Key, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> _Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: _Key, value: _Value) -> None:
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                self._values.popitem(last=False)


@lru_cache(maxsize=2)
def _loaded(weights: str | None) -> ClickNet:
    from xmem_core.clicks import load_click_model

    return load_click_model(weights)


def _of_clicked_part(seen: _Seen, clicks: Sequence[Click]) -> _Seen:
    """Without what is joined to the clicked thing by a neck only, see `clicked_part`.

    Only once a click has taken something away: the first mask of a person may have a neck, too.
    """
    if all(click.positive for click in clicks):
        return seen
    cut = seen.window.cut
    inside = [Click(c.x - seen.window.left, c.y - seen.window.top, c.positive) for c in clicks]
    part = clicked_part(seen.mask[cut], inside)
    if np.array_equal(part, seen.mask[cut]):
        return seen
    mask = np.zeros_like(seen.mask)
    mask[cut] = part
    mask = tidied(mask, clicks, *mask.shape)
    probabilities = seen.probabilities.copy()
    probabilities[seen.mask[cut] & ~mask[cut]] = 0
    return _Seen(mask, seen.window, probabilities)


def _seen(chosen: Candidate, window: _Window, height: int, width: int) -> _Seen:
    """A candidate as a round's outcome: what was left out of its mask is improbable from now on."""
    mask = np.zeros((height, width), np.bool_)
    mask[window.cut] = chosen.mask
    probabilities = 1 / (1 + np.exp(-chosen.logits))
    probabilities[(chosen.logits > chosen.level) & ~chosen.mask] = 0
    return _Seen(mask, window, probabilities.astype(np.float16))


def _rounds(clicks: Sequence[Click], side: int) -> list[int]:
    """Ends of the rounds in which clicks are taken: one each, but those of a stroke at once.

    Clicks of one sign close to one another are a stroke. More than `_MOST_ROUNDS` are all taken in one.
    """
    near = max(2.0, side / 12)
    ends = [
        i
        for i in range(1, len(clicks))
        if clicks[i].positive != clicks[i - 1].positive
        or math.dist((clicks[i].x, clicks[i].y), (clicks[i - 1].x, clicks[i - 1].y)) > near
    ]
    # Without a click on the object there is nothing to look at.
    first = next((i for i, c in enumerate(clicks) if c.positive), 0)
    ends = [end for end in ends if end > first]
    return [*(ends if len(ends) < _MOST_ROUNDS else []), len(clicks)]


def _inside(window: _Window, clicks: Sequence[Click]) -> list[Click]:
    """The clicks in a window, in its pixels."""
    return [
        Click(c.x - window.left, c.y - window.top, c.positive)
        for c in clicks
        if window.left <= c.x < window.right and window.top <= c.y < window.bottom
    ]


def _around(mask: Mask, clicks: Sequence[Click]) -> _Window:
    """A square around a mask and the positive clicks, as far as the frame reaches."""
    height, width = mask.shape
    xs = [c.x for c in clicks if c.positive]
    ys = [c.y for c in clicks if c.positive]
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        xs, ys = [*xs, int(columns[0]), int(columns[-1])], [*ys, int(rows[0]), int(rows[-1])]
    return _square((min(xs), min(ys), max(xs) + 1, max(ys) + 1), height, width)


def _square(bounds: tuple[int, int, int, int], height: int, width: int) -> _Window:
    """A square around left, top, right and bottom, as far as the frame reaches."""
    x0, y0, x1, y1 = bounds
    half = max(_LEAST_SIDE, max(x1 - x0, y1 - y0) * _REACH) / 2
    return _cut((x0 + x1) / 2, (y0 + y1) / 2, half, height, width)


def _centred(click: Click, half: float, height: int, width: int) -> _Window:
    """A square of 2 `half` pixels, at least the least side, around a click, as far as the frame reaches."""
    return _cut(click.x, click.y, max(_LEAST_SIDE / 2, half), height, width)


def _cut(x: float, y: float, half: float, height: int, width: int) -> _Window:
    return _Window(
        max(0, round(x - half)),
        max(0, round(y - half)),
        min(width, round(x + half)),
        min(height, round(y + half)),
    )
