"""Training samples of the click model: a square cut of a picture and the mask of one object in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from xmem_core.training.library import STILL_KINDS, Image, Library

Mask = NDArray[np.bool_]

# Clips of which every frame is kept out of training, and one still in so many.
HELD_OUT_CLIPS = 4
HELD_OUT_STILLS = 10

# Shares of ecssd, people, coco, davis and video.
MIXTURE = (0.32, 0.16, 0.22, 0.2, 0.1)

# Share of samples of drawn shapes.
_DRAWN = 0.06
_PADDING = (124, 116, 104)
_CLIP_STEP = 4


def held_out_still(kind: str, stem: str) -> bool:
    """Whether a still is kept out of training: one in ten, by the SHA-256 of `kind/stem`."""
    digest = hashlib.sha256(f"{kind}/{stem}".encode()).digest()
    return int.from_bytes(digest[:4]) % HELD_OUT_STILLS == 0


def held_out_clips(names: list[str]) -> list[str]:
    """The clips kept out of training: the four whose names have the smallest SHA-256."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:HELD_OUT_CLIPS]


class ClickLibrary(Library):
    """The training pictures without those held out, with the clips of `video/` besides those of `davis/`.

    Args:
        root: as for `Library`; `video/{JPEGImages,Annotations}/<clip>/` is optional, too.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(root, held_out_people=0)
        for kind in STILL_KINDS:
            self.stills[kind] = [p for p in self.stills[kind] if not held_out_still(kind, p.stem)]
        away = set(held_out_clips([clip[0][0].parent.name for clip in self.clips]))
        # Neighbouring frames differ little: one in four.
        self.clips = [clip[::_CLIP_STEP] for clip in self.clips if clip[0][0].parent.name not in away]
        self.others: list[list[tuple[Path, Path]]] = []
        for folder in sorted((self.root / "video" / "JPEGImages").glob("*")):
            labels = self.root / "video" / "Annotations" / folder.name
            pairs = [(p, labels / f"{p.stem}.png") for p in sorted(folder.glob("*.jpg"))[::_CLIP_STEP]]
            if folder.name not in away and pairs:
                self.others.append([pair for pair in pairs if pair[1].exists()])

    def draw(self, rng: np.random.Generator, mixture: Sequence[float] = MIXTURE) -> tuple[Image, Image]:
        """A picture and its labels, of the kinds in `MIXTURE`'s order. Treat both as read-only."""
        weights = dict(zip((*STILL_KINDS, "davis", "video"), mixture, strict=True))
        has = {kind: bool(self.stills[kind]) for kind in STILL_KINDS}
        has |= {"davis": bool(self.clips), "video": bool(self.others)}
        kinds = [kind for kind in weights if has[kind]]
        share = np.array([weights[kind] for kind in kinds])
        kind = str(rng.choice(kinds, p=share / share.sum()))
        if kind in STILL_KINDS:
            return self.still(kind, int(rng.integers(len(self.stills[kind]))))
        clips = self.clips if kind == "davis" else self.others
        clip = clips[int(rng.integers(len(clips)))]
        return self._read(*clip[int(rng.integers(len(clip)))])


@dataclass(frozen=True)
class Sample:
    """A picture (S, S, 3) uint8 RGB and the object's mask (S, S) bool."""

    picture: Image
    mask: Mask


def draw_sample(
    library: ClickLibrary, size: int, rng: np.random.Generator, mixture: Sequence[float] = MIXTURE
) -> Sample:
    """A random object, seen whole or in part, small in the picture or filling it, in random light.

    In three of ten samples an object of another still is pasted into the picture, and either the pasted one
    or the one behind it is to be segmented: what stands out most is then not always the object.
    """
    while True:
        picture, labels = library.draw(rng, mixture)
        ids, areas = np.unique(labels[(labels > 0) & (labels < 255)], return_counts=True)
        ids = ids[areas >= 150]
        if not len(ids):
            continue
        mask = labels == int(rng.choice(ids))
        if rng.random() < _DRAWN:
            picture, mask = _drawn(picture, rng)
        elif rng.random() < 0.3:
            picture, mask = _pasted(library, picture, mask, rng)
        if mask.sum() < 100:
            continue
        sample = _cut(picture, mask, size, rng)
        if sample.mask.sum() >= 60:
            return Sample(_relit(sample.picture, rng), sample.mask)


