"""Composes scenes: actors cut from photographs move over a real background; the truth is exact.

Except for cutting out, nothing is shared with the composer of the training clips: motion, gait, light and
camera faults differ, so that a model cannot profit from knowing that composer.
Coordinates are pixels, x right, y down; an actor stands with its feet at (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Rng = np.random.Generator

_PHASES = 12
_OPAQUE = 127


@dataclass(frozen=True)
class Actor:
    """A person or object that moves through a scene. All arrays have one entry per frame.

    Attributes:
        identity: 1 .. 255, unique in the scene; 0 for background objects.
        pictures: RGBA, the phases of its gait; one for something that keeps its shape.
        feet: (T, 2) position of its lowest middle point.
        heights: (T,) drawn height in pixels.
        phases: (T,) position in the gait, in turns.
        mirrored: (T,) whether it faces the other way.
        turns: (T,) rotation in radians about its middle.
        depths: (T,) depth order; larger values are nearer to the camera.
        present: (T,) false: not in the scene at all.
        shadow: whether it darkens the ground it stands on.
    """

    identity: int
    pictures: tuple[Image, ...]
    feet: NDArray[np.float64]
    heights: NDArray[np.float64]
    phases: NDArray[np.float64]
    mirrored: NDArray[np.bool_]
    turns: NDArray[np.float64]
    depths: NDArray[np.float64]
    present: NDArray[np.bool_]
    shadow: bool = False

    def width(self, frame: int) -> float:
        """Drawn width on a frame, in pixels."""
        height, width = self.pictures[0].shape[:2]
        return float(self.heights[frame] * width / height)


@dataclass(frozen=True)
class Scene:
    """A clip with its ground truth.

    Attributes:
        name, kind: name and kind of the scene.
        frames: (T, H, W, 3) uint8 RGB.
        truth: (T, H, W) uint8: identity of each pixel; 0 for background.
        own: (T, N + 1) pixels that identity i would cover if it were alone and the picture had no borders.
        overlap: (T, N + 1, N + 1) pixels within the picture that both i and j would cover.
        given: identity -> the frame on which its mask is given; the others are distractors.
    """

    name: str
    kind: str
    frames: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    own: NDArray[np.int64]
    overlap: NDArray[np.int64]
    given: dict[int, int]

    @cached_property
    def visible(self) -> NDArray[np.int64]:
        """(T, N + 1) visible pixels of each identity."""
        count = self.own.shape[1]
        return np.stack([np.bincount(t.ravel(), minlength=256)[:count] for t in self.truth]).astype(np.int64)

    def visible_of(self, identity: int) -> NDArray[np.int64]:
        """(T,) visible pixels of one identity."""
        return self.visible[:, identity]


def walk_phases(picture: Image, amplitude: float = 0.1) -> tuple[Image, ...]:
    """Make phases of a gait from a standing person (RGBA): the legs open and close, the body sways.

    `amplitude`: swing of a foot, as a share of the height.
    """
    height = picture.shape[0]
    pad = int(np.ceil(1.2 * amplitude * height))
    wide = np.pad(picture, ((0, 0), (pad, pad), (0, 0)))
    rows = np.arange(height, dtype=np.float32)[:, None] / height
    weight = wide[..., 3].astype(np.float64)
    below = weight[int(0.55 * height) :].sum(axis=0)
    middle = float((below * np.arange(wide.shape[1])).sum() / max(below.sum(), 1.0))
    columns = np.arange(wide.shape[1], dtype=np.float32)[None]
    side = np.tanh((columns - middle) / (0.05 * height)).astype(np.float32)
    leg = np.clip((rows - 0.52) / 0.48, 0, 1).astype(np.float32)
    trunk = np.exp(-(((rows - 0.35) / 0.15) ** 2)).astype(np.float32)
    phases = []
    for k in range(_PHASES):
        swing = float(np.sin(2 * np.pi * k / _PHASES)) * amplitude * height
        # Source of each pixel: the legs part at the hip, and the trunk leans slightly the other way.
        shift = swing * leg * side - 0.12 * swing * trunk
        map_x = (columns - shift).astype(np.float32)
        map_y = np.broadcast_to(rows * height, map_x.shape).astype(np.float32)
        bent = cv2.remap(wide, map_x, np.ascontiguousarray(map_y), cv2.INTER_LINEAR)
        phases.append(np.asarray(bent, np.uint8))
    return tuple(phases)


def compose(
    background: NDArray[np.uint8], actors: list[Actor], blur_motion: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Draw a scene.

    Args:
        background: (T, H, W, 3) background frames.
        actors: the moving actors, in any order.
        blur_motion: add motion blur to fast actors, as an open shutter does.

    Returns:
        Frames (T, H, W, 3), truth (T, H, W), own (T, N + 1), overlap (T, N + 1, N + 1), as in `Scene`. A
        pixel belongs to an actor that covers more than half of it, the nearest if several do.
    """
    frames = background.copy()
    count, height, width = frames.shape[:3]
    top = max((a.identity for a in actors), default=0)
    truth = np.zeros((count, height, width), np.uint8)
    own = np.zeros((count, top + 1), np.int64)
    overlap = np.zeros((count, top + 1, top + 1), np.int64)
    for t in range(count):
        alone = np.zeros((top + 1, height * width), np.bool_)
        for actor in sorted(actors, key=lambda a: float(a.depths[t])):
            if not actor.present[t]:
                continue
            total, rows, columns = _draw(frames[t], actor, t, blur_motion)
            truth[t, rows, columns] = actor.identity
            if actor.identity:
                own[t, actor.identity] += total
                alone[actor.identity, rows * width + columns] = True
        covered = alone[:, alone.any(axis=0)].astype(np.int32)
        overlap[t] = covered @ covered.T
    return frames, truth, own, overlap


