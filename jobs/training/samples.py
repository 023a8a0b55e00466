"""Training clips of the published stages: choice of frames and objects, and augmentation.

A clip is a function of the seed, the step and its place in the batch: a resumed run, with however many
processes, sees what an unbroken run would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.training.settings import StageConfig
from jobs.training.sources import Item, find_items
from pipeline.base.errors import UsageError
from xmem_core.training.clips import Batch, Clip, relabel
from xmem_core.training.compose import bend

Rng = np.random.Generator
_FILL = (124, 116, 104)
"""Beyond the picture: ImageNet's mean colour."""
_TRIES = 20


class StageData:
    """The clips of a stage's steps.

    Args:
        config: the stage.
        root: folder with its data sets.

    Raises:
        UsageError: see `find_items`.
    """

    def __init__(self, config: StageConfig, root: str | Path) -> None:
        self.config = config
        still = all(source.layout != "clips" for source in config.sources)
        self.items = find_items(Path(root), config.sources, 1 if still else config.frames)
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batch(self, step: int, first: int, last: int) -> Batch:
        """Clips first..last-1 of a step's batch."""
        clips = [self.clip(step, number) for number in range(first, last)]
        return Batch(
            np.stack([c.frames for c in clips]),
            np.stack([c.labels for c in clips]),
            np.array([c.objects for c in clips], np.int64),
            tuple(c.kind for c in clips),
        )

    def clip(self, step: int, number: int) -> Clip:
        """One clip of a step's batch. Raises UsageError if no clip with an object can be found."""
        rng = np.random.default_rng((self.config.seed, step, number))
        item = self._item(step * self.config.batch + number)
        for attempt in range(_TRIES):
            frames, labels = self._frames(item, step, rng)
            chosen = _objects(labels, item, self.config.max_objects, rng)
            if chosen:
                return Clip(frames, relabel(labels, chosen), len(chosen), item.source.layout)
            if attempt % 5 == 4:
                item = self.items[int(rng.integers(len(self.items)))]
        raise UsageError(
            f"no object on the first frames of {_TRIES} clips in a row, at last {item.masks[0].parent}: "
            "are the masks empty?"
        )

    def _item(self, place: int) -> Item:
        """The item at a place of the endless shuffled sequence."""
        epoch, place = divmod(place, len(self.items))
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.config.seed, epoch, 1 << 22))
            self._epoch = (epoch, rng.permutation(len(self.items)))
        return self.items[int(self._epoch[1][place])]

    def _frames(self, item: Item, step: int, rng: Rng) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Augmented frames (T, S, S, 3) and labels (T, S, S)."""
        count, size = self.config.frames, self.config.size
        if len(item.frames) == 1:
            return _moved_still(*item.read(0), count, size, rng)
        gap = max(1, self.config.max_gap(step) // item.source.annotated_every)
        numbers = choose_frames(len(item.frames), count, gap, rng)
        weak = item.source.rendered or self.config.is_finetuning(step)
        return _video(
            [item.read(n) for n in numbers], size, 0.25 if item.source.rendered else 0.36, weak, rng
        )


def choose_frames(length: int, count: int, max_gap: int, rng: Rng) -> list[int]:
    """Different frames of a video, in order or reversed, each at most `max_gap` from another one."""
    gap = min(length, max_gap)
    chosen = [int(rng.integers(length))]
    while len(chosen) < count:
        near = {n for c in chosen for n in range(max(0, c - gap), min(length, c + gap + 1))}
        chosen.append(int(rng.choice(sorted(near - set(chosen)))))
    return sorted(chosen, reverse=bool(rng.random() < 0.5))


def _objects(labels: NDArray[np.uint8], item: Item, most: int, rng: Rng) -> list[int]:
    """Objects to track: those on the first frame, at most `most` of them."""
    numbers, areas = np.unique(labels[0], return_counts=True)
    found = [(int(n), int(a)) for n, a in zip(numbers, areas, strict=True) if n != 0]
    if item.source.rendered:
        # A small object is fine if it stays small; one that is mostly outside the first frame is not.
        found = [
            (n, area)
            for n, area in found
            if area > 900 or (area > 100 and max(int((frame == n).sum()) for frame in labels[1:3]) < 400)
        ]
    ids = [n for n, _ in found]
    return sorted(int(n) for n in rng.choice(ids, most, replace=False)) if len(ids) > most else ids


# --- augmentation --------------------------------------------------------------------------------


def _video(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    size: int,
    least: float,
    weak: bool,
    rng: Rng,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One crop, flip and tint of all frames; a small rotation, shear and tint of each."""
    height, width = pairs[0][1].shape
    crop = _random_crop(height, width, size, least, rng)
    tint = _tint(rng, (0.1, 0.03, 0.03, 0.0), grey=0.05)
    frames, labels = [], []
    for picture, label in pairs:
        if label.shape != (height, width):
            scale = np.diag([width / label.shape[1], height / label.shape[0], 1.0])
        else:
            scale = np.eye(3)
        own = np.eye(3) if weak else _turn(size, size, rng, degrees=15, shear=10)
        frame, mask = _warp(picture, label, own @ crop @ scale, size)
        frames.append(_coloured(_coloured(frame, tint), _tint(rng, (0.01, 0.01, 0.01, 0.0))))
        labels.append(mask)
    return np.stack(frames), np.stack(labels)


