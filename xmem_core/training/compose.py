"""Layered scenes: cut-outs over a background, each with its own motion, warping and colour.

Every object of a scene has an identity number; the objects to label are chosen after rendering.
Coordinates are pixels (x right, y down); a pose is the 2 x 3 matrix from source to frame coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Pose = NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Sprite:
    """A cut-out moving through the scene: RGBA pictures (one for all frames or one per frame), poses, depths.

    Larger depths are nearer to the camera. A pose of None: not in the scene on that frame.
    """

    pictures: tuple[Image, ...]
    poses: tuple[Pose | None, ...]
    depths: tuple[float, ...]
    identity: int


@dataclass(frozen=True)
class Background:
    """The background: per frame a picture, its identities (0: none) and a pose."""

    pictures: tuple[Image, ...]
    identities: tuple[Image, ...]
    poses: tuple[Pose, ...]


def pose_matrix(
    source_size: tuple[int, int],
    centre: tuple[float, float],
    scale: float,
    rotation: float = 0.0,
    shear: float = 0.0,
    stretch: float = 1.0,
    flip: bool = False,
    anchor: tuple[float, float] | None = None,
) -> Pose:
    """Make the pose that puts `anchor` (source pixels; default: the middle) of a source at `centre`.

    `source_size` is (height, width), `rotation` in radians, `stretch` an additional factor on x, `shear` of x
    by y.
    """
    height, width = source_size
    ax, ay = anchor if anchor is not None else (width / 2, height / 2)
    cos, sin = np.cos(rotation), np.sin(rotation)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    linear = linear @ np.diag([(-1.0 if flip else 1.0) * scale * stretch, scale])
    offset = np.array(centre) - linear @ np.array([ax, ay])
    return np.concatenate([linear, offset[:, None]], axis=1)


def cut_out(picture: Image, mask: NDArray[np.bool_], pad: int = 2) -> Image | None:
    """Cut out the masked object as RGBA, cropped tightly; None if it is smaller than 12 x 12 pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) < 12 or len(columns) < 12:
        return None
    y0, y1 = max(0, rows[0] - pad), min(mask.shape[0], rows[-1] + 1 + pad)
    x0, x1 = max(0, columns[0] - pad), min(mask.shape[1], columns[-1] + 1 + pad)
    alpha = mask[y0:y1, x0:x1].astype(np.uint8) * 255
    # Erode by a pixel or two and soften the edge, which still shows the old background.
    times = 2 if min(alpha.shape) > 60 else 1
    kernel = np.ones((3, 3), np.uint8)
    eroded = cv2.erode(alpha, kernel, iterations=times, borderType=cv2.BORDER_CONSTANT, borderValue=255)
    soft = cv2.GaussianBlur(eroded, (3, 3), 0)
    return np.dstack([picture[y0:y1, x0:x1], np.asarray(soft, np.uint8)])


