"""Training clips: animated stills, video with growing gaps, and crowds of look-alikes.

Everything is a function of a seed and a step number, so a resumed run sees the data it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from xmem_core.training.compose import (
    Background,
    Image,
    Pose,
    Rng,
    Sprite,
    bend,
    cut_out,
    degrade,
    pose_matrix,
    recolour,
    render,
    shrink_to,
    smooth_path,
)
from xmem_core.training.crowd import crowd_scene, occluder
from xmem_core.training.library import STILL_KINDS, Library

KINDS = ("stills", "video", "crowd")


@dataclass(frozen=True)
class ClipOptions:
    """Options of training clips.

    `mixture`: weights of stills, video, crowd; `max_gap` in source frames; `pace`: speed of composed objects,
        as
    a share of the usual; `pace_spread`, `small`, `leaving`, `together`, `smeared`: see `settings.Phase`.
    """

    size: int = 192
    frames: int = 3
    max_objects: int = 2
    max_gap: int = 5
    mixture: tuple[float, float, float] = (0.35, 0.40, 0.25)
    min_area: float = 0.003
    pace: float = 1.0
    pace_spread: float = 1.0
    small: float = 0.0
    leaving: float = 0.0
    together: float = 0.0
    smeared: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 16:
            raise ValueError(f"size is {self.size}: must be a multiple of 16, at least 32")
        if self.frames < 2 or self.max_objects < 1 or self.max_gap < 1:
            raise ValueError("a clip needs frames >= 2, max_objects >= 1 and max_gap >= 1")
        if not 0 < self.pace <= 4:
            raise ValueError(f"pace is {self.pace}: must be more than 0 and at most 4")
        if not 1 <= self.pace_spread <= 8:
            raise ValueError(f"pace_spread is {self.pace_spread}: must be 1 to 8")
        for name in ("small", "leaving", "together", "smeared"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be a share, 0 to 1")
        if len(self.mixture) != 3 or min(self.mixture) < 0 or sum(self.mixture) <= 0:
            raise ValueError(
                f"mixture is {self.mixture}: must be three weights (stills, video, crowd), not all 0"
            )


@dataclass(frozen=True)
class Clip:
    """frames (T, H, W, 3) RGB uint8; labels (T, H, W) uint8: 0 background, then 1..objects."""

    frames: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    objects: int
    kind: str


@dataclass(frozen=True)
class Batch:
    """frames (B, T, H, W, 3) RGB uint8; labels (B, T, H, W) uint8; objects (B,).

    Number of labelled objects per clip.
    """

    frames: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    objects: NDArray[np.int64]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """Layers to render, and the identities that may be labelled (None: all)."""

    background: Background
    sprites: list[Sprite]
    eligible: frozenset[int] | None = None


def make_batch(library: Library, options: ClipOptions, seed: int, step: int, count: int) -> Batch:
    """Make the batch of a step; it depends only on the arguments and the pictures."""
    clips = [make_clip(library, options, np.random.default_rng((seed, step, i))) for i in range(count)]
    return Batch(
        np.stack([c.frames for c in clips]),
        np.stack([c.labels for c in clips]),
        np.array([c.objects for c in clips], np.int64),
        tuple(c.kind for c in clips),
    )


def make_clip(library: Library, options: ClipOptions, rng: Rng) -> Clip:
    """Make a clip with at least one object on its first frame."""
    weights = np.array(options.mixture, float)
    if not any(library.stills.values()):
        weights[[0, 2]] = 0.0
    if not library.clips:
        weights[1] = 0.0
    if not library.stills["people"]:
        weights[2] = 0.0
    if weights.sum() == 0:
        raise ValueError(f"mixture {options.mixture} needs pictures that {library.root} does not have")
    kind = KINDS[int(rng.choice(3, p=weights / weights.sum()))]
    make = {"stills": still_scene, "video": video_scene, "crowd": _crowd}[kind]
    options = _varied(options, rng)
    for _ in range(20):
        scene = make(library, options, rng)
        side = options.size
        frames, identities = render(scene.background, scene.sprites, (side, side), _exposure(rng, options))
        chosen = choose_objects(rng, identities, options, scene.eligible)
        if chosen:
            return Clip(degrade(rng, frames), relabel(identities, chosen), len(chosen), kind)
    raise RuntimeError(f"20 {kind} scenes in a row had no object on their first frame; are the masks empty?")


def _exposure(rng: Rng, options: ClipOptions) -> list[float] | None:
    """Draw a clip's shutter; in every second clip that has one, the first frame (with the masks) is sharp."""
    if options.smeared == 0 or rng.random() >= options.smeared:
        return None
    shutter = [float(rng.uniform(0.2, 0.8))] * options.frames
    return [0.0, *shutter[1:]] if rng.random() < 0.5 else shutter