def _draw(
    frame: Image, actor: Actor, t: int, blur_motion: bool
) -> tuple[int, NDArray[np.intp], NDArray[np.intp]]:
    """Draw one actor.

    Returns the number of pixels it covers in total, and its pixels in the frame (rows, columns).
    """
    picture = actor.pictures[int(actor.phases[t] * len(actor.pictures)) % len(actor.pictures)]
    source_height, source_width = picture.shape[:2]
    scale = float(actor.heights[t]) / source_height
    if scale < 0.9:
        # Area averaging first: warping alone would alias.
        size = (max(2, round(source_width * scale)), max(2, round(source_height * scale)))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        source_height, source_width = picture.shape[:2]
        scale = float(actor.heights[t]) / source_height
    x, y = actor.feet[t]
    cos, sin = np.cos(actor.turns[t]), np.sin(actor.turns[t])
    flip = -1.0 if actor.mirrored[t] else 1.0
    linear = scale * np.array([[cos, -sin], [sin, cos]]) @ np.diag([flip, 1.0])
    middle = np.array([x, y - float(actor.heights[t]) / 2])
    offset = middle - linear @ np.array([source_width / 2, source_height / 2])
    corners = linear @ np.array([[0, source_width] * 2, [0, 0, source_height, source_height]], float)
    corners += offset[:, None]
    x0, y0 = np.floor(corners.min(axis=1)).astype(int) - 1
    x1, y1 = np.ceil(corners.max(axis=1)).astype(int) + 2
    pose = np.concatenate([linear, (offset - (x0, y0))[:, None]], axis=1)
    size = (int(x1 - x0), int(y1 - y0))
    warped = np.asarray(cv2.warpAffine(picture, pose, size, flags=cv2.INTER_LINEAR), np.uint8)
    smear = actor.feet[t] - actor.feet[max(t - 1, 0)]
    if blur_motion and np.hypot(*smear) > 6:
        warped, x0, y0 = _smeared(warped, smear, int(x0), int(y0))
    total = int(np.count_nonzero(warped[..., 3] > _OPAQUE))
    height, width = frame.shape[:2]
    left, upper = max(0, -int(x0)), max(0, -int(y0))
    part = (
        warped[upper : height - int(y0), left : width - int(x0)] if y0 < height and x0 < width else warped[:0]
    )
    if not part.size:
        return total, np.empty(0, np.intp), np.empty(0, np.intp)
    if actor.shadow:
        _cast_shadow(frame, float(x), float(y), float(actor.heights[t]))
    rows, columns = int(y0) + upper, int(x0) + left
    region = frame[rows : rows + part.shape[0], columns : columns + part.shape[1]]
    alpha = part[..., 3:].astype(np.uint16)
    region[:] = ((part[..., :3] * alpha + region * (255 - alpha) + 127) // 255).astype(np.uint8)
    inside = np.nonzero(part[..., 3] > _OPAQUE)
    return total, inside[0] + rows, inside[1] + columns


def _smeared(warped: Image, smear: NDArray[np.float64], x0: int, y0: int) -> tuple[Image, int, int]:
    """Average a drawn actor along half of its step (a half-open shutter); returns it and its new corner."""
    reach = int(np.ceil(np.abs(smear).max() / 4)) + 1
    wide = np.pad(warped, ((reach, reach), (reach, reach), (0, 0))).astype(np.float32)
    wide[..., :3] *= wide[..., 3:] / np.float32(255)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    dx, dy = smear / 4
    ends = [(round(reach + s * dx), round(reach + s * dy)) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    smooth = cv2.filter2D(wide, -1, kernel / kernel.sum(), borderType=cv2.BORDER_CONSTANT)
    blurred = np.asarray(smooth, np.float32)
    blurred[..., :3] /= np.maximum(blurred[..., 3:] / 255, 1e-3)
    return np.clip(np.round(blurred), 0, 255).astype(np.uint8), x0 - reach, y0 - reach


def _cast_shadow(frame: Image, x: float, y: float, tall: float) -> None:
    """Darken the ground around the feet."""
    half_width, half_height = max(2, round(0.16 * tall)), max(1, round(0.035 * tall))
    height, width = frame.shape[:2]
    x0, x1 = max(0, int(x) - half_width), min(width, int(x) + half_width + 1)
    y0, y1 = max(0, int(y) - half_height), min(height, int(y) + half_height + 1)
    if x1 <= x0 or y1 <= y0:
        return
    across = (np.arange(x0, x1) - x)[None] / half_width
    down = (np.arange(y0, y1) - y)[:, None] / half_height
    dark = 1 - 0.45 * np.clip(1 - across**2 - down**2, 0, 1)[..., None]
    frame[y0:y1, x0:x1] = (frame[y0:y1, x0:x1] * dark).astype(np.uint8)


def filmed(rng: Rng, frames: NDArray[np.uint8], noise: float = 3.0, quality: int = 88) -> NDArray[np.uint8]:
    """Simulate a camera: a soft lens, flickering light, sensor noise and JPEG blocks.

    They affect actors and background alike, so that seams of the composition are no cue.
    """
    filmed = np.empty_like(frames)
    for t, frame in enumerate(frames):
        light = 1 + 0.015 * rng.normal()
        soft = cv2.GaussianBlur(frame, (0, 0), 0.7).astype(np.float32) * light
        soft += rng.normal(0, noise, frame.shape).astype(np.float32)
        filmed[t] = compressed(np.clip(soft, 0, 255).astype(np.uint8), quality)
    return filmed


def compressed(frame: Image, quality: int) -> Image:
    """Compress a frame with JPEG of quality 1 to 100."""
    _, code = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])
