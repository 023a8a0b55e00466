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

import json
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import XmemError, one_line
from pipeline.base.records import Frame
from pipeline.detect.lifecycle.appearance import Colours, colours_of
from pipeline.detect.lifecycle.association import (
    FITS,
    Shown,
    distance,
    matches,
    moved_on,
    reach,
    share_inside,
    shown_in,
)
from pipeline.detect.lifecycle.candidates import Candidate, confirmed_among, inside, reaches_out
from pipeline.detect.lifecycle.components import homes_of, without_strays
from pipeline.detect.lifecycle.contacts import (
    after_meeting,
    after_view,
    lost_before,
    meetings,
    moved_to,
    parted,
    settled,
)
from pipeline.detect.lifecycle.found_object import FoundObject, centre_of, iou, overlap, smaller_area
from pipeline.detect.protocol import Detection, Detector, Look, look_with
from pipeline.detect.settings import FinderSettings
from pipeline.prompts.box_segmenters import Box, BoxSegmenter, inscribed_ellipse

_MAGIC, _OLD_MAGIC = b"xmem-finder-2\n", b"xmem-finder-1\n"
# A detection matches a tracked object if this share of it lies on tracked objects ...
_COVERED = 0.25
# ... or if it covers this share of one that is not too small beside it.
_HELD, _CRUMB = 0.5, 0.15
# Looks in a row on which a mask must be elsewhere than its detection before it is replaced.
_DISAGREE = 2
# A mask of which a smaller share is inside its detection is elsewhere, without doubt.
_ELSEWHERE = 0.4
# Ratio of the areas of two boxes from which one may be of a part of the other, or of two things.
_SIZE = 1.5
# Share of a mask that is inside the detection if the mask is the visible part of it.
_PART = 0.8
# An object in another one's detection, or one that was detected often, is missed this many times as often
# as others before it is given up, while it keeps its size.
_HIDDEN_MISSES = 3
# Of a matched object's mask, the part in its detection or expected box, enlarged by this share, is tracked.
_AROUND = 0.25
# Of two detections that share this much of the smaller one only that with the larger score counts: both are
# of the same thing, or one is of two things.
_SAME = 0.7
# Detections that overlap another one by this share of their area do not show one thing's colours alone.
_ALONE = 0.15
# A mask whose box is smaller than this share of the object's is a scrap if it is not detected.
_SCRAP = 0.2
# What a look counts when more than `every` frames passed since the last one, as where frames are dropped:
# what it confirms or misses was there, or not, for longer.
_SPARSE = 2
# Confirmations after which an object is remembered when it is given up.
_PROVEN = 2
# Objects were out of sight for long after this share of `out_of_sight`; after the same share of that, those
# that left the picture are given up.
_SOON = 5


@dataclass(frozen=True)
class NewObject:
    """An object to start or to correct on the current frame.

    Args:
        object_id: id that is new to the stream, or that of an object that was started here before.
        mask: H x W bool, without the pixels of other objects.
        category, score: values from the detector.
        reason: detector (a new object), found_again or drifted.
    """

    object_id: int
    mask: NDArray[np.bool_]
    category: str | None
    score: float
    reason: str = "detector"