def _varied(options: ClipOptions, rng: Rng) -> ClipOptions:
    """Draw one clip's options: `pace` and `max_gap` within `pace_spread`, `small` as 0 or 1.

    Nothing is drawn for omitted options, so clips of recipes without them are unchanged.
    """
    if options.pace_spread > 1:
        reach = float(np.log(options.pace_spread))
        factor = float(np.exp(rng.uniform(-reach, reach)))
        gap = max(1, round(options.max_gap * factor))
        options = replace(options, pace=min(4.0, options.pace * factor), max_gap=gap)
    if options.small > 0:
        small = bool(rng.random() < options.small)
        area = options.min_area / 6 if small else options.min_area
        options = replace(options, small=float(small), min_area=area)
    return options


def choose_objects(
    rng: Rng, identities: NDArray[np.uint8], options: ClipOptions, eligible: frozenset[int] | None
) -> list[int]:
    """Choose the identities to label, in random order; they must be large enough on the first frame."""
    numbers, areas = np.unique(identities[0], return_counts=True)
    least = options.min_area * options.size**2
    candidates = [
        int(n)
        for n, a in zip(numbers, areas, strict=True)
        if n != 0 and a >= least and (eligible is None or int(n) in eligible)
    ]
    if not candidates:
        return []
    most = min(options.max_objects, len(candidates))
    count = most if rng.random() < 0.6 else int(rng.integers(1, most + 1))
    return [int(n) for n in rng.permutation(candidates)[:count]]


def relabel(identities: NDArray[np.uint8], chosen: Sequence[int]) -> NDArray[np.uint8]:
    """Map identities to labels: chosen[i] becomes i + 1, all others 0."""
    table = np.zeros(256, np.uint8)
    table[list(chosen)] = np.arange(1, len(chosen) + 1, dtype=np.uint8)
    return table[identities]


