"""Updates existing objects after a detector run: confirmed, corrected, continued or given up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Frame
from pipeline.detect.lifecycle.association import FITS, distance, matches, reach, share_inside, shown_in
from pipeline.detect.lifecycle.candidates import inside
from pipeline.detect.lifecycle.contacts import (
    after_meeting,
    after_view,
    lost_before,
    meetings,
    moved_to,
    parted,
    settled,
)
from pipeline.detect.lifecycle.decisions import Decisions, NewObject
from pipeline.detect.lifecycle.detector_run import CRUMB, HELD, DetectorRun, enlarged, is_tracked, keep_inside
from pipeline.detect.lifecycle.finder_state import FinderState
from pipeline.detect.lifecycle.found_object import centre_of, iou
from pipeline.detect.protocol import Detection
from pipeline.detect.settings import FinderSettings

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


@dataclass(frozen=True)
class Following:
    """Confirms, corrects, recognizes and gives up the objects of a stream after a run of the detector.

    Args:
        state: of the stream; changed.
        settings: when objects are given up.
        run: the run of the detector; its labels and matches are changed.
        decided: what is decided is added to it.
        mask_of: H x W bool, the mask of a detection on a frame.
    """

    state: FinderState
    settings: FinderSettings
    run: DetectorRun
    decided: Decisions
    mask_of: Callable[[Detection, Frame], NDArray[np.bool_]]

    def follow(self) -> None:
        """Match detections with the objects, and draw the consequences for those that have a mask."""
        self.state.objects = {i: f for i, f in self.state.objects.items() if i not in self.run.given}
        self.run.shown = shown_in(self.run.labels, list(self.state.objects))
        pairs = matches(
            self.state.known,
            self.run.shown,
            self.run.labels,
            {k: self.run.detection(k) for k in self.run.free},
            [k for k in self.run.free if self.run.is_certain(k, self.settings.least_score)],
            self.run.colours,
            self.run.frame.frame_index,
            self.settings.long_unseen,
        )
        self.run.matched = {i: k for i, k in pairs.items() if i in self.run.shown}
        self.run.lost = {i: k for i, k in pairs.items() if i not in self.run.shown}
        for pair in meetings(self.run.shown):
            for one, other in (pair, pair[::-1]):
                self.state.objects[one] = after_meeting(self.state.objects[one], other)
        apart = [i for i, k in sorted(self.run.matched.items()) if not self._confirm(i, k)]
        for object_id in apart:
            self._correct(object_id, self.run.matched[object_id])
        confirmed = [i for i in sorted(self.run.agreed) if i not in apart]
        self._recognize(self._tell_apart(confirmed))
        if self.run.regular:
            for object_id in sorted(set(self.run.shown) - set(self.run.matched)):
                self._not_detected(object_id)

    def _confirm(self, object_id: int, k: int) -> bool:
        """Confirm an object by its detection, if its mask is there or that can't be told; returns whether."""
        found, shown = self.state.objects[object_id], self.run.shown[object_id]
        detection = self.run.detection(k)
        now, box = self.run.frame.frame_index, detection.bounds
        fits, expected = iou(found.moved(shown.box), box) >= FITS, found.expected(now)
        other_size = not 1 / _SIZE <= box[2] * box[3] / (found.box[2] * found.box[3]) <= _SIZE
        if not fits and other_size and iou(shown.box, expected) >= FITS > iou(expected, box):
            # A detection of part of it, or of two things as one.
            self.state.objects[object_id] = replace(found, misses=0)
            return True
        if not fits:
            # The mask may be the visible part of something that is partly hidden.
            held = share_inside(self.run.labels, object_id, shown, detection)
            part = held >= _PART and shown.area >= CRUMB * int(detection.area().sum())
            if not part or found.disagreed + self.run.regular >= _DISAGREE * _HIDDEN_MISSES:
                return False
        clear = fits and self.run.alone(k) and detection.score >= self.settings.least_score
        if fits:
            # Masks are more exact than detections, but may lack what is hidden.
            moved = found.moved(shown.box)
            x, y, w, h = (round((one + other) / 2) for one, other in zip(moved, box, strict=True))
            box = x, y, w, h
        confirmed = found.confirmed(box, now, self.run.colours(k) if clear else None)
        self.state.objects[object_id] = (
            confirmed if fits else replace(confirmed, disagreed=found.disagreed + self.run.regular)
        )
        if clear and self.run.weight:
            view = self.run.colours_of_mask(object_id)
            self.state.objects[object_id] = after_view(self.state.objects[object_id], view)
        self.run.agreed.add(object_id)
        return True

    def _tell_apart(self, confirmed: Collection[int]) -> list[int]:
        """Put right which object is which, for objects that met others and are seen alone again.

        Args:
            confirmed: ids of the objects that are where their masks are.

        Returns:
            those of them that remain where they are.
        """
        known = self.state.known
        visible = [i for i in self.run.shown if i in self.state.objects]
        pairs, unchanged = parted(known, visible, confirmed)
        for object_id in unchanged:
            self.state.objects[object_id] = settled(self.state.objects[object_id])
        for one, other in pairs:
            at = {other: self.run.matched[one]}
            if other in visible:
                at[one] = self.run.matched[other]
            self._exchange(one, other, lost=other not in visible)
            if one not in at:
                # It was lost where it met the other one, and is sought from there.
                box, frame = known[one].before or (known[one].box, known[one].frame)
                moved = self.state.objects[one]
                self.state.objects[one] = replace(moved, box=box, frame=frame, velocity=(0.0, 0.0))
                self.state.give_up(one, "unconfirmed", self.decided)
                self.run.labels[self.run.labels == one] = 0
            self.run.agreed -= at.keys()
            for object_id, k in at.items():
                self._place(object_id, k, "drifted")
        exchanged = {i for pair in pairs for i in pair}
        return [i for i in confirmed if i not in exchanged]

    def _recognize(self, confirmed: Collection[int]) -> None:
        """Give new objects that are lost ones the ids of those."""
        known = self.state.known
        placed = {new.object_id for new in self.decided.masks}
        lost = [
            i
            for i in known
            if not (i in self.run.shown and i in self.state.objects)
            and i not in placed
            and not self.state.has_left(i, self.run.frame)
        ]
        candidates = [candidate.box for candidate in self.state.candidates]
        now, long = self.run.frame.frame_index, self.settings.long_unseen
        pairs = lost_before(known, lost, confirmed, candidates, now, long)
        for new, old in pairs:
            self._exchange(new, old, lost=True)
            del self.state.objects[new]
            self.decided.gone[new] = "unconfirmed"
            self.run.labels[self.run.labels == new] = 0
            self._place(old, self.run.matched[new], "found_again")

    def _exchange(self, one: int, other: int, *, lost: bool) -> None:
        """Exchange where two objects are, the second of which may be lost; their looks stay theirs."""
        a, b = (self.state.objects.get(i) or self.state.remembered[i] for i in (one, other))
        self.state.remembered.pop(other, None)
        self.state.objects[one] = moved_to(a, b, visible=not lost)
        self.state.objects[other] = moved_to(b, a, visible=True)

    def _correct(self, object_id: int, k: int) -> None:
        """An object's mask is not where its detection is: replace it if that is certain, or goes on."""
        found, shown = self.state.objects[object_id], self.run.shown[object_id]
        detection = self.run.detection(k)
        if self._is_shared(object_id, k) or detection.score < self.settings.least_score:
            self.state.objects[object_id] = replace(found, misses=0)
            return
        elsewhere = share_inside(self.run.labels, object_id, shown, detection) < _ELSEWHERE
        disagreed = found.disagreed + self.run.regular
        replaced = elsewhere or disagreed >= _DISAGREE
        if replaced and self._place(object_id, k, "drifted"):
            return
        moved = found.confirmed(detection.bounds, self.run.frame.frame_index, None)
        self.state.objects[object_id] = replace(moved, disagreed=disagreed)

    def _place(self, object_id: int, k: int, reason: str) -> bool:
        """Give an object a new mask: that of a detection, if any of it is nobody else's; returns whether."""
        detection, now = self.run.detection(k), self.run.frame.frame_index
        mask = self.mask_of(detection, self.run.frame) & ~self._certain(self.run.labels)
        if not mask.any():
            return False
        found = self.state.remembered.pop(object_id, None) or self.state.objects[object_id]
        found = found.confirmed(detection.bounds, now, self.run.colours(k) if self.run.alone(k) else None)
        self.state.objects[object_id] = replace(found, seen=now)
        self.run.agreed.add(object_id)
        self.run.lost.pop(object_id, None)
        self.run.mark(mask, object_id)
        self.decided.gone.pop(object_id, None)
        category = found.category or detection.category
        self.decided.masks.append(NewObject(object_id, mask, category, detection.score, reason))
        return True

    def _certain(self, labels: NDArray[np.int32]) -> NDArray[np.bool_]:
        """H x W, where labels are of users' objects, or of objects that this run confirmed."""
        unsure = [i for i in self.state.objects if i not in self.run.agreed]
        certain: NDArray[np.bool_] = (labels != 0) & ~np.isin(labels, unsure)
        return certain

    def _is_shared(self, object_id: int, k: int) -> bool:
        """Whether a detection holds another object's mask too: it may be of both, or of the other one."""
        detection = self.run.detection(k)
        return any(
            share_inside(self.run.labels, other, shown, detection) >= HELD
            and shown.area >= CRUMB * int(detection.area().sum())
            and self.run.matched.get(other, k) == k
            for other, shown in self.run.shown.items()
            if other != object_id and other in self.state.objects
        )

    def _not_detected(self, object_id: int) -> None:
        """No detection was matched with an object's mask."""
        found, shown = self.state.objects[object_id], self.run.shown[object_id]
        x, y = centre_of(shown.box)
        w, h = found.box[2:]
        place = inside((round(x - w / 2), round(y - h / 2), w, h), self.run.frame)
        if not self.run.look.covers(place):
            return
        hidden = any(
            share_inside(self.run.labels, object_id, shown, self.run.detection(k)) >= HELD
            for k in self.run.matched.values()
        )
        now, ratio = self.run.frame.frame_index, shown.box[2] * shown.box[3] / (found.box[2] * found.box[3])
        near = distance(found.expected(now), shown.box) <= reach(now - found.frame, self.settings.long_unseen)
        missed = replace(found, misses=found.misses + 1)
        limit = self.settings.give_up_looks
        if near and 1 / _SIZE <= ratio <= _SIZE:
            # It moves on as one thing, so it is where its mask is, whatever the detector sees.
            moved = found.confirmed(shown.box, now, None)
            missed = replace(moved, hits=found.hits, misses=found.misses + 1)
            limit *= _HIDDEN_MISSES if hidden or found.hits >= _HIDDEN_MISSES * limit else 1
        found = self.state.objects[object_id] = missed
        if found.misses >= limit:
            self.state.give_up(object_id, "unconfirmed", self.decided)
            self.run.labels[self.run.labels == object_id] = 0

    def restrict(self) -> None:
        """What an object holds beside its detection is of another thing."""
        self.run.tracked = self.run.labels.copy()
        for object_id, k in self.run.matched.items():
            if object_id in self.state.objects:
                expected = self.state.objects[object_id].expected(self.run.frame.frame_index)
                boxes = (self.run.detection(k).bounds, expected)
                keep_inside(self.run.tracked, object_id, [enlarged(box) for box in boxes])

    def find_again(self, room: int) -> int:
        """Continue lost objects on their detections; returns the room that is left."""
        certain = np.where(self._certain(self.run.tracked), self.run.tracked, 0)
        for object_id, k in sorted(self.run.lost.items()):
            if is_tracked(self.run.detection(k), certain):
                continue
            if object_id in self.state.remembered and room <= 0:
                self.state.waiting += 1
                continue
            needs_room = object_id in self.state.remembered
            if self._place(object_id, k, "found_again"):
                room -= needs_room
        return room
