"""Lifecycle of detected objects: which detections start objects, and when an object is given up.

The detector runs every few frames. Its detections are matched with all objects at once, by mask, expected
position and colours (`pipeline.detect.lifecycle.association`). What follows from a match:

- A detection where the object's mask is confirms the object. One with a small score may confirm, but starts
  nothing.
- If the mask is elsewhere, it has drifted, or spread over a second thing: it is replaced by one of the
  detection, at once if it is mostly beside it, else if that goes on. The tracker then forgets what it learnt
  there. A mask inside its detection may be what is not hidden, and is replaced later only.
- An object without a mask goes on at its detection under its own id.
- An object that several looks in a row search and do not find is given up; much later if it was detected
  often and its mask moves on as one thing, since detectors overlook people who stand close together. So,
  after a while, is one that is found only together with another one: of two objects on one thing the older
  stays.
- Objects that met and are seen alone again are compared with what they looked like before. If their masks
  were exchanged, the ids change places; a new object that looks like one lost nearby continues that one's id
  (`pipeline.detect.lifecycle.contacts`).
- The other detections are candidates: one that is detected several times in a row, near its expected
  position, becomes an object with a new id.

An object that is given up, or that was out of sight for a while, is no longer tracked and holds nobody's
place, but is remembered: a detection of it continues its id. It is forgotten after it has been out of sight
for too long, and soon if it left the picture. Objects that a user prompted or corrected are left alone: they
stay until the user removes them.

Detectors of movement (`Look.instances` is false) only start objects: what stands still is not detected, and
two people who walk together are one detection. An object ends when it was out of sight for too long.

The tracker matches by appearance and may assign a new thing to an existing object that looks like it. For
objects started here, only the part of the mask that continues from the previous position (its home) counts as
tracked. A detection elsewhere is a new candidate; when it becomes an object, its pixels are taken from the
other one.

The decisions depend only on the frames and on the state kept here, which is serialized in snapshots: a stream
that is interrupted or moved starts the same objects on the same frames.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import XmemError, one_line
from pipeline.base.records import Frame
from pipeline.detect.lifecycle.association import (
    FITS,
    moved_on,
    shown_in,
)
from pipeline.detect.lifecycle.candidates import confirmed_among, inside
from pipeline.detect.lifecycle.components import homes_of, without_strays
from pipeline.detect.lifecycle.decisions import Decisions, NewObject
from pipeline.detect.lifecycle.detector_run import DetectorRun, distinct, is_tracked
from pipeline.detect.lifecycle.finder_state import DAMAGED, FinderState
from pipeline.detect.lifecycle.following import Following
from pipeline.detect.lifecycle.found_object import FoundObject, iou
from pipeline.detect.protocol import Detection, Detector, Look, look_with
from pipeline.detect.settings import SOON, FinderSettings
from pipeline.prompts.box_segmenters import Box, BoxSegmenter, inscribed_ellipse

# A mask whose box is smaller than this share of the object's is a scrap if it is not detected.
_SCRAP = 0.2
# What a look counts when more than `every` frames passed since the last one, as where frames are dropped:
# what it confirms or misses was there, or not, for longer.
_SPARSE = 2


class ObjectFinder:
    """Starts and gives up objects of one stream; see the module docstring.

    For each frame, in order: `look`, then, with the frame tracked, `saw`.

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
        self._state = FinderState()
        self.reserve(used_ids)

    @property
    def next_id(self) -> int:
        """The id of the next new object."""
        return self._state.next_id

    def reserve(self, ids: Iterable[int]) -> None:
        """Reserve ids: new objects get ids above them."""
        self._state.next_id = max([self._state.next_id, *(i + 1 for i in ids)])

    @property
    def started(self) -> list[int]:
        """Ids of the tracked objects that were started here and not released since. Thread-safe."""
        return list(self._state.objects)

    def release(self, ids: Iterable[int]) -> None:
        """Stop managing objects, because a prompt corrected them or they were removed."""
        released = set(ids)
        self._state.objects = {i: found for i, found in self._state.objects.items() if i not in released}
        self._state.remembered = {
            i: found for i, found in self._state.remembered.items() if i not in released
        }

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
        visible = set() if self._state.labels is None else set(np.unique(self._state.labels).tolist())
        choice = [i for i in self._state.objects if i in among]
        choice.sort(key=lambda i: (i in visible, -i if i in visible else self._state.objects[i].seen, i))
        unseen = {i: frame_index - self._state.objects[i].seen - 1 for i in choice[:count]}
        self.release(unseen)
        return unseen

    @property
    def looked(self) -> int:
        """Frame of the last run of the detector; -1 before the first."""
        return self._state.looked

    def look(
        self,
        frame: Frame,
        live: Collection[int],
        given: Mapping[int, NDArray[np.bool_]],
        *,
        may_detect: bool = True,
    ) -> Decisions:
        """Decide what starts, ends and is corrected on a frame, with a run of the detector if it is due.

        Args:
            frame: the frame about to be tracked.
            live: ids of the tracked objects, without those that start on it.
            given: masks of prompts on this frame; they may start objects.
            may_detect: whether the detector may run; if not, a run that is due waits for a later frame.

        Raises:
            XmemError: the detector failed, or violates its protocol.
        """
        decided = Decisions()
        self._end_unseen(frame, decided)
        if frame.frame_index < self._state.next_look or not may_detect:
            return decided
        tracked = set(live) - set(decided.gone)
        labels = self._labels_on(frame, tracked, given)
        run = DetectorRun(frame, self._detected(frame, self._wanted(frame)), labels, set(given))
        # Looks between the regular ones confirm, but do not hurry what takes several looks to be disproved.
        # Of looks at nearly the same picture one counts.
        every, half = self._settings.every, max(1, self._settings.span // 2)
        run.regular = self._apart(frame, max(every, self._settings.span))
        run.weight = _SPARSE if 0 <= self._state.looked < frame.frame_index - every else 1
        if every < half and not self._apart(frame, half):
            run.weight = 0
        self._state.looked = frame.frame_index
        # What lies on objects of users is theirs.
        users = np.where(np.isin(labels, list(self._state.objects)), 0, labels)
        run.free = [k for k in range(len(run.look.detections)) if not is_tracked(run.detection(k), users)]
        run.distinct = frozenset(distinct(run.look))
        self._state.instances = run.look.instances
        following = Following(self._state, self._settings, run, decided, self._mask_of)
        if self._state.instances:
            following.follow()
        room = self._settings.max_objects - self._settings.kept_for_prompts
        tracked |= given.keys() | {new.object_id for new in decided.masks}
        room -= len(tracked - decided.gone.keys())
        self._state.waiting = 0
        following.restrict()
        if self._state.instances:
            room = following.find_again(room)
        self._start(run, self._unknown(run), room, decided)
        pending = any(c.hits < self._settings.confirmations for c in self._state.candidates)
        every = max(1, self._settings.every // (2 if pending and self._state.instances else 1))
        self._state.next_look = frame.frame_index - frame.frame_index % every + every
        return decided

    def saw(self, frame_index: int, label_map: NDArray[np.int32], live: Collection[int]) -> NDArray[np.int32]:
        """Process a tracked frame.

        Args:
            frame_index: the frame.
            label_map: H x W, its labels; not changed.
            live: ids of the tracked objects.

        Returns:
            the labels; where the detector detects things, without what the tracker gave to objects started
            here beside their homes, and without scraps of those that were not detected.
        """
        self._state.objects = {i: found for i, found in self._state.objects.items() if i in live}
        self._state.homes = homes_of(label_map, self._state.objects, self._state.homes)
        labels = label_map.copy()
        without_strays(labels, self._state.objects, self._state.homes)
        self._state.labels, self._state.labelled, self._state.saw = labels, set(live), frame_index
        for object_id, found in self._state.objects.items():
            if bool((labels == object_id).any()):
                # The tracker may have taken something else for an object that was out of sight.
                again = frame_index - found.seen > self._settings.every
                misses = max(found.misses, int(again))
                self._state.objects[object_id] = replace(found, seen=frame_index, misses=misses)
        return self._without_scraps(labels) if self._state.instances else label_map

    def _without_scraps(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Labels without masks that are much smaller than the object and were not detected either."""
        missed = [i for i, found in self._state.objects.items() if found.misses]
        scraps = [
            i
            for i, shown in shown_in(labels, missed).items()
            if shown.box[2] * shown.box[3]
            < _SCRAP * self._state.objects[i].box[2] * self._state.objects[i].box[3]
        ]
        return np.where(np.isin(labels, scraps), 0, labels).astype(np.int32) if scraps else labels

    def _apart(self, frame: Frame, span: int) -> bool:
        """Whether a frame is in another span of so many frames than the last look."""
        return frame.frame_index // span != self._state.looked // span

    # --- ends ------------------------------------------------------------------------------------

    def _end_unseen(self, frame: Frame, decided: Decisions) -> None:
        """Give up objects that have been out of sight for long, and forget remembered ones."""
        limit, now = self._settings.out_of_sight, frame.frame_index
        unseen = {i: now - found.seen for i, found in self._state.objects.items()}
        # What left the picture rarely comes back soon, and what comes in there is mostly something else.
        left = {
            i for i, n in unseen.items() if n and self._state.instances and self._state.has_left(i, frame)
        }
        gone = [
            i for i, n in unseen.items() if n > (self._settings.long_unseen // SOON if i in left else limit)
        ]
        if len(gone) < self._state.waiting:
            # Those unseen for longest make room; among equals, the older ones.
            soon = [i for i, n in unseen.items() if n > limit // SOON and i not in gone]
            gone += sorted(soon, key=lambda i: (-unseen[i], i))[: self._state.waiting - len(gone)]
        for object_id in gone:
            self._state.give_up(object_id, "out_of_sight", decided)
        self._state.waiting -= min(self._state.waiting, len(gone))
        self._state.remembered = {
            i: found
            for i, found in self._state.remembered.items()
            if now - found.seen <= (self._settings.long_unseen if self._state.has_left(i, frame) else limit)
        }

    # --- one detector run ------------------------------------------------------------------------

    def _labels_on(
        self, frame: Frame, live: Collection[int], given: Mapping[int, NDArray[np.bool_]]
    ) -> NDArray[np.int32]:
        """Return the labels for a frame not tracked yet: those of the previous frame, updated by prompts.

        If the previous frame was not tracked, they are those that objects started here should have on it.
        """
        height, width = frame.size
        if self._state.labels is None:
            labels = np.zeros((height, width), np.int32)
        else:
            labels = self._state.labels.copy()
            if labels.shape != frame.size:
                resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
                labels = np.asarray(resized, np.int32)
                self._state.candidates = []
        for object_id in self._state.labelled - set(live):
            labels[labels == object_id] = 0
        dropped = frame.frame_index - self._state.saw - 1
        if dropped > 0 and self._state.saw >= 0 and self._state.instances:
            labels = moved_on(labels, self._state.objects, dropped)
        for object_id, mask in given.items():
            labels[labels == object_id] = 0
            labels[mask] = object_id
        return labels

    def _wanted(self, frame: Frame) -> list[Box]:
        """Boxes in which something is looked for: candidates, and objects that were not confirmed lately."""
        boxes = [candidate.expected() for candidate in self._state.candidates]
        unsure = [
            f
            for f in (*self._state.objects.values(), *self._state.remembered.values())
            if f.misses or f.disagreed
        ]
        boxes += [found.expected(frame.frame_index) for found in unsure]
        return [inside(box, frame) for box in boxes]

    def _detected(self, frame: Frame, wanted: list[Box]) -> Look:
        name = type(self._detector).__name__
        try:
            found = look_with(self._detector, frame, wanted)
            for detection in found.detections:
                detection.check_fits(frame)
        except XmemError:
            raise
        except Exception as error:
            raise XmemError(
                f"the detector {name} failed on frame {frame.frame_index}: {type(error).__name__}: "
                f"{one_line(error)}; committed rows are kept"
            ) from error
        classes = self._settings.wanted
        if classes is None:
            return found
        return replace(found, detections=[d for d in found.detections if d.category in classes])

    # --- other detections ------------------------------------------------------------------------

    def _unknown(self, run: DetectorRun) -> dict[int, Detection]:
        """Detections of nothing that is tracked, by position."""
        return {
            k: run.detection(k)
            for k in run.free
            if k not in run.matched.values()
            and run.is_certain(k, self._settings.least_score)
            and not is_tracked(run.detection(k), run.tracked)
        }

    def _start(self, run: DetectorRun, unknown: dict[int, Detection], room: int, decided: Decisions) -> None:
        """Start objects from candidates that were detected often enough."""
        now = run.frame.frame_index
        least = self._settings.least_score
        weak = [run.detection(k).bounds for k in run.free if run.detection(k).score < least]
        self._state.candidates, confirmed = confirmed_among(
            self._state.candidates,
            list(unknown.values()),
            weak,
            run.look,
            run.frame,
            self._settings.confirmations,
            run.weight,
        )
        position = {id(detection): k for k, detection in unknown.items()}
        for candidate, detection in confirmed:
            # An object started just now may cover the next detection.
            if is_tracked(detection, run.tracked):
                continue
            if room <= 0:
                self._state.waiting += 1
                continue
            mask = self._mask_of(detection, run.frame) & (run.tracked == 0)
            if not mask.any():
                continue
            new = NewObject(self._state.next_id, mask, detection.category, detection.score)
            self._state.next_id += 1
            room -= 1
            colours = run.colours(position[id(detection)]) if self._state.instances else None
            self._state.objects[new.object_id] = FoundObject(
                detection.bounds, now, now, detection.category, colours, hits=1, born=(detection.bounds, now)
            )
            self._state.candidates.remove(candidate)
            run.mark(mask, new.object_id)
            decided.masks.append(new)

    def _mask_of(self, detection: Detection, frame: Frame) -> NDArray[np.bool_]:
        if detection.mask is not None:
            return detection.mask
        box = detection.bounds
        mask = self._boxes.segment(frame.image, box)
        if mask.any() and iou(Detection(mask).bounds, box) >= FITS:
            return mask
        return inscribed_ellipse(frame.size, box)

    # --- storage ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Serialize the state, including the detector's."""
        return self._state.to_bytes(self._detector.to_bytes())

    def from_bytes(self, blob: bytes) -> None:
        """Restore the state from `to_bytes`. Raises ValueError on bytes that are damaged or foreign."""
        try:
            state, detector = FinderState.from_bytes(blob)
            self._detector.from_bytes(detector)
        except DAMAGED as error:
            raise ValueError(f"damaged or foreign bytes of the object finder: {error}") from error
        state.next_id = max(self._state.next_id, state.next_id)
        self._state = state