def still_scene(library: Library, options: ClipOptions, rng: Rng) -> Scene:
    """A still moved, stretched and bent over time, with cut-outs of other stills moving independently."""
    count, size = options.frames, options.size
    kind = _still_kind(library, rng)
    index = int(rng.integers(len(library.stills[kind])))
    picture, labels = library.still(kind, index)
    flip = bool(rng.random() < 0.5)
    # Sometimes the object is a separate layer: then others can pass behind it, and it moves over its scene.
    separable = 0 < (labels > 0).mean() < 0.35
    own_layer = (rng.random() < 0.4 or options.small == 1) and separable
    sprites: list[Sprite] = []
    inner = (labels > 0) if (labels > 0).any() else np.ones_like(labels, bool)
    scale = size / min(picture.shape[:2]) * float(np.exp(rng.uniform(np.log(1.0), np.log(1.6))))
    anchor = _inside(rng, _pixel_of(rng, inner), picture.shape[:2], size / scale)
    poses = _camera_path(rng, picture.shape[:2], anchor, scale, size, count, flip, speed=0.05 * options.pace)
    if own_layer:
        shrunk = rng.uniform(0.12, 0.5) if options.small == 1 else 1.0
        for number in np.unique(labels[labels > 0])[:4]:
            mask = labels == number
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            piece = cut_out(picture, mask)
            if piece is None:
                continue
            middle = poses[0] @ np.array([columns.mean(), rows.mean(), 1.0])
            height = max(piece.shape[0] * scale * shrunk, 0.06 * size)
            sprites.append(
                moving_sprite(
                    rng,
                    piece,
                    int(number),
                    count,
                    size,
                    height,
                    (middle[0], middle[1]),
                    flip=flip,
                    pace=options.pace,
                )
            )
        picture, labels = library.emptied_still(kind, index), np.zeros_like(labels)
    identities = np.where(labels < 100, labels, 0).astype(np.uint8)
    pictures, masks = [], []
    grids = _bend_grids(rng, count, float(rng.choice([0.0, 0.015, 0.04])))
    for t in range(count):
        pictures.append(bend(picture, grids[t]) if grids is not None else picture)
        masks.append(bend(identities, grids[t]) if grids is not None else identities)
    sprites += _passers(library, rng, options, first_identity=100, counts=(0.25, 0.45, 0.3))
    return Scene(
        Background(tuple(pictures), tuple(masks), tuple(poses)), _hide_some(library, rng, options, sprites)
    )


def video_scene(library: Library, options: ClipOptions, rng: Rng) -> Scene:
    """Frames of a video clip with random gaps, forward or backward, cropped; at times cut-outs pasted."""
    pictures, identities, poses = _video_layer(library, options, rng, options.max_gap)
    weights = (0.5, 0.3, 0.2)
    sprites = _passers(library, rng, options, first_identity=100, counts=weights)
    return Scene(Background(pictures, identities, poses), _hide_some(library, rng, options, sprites))


