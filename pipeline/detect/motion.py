"""The built-in detector `motion`: moving foreground in front of a static scene.

On a small copy of the frame it learns, pixel by pixel, the empty scene: a slowly updated mean colour and its
variance. Pixels that differ from it are foreground; a connected piece of foreground that also changed within
the last moment is a moving object. Both are needed: where an object stood when the stream began, or was
carried away, the background is wrong until it is learned again, but nothing moves there.

Shadows (darker, of the same hue) are not foreground. Brightness changes of the whole picture, such as the
camera's exposure control, are divided out; a change that this does not explain, such as a lamp, restarts the
learning. Moving cameras are not supported.

All state is in the detector's own arrays, so that it can be stored; OpenCV's subtractors do not expose
theirs.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection, Look
from pipeline.prompts.box_segmenters import Box

_MAGIC = b"xmem-motion-1\n"
# In squared grey levels, where nothing has been learned yet.
_FIRST_VARIANCE = np.float32(25.0)
_LARGEST_VARIANCE = np.float32(80.0)
# Colour differences are smaller than brightness differences: they are compared after scaling by this factor.
_HUE = np.float32(0.7)
# Seconds between frames without timestamps, and the longest pause that is accepted.
_STEP, _LONGEST_STEP = 0.2, 2.0
# The scene's arrays as stored: name, type, planes (0: a plain h x w array).
_ARRAYS = (
    ("mean", np.float32, 3),
    ("variance", np.float32, 2),
    ("rest", np.float32, 0),
    ("earlier", np.uint8, 3),
    ("later", np.uint8, 3),
)


@dataclass(frozen=True)
class MotionSettings:
    """How the scene is learned and what counts as a moving object. Times are in seconds of the video.

    Args:
        max_side: longer side of the small picture, in pixels.
        warm_up: time without detections at the start and after a change of light; a pixel's background counts
            as known after it has been at rest for half of this time.
        memory: time constant with which the background follows where there is no foreground.
        patience: foreground that has not changed for this long becomes background.
        deviations: standard deviations from the mean at which a pixel is foreground.
        min_difference: smallest difference, in grey levels, at which a pixel can be foreground.
        shadow: smallest share of the brightness that a shadow leaves.
        min_area, max_area: size limits of an object, as shares of the frame.
        min_motion: share of an object's pixels that must have changed within the last moment.
        moment: age of the picture that motion is measured against.
        light_change: share of the frame above which foreground means a change of light.
    """

    max_side: int = 320
    warm_up: float = 1.0
    memory: float = 15.0
    patience: float = 2.5
    deviations: float = 3.5
    min_difference: float = 14.0
    shadow: float = 0.55
    min_area: float = 0.0008
    max_area: float = 0.5
    min_motion: float = 0.15
    moment: float = 0.2
    light_change: float = 0.6


class MotionDetector:
    """Detects objects that move in front of a static camera; a `Detector`.

    Frames without timestamps are taken to be 0.2 seconds apart.
    """

    categories: tuple[str, ...] = ()

    def __init__(self, settings: MotionSettings | None = None) -> None:
        self._settings = settings or MotionSettings()
        self._scene: _Scene | None = None

    def detect(self, frame: Frame) -> list[Detection]:
        """Return the moving objects, largest first, with masks of the frame's size."""
        small = _shrunk(frame.image, self._settings.max_side)
        scene = self._scene
        if scene is None or scene.frame_size != frame.size:
            self._scene = _Scene.begin(small, frame.size, frame.pts_seconds, self._settings)
            return []
        pieces = scene.learn(small, frame.pts_seconds, self._settings)
        masks = [_enlarged(piece, small.shape[1:], frame.size) for piece in pieces]
        scores = [round(min(1.0, 0.5 + piece.motion), 6) for piece in pieces]
        return [Detection(m, score=s) for m, s in zip(masks, scores, strict=True) if m.any()]

    def look(self, frame: Frame, wanted: Sequence[Box] = ()) -> Look:
        """The detections; not one for each thing, see `Look.instances`. All of the frame is searched."""
        return Look(self.detect(frame), instances=False)

    def to_bytes(self) -> bytes:
        """Serialize the learned scene; a detector restored by `from_bytes` continues bit-identically."""
        header: dict[str, Any] = {"settings": asdict(self._settings), "scene": None}
        body = b""
        if self._scene is not None:
            header["scene"], body = self._scene.to_parts()
        text = json.dumps(header, sort_keys=True).encode()
        packed = zlib.compress(struct.pack("<I", len(text)) + text + body, 1)
        return _MAGIC + struct.pack("<I", zlib.crc32(packed)) + packed

    def from_bytes(self, blob: bytes) -> None:
        """Restore the state.

        Raises ValueError on anything but the output of `to_bytes` with the same settings.
        """
        try:
            head = len(_MAGIC) + 4
            if not blob.startswith(_MAGIC):
                raise ValueError("they are of another kind or version")
            (crc,) = struct.unpack_from("<I", blob, len(_MAGIC))
            if zlib.crc32(blob[head:]) != crc:
                raise ValueError("checksum does not match")
            raw = zlib.decompress(blob[head:])
            (length,) = struct.unpack_from("<I", raw)
            header = json.loads(raw[4 : 4 + length])
            if header["settings"] != asdict(self._settings):
                raise ValueError("they were stored under other settings")
            facts = header["scene"]
            self._scene = None if facts is None else _Scene.from_parts(facts, raw[4 + length :])
        except (struct.error, zlib.error, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged or foreign bytes of the motion detector: {error}") from error


@dataclass
class _Scene:
    """State of a learned scene; h x w is the small picture's size.

    Attributes:
        frame_size: (height, width) of the frames.
        pts_seconds: time of the last frame.
        seconds: time since learning began, by the frames' timestamps.
        mean: (3, h, w) float32, the background.
        variance: (2, h, w) float32, of brightness and colour.
        rest: (h, w) float32, seconds for which a pixel has been foreground at rest; negative until it has
            been at rest for long enough to know its background.
        earlier: (3, h, w) uint8, a picture at least a moment old, against which motion is measured.
        later: (3, h, w) uint8, the picture that replaces it next.
        waited: seconds since `later` was taken.
    """

    frame_size: tuple[int, int]
    pts_seconds: float | None
    seconds: float
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    rest: NDArray[np.float32]
    earlier: NDArray[np.uint8]
    later: NDArray[np.uint8]
    waited: float

    @classmethod
    def begin(
        cls,
        small: NDArray[np.uint8],
        frame_size: tuple[int, int],
        pts: float | None,
        settings: MotionSettings,
    ) -> _Scene:
        size = small.shape[1:]
        variance = np.full((2, *size), _FIRST_VARIANCE, np.float32)
        mean = small.astype(np.float32)
        rest = np.full(size, -settings.warm_up / 2, np.float32)
        return cls(frame_size, pts, 0.0, mean, variance, rest, small, small, 0.0)

    def learn(self, small: NDArray[np.uint8], pts: float | None, settings: MotionSettings) -> list[_Piece]:
        """Compare a picture with the background, then let the background follow it.

        Returns:
            The moving pieces; none while warming up.
        """
        step = self._passed(pts)
        self.seconds += step
        changed = _changed(small, self.earlier, settings.min_difference)
        picture = small.astype(np.float32)
        known = self.rest >= 0
        foreground = self._foreground(picture, settings) & known
        if self.seconds >= settings.warm_up and foreground.mean() > settings.light_change:
            self.__dict__.update(_Scene.begin(small, self.frame_size, self.pts_seconds, settings).__dict__)
            return []
        self._keep_moment(small, step, settings)
        calm = ~_widened(changed)
        moving = _moving(foreground, changed, settings) if self.seconds >= settings.warm_up else []
        self._take_in(picture, calm & (foreground | ~known), step, settings)
        slow = np.float32(1 - np.exp(-step / settings.memory))
        quick = np.float32(1 - np.exp(-3 * step / settings.warm_up))
        self._follow(picture, np.where(known, slow * ~foreground, quick * calm).astype(np.float32))
        return moving

    def _passed(self, pts: float | None) -> float:
        """Seconds since the last frame; clocks that jump or stand still are not trusted."""
        before, self.pts_seconds = self.pts_seconds, pts
        if pts is None or before is None or not 0 < pts - before <= _LONGEST_STEP:
            return _STEP
        return pts - before

    def _foreground(self, picture: NDArray[np.float32], settings: MotionSettings) -> NDArray[np.bool_]:
        grey, expected = picture[0], self.mean[0]
        sample = (slice(None, None, 4), slice(None, None, 4))
        gain = np.float32(np.clip(np.median((grey[sample] + 8) / (expected[sample] + 8)), 0.4, 2.5))
        expected = expected * gain
        difference = grey - expected
        hue = picture[1:] - 128
        hue -= (self.mean[1:] - 128) * gain
        hue *= hue
        spread = self.variance * np.float32(settings.deviations**2)
        least = np.float32(settings.min_difference)
        other_hue = hue[0] + hue[1] > np.maximum(spread[1], (least * _HUE) ** 2)
        other_grey = difference * difference > np.maximum(spread[0], least**2)
        shadow = (difference < 0) & (grey > np.float32(settings.shadow) * expected)
        foreground: NDArray[np.bool_] = other_hue | (other_grey & ~shadow)
        return foreground

    def _take_in(
        self,
        picture: NDArray[np.float32],
        resting: NDArray[np.bool_],
        step: float,
        settings: MotionSettings,
    ) -> None:
        """Make foreground that has been at rest for long part of the background."""
        self.rest += np.float32(step) * resting
        self.rest[~resting & (self.rest > 0)] = 0
        stays = self.rest > settings.patience
        if stays.any():
            self.mean[:, stays] = picture[:, stays]
            self.variance[:, stays] = _FIRST_VARIANCE
            self.rest[stays] = 0

    def _follow(self, picture: NDArray[np.float32], rate: np.float32 | NDArray[np.float32]) -> None:
        difference = picture - self.mean
        self.mean += rate * difference
        difference *= difference
        # An object that passes while everything is learned must not blind these pixels.
        np.minimum(difference, _LARGEST_VARIANCE, out=difference)
        self.variance[0] += rate * (difference[0] - self.variance[0])
        self.variance[1] += rate * (difference[1] + difference[2] - self.variance[1])

    def _keep_moment(self, small: NDArray[np.uint8], step: float, settings: MotionSettings) -> None:
        self.waited += step
        if self.waited >= settings.moment * 0.99:
            self.earlier, self.later, self.waited = self.later, small, 0.0

    def to_parts(self) -> tuple[dict[str, Any], bytes]:
        """Return JSON-ready values, and the bytes of all arrays concatenated."""
        facts = {name: getattr(self, name) for name in ("pts_seconds", "seconds", "waited")}
        facts["frame_size"] = list(self.frame_size)
        facts["small"] = list(self.rest.shape)
        return facts, b"".join(getattr(self, name).tobytes() for name, _, _ in _ARRAYS)

    @classmethod
    def from_parts(cls, facts: dict[str, Any], body: bytes) -> _Scene:
        """Restore from the output of `to_parts`. Raises ValueError if the bytes do not match the arrays."""
        height, width = facts["small"]
        arrays, start = {}, 0
        for name, dtype, planes in _ARRAYS:
            shape = (planes, height, width) if planes else (height, width)
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(body, dtype, count, start).reshape(shape).copy()
            start += arrays[name].nbytes
        if start != len(body):
            raise ValueError(f"{len(body)} bytes of arrays, {start} expected")
        size = (int(facts["frame_size"][0]), int(facts["frame_size"][1]))
        pts = facts["pts_seconds"]
        return cls(
            frame_size=size,
            pts_seconds=None if pts is None else float(pts),
            seconds=float(facts["seconds"]),
            waited=float(facts["waited"]),
            **arrays,
        )


def _shrunk(image: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Shrink an image to (3, h, w) uint8: brightness and two planes of colour, slightly blurred."""
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    small = np.ascontiguousarray(image)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = np.asarray(cv2.resize(small, size, interpolation=cv2.INTER_AREA), np.uint8)
    blurred = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb), (3, 3), 0)
    return np.stack(cv2.split(blurred)).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class _Piece:
    """A connected, moving piece of foreground.

    Args:
        at: upper left corner in the small picture, (x, y).
        mask: (h, w) bool, within its bounding box.
        area: number of pixels.
        motion: share of its pixels that changed.
    """

    at: tuple[int, int]
    mask: NDArray[np.bool_]
    area: int
    motion: float


def _changed(a: NDArray[np.uint8], b: NDArray[np.uint8], least: float) -> NDArray[np.bool_]:
    """(h, w) mask of the pixels where one of the planes differs by more than `least`."""
    differs = np.asarray(cv2.absdiff(a, b)) > least
    changed: NDArray[np.bool_] = differs[0] | differs[1] | differs[2]
    return changed


def _widened(changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Dilate a mask of changes: of an evenly coloured object that moves, only the outline changes."""
    reach = max(3, round(changed.shape[0] / 27) | 1)
    widened = cv2.dilate(changed.astype(np.uint8), np.ones((reach, reach), np.uint8))
    return np.asarray(widened, np.bool_)


def _moving(
    foreground: NDArray[np.bool_], changed: NDArray[np.bool_], settings: MotionSettings
) -> list[_Piece]:
    """Return the connected pieces that are large enough and move, largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(_cleaned(foreground), connectivity=8)
    least, most = settings.min_area * foreground.size, settings.max_area * foreground.size
    found = []
    for label in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[label])
        if least <= area <= most:
            mask = np.asarray(labels[y : y + h, x : x + w] == label)
            motion = float(changed[y : y + h, x : x + w][mask].mean())
            if motion >= settings.min_motion:
                found.append(_Piece((x, y), mask, area, motion))
    found.sort(key=lambda piece: -piece.area)
    return found


def _cleaned(foreground: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Remove specks and close gaps: more upwards than sideways, as people stand and walk."""
    height = foreground.shape[0]
    reach = max(3, round(height / 34) | 1)
    speck = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    gap = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, reach))
    opened = cv2.morphologyEx(foreground.astype(np.uint8), cv2.MORPH_OPEN, speck)
    padded = np.pad(np.asarray(opened), reach)
    closed = np.asarray(cv2.morphologyEx(padded, cv2.MORPH_CLOSE, gap), np.uint8)
    return np.ascontiguousarray(closed[reach:-reach, reach:-reach])


def _filled(piece: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill holes: pixels not reachable from outside belong to the piece."""
    outside = np.pad(piece, 1).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 2)
    filled: NDArray[np.bool_] = outside[1:-1, 1:-1] != 2
    return filled


def _enlarged(piece: _Piece, small: tuple[int, ...], frame_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Scale a piece of the small picture, with holes filled, to a mask of the frame's size."""
    mask = np.zeros(frame_size, np.bool_)
    scale_y, scale_x = frame_size[0] / small[0], frame_size[1] / small[1]
    (left, top), (h, w) = piece.at, piece.mask.shape
    x0, y0 = round((left - 1) * scale_x), round((top - 1) * scale_y)
    size = (max(1, round((w + 2) * scale_x)), max(1, round((h + 2) * scale_y)))
    soft = cv2.resize(np.pad(_filled(piece.mask), 1).astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    firm = np.asarray(soft) >= 0.5
    y_cut, x_cut = max(0, -y0), max(0, -x0)
    part = firm[y_cut : frame_size[0] - y0, x_cut : frame_size[1] - x0]
    mask[y0 + y_cut : y0 + y_cut + part.shape[0], x0 + x_cut : x0 + x_cut + part.shape[1]] = part
    return mask
