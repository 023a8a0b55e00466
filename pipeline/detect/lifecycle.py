"""Lifecycle of detected objects: which detections start objects, and when an object is given up.

The detector runs every few frames. A detection that overlaps a tracked object is matched to it. The others
are candidates: one that is detected several times in a row, near its expected position, becomes an object
with a new id. An object that was started here is given up after it has been out of sight for too long, sooner
if candidates wait for room, or when a prompt needs its place. Objects that a user prompted or corrected stay
until the user removes them.

The tracker matches by appearance and may assign a new thing to an existing object that looks like it. For
objects started here, only the part of the mask that continues from the previous position (its home) counts as
tracked. A detection elsewhere is a new candidate; when it becomes an object, its pixels are taken from the
other one.

The decisions depend only on the frames and on the state kept here, which is serialized in snapshots: a stream
that is interrupted or moved starts the same objects on the same frames.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import XmemError, one_line
from pipeline.base.records import Frame
from pipeline.detect.components import homes_of, without_strays
from pipeline.detect.protocol import Detection, Detector
from pipeline.detect.settings import FinderSettings
from pipeline.prompts.box_segmenters import Box, BoxSegmenter, inscribed_ellipse

_MAGIC = b"xmem-finder-1\n"
# A detection matches a tracked object if this share of it lies on tracked objects ...
_COVERED = 0.25
# ... or if it covers this share of one that is not too small beside it.
_HELD, _CRUMB = 0.5, 0.15
# Maximum distance of a candidate from its expected position, in its own size, and maximum ratio of sizes.
_NEAR, _SIZES = 0.8, 3.0
# Consecutive detector runs that may miss it.
_MISSES = 1


@dataclass(frozen=True)
class NewObject:
    """An object to start on the current frame.

    Args:
        object_id: id that is new to the stream.
        mask: H x W bool, without the pixels of other objects.
        category, score: values from the detector.
    """

    object_id: int
    mask: NDArray[np.bool_]
    category: str | None
    score: float


@dataclass(frozen=True)
class _Candidate:
    box: Box
    step: tuple[float, float]  # movement of the centre between detector runs, x and y
    hits: int = 1
    misses: int = 0

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2

    def distance(self, other: Box) -> float:
        """Distance of a box from the expected position, in mean sizes.

        Infinite if it cannot be the same thing.
        """
        (x, y), (_, _, w, h) = self.centre, self.box
        dx, dy = other[0] + other[2] / 2 - x - self.step[0], other[1] + other[3] / 2 - y - self.step[1]
        ratio = other[2] * other[3] / (w * h)
        if not 1 / _SIZES <= ratio <= _SIZES:
            return float("inf")
        return float(np.hypot(dx, dy)) * 4 / (w + h + other[2] + other[3])

    def seen(self, box: Box) -> _Candidate:
        moved = _Candidate(box, (0.0, 0.0)).centre
        looks = self.misses + 1
        step = ((moved[0] - self.centre[0]) / looks, (moved[1] - self.centre[1]) / looks)
        return _Candidate(box, step, self.hits + 1)

    def missed(self) -> _Candidate:
        return _Candidate(self.box, self.step, self.hits, self.misses + 1)


class ObjectFinder:
    """Starts and gives up objects of one stream; see the module docstring.

    For each frame, in order: `given_up`, then `look`, then, with the frame tracked, `saw`.

    Args:
        detector: a detector used for this stream only.
        settings: when objects are started and given up.
        box_segmenter: makes masks of detections that are boxes only.
        used_ids: ids that prompts use, now or later; new ids are larger than all of them.
    """

    def __init__(
        self,
        detector: Detector,
        settings: FinderSettings,
        box_segmenter: BoxSegmenter,
        used_ids: Iterable[int] = (),
    ) -> None:
        self._detector = detector
        self._settings = settings
        self._boxes = box_segmenter
        self._next_id = 1
        self._next_look = 0
        self._candidates: list[_Candidate] = []
        self._last_seen: dict[int, int] = {}  # of objects started here: frame on which they were visible
        self._labels: NDArray[np.int32] | None = None  # of the previous frame
        self._labelled: set[int] = set()  # the objects that were tracked on it
        self._waiting = 0  # confirmed candidates without room at the last detector run
        self._homes: NDArray[np.int32] | None = None  # homes of the objects started here, see `homes_of`
        self.reserve(used_ids)

    @property
    def next_id(self) -> int:
        """The id of the next new object."""
        return self._next_id

    def reserve(self, ids: Iterable[int]) -> None:
        """Reserve ids: new objects get ids above them."""
        self._next_id = max([self._next_id, *(i + 1 for i in ids)])

    @property
    def started(self) -> list[int]:
        """Ids of the tracked objects that were started here and not released since. Thread-safe."""
        return list(self._last_seen)

    def release(self, ids: Iterable[int]) -> None:
        """Stop managing objects, because a prompt corrected them or they were removed."""
        released = set(ids)
        self._last_seen = {i: seen for i, seen in self._last_seen.items() if i not in released}

    def make_room(self, frame_index: int, count: int, among: Collection[int]) -> dict[int, int]:
        """Choose objects that were started here to be displaced by prompts, and stop managing them.

        Objects out of sight go first, those unseen for longest before the others; then visible ones, the most
        recently started first.

        Args:
            frame_index: the frame about to be tracked.
            count: number of objects to displace.
            among: ids of the objects that may be displaced.

        Returns:
            The displaced objects, in the order chosen: by id, the number of frames for which each was out of
            sight. Fewer than `count` if no more of them were started here.
        """
        visible = set() if self._labels is None else set(np.unique(self._labels).tolist())
        choice = [i for i in self._last_seen if i in among]
        choice.sort(key=lambda i: (i in visible, -i if i in visible else self._last_seen[i], i))
        unseen = {i: frame_index - self._last_seen[i] - 1 for i in choice[:count]}
        self.release(unseen)
        return unseen

    def given_up(self, frame_index: int) -> list[int]:
        """Return objects started here that have been out of sight for too long.

        They are no longer managed.
        """
        unseen = {i: frame_index - seen for i, seen in self._last_seen.items()}
        gone = [i for i, frames in unseen.items() if frames > self._settings.out_of_sight]
        if len(gone) < self._waiting:
            # Those unseen for longest make room; among equals, the older ones.
            soon = [i for i, n in unseen.items() if n > self._settings.out_of_sight // 5 and i not in gone]
            gone += sorted(soon, key=lambda i: (-unseen[i], i))[: self._waiting - len(gone)]
        for object_id in gone:
            del self._last_seen[object_id]
        self._waiting -= min(self._waiting, len(gone))
        return gone

    def look(
        self, frame: Frame, live: Collection[int], given: Mapping[int, NDArray[np.bool_]]
    ) -> list[NewObject]:
        """Run the detector if it is due, and return the objects to start on this frame.

        Args:
            frame: the frame about to be tracked.
            live: ids of the tracked objects, without those that start on it.
            given: masks of prompts on this frame; they may start objects.

        Raises:
            XmemError: the detector failed, or violates its protocol.
        """
        if frame.frame_index < self._next_look:
            return []
        every = self._settings.every
        self._next_look = frame.frame_index - frame.frame_index % every + every
        labels = self._labels_on(frame, live, given)
        unknown = [d for d in self._detected(frame) if not _is_tracked(d, labels)]
        confirmed = self._confirm(unknown, frame)
        room = self._settings.max_objects - len(set(live) | set(given))
        started: list[NewObject] = []
        self._waiting = 0
        for candidate, detection in confirmed:
            # An object started just now may cover the next detection.
            if _is_tracked(detection, labels):
                continue
            if len(started) >= room:
                self._waiting += 1
                continue
            mask = self._mask_of(detection, frame) & (labels == 0)
            if not mask.any():
                continue
            new = NewObject(self._next_id, mask, detection.category, detection.score)
            self._next_id += 1
            self._last_seen[new.object_id] = frame.frame_index
            self._candidates.remove(candidate)
            labels[mask] = new.object_id
            started.append(new)
        return started

    def saw(self, frame_index: int, label_map: NDArray[np.int32], live: Collection[int]) -> None:
        """Process a tracked frame: H x W labels, and the ids of the tracked objects."""
        self._labels, self._labelled = label_map, set(live)
        self._last_seen = {i: seen for i, seen in self._last_seen.items() if i in live}
        self._homes = homes_of(label_map, self._last_seen, self._homes)
        for object_id in self._last_seen:
            if bool((label_map == object_id).any()):
                self._last_seen[object_id] = frame_index

    # --- one detector run ------------------------------------------------------------------------

    def _labels_on(
        self, frame: Frame, live: Collection[int], given: Mapping[int, NDArray[np.bool_]]
    ) -> NDArray[np.int32]:
        """Return the labels for a frame not tracked yet: those of the previous frame, updated by prompts."""
        height, width = frame.size
        if self._labels is None:
            labels = np.zeros((height, width), np.int32)
        else:
            labels = self._labels.copy()
            if self._homes is not None:
                without_strays(labels, self._last_seen, self._homes)
            if labels.shape != frame.size:
                resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
                labels = np.asarray(resized, np.int32)
                self._candidates = []
        for object_id in self._labelled - set(live):
            labels[labels == object_id] = 0
        for object_id, mask in given.items():
            labels[labels == object_id] = 0
            labels[mask] = object_id
        return labels

    def _detected(self, frame: Frame) -> list[Detection]:
        name = type(self._detector).__name__
        try:
            found = list(self._detector.detect(frame))
            for detection in found:
                detection.check_fits(frame)
        except XmemError:
            raise
        except Exception as error:
            raise XmemError(
                f"the detector {name} failed on frame {frame.frame_index}: {type(error).__name__}: "
                f"{one_line(error)}; committed rows are kept"
            ) from error
        wanted = self._settings.wanted
        return found if wanted is None else [d for d in found if d.category in wanted]

    def _confirm(self, unknown: list[Detection], frame: Frame) -> list[tuple[_Candidate, Detection]]:
        """Match detections with candidates; return the confirmed ones."""
        pairs = sorted(
            (distance, i, k)
            for i, candidate in enumerate(self._candidates)
            for k, detection in enumerate(unknown)
            if (distance := candidate.distance(detection.bounds)) <= _NEAR
        )
        follows: dict[int, int] = {}  # detection -> candidate
        for _, i, k in pairs:
            if k not in follows and i not in follows.values():
                follows[k] = i
        kept, confirmed = [], []
        for k, detection in enumerate(unknown):
            if k in follows:
                candidate = self._candidates[follows[k]].seen(detection.bounds)
            else:
                candidate = _Candidate(detection.bounds, (0.0, 0.0))
            kept.append(candidate)
            needed = self._settings.confirmations * (2 if _reaches_out(detection.bounds, frame) else 1)
            if candidate.hits >= needed:
                confirmed.append((candidate, detection))
        matched = set(follows.values())
        for i, candidate in enumerate(self._candidates):
            if i not in matched and candidate.misses < _MISSES:
                kept.append(candidate.missed())
        self._candidates = kept
        return confirmed

    def _mask_of(self, detection: Detection, frame: Frame) -> NDArray[np.bool_]:
        if detection.mask is not None:
            return detection.mask
        mask = self._boxes.segment(frame.image, detection.bounds)
        return mask if mask.any() else inscribed_ellipse(frame.size, detection.bounds)

    # --- storage ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialize the state, including the detector's."""
        labels, homes = _packed(self._labels), _packed(self._homes)
        detector = self._detector.to_bytes()
        facts: dict[str, Any] = {
            "next_id": self._next_id,
            "next_look": self._next_look,
            "candidates": [asdict(c) for c in self._candidates],
            "last_seen": list(self._last_seen.items()),
            "waiting": self._waiting,
            "labelled": sorted(self._labelled),
            "labels": None if self._labels is None else list(self._labels.shape),
            "homes": None if self._homes is None else list(self._homes.shape),
            "lengths": [len(labels), len(homes), len(detector)],
        }
        text = json.dumps(facts, sort_keys=True).encode()
        return _MAGIC + struct.pack("<I", len(text)) + text + labels + homes + detector

    def from_bytes(self, blob: bytes) -> None:
        """Restore the state from `to_bytes`. Raises ValueError on bytes that are damaged or foreign."""
        try:
            if not blob.startswith(_MAGIC):
                raise ValueError("they are of another kind or version")
            head = len(_MAGIC) + 4
            (length,) = struct.unpack_from("<I", blob, len(_MAGIC))
            facts = json.loads(blob[head : head + length])
            parts, end = [], head + length
            for size in facts["lengths"]:
                parts.append(blob[end : end + size])
                end += size
            if len(blob) != end:
                raise ValueError(f"{len(blob)} bytes, {end} expected")
            labels = _unpacked(parts[0], facts["labels"])
            homes = _unpacked(parts[1], facts["homes"])
            candidates = [
                _Candidate(_box(c["box"]), (c["step"][0], c["step"][1]), c["hits"], c["misses"])
                for c in facts["candidates"]
            ]
            waiting = int(facts["waiting"])
            labelled = {int(i) for i in facts["labelled"]}
            last_seen = {int(i): int(seen) for i, seen in facts["last_seen"]}
            next_id, next_look = int(facts["next_id"]), int(facts["next_look"])
            self._detector.from_bytes(parts[2])
        except (struct.error, zlib.error, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged or foreign bytes of the object finder: {error}") from error
        self._labels, self._labelled, self._homes = labels, labelled, homes
        self._candidates, self._last_seen, self._waiting = candidates, last_seen, waiting
        self._next_id, self._next_look = max(self._next_id, next_id), next_look


def _packed(labels: NDArray[np.int32] | None) -> bytes:
    return b"" if labels is None else zlib.compress(np.ascontiguousarray(labels, np.int32).tobytes(), 1)


def _unpacked(blob: bytes, shape: list[int] | None) -> NDArray[np.int32] | None:
    return None if shape is None else np.frombuffer(zlib.decompress(blob), np.int32).reshape(shape)


def _box(values: list[int]) -> Box:
    x, y, w, h = (int(v) for v in values)
    return x, y, w, h


def _is_tracked(detection: Detection, labels: NDArray[np.int32]) -> bool:
    """Whether a detection covers objects of the labels, that is, is already tracked."""
    x, y, w, h = detection.bounds
    area = detection.area()
    pixels = int(area.sum())
    inside = labels[y : y + h, x : x + w][area]
    inside = inside[inside != 0]
    if inside.size >= _COVERED * pixels:
        return True
    for object_id, held in zip(*np.unique(inside, return_counts=True), strict=True):
        own = int((labels == object_id).sum())
        if held >= _HELD * own and own >= _CRUMB * pixels:
            return True
    return False


def _reaches_out(box: Box, frame: Frame) -> bool:
    x, y, w, h = box
    height, width = frame.size
    return x <= 1 or y <= 1 or x + w >= width - 1 or y + h >= height - 1