def _crowd(library: Library, options: ClipOptions, rng: Rng) -> Scene:
    count, size = options.frames, options.size
    choice = rng.random()
    if choice < 0.25 and library.clips:
        pictures, _, poses = _video_layer(library, options, rng, max(1, options.max_gap // 2), wide=True)
        nobody = tuple(np.zeros(p.shape[:2], np.uint8) for p in pictures)
        background = Background(pictures, nobody, poses)
    else:
        kind = "people" if choice < 0.7 else ("coco" if choice < 0.9 else "ecssd")
        kind = kind if library.stills[kind] else "people"
        index = int(rng.integers(len(library.stills[kind])))
        # Objects of coco and ecssd scenes are kept: parked, unlabelled things.
        picture = library.emptied_still(kind, index) if kind == "people" else library.still(kind, index)[0]
        height, width = picture.shape[:2]
        scale = size / min(height, width) * rng.uniform(1.0, 1.3)
        anchor = (rng.uniform(0.3, 0.7) * width, rng.uniform(0.25, 0.75) * height)
        speed = 0.0 if rng.random() < 0.6 else 0.02 * options.pace
        camera = _camera_path(
            rng, (height, width), anchor, scale, size, count, bool(rng.random() < 0.5), speed
        )
        background = Background(
            (picture,) * count, (np.zeros((height, width), np.uint8),) * count, tuple(camera)
        )
    leave = options.leaving > 0 and bool(rng.random() < options.leaving)
    together = options.together > 0 and bool(rng.random() < options.together)
    sprites, people = crowd_scene(
        library,
        rng,
        count,
        size,
        background.poses,
        options.pace,
        small=options.small == 1,
        leave=leave,
        together=together,
    )
    return Scene(background, sprites, people)


def moving_sprite(
    rng: Rng,
    picture: Image,
    identity: int,
    count: int,
    size: int,
    height: float,
    centre: tuple[float, float],
    speed: float = 0.06,
    flip: bool = False,
    depth: float | None = None,
    pace: float = 1.0,
) -> Sprite:
    """A cut-out on a smooth path of place, size, angle and shape.

    `height` in pixels, `speed` as a share of `size`; `pace` scales all changes from frame to frame.
    """
    picture = shrink_to(picture, height * 1.1)
    scale = height / picture.shape[0]
    speed *= pace
    dx, dy = smooth_path(rng, count, speed * size), smooth_path(rng, count, speed * size * 0.7)
    zoom = np.exp(smooth_path(rng, count, 0.07 * pace))
    angle = rng.normal(0, 0.1) + smooth_path(rng, count, 0.08 * pace)
    shear = smooth_path(rng, count, 0.05 * pace)
    stretch = np.exp(rng.normal(0, 0.08) + smooth_path(rng, count, 0.05 * pace))
    poses = tuple(
        pose_matrix(
            picture.shape[:2],
            (centre[0] + dx[t], centre[1] + dy[t]),
            scale * zoom[t],
            angle[t],
            shear[t],
            stretch[t],
            flip,
        )
        for t in range(count)
    )
    grids = _bend_grids(rng, count, float(rng.choice([0.0, 0.02, 0.05])))
    pictures = (picture,) if grids is None else tuple(bend(picture, g) for g in grids)
    level = float(rng.random()) if depth is None else depth
    return Sprite(pictures, poses, (level,) * count, identity)


def _passers(
    library: Library, rng: Rng, options: ClipOptions, first_identity: int, counts: tuple[float, ...]
) -> list[Sprite]:
    """Make cut-outs of other stills; `counts`: the probabilities of 0, 1, 2... of them."""
    if not any(library.stills.values()):
        return []
    sprites = []
    for number in range(int(rng.choice(len(counts), p=counts))):
        kind = _still_kind(library, rng)
        picture, labels = library.still(kind, int(rng.integers(len(library.stills[kind]))))
        present = np.unique(labels[labels > 0])
        if not len(present):
            continue
        piece = cut_out(picture, labels == rng.choice(present))
        if piece is None or (piece[..., 3] > 127).mean() < 0.1:
            continue
        piece = recolour(rng, piece, 0.5)
        # Height so that the cut-out's longer side is a fifth to two thirds of the frame.
        longer = options.size * float(np.exp(rng.uniform(np.log(0.2), np.log(0.7))))
        height = longer * piece.shape[0] / max(piece.shape[:2])
        centre = (rng.uniform(0.1, 0.9) * options.size, rng.uniform(0.1, 0.9) * options.size)
        flip = bool(rng.random() < 0.5)
        sprites.append(
            moving_sprite(
                rng,
                piece,
                first_identity + number,
                options.frames,
                options.size,
                height,
                centre,
                0.1,
                flip,
                pace=options.pace,
            )
        )
    return sprites


def _hide_some(library: Library, rng: Rng, options: ClipOptions, sprites: list[Sprite]) -> list[Sprite]:
    """Sometimes hide a sprite in the middle frames, or cover it with something large."""
    if not sprites or options.frames < 3 or rng.random() > 0.2:
        return sprites
    target = int(rng.integers(len(sprites)))
    chosen, middle = sprites[target], slice(1, int(rng.integers(2, options.frames)))
    if rng.random() < 0.5 and library.stills["people"]:
        return [*sprites, occluder(library, rng, chosen, 1, options.frames, options.size, identity=200)]
    poses: list[Pose | None] = list(chosen.poses)
    poses[middle] = [None] * len(poses[middle])
    hidden = Sprite(chosen.pictures, tuple(poses), chosen.depths, chosen.identity)
    return [*sprites[:target], hidden, *sprites[target + 1 :]]


def _video_layer(
    library: Library, options: ClipOptions, rng: Rng, max_gap: int, wide: bool = False
) -> tuple[tuple[Image, ...], tuple[Image, ...], tuple[Pose, ...]]:
    clip = int(rng.integers(len(library.clips)))
    length, count, size = len(library.clips[clip]), options.frames, options.size
    gap = max(1, min(max_gap, (length - 1) // (count - 1)))
    gaps = rng.integers(1, gap + 1, count - 1)
    first = int(rng.integers(length - int(gaps.sum())))
    numbers = np.concatenate([[first], first + np.cumsum(gaps)]).tolist()
    if rng.random() < 0.5:
        numbers.reverse()
    frames = [library.clip_frame(clip, n) for n in numbers]
    picture, labels = frames[0]
    height, width = picture.shape[:2]
    low, high = (1.0, 1.25) if wide else (1.0, 1.8)
    scale = size / min(height, width) * float(np.exp(rng.uniform(np.log(low), np.log(high))))
    spot = np.array(_pixel_of(rng, labels > 0 if (labels > 0).any() else np.ones_like(labels, bool)))
    last = frames[-1][1] > 0
    if last.any() and rng.random() < 0.6:
        # Between the object's first and last position: otherwise fast objects leave most crops at once.
        spot = (spot + _pixel_of(rng, last)) / 2
    x, y = _inside(rng, (float(spot[0]), float(spot[1])), (height, width), size / scale)
    speed = 0.0 if rng.random() < 0.6 else 0.015 * options.pace
    poses = _camera_path(
        rng, (height, width), (x, y), scale, size, count, bool(rng.random() < 0.5), speed, tilt=0.05
    )
    return tuple(f[0] for f in frames), tuple((f[1] > 0).astype(np.uint8) for f in frames), tuple(poses)


def _camera_path(
    rng: Rng,
    source_size: tuple[int, ...],
    anchor: tuple[float, float],
    scale: float,
    size: int,
    count: int,
    flip: bool,
    speed: float,
    tilt: float = 0.1,
) -> list[Pose]:
    """Poses of a picture whose `anchor` starts at the frame's centre; `speed` 0: a static camera."""
    dx, dy = smooth_path(rng, count, speed * size), smooth_path(rng, count, speed * size)
    zoom = np.exp(smooth_path(rng, count, speed))
    angle = rng.normal(0, tilt) + smooth_path(rng, count, speed)
    shear = rng.normal(0, tilt / 2) + smooth_path(rng, count, speed / 2)
    stretch = float(np.exp(rng.normal(0, 0.1)))
    return [
        pose_matrix(
            (source_size[0], source_size[1]),
            (size / 2 + dx[t], size / 2 + dy[t]),
            scale * zoom[t],
            angle[t],
            shear[t],
            stretch,
            flip,
            anchor,
        )
        for t in range(count)
    ]


def _inside(
    rng: Rng, spot: tuple[float, float], source_size: tuple[int, ...], crop: float
) -> tuple[float, float]:
    """Move the spot by a part of the crop, and so that the crop stays within the picture, if possible."""
    half = crop / 2
    x, y = (
        float(np.clip(v + rng.normal(0, half * 0.4), min(half, n / 2), max(n - half, n / 2)))
        for v, n in zip(spot, reversed(source_size), strict=True)
    )
    return x, y


def _bend_grids(rng: Rng, count: int, amount: float) -> list[NDArray[np.float32]] | None:
    """Coarse shift grids, in fractions of the height, that change smoothly with time; None for no bending."""
    if amount == 0:
        return None
    start, drift = rng.normal(0, amount, (2, 4, 4, 2))
    return [(start + drift * t * 0.5).astype(np.float32) for t in range(count)]


def _pixel_of(rng: Rng, mask: NDArray[np.bool_]) -> tuple[float, float]:
    positions = np.flatnonzero(mask)
    y, x = divmod(int(positions[int(rng.integers(len(positions)))]), mask.shape[1])
    return float(x), float(y)


def _still_kind(library: Library, rng: Rng) -> str:
    weights = np.array([0.5, 0.3, 0.2]) * [bool(library.stills[k]) for k in STILL_KINDS]
    return STILL_KINDS[int(rng.choice(3, p=weights / weights.sum()))]


# Both cores are used by the network; OpenCV's threads would only compete with it.
cv2.setNumThreads(1)