def shrink_to(picture: Image, height: float) -> Image:
    """Shrink a picture to a height by area averaging, if it is larger; warping alone would alias."""
    scale = height / picture.shape[0]
    if scale >= 1:
        return picture
    size = (max(2, round(picture.shape[1] * scale)), max(2, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def bend(picture: Image, shifts: NDArray[np.float32]) -> Image:
    """Bend a picture by a coarse grid of shifts (rows, columns, 2), in fractions of its height."""
    height, width = picture.shape[:2]
    smooth = cv2.resize(shifts, (width, height), interpolation=cv2.INTER_CUBIC)
    field = np.asarray(smooth, np.float32) * np.float32(height)
    map_x = field[..., 0] + np.arange(width, dtype=np.float32)[None]
    map_y = field[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    border = cv2.BORDER_CONSTANT if picture.ndim == 3 and picture.shape[2] == 4 else cv2.BORDER_REPLICATE
    interpolation = cv2.INTER_LINEAR if picture.ndim == 3 else cv2.INTER_NEAREST
    return np.asarray(cv2.remap(picture, map_x, map_y, interpolation, borderMode=border), np.uint8)


def render(
    background: Background,
    sprites: list[Sprite],
    size: tuple[int, int],
    shutter: Sequence[float] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render a scene at (height, width): pictures (T, H, W, 3) and identities (T, H, W), 0 none.

    A pixel has a sprite's identity if the sprite's opacity is over one half; nearer sprites are drawn later.
    `shutter`: per frame, the share of the time to the next frame for which the shutter is open: moving
        sprites
    are smeared along their motion. None: 0 everywhere.
    """
    height, width = size
    count = len(background.poses)
    frames = np.empty((count, height, width, 3), np.uint8)
    identities = np.empty((count, height, width), np.uint8)
    for t in range(count):
        picture, labels, pose = background.pictures[t], background.identities[t], background.poses[t]
        mean = [float(v) for v in picture[::8, ::8].reshape(-1, 3).mean(axis=0)]
        frames[t] = cv2.warpAffine(
            picture,
            pose,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=mean,
        )
        identities[t] = cv2.warpAffine(labels, pose, (width, height), flags=cv2.INTER_NEAREST)
        for sprite in sorted(sprites, key=lambda s: s.depths[t]):
            sprite_pose = sprite.poses[t]
            if sprite_pose is not None:
                picture = sprite.pictures[t % len(sprite.pictures)]
                way = np.zeros(2) if shutter is None else shutter[t] * _step(sprite, t)
                _draw(frames[t], identities[t], picture, sprite_pose, sprite.identity, way)
    return frames, identities


def _step(sprite: Sprite, t: int) -> NDArray[np.float64]:
    """Movement (x, y) of a sprite's centre from frame t to the next; for the last, from the previous."""
    count = len(sprite.poses)
    before, after = (t, t + 1) if t + 1 < count and sprite.poses[t + 1] is not None else (t - 1, t)
    ends = [sprite.poses[i] if 0 <= i < count else None for i in (before, after)]
    height, width = sprite.pictures[0].shape[:2]
    places = [p @ np.array([width / 2, height / 2, 1.0]) for p in ends if p is not None]
    way: NDArray[np.float64] = places[1] - places[0] if len(places) == 2 else np.zeros(2)
    return way


def _draw(
    frame: Image,
    identities: Image,
    picture: Image,
    pose: Pose,
    identity: int,
    way: NDArray[np.float64],
) -> None:
    """Draw a sprite; `way`: (x, y) along which it is smeared, half to each side."""
    reach = int(np.ceil(np.abs(way).max() / 2)) if np.abs(way).max() >= 2 else 0
    height, width = picture.shape[:2]
    corners = pose @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]], float)
    x0, y0 = np.maximum(np.floor(corners.min(axis=1)).astype(int) - 1 - reach, -reach)
    x1, y1 = np.minimum(
        np.ceil(corners.max(axis=1)).astype(int) + 1 + reach,
        (frame.shape[1] + reach, frame.shape[0] + reach),
    )
    if x1 <= x0 or y1 <= y0:
        return
    local = pose.copy()
    local[:, 2] -= (x0, y0)
    size = int(x1 - x0), int(y1 - y0)
    warped: Image = np.asarray(cv2.warpAffine(picture, local, size, flags=cv2.INTER_LINEAR), np.uint8)
    if reach:
        warped = _smeared(warped, way, reach)
        # Smearing used a margin around the frame; it is cropped here.
        cut_x, cut_y = max(0, -int(x0)), max(0, -int(y0))
        x0, y0 = max(int(x0), 0), max(int(y0), 0)
        x1, y1 = min(int(x1), frame.shape[1]), min(int(y1), frame.shape[0])
        if x1 <= x0 or y1 <= y0:
            return
        warped = warped[cut_y : cut_y + y1 - y0, cut_x : cut_x + x1 - x0]
    alpha = warped[..., 3:].astype(np.uint16)
    region = frame[y0:y1, x0:x1]
    region[:] = ((warped[..., :3] * alpha + region * (255 - alpha) + 127) // 255).astype(np.uint8)
    identities[y0:y1, x0:x1][warped[..., 3] > 127] = identity


def _smeared(picture: Image, way: NDArray[np.float64], reach: int) -> Image:
    """Average a picture (H, W, 4) along `way`, as with an open shutter."""
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    ends = [(round(reach + s * way[0] / 2), round(reach + s * way[1] / 2)) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    light = picture.astype(np.float32)
    light[..., :3] *= light[..., 3:] / 255  # so that transparent pixels contribute no colour
    kernel /= kernel.sum()
    smooth = np.asarray(cv2.filter2D(light, -1, kernel, borderType=cv2.BORDER_CONSTANT), np.float32)
    smooth[..., :3] *= 255 / np.maximum(smooth[..., 3:], 0.5)
    return np.clip(np.round(smooth), 0, 255).astype(np.uint8)


def smooth_path(rng: Rng, count: int, speed: float, wander: float | None = None) -> NDArray[np.float64]:
    """Offsets (count,) from 0: a constant speed (normal, deviation `speed` per frame) plus a random walk."""
    steps = rng.normal(0, speed) + rng.normal(0, speed * 0.4 if wander is None else wander, count)
    steps[0] = 0.0
    return np.cumsum(steps)


def recolour(rng: Rng, picture: Image, strength: float) -> Image:
    """Change tone, channel balance, hue and saturation of an RGB or RGBA picture; strength 1 is strong."""
    rgb = picture[..., :3]
    if rng.random() < 0.7:
        hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV)
        hue = np.uint8(int(rng.normal(0, 14 * strength)) % 180)
        hsv[..., 0] = (hsv[..., 0].astype(np.uint16) + hue) % 180
        factor = float(np.exp(rng.normal(0, 0.35 * strength)))
        hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 255).astype(np.uint8)
        rgb = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    rgb = np.asarray(cv2.LUT(np.ascontiguousarray(rgb), tone_table(rng, strength)), np.uint8)
    if picture.shape[2] == 4:
        return np.dstack([rgb, picture[..., 3]])
    return np.asarray(rgb, np.uint8)


def tone_table(rng: Rng, strength: float) -> Image:
    """Make a table (256, 1, 3) for cv2.LUT: gamma, contrast, brightness and channel balance."""
    levels = np.arange(256, dtype=np.float64)[:, None] / 255
    gamma = np.exp(rng.normal(0, 0.2 * strength))
    gains = np.exp(rng.normal(0, 0.2 * strength) + rng.normal(0, 0.08 * strength, 3))
    table = (levels**gamma - 0.5) * gains + 0.5 + rng.normal(0, 0.06 * strength)
    result: Image = np.clip(table * 255, 0, 255).astype(np.uint8)[:, None]
    return result


def degrade(rng: Rng, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Apply camera faults to a clip (T, H, W, 3): drifting light, blur, low resolution, noise, JPEG."""
    frames = frames.copy()
    count, height, width = frames.shape[:3]
    if rng.random() < 0.8:
        table = tone_table(rng, 0.8)
        for t in range(count):
            frames[t] = cv2.LUT(cv2.LUT(frames[t], table), tone_table(rng, 0.15))
    if rng.random() < 0.08:
        frames[:] = np.round(frames @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    choice = rng.random()
    factor = rng.uniform(1.3, 2.8)
    length, angle = int(rng.integers(3, 8)), rng.uniform(0, np.pi)
    quality = int(rng.integers(25, 80))
    noise = rng.normal(0, rng.uniform(2, 8), (height, width, 1)) if choice > 0.85 else None
    for t in range(count):
        if choice < 0.12:
            frames[t] = cv2.GaussianBlur(frames[t], (0, 0), factor / 2)
        elif choice < 0.22:
            kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
            dx, dy = round(np.cos(angle) * length), round(np.sin(angle) * length)
            cv2.line(kernel, (length - dx // 2, length - dy // 2), (length + dx // 2, length + dy // 2), 1.0)
            frames[t] = cv2.filter2D(frames[t], -1, kernel / kernel.sum())
        elif choice < 0.38:
            small = cv2.resize(
                frames[t], (int(width / factor), int(height / factor)), interpolation=cv2.INTER_AREA
            )
            frames[t] = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
        elif choice < 0.5:
            _, code = cv2.imencode(".jpg", frames[t], [cv2.IMWRITE_JPEG_QUALITY, quality])
            frames[t] = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8)
        elif noise is not None:
            rolled = np.roll(noise, int(rng.integers(0, 10_000)))
            frames[t] = np.clip(frames[t] + rolled, 0, 255).astype(np.uint8)
    return frames