def _moved_still(
    picture: NDArray[np.uint8], label: NDArray[np.uint8], count: int, size: int, rng: Rng
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A still as a clip: each frame is turned, scaled, sheared, shifted, and sometimes bent, by itself."""
    height, width = label.shape
    zoom = float(rng.uniform(0.8, 1.5)) * size / min(height, width)
    flip = rng.random() < 0.5
    tint = _tint(rng, (0.1, 0.05, 0.05, 0.05), grey=0.05)
    frames, labels = [], []
    for _ in range(count):
        turn = _turn(width, height, rng, degrees=20, shear=10, scale=0.1)
        # A crop of the resized picture; if a side is too short, it is centred in the crop.
        spare = np.array([width, height]) * size / min(height, width) - size
        shift = rng.uniform(-0.5, 0.5, 2) * np.maximum(spare, 0)
        centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1.0]])
        placed = np.array(
            [[-zoom if flip else zoom, 0, size / 2 + shift[0]], [0, zoom, size / 2 + shift[1]], [0, 0, 1]]
        )
        frame, mask = _warp(picture, label, placed @ centre @ turn, size)
        if rng.random() < 0.33:
            grid = rng.normal(0, 0.02, (4, 4, 2)).astype(np.float32)
            frame, mask = bend(frame, grid), bend(mask, grid)
        frames.append(_coloured(_coloured(frame, tint), _tint(rng, (0.1, 0.05, 0.05, 0.0))))
        labels.append(mask)
    return np.stack(frames), np.stack(labels)


def _random_crop(height: int, width: int, size: int, least: float, rng: Rng) -> NDArray[np.float64]:
    """Matrix of a crop of `least` to all of the area, aspect 3:4 to 4:3, flipped or not, to size x size."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(height, width)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    matrix = np.array([[size / w, 0, -x * size / w], [0, size / h, -y * size / h], [0, 0, 1.0]])
    if rng.random() < 0.5:
        matrix = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1.0]]) @ matrix
    return matrix


def _turn(
    width: int, height: int, rng: Rng, *, degrees: float, shear: float, scale: float = 0.0
) -> NDArray[np.float64]:
    """Matrix of a rotation, shear along x and scaling about the middle."""
    angle, slant = np.deg2rad(rng.uniform(-degrees, degrees)), np.deg2rad(rng.uniform(-shear, shear))
    factor = rng.uniform(1 - scale, 1 + scale)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = factor * rotation @ np.array([[1, np.tan(slant)], [0, 1]])
    middle = np.array([width / 2, height / 2])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, middle - linear @ middle
    return matrix


def _warp(
    picture: NDArray[np.uint8], label: NDArray[np.uint8], matrix: NDArray[np.float64], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    # The matrix maps positions between pixels; OpenCV's are of pixel centres.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    affine = (np.linalg.inv(half) @ matrix @ half)[:2]
    frame = cv2.warpAffine(picture, affine, (size, size), flags=cv2.INTER_LINEAR, borderValue=_FILL)
    mask = cv2.warpAffine(label, affine, (size, size), flags=cv2.INTER_NEAREST, borderValue=0)
    return np.asarray(frame, np.uint8), np.asarray(mask, np.uint8)


Tint = tuple[float, float, float, float, bool]
"""Factors of brightness, contrast and saturation, shift of the hue (a share of the circle), and grey."""


def _tint(rng: Rng, reach: tuple[float, float, float, float], grey: float = 0.0) -> Tint:
    b, c, s, h = reach
    factors = rng.uniform([1 - b, 1 - c, 1 - s, -h], [1 + b, 1 + c, 1 + s, h])
    return (*map(float, factors), bool(rng.random() < grey))  # type: ignore[return-value]


def _coloured(frame: NDArray[np.uint8], tint: Tint) -> NDArray[np.uint8]:
    brightness, contrast, saturation, hue, grey = tint
    if hue:
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(hue * 180)) % 180
        frame = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    values = frame.astype(np.float32) * brightness
    luma = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values = (values - luma.mean()) * contrast + luma.mean()
    luma = (luma - luma.mean()) * contrast + luma.mean()
    values = luma[..., None] + (values - luma[..., None]) * (0.0 if grey else saturation)
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)