def _drawn(picture: Image, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Flat shapes, on the picture or on a flat ground: what has no texture is to be filled up to its edge."""
    height, width = picture.shape[:2]
    image = picture.copy()
    if rng.random() < 0.6:
        image[:] = rng.integers(0, 256, 3)
        if rng.random() < 0.5:
            noise = rng.integers(-12, 13, image.shape)
            image = np.asarray(np.clip(image + noise, 0, 255), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    count = int(rng.integers(1, 5))
    for number in range(1, count + 1):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        a, b = (int(rng.integers(6, max(8, min(height, width) // 3))) for _ in range(2))
        shape = np.zeros((height, width), np.uint8)
        kind = rng.random()
        if kind < 0.4:
            cv2.rectangle(shape, (x - a, y - b), (x + a, y + b), 1, -1)
        elif kind < 0.7:
            cv2.ellipse(shape, (x, y), (a, b), float(rng.uniform(0, 180)), 0, 360, 1, -1)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
            corners = np.stack([x + a * np.cos(angles), y + b * np.sin(angles)], 1)
            cv2.fillPoly(shape, [np.round(corners).astype(np.int32)], 1)
        image[shape > 0] = rng.integers(0, 256, 3)
        labels[shape > 0] = number
    return image, labels == int(rng.integers(1, count + 1))


def _pasted(
    library: ClickLibrary, picture: Image, mask: Mask, rng: np.random.Generator
) -> tuple[Image, Mask]:
    kinds = [kind for kind in ("ecssd", "people") if library.stills[kind]]
    if not kinds:
        return picture, mask
    kind = str(rng.choice(kinds))
    other, labels = library.still(kind, int(rng.integers(len(library.stills[kind]))))
    cut = labels > 0
    if not cut.any():
        return picture, mask
    rows, columns = np.flatnonzero(cut.any(1)), np.flatnonzero(cut.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    other, cut = other[box], cut[box]
    height, width = mask.shape
    scale = rng.uniform(0.2, 0.8) * min(height, width) / max(cut.shape)
    new = (max(6, round(cut.shape[1] * scale)), max(6, round(cut.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    other = np.asarray(cv2.resize(np.ascontiguousarray(other), new, interpolation=way), np.uint8)
    alpha = np.asarray(cv2.resize(cut.astype(np.float32), new, interpolation=way))
    if rng.random() < 0.5:
        other, alpha = other[:, ::-1], alpha[:, ::-1]
    x = int(rng.integers(-new[0] // 4, width - new[0] * 3 // 4))
    y = int(rng.integers(-new[1] // 4, height - new[1] * 3 // 4))
    full = np.zeros((height, width), np.float32)
    image = picture.copy()
    top, left, bottom, right = max(0, y), max(0, x), min(height, y + new[1]), min(width, x + new[0])
    if bottom <= top or right <= left:
        return picture, mask
    source = np.s_[top - y : bottom - y, left - x : right - x]
    full[top:bottom, left:right] = alpha[source]
    image[top:bottom, left:right] = np.where(
        alpha[source][..., None] > 0, other[source], image[top:bottom, left:right]
    )
    soft = cv2.GaussianBlur(full, (3, 3), 0)[..., None]
    mixed = np.asarray(image * soft + picture * (1 - soft), np.uint8)
    front = full > 0.5
    behind = mask & ~front
    if rng.random() < 0.4 and behind.sum() > 0.4 * mask.sum():
        return mixed, behind
    return mixed, front


def _cut(picture: Image, mask: Mask, size: int, rng: np.random.Generator) -> Sample:
    """A square around the object, or one of the whole picture, turned a little."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    extent_x, extent_y = x1 - x0, y1 - y0
    if rng.random() < 0.6:
        side = max(extent_x, extent_y) * rng.uniform(1.15, 2.0)
        wide, high = max(side, 48.0), max(side, 48.0)
    else:
        share = rng.uniform(0.6, 1.05)
        wide, high = max(width * share, extent_x * 1.1), max(height * share, extent_y * 1.1)
    stretch = rng.uniform(0.8, 1.25) if rng.random() < 0.3 else 1.0
    cx = _centre(x0, x1, wide, width, rng)
    cy = _centre(y0, y1, high, height, rng)
    turn = np.deg2rad(np.clip(rng.normal(0, 6), -20, 20))
    flip = -1 if rng.random() < 0.5 else 1
    scale_x, scale_y = size / wide * stretch, size / high
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    linear = np.diag([scale_x * flip, scale_y]) @ turned
    matrix = np.hstack([linear, (size / 2 - linear @ [cx, cy])[:, None]])
    scale = min(scale_x, scale_y)
    source = picture
    if scale < 0.6:
        source = np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.4 / scale), np.uint8)
    cut = cv2.warpAffine(
        source,
        matrix,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_PADDING,
    )
    soft = cv2.warpAffine(mask.astype(np.float32), matrix, (size, size), flags=cv2.INTER_LINEAR)
    return Sample(np.asarray(cut, np.uint8), np.asarray(soft >= 0.5))


def _centre(first: int, last: int, side: float, whole: int, rng: np.random.Generator) -> float:
    """The centre of a cut of `side` pixels that holds most of first..last and leaves the picture little."""
    slack = max(0.0, side - (last - first)) / 2
    centre = (first + last) / 2 + rng.uniform(-0.9, 0.9) * slack
    if side < whole and rng.random() < 0.8:
        centre = float(np.clip(centre, side / 2, whole - side / 2))
    return float(centre)


def _relit(picture: Image, rng: np.random.Generator) -> Image:
    values = picture.astype(np.float32)
    if rng.random() < 0.6:
        values = (values - 128) * rng.uniform(0.7, 1.3) + 128 + rng.uniform(-30, 30)
    if rng.random() < 0.4:
        grey = values.mean(2, keepdims=True)
        values = grey + (values - grey) * rng.uniform(0.0, 1.6)
    if rng.random() < 0.3:
        values *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    result = np.asarray(np.clip(values, 0, 255), np.uint8)
    if rng.random() < 0.15:
        result = np.asarray(cv2.GaussianBlur(result, (0, 0), float(rng.uniform(0.5, 1.6))), np.uint8)
    if rng.random() < 0.2:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))]
        decoded = cv2.imdecode(cv2.imencode(".jpg", result, quality)[1], cv2.IMREAD_COLOR)
        result = result if decoded is None else np.asarray(decoded, np.uint8)
    return result