@dataclass(frozen=True)
class Decisions:
    """What is to be done on a frame before it is tracked: first the removals, then the masks.

    Args:
        gone: ids of the objects not to be tracked any more, and why: out_of_sight or unconfirmed.
        masks: objects to start or to correct.
    """

    gone: dict[int, str] = field(default_factory=dict)
    masks: list[NewObject] = field(default_factory=list)


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
        self._next_id = 1
        self._next_look = 0
        self._looked = -1  # frame of the last look
        self._instances = False  # whether it detected one thing each
        self._candidates: list[Candidate] = []
        self._objects: dict[int, FoundObject] = {}  # started here, tracked
        self._remembered: dict[int, FoundObject] = {}  # started here, no longer tracked
        self._labels: NDArray[np.int32] | None = None  # of the previous frame
        self._labelled: set[int] = set()  # the objects that were tracked on it
        self._saw = -1  # its frame_index; -1: not known
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
        return list(self._objects)

    @property
    def _long(self) -> int:
        """Frames after which an object was out of sight for long."""
        return max(1, self._settings.out_of_sight // _SOON)

    def release(self, ids: Iterable[int]) -> None:
        """Stop managing objects, because a prompt corrected them or they were removed."""
        released = set(ids)
        self._objects = {i: found for i, found in self._objects.items() if i not in released}
        self._remembered = {i: found for i, found in self._remembered.items() if i not in released}

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
        choice = [i for i in self._objects if i in among]
        choice.sort(key=lambda i: (i in visible, -i if i in visible else self._objects[i].seen, i))
        unseen = {i: frame_index - self._objects[i].seen - 1 for i in choice[:count]}
        self.release(unseen)
        return unseen

    @property
    def looked(self) -> int:
        """Frame of the last run of the detector; -1 before the first."""
        return self._looked

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
        if frame.frame_index < self._next_look or not may_detect:
            return decided
        tracked = set(live) - set(decided.gone)
        labels = self._labels_on(frame, tracked, given)
        run = _Run(frame, self._detected(frame, self._wanted(frame)), labels, set(given))
        # Looks between the regular ones confirm, but do not hurry what takes several looks to be disproved.
        run.regular = frame.frame_index // self._settings.every != self._looked // self._settings.every
        run.weight = _SPARSE if 0 <= self._looked < frame.frame_index - self._settings.every else 1
        self._looked = frame.frame_index
        # What lies on objects of users is theirs.
        users = np.where(np.isin(labels, list(self._objects)), 0, labels)
        run.free = [k for k in range(len(run.look.detections)) if not _is_tracked(run.detection(k), users)]
        run.distinct = frozenset(_distinct(run.look))
        self._instances = run.look.instances
        if self._instances:
            self._follow(run, decided)
        room = self._settings.max_objects - self._settings.kept_for_prompts
        tracked |= given.keys() | {new.object_id for new in decided.masks}
        room -= len(tracked - decided.gone.keys())
        self._waiting = 0
        self._restrict(run)
        if self._instances:
            room = self._find_again(run, room, decided)
        self._start(run, self._unknown(run), room, decided)
        pending = any(c.hits < self._settings.confirmations for c in self._candidates)
        every = max(1, self._settings.every // (2 if pending and self._instances else 1))
        self._next_look = frame.frame_index - frame.frame_index % every + every
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
        self._objects = {i: found for i, found in self._objects.items() if i in live}
        self._homes = homes_of(label_map, self._objects, self._homes)
        labels = label_map.copy()
        without_strays(labels, self._objects, self._homes)
        self._labels, self._labelled, self._saw = labels, set(live), frame_index
        for object_id, found in self._objects.items():
            if bool((labels == object_id).any()):
                # The tracker may have taken something else for an object that was out of sight.
                again = frame_index - found.seen > self._settings.every
                misses = max(found.misses, int(again))
                self._objects[object_id] = replace(found, seen=frame_index, misses=misses)
        return self._without_scraps(labels) if self._instances else label_map

    def _without_scraps(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Labels without masks that are much smaller than the object and were not detected either."""
        missed = [i for i, found in self._objects.items() if found.misses]
        scraps = [
            i
            for i, shown in shown_in(labels, missed).items()
            if shown.box[2] * shown.box[3] < _SCRAP * self._objects[i].box[2] * self._objects[i].box[3]
        ]
        return np.where(np.isin(labels, scraps), 0, labels).astype(np.int32) if scraps else labels

    # --- ends ------------------------------------------------------------------------------------

    def _end_unseen(self, frame: Frame, decided: Decisions) -> None:
        """Give up objects that have been out of sight for long, and forget remembered ones."""
        limit, now = self._settings.out_of_sight, frame.frame_index
        unseen = {i: now - found.seen for i, found in self._objects.items()}
        # What left the picture rarely comes back soon, and what comes in there is mostly something else.
        left = {i for i, n in unseen.items() if n and self._instances and self._has_left(i, frame)}
        gone = [i for i, n in unseen.items() if n > (self._long // _SOON if i in left else limit)]
        if len(gone) < self._waiting:
            # Those unseen for longest make room; among equals, the older ones.
            soon = [i for i, n in unseen.items() if n > limit // _SOON and i not in gone]
            gone += sorted(soon, key=lambda i: (-unseen[i], i))[: self._waiting - len(gone)]
        for object_id in gone:
            self._give_up(object_id, "out_of_sight", decided)
        self._waiting -= min(self._waiting, len(gone))
        self._remembered = {
            i: found
            for i, found in self._remembered.items()
            if now - found.seen <= (self._long if self._has_left(i, frame) else limit)
        }

    def _has_left(self, object_id: int, frame: Frame) -> bool:
        """Whether an object is expected at the edge of the frame, or beyond it."""
        found = self._objects.get(object_id) or self._remembered[object_id]
        return reaches_out(found.expected(frame.frame_index), frame)

    def _give_up(self, object_id: int, reason: str, decided: Decisions) -> None:
        found = self._objects.pop(object_id)
        if found.hits >= _PROVEN:
            self._remembered[object_id] = found
        decided.gone[object_id] = reason

    # --- one detector run ------------------------------------------------------------------------

    def _labels_on(
        self, frame: Frame, live: Collection[int], given: Mapping[int, NDArray[np.bool_]]
    ) -> NDArray[np.int32]:
        """Return the labels for a frame not tracked yet: those of the previous frame, updated by prompts.

        If the previous frame was not tracked, they are those that objects started here should have on it.
        """
        height, width = frame.size
        if self._labels is None:
            labels = np.zeros((height, width), np.int32)
        else:
            labels = self._labels.copy()
            if labels.shape != frame.size:
                resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
                labels = np.asarray(resized, np.int32)
                self._candidates = []
        for object_id in self._labelled - set(live):
            labels[labels == object_id] = 0
        dropped = frame.frame_index - self._saw - 1
        if dropped > 0 and self._saw >= 0 and self._instances:
            labels = moved_on(labels, self._objects, dropped)
        for object_id, mask in given.items():
            labels[labels == object_id] = 0
            labels[mask] = object_id
        return labels

    def _wanted(self, frame: Frame) -> list[Box]:
        """Boxes in which something is looked for: candidates, and objects that were not confirmed lately."""
        boxes = [candidate.expected() for candidate in self._candidates]
        unsure = [f for f in (*self._objects.values(), *self._remembered.values()) if f.misses or f.disagreed]
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

    # --- objects with a mask ---------------------------------------------------------------------

    def _follow(self, run: _Run, decided: Decisions) -> None:
        """Match detections with the objects, and draw the consequences for those that have a mask."""
        self._objects = {i: f for i, f in self._objects.items() if i not in run.given}
        run.shown = shown_in(run.labels, list(self._objects))
        pairs = matches(
            {**self._remembered, **self._objects},
            run.shown,
            run.labels,
            {k: run.detection(k) for k in run.free},
            [k for k in run.free if run.is_certain(k, self._settings.least_score)],
            run.colours,
            run.frame.frame_index,
            self._long,
        )
        run.matched = {i: k for i, k in pairs.items() if i in run.shown}
        run.lost = {i: k for i, k in pairs.items() if i not in run.shown}
        for pair in meetings(run.shown):
            for one, other in (pair, pair[::-1]):
                self._objects[one] = after_meeting(self._objects[one], other)
        apart = [i for i, k in sorted(run.matched.items()) if not self._confirm(run, i, k)]
        for object_id in apart:
            self._correct(run, object_id, run.matched[object_id], decided)
        confirmed = [i for i in sorted(run.agreed) if i not in apart]
        self._recognize(run, self._tell_apart(run, confirmed, decided), decided)
        if run.regular:
            for object_id in sorted(set(run.shown) - set(run.matched)):
                self._not_detected(run, object_id, decided)

    def _confirm(self, run: _Run, object_id: int, k: int) -> bool:
        """Confirm an object by its detection, if its mask is there or that can't be told; returns whether."""
        found, shown, detection = self._objects[object_id], run.shown[object_id], run.detection(k)
        now, box = run.frame.frame_index, detection.bounds
        fits, expected = iou(found.moved(shown.box), box) >= FITS, found.expected(now)
        other_size = not 1 / _SIZE <= box[2] * box[3] / (found.box[2] * found.box[3]) <= _SIZE
        if not fits and other_size and iou(shown.box, expected) >= FITS > iou(expected, box):
            # A detection of part of it, or of two things as one.
            self._objects[object_id] = replace(found, misses=0)
            return True
        if not fits:
            # The mask may be the visible part of something that is partly hidden.
            held = share_inside(run.labels, object_id, shown, detection)
            part = held >= _PART and shown.area >= _CRUMB * int(detection.area().sum())
            if not part or found.disagreed + run.regular >= _DISAGREE * _HIDDEN_MISSES:
                return False
        clear = fits and run.alone(k) and detection.score >= self._settings.least_score
        if fits:
            # Masks are more exact than detections, but may lack what is hidden.
            moved = found.moved(shown.box)
            x, y, w, h = (round((one + other) / 2) for one, other in zip(moved, box, strict=True))
            box = x, y, w, h
        confirmed = found.confirmed(box, now, run.colours(k) if clear else None)
        self._objects[object_id] = (
            confirmed if fits else replace(confirmed, disagreed=found.disagreed + run.regular)
        )
        if clear:
            view = run.colours_of_mask(object_id)
            self._objects[object_id] = after_view(self._objects[object_id], view)
        run.agreed.add(object_id)
        return True

    def _tell_apart(self, run: _Run, confirmed: Collection[int], decided: Decisions) -> list[int]:
        """Put right which object is which, for objects that met others and are seen alone again.

        Args:
            confirmed: ids of the objects that are where their masks are.

        Returns:
            those of them that remain where they are.
        """
        known = self._remembered | self._objects
        visible = [i for i in run.shown if i in self._objects]
        pairs, unchanged = parted(known, visible, confirmed)
        for object_id in unchanged:
            self._objects[object_id] = settled(self._objects[object_id])
        for one, other in pairs:
            at = {other: run.matched[one]}
            if other in visible:
                at[one] = run.matched[other]
            self._exchange(one, other, lost=other not in visible)
            if one not in at:
                # It was lost where it met the other one, and is sought from there.
                box, frame = known[one].before or (known[one].box, known[one].frame)
                self._objects[one] = replace(self._objects[one], box=box, frame=frame, velocity=(0.0, 0.0))
                self._give_up(one, "unconfirmed", decided)
                run.labels[run.labels == one] = 0
            run.agreed -= at.keys()
            for object_id, k in at.items():
                self._place(run, object_id, k, "drifted", decided)
        moved = {i for pair in pairs for i in pair}
        return [i for i in confirmed if i not in moved]

    def _recognize(self, run: _Run, confirmed: Collection[int], decided: Decisions) -> None:
        """Give new objects that are lost ones the ids of those."""
        known = self._remembered | self._objects
        placed = {new.object_id for new in decided.masks}
        lost = [
            i
            for i in known
            if not (i in run.shown and i in self._objects)
            and i not in placed
            and not self._has_left(i, run.frame)
        ]
        candidates = [candidate.box for candidate in self._candidates]
        pairs = lost_before(known, lost, confirmed, candidates, run.frame.frame_index, self._long)
        for new, old in pairs:
            self._exchange(new, old, lost=True)
            del self._objects[new]
            decided.gone[new] = "unconfirmed"
            run.labels[run.labels == new] = 0
            self._place(run, old, run.matched[new], "found_again", decided)

    def _exchange(self, one: int, other: int, *, lost: bool) -> None:
        """Exchange where two objects are, the second of which may be lost; their looks stay theirs."""
        a, b = (self._objects.get(i) or self._remembered[i] for i in (one, other))
        self._remembered.pop(other, None)
        self._objects[one] = moved_to(a, b, visible=not lost)
        self._objects[other] = moved_to(b, a, visible=True)

    def _correct(self, run: _Run, object_id: int, k: int, decided: Decisions) -> None:
        """An object's mask is not where its detection is: replace it if that is certain, or goes on."""
        found, shown, detection = self._objects[object_id], run.shown[object_id], run.detection(k)
        if self._is_shared(run, object_id, k) or detection.score < self._settings.least_score:
            self._objects[object_id] = replace(found, misses=0)
            return
        elsewhere = share_inside(run.labels, object_id, shown, detection) < _ELSEWHERE
        disagreed = found.disagreed + run.regular
        replaced = elsewhere or disagreed >= _DISAGREE
        if replaced and self._place(run, object_id, k, "drifted", decided):
            return
        moved = found.confirmed(detection.bounds, run.frame.frame_index, None)
        self._objects[object_id] = replace(moved, disagreed=disagreed)

    def _place(self, run: _Run, object_id: int, k: int, reason: str, decided: Decisions) -> bool:
        """Give an object a new mask: that of a detection, if any of it is nobody else's; returns whether."""
        detection, now = run.detection(k), run.frame.frame_index
        mask = self._mask_of(detection, run.frame) & ~self._certain(run, run.labels)
        if not mask.any():
            return False
        found = self._remembered.pop(object_id, None) or self._objects[object_id]
        found = found.confirmed(detection.bounds, now, run.colours(k) if run.alone(k) else None)
        self._objects[object_id] = replace(found, seen=now)
        run.agreed.add(object_id)
        run.lost.pop(object_id, None)
        run.mark(mask, object_id)
        decided.gone.pop(object_id, None)
        category = found.category or detection.category
        decided.masks.append(NewObject(object_id, mask, category, detection.score, reason))
        return True

    def _certain(self, run: _Run, labels: NDArray[np.int32]) -> NDArray[np.bool_]:
        """H x W, where labels are of users' objects, or of objects that this run confirmed."""
        unsure = [i for i in self._objects if i not in run.agreed]
        certain: NDArray[np.bool_] = (labels != 0) & ~np.isin(labels, unsure)
        return certain

    def _is_shared(self, run: _Run, object_id: int, k: int) -> bool:
        """Whether a detection holds another object's mask too: it may be of both, or of the other one."""
        detection = run.detection(k)
        return any(
            share_inside(run.labels, other, shown, detection) >= _HELD
            and shown.area >= _CRUMB * int(detection.area().sum())
            and run.matched.get(other, k) == k
            for other, shown in run.shown.items()
            if other != object_id and other in self._objects
        )

    def _not_detected(self, run: _Run, object_id: int, decided: Decisions) -> None:
        """No detection was matched with an object's mask."""
        found, shown = self._objects[object_id], run.shown[object_id]
        x, y = centre_of(shown.box)
        w, h = found.box[2:]
        place = inside((round(x - w / 2), round(y - h / 2), w, h), run.frame)
        if not run.look.covers(place):
            return
        hidden = any(
            share_inside(run.labels, object_id, shown, run.detection(k)) >= _HELD
            for k in run.matched.values()
        )
        now, ratio = run.frame.frame_index, shown.box[2] * shown.box[3] / (found.box[2] * found.box[3])
        near = distance(found.expected(now), shown.box) <= reach(now - found.frame, self._long)
        missed = replace(found, misses=found.misses + 1)
        limit = self._settings.give_up_looks
        if near and 1 / _SIZE <= ratio <= _SIZE:
            # It moves on as one thing, so it is where its mask is, whatever the detector sees.
            moved = found.confirmed(shown.box, now, None)
            missed = replace(moved, hits=found.hits, misses=found.misses + 1)
            limit *= _HIDDEN_MISSES if hidden or found.hits >= _HIDDEN_MISSES * limit else 1
        found = self._objects[object_id] = missed
        if found.misses >= limit:
            self._give_up(object_id, "unconfirmed", decided)
            run.labels[run.labels == object_id] = 0

    # --- other detections ------------------------------------------------------------------------

    def _restrict(self, run: _Run) -> None:
        """What an object holds beside its detection is of another thing."""
        run.tracked = run.labels.copy()
        for object_id, k in run.matched.items():
            if object_id in self._objects:
                boxes = (run.detection(k).bounds, self._objects[object_id].expected(run.frame.frame_index))
                _keep_inside(run.tracked, object_id, [_enlarged(box) for box in boxes])

    def _unknown(self, run: _Run) -> dict[int, Detection]:
        """Detections of nothing that is tracked, by position."""
        return {
            k: run.detection(k)
            for k in run.free
            if k not in run.matched.values()
            and run.is_certain(k, self._settings.least_score)
            and not _is_tracked(run.detection(k), run.tracked)
        }

    def _find_again(self, run: _Run, room: int, decided: Decisions) -> int:
        """Continue lost objects on their detections; returns the room that is left."""
        certain = np.where(self._certain(run, run.tracked), run.tracked, 0)
        for object_id, k in sorted(run.lost.items()):
            if _is_tracked(run.detection(k), certain):
                continue
            if object_id in self._remembered and room <= 0:
                self._waiting += 1
                continue
            needs_room = object_id in self._remembered
            if self._place(run, object_id, k, "found_again", decided):
                room -= needs_room
        return room

    def _start(self, run: _Run, unknown: dict[int, Detection], room: int, decided: Decisions) -> None:
        """Start objects from candidates that were detected often enough."""
        now = run.frame.frame_index
        least = self._settings.least_score
        weak = [run.detection(k).bounds for k in run.free if run.detection(k).score < least]
        self._candidates, confirmed = confirmed_among(
            self._candidates,
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
            if _is_tracked(detection, run.tracked):
                continue
            if room <= 0:
                self._waiting += 1
                continue
            mask = self._mask_of(detection, run.frame) & (run.tracked == 0)
            if not mask.any():
                continue
            new = NewObject(self._next_id, mask, detection.category, detection.score)
            self._next_id += 1
            room -= 1
            colours = run.colours(position[id(detection)]) if self._instances else None
            self._objects[new.object_id] = FoundObject(
                detection.bounds, now, now, detection.category, colours, hits=1, born=(detection.bounds, now)
            )
            self._candidates.remove(candidate)
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
        labels, homes = _packed(self._labels), _packed(self._homes)
        detector = self._detector.to_bytes()
        facts: dict[str, Any] = {
            "next_id": self._next_id,
            "next_look": self._next_look,
            "looked": self._looked,
            "instances": self._instances,
            "candidates": [c.to_json() for c in self._candidates],
            "objects": [[i, found.to_json()] for i, found in self._objects.items()],
            "remembered": [[i, found.to_json()] for i, found in self._remembered.items()],
            "waiting": self._waiting,
            "labelled": sorted(self._labelled),
            "saw": self._saw,
            "labels": None if self._labels is None else list(self._labels.shape),
            "homes": None if self._homes is None else list(self._homes.shape),
            "lengths": [len(labels), len(homes), len(detector)],
        }
        text = json.dumps(facts, sort_keys=True).encode()
        return _MAGIC + struct.pack("<I", len(text)) + text + labels + homes + detector

    def from_bytes(self, blob: bytes) -> None:
        """Restore the state from `to_bytes`. Raises ValueError on bytes that are damaged or foreign."""
        try:
            if not blob.startswith((_MAGIC, _OLD_MAGIC)):
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
            if blob.startswith(_OLD_MAGIC):
                facts = _updated(facts, labels)
            candidates = [Candidate.from_json(values) for values in facts["candidates"]]
            waiting = int(facts["waiting"])
            labelled = {int(i) for i in facts["labelled"]}
            objects, remembered = (
                {int(i): FoundObject.from_json(values) for i, values in facts[name]}
                for name in ("objects", "remembered")
            )
            next_id, next_look, looked = (int(facts[name]) for name in ("next_id", "next_look", "looked"))
            saw = int(facts.get("saw", -1))  # earlier versions did not store it
            instances = bool(facts["instances"])
            self._detector.from_bytes(parts[2])
        except (struct.error, zlib.error, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged or foreign bytes of the object finder: {error}") from error
        self._labels, self._labelled, self._homes, self._saw = labels, labelled, homes, saw
        self._candidates, self._objects, self._remembered = candidates, objects, remembered
        self._waiting, self._looked, self._instances = waiting, looked, instances
        self._next_id, self._next_look = max(self._next_id, next_id), next_look


class _Run:
    """One run of the detector: what it found, and the labels as they are changed by decisions."""

    def __init__(self, frame: Frame, look: Look, labels: NDArray[np.int32], given: Collection[int]) -> None:
        self.frame, self.look, self.labels, self.given = frame, look, labels, given
        self.tracked = labels  # without what objects hold of other things
        self.regular = True
        self.weight = 1  # what its detections and misses count
        self.free: list[int] = []  # positions of the detections that are not of users' objects
        self.distinct: frozenset[int] = frozenset()  # positions of those that are not another one's again
        self.shown: dict[int, Shown] = {}
        self.matched: dict[int, int] = {}  # object with a mask -> position of its detection
        self.lost: dict[int, int] = {}  # object without one -> position of its detection
        self.agreed: set[int] = set()  # objects that are where their masks are
        self._colours: dict[int, Colours] = {}

    def detection(self, k: int) -> Detection:
        return self.look.detections[k]

    def is_certain(self, k: int, least_score: float) -> bool:
        """Whether a detection may be of something new, or of an object whose mask is elsewhere."""
        return k in self.distinct and self.detection(k).score >= least_score

    def colours(self, k: int) -> Colours:
        if k not in self._colours:
            self._colours[k] = colours_of(self.frame.image, self.detection(k))
        return self._colours[k]

    def colours_of_mask(self, object_id: int) -> Colours:
        """The colours where an object's mask was on the previous frame."""
        return colours_of(self.frame.image, Detection(self.labels == object_id, self.shown[object_id].box))

    def alone(self, k: int) -> bool:
        """Whether no other detection covers much of a detection."""
        box = self.detection(k).bounds
        most = _ALONE * box[2] * box[3]
        return not any(
            overlap(box, other.bounds) > most for at, other in enumerate(self.look.detections) if at != k
        )

    def mark(self, mask: NDArray[np.bool_], object_id: int) -> None:
        for labels in (self.labels, self.tracked):
            labels[labels == object_id] = 0
            labels[mask] = object_id


def _packed(labels: NDArray[np.int32] | None) -> bytes:
    return b"" if labels is None else zlib.compress(np.ascontiguousarray(labels, np.int32).tobytes(), 1)


def _unpacked(blob: bytes, shape: list[int] | None) -> NDArray[np.int32] | None:
    return None if shape is None else np.frombuffer(zlib.decompress(blob), np.int32).reshape(shape)


def _updated(facts: dict[str, Any], labels: NDArray[np.int32] | None) -> dict[str, Any]:
    """Facts of the previous version, which kept only the last visible frame of an object, as this one's."""
    last_seen = {int(i): int(seen) for i, seen in facts["last_seen"]}
    shown = {} if labels is None else shown_in(labels, list(last_seen))
    objects = {
        i: FoundObject(shown[i].box if i in shown else (0, 0, 1, 1), seen, seen)
        for i, seen in last_seen.items()
    }
    return {
        **facts,
        "candidates": [{**values, "unsearched": 0} for values in facts["candidates"]],
        "objects": [[i, found.to_json()] for i, found in objects.items()],
        "remembered": [],
        "looked": -1,
        "instances": False,
    }


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


def _distinct(look: Look) -> list[int]:
    """Positions of the detections without those that are another one's again, or that are of two at once."""
    if not look.instances:
        return list(range(len(look.detections)))
    kept: list[int] = []
    for k in sorted(range(len(look.detections)), key=lambda at: (-look.detections[at].score, at)):
        box = look.detections[k].bounds
        others = [look.detections[at].bounds for at in kept]
        if not any(overlap(box, other) >= _SAME * smaller_area(box, other) for other in others):
            kept.append(k)
    return sorted(kept)


def _enlarged(box: Box) -> Box:
    x, y, w, h = box
    dx, dy = round(w * _AROUND / 2), round(h * _AROUND / 2)
    return x - dx, y - dy, w + 2 * dx, h + 2 * dy


def _keep_inside(labels: NDArray[np.int32], object_id: int, boxes: Iterable[Box]) -> None:
    """Remove the part of an object that is in none of the boxes from the labels."""
    outside = labels == object_id
    for x, y, w, h in boxes:
        outside[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = False
    labels[outside] = 0
