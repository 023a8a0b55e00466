"""TrackedObjects: the objects of one stream, added by prompts or detections, removed on request or when lost.

Each addition and removal is recorded as an event at once: a frame may fail half-way, and removals made before
the failure stay in effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame, MaskRecord
from pipeline.detect.lifecycle.object_finder import ObjectFinder
from pipeline.prompts.resolving import ResolvedPrompt
from pipeline.tracking.snapshots.memory_edit import MemoryEdit
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.edit_log import EDITED
from pipeline.tracks.masks import tracked_records
from xmem_core import StepResult, TrackerState

# Pixels of a frame times objects and background up to which records are made in a thread: 16 MB.
_MOST_ASIDE = 4 << 20

Masks = dict[int, NDArray[np.bool_]]
"""Masks of shape (height, width) by object id; the segmenter's prompts."""


class EventRecorder(Protocol):
    """Records the events of a stream; `values` are fields of `Event` besides frame, times and kind."""

    def happened(self, frame: Frame, kind: str, **values: Any) -> None: ...


class TrackedObjects:
    """The objects of one stream. To be used by the thread that steps the stream.

    For each frame, call in order: `arrive`, removals and prompts, `look`, and, after tracking, `seen`.

    Args:
        state: the segmenter's state. Objects are removed from it here; the step that gets their masks as
            prompts adds them.
        events: records which objects are added and removed.
        most: maximum number of objects at the same time, which also applies to prompts; prompts displace
            detected objects. None: all prompts are accepted.
        finder: starts objects from detections; None without a detector.
        categories: categories of the objects in the state, by id.
        frame_size: (height, width) of the last tracked frame; None before the first.

    Attributes:
        changed, found: whether objects were added, corrected or removed since the last snapshot: by requests
            and prompts, or by the detector. Reset by the code that takes the snapshot.
    """

    def __init__(
        self,
        state: TrackerState,
        events: EventRecorder,
        *,
        most: int | None = None,
        finder: ObjectFinder | None = None,
        categories: Mapping[int, str | None] | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.state, self.finder, self.frame_size = state, finder, frame_size
        self.categories = dict(categories or {})
        self.changed = self.found = False
        self._events, self._most = events, most

    def living(self) -> dict[int, str | None]:
        """Categories of the objects that are tracked, by id."""
        return {i: self.categories.get(i) for i in self.state.object_ids}

    @property
    def object_ids(self) -> Sequence[int]:
        """Ids of the tracked objects. Thread-safe."""
        return self.state.object_ids

    @property
    def detected_ids(self) -> Sequence[int]:
        """Ids of the objects that the detector started and no prompt has corrected. Thread-safe."""
        started = () if self.finder is None else self.finder.started
        return [i for i in started if i in self.state.object_ids]

    # --- one frame -------------------------------------------------------------------------------

    def arrive(self, frame: Frame) -> None:
        """Announce the next frame to track; records an event if the frame size has changed."""
        # Live sources report a new size themselves.
        told = any(loss.kind == "resized" and loss.reason is None for loss in frame.losses)
        if self.frame_size is not None and frame.size != self.frame_size and not told:
            detail = {"from": list(self.frame_size), "to": list(frame.size)}
            self._events.happened(frame, "resized", detail=detail)

    def memory_edited(self, frame: Frame, edit: MemoryEdit, detail: Mapping[str, Any]) -> None:
        """Record that the memory was edited before this frame."""
        self._events.happened(frame, EDITED, reason=edit.kind, object_id=edit.object_id, detail=detail)
        self.changed = True

    def copied(self, frame: Frame, object_id: int, category: str | None) -> None:
        """Record that an object was started in the state from a copy, out of sight, before this frame."""
        if self.finder is not None:
            self.finder.release([object_id])
            self.finder.reserve([object_id])
        self.categories[object_id] = category
        detail = {"category": category}
        self._events.happened(frame, "object_added", object_id=object_id, reason="copy", detail=detail)
        self.changed = True

    def make_room(self, frame: Frame, ids: Collection[int]) -> None:
        """Remove detected objects where the limit requires it for these ids, checked by `check_room`."""
        if self.finder is not None and self._most is not None:
            self._make_room(frame, sorted(ids), self.finder, self._most)

    def remove(
        self, frame: Frame, object_id: int, reason: str, detail: Mapping[str, Any] | None = None
    ) -> bool:
        """Stop tracking an object from this frame on; False if no object of this id is tracked."""
        if object_id not in self.state.object_ids:
            return False
        if self.finder is not None:
            self.finder.release([object_id])
        self._remove(frame, object_id, reason, detail)
        return True

    def _remove(
        self, frame: Frame, object_id: int, reason: str, detail: Mapping[str, Any] | None = None
    ) -> None:
        self.state.remove_objects([object_id])
        self._events.happened(frame, "object_removed", object_id=object_id, reason=reason, detail=detail)
        self.categories.pop(object_id, None)
        self.changed = True

    def rename(self, frame: Frame, object_id: int, category: str) -> bool:
        """Change an object's category from this frame on; False if no object of this id is tracked.

        A detected object counts as prompted from then on: a detector would name it again.
        """
        if object_id not in self.state.object_ids:
            return False
        if self.finder is not None:
            self.finder.release([object_id])
        detail = {"category": category, "before": self.categories.get(object_id)}
        self.categories[object_id] = category
        self._events.happened(frame, "corrected", object_id=object_id, reason="renamed", detail=detail)
        self.changed = True
        return True

    def check_room(self, ids: Collection[int]) -> None:
        """Raise PromptError if prompts for these ids exceed the limit, detected objects not counted."""
        staying = {*self.state.object_ids, *ids} - (set(self.detected_ids) - set(ids))
        if self._most is not None and len(staying) > self._most:
            raise PromptError(f"{len(staying)} objects would be tracked, {self._most} are allowed")

    def prompt(self, frame: Frame, resolved: ResolvedPrompt) -> Masks:
        """Start or correct objects from masks. Detected objects are removed where the limit requires it.

        Args:
            resolved: checked by `check_room`.

        Returns:
            the masks by object id.
        """
        ids = sorted(resolved.masks)
        if self.finder is not None:
            if self._most is not None:
                self._make_room(frame, ids, self.finder, self._most)
            self.finder.release(ids)
            self.finder.reserve(ids)
        for object_id in resolved.masks:
            known = object_id in self.state.object_ids
            category = resolved.categories.get(object_id)
            if category is not None or not known:
                self.categories[object_id] = category
            kind, detail = ("corrected", None) if known else ("object_added", {"category": category})
            self._events.happened(frame, kind, object_id=object_id, reason="prompt", detail=detail)
        self.changed = True
        return dict(resolved.masks)

    def _make_room(self, frame: Frame, ids: list[int], finder: ObjectFinder, most: int) -> None:
        excess = len({*self.state.object_ids, *ids}) - most
        if excess > 0:
            yielding = set(self.detected_ids) - set(ids)
            for object_id, unseen in finder.make_room(frame.frame_index, excess, yielding).items():
                self.remove(frame, object_id, "made_room", {"for": ids, "unseen_frames": unseen})

    def look(self, frame: Frame, masks: Masks, *, may_detect: bool = True) -> bool:
        """Run the finder: remove objects that were out of sight too long and add newly found ones.

        Args:
            masks: prompts of this frame; the masks of new objects are added to it.
            may_detect: whether the detector may run on this frame.

        Returns:
            whether it ran.
        """
        if self.finder is None:
            return False
        decided = self.finder.look(frame, self.state.object_ids, masks, may_detect=may_detect)
        for object_id, reason in decided.gone.items():
            if object_id not in masks and object_id in self.state.object_ids:
                self._remove(frame, object_id, reason)
        for new in decided.masks:
            kind = "corrected" if new.object_id in self.state.object_ids else "object_added"
            masks[new.object_id] = new.mask
            self.categories[new.object_id] = new.category
            detail = {"score": round(new.score, 4), "category": new.category}
            self._events.happened(frame, kind, object_id=new.object_id, reason=new.reason, detail=detail)
            self.found = True
        return self.finder.looked == frame.frame_index

    def seen(self, frame: Frame, result: StepResult, *, recorded: bool = True) -> list[MaskRecord]:
        """Process the result of a tracked frame and pass its label map to the finder.

        Args:
            recorded: whether to make mask records.

        Returns:
            a record of each object; empty if not `recorded`.
        """
        self.frame_size = frame.size
        ids = result.object_ids
        recorded = recorded and bool(ids)
        if not recorded and self.finder is None:
            return []  # nothing needs the label map: it stays on the device
        if recorded:
            result.begin_runs()
        if self.finder is None:
            return tracked_records(result, None, frame, self.categories)
        label_map = result.label_map.cpu().numpy()  # once: it may come off a GPU
        shown = self.finder.saw(frame.frame_index, label_map, ids)
        if not recorded:
            return []
        # Without the probabilities of all pixels, if they are on a GPU and nothing was removed.
        same = result.finds_runs and np.array_equal(shown, label_map)
        return tracked_records(result, None if same else shown, frame, self.categories)

    def seen_aside(
        self, pool: Executor, frame: Frame, result: StepResult
    ) -> Future[list[MaskRecord]] | list[MaskRecord]:
        """`seen`, with the records made in a thread while the next frame is tracked.

        Not so with a finder, which needs the label map first, nor where a thread would take much memory. On a
        GPU the thread waits for the runs, while the next frame's work is given to the device.
        """
        size = (len(result.object_ids) + 1) * frame.size[0] * frame.size[1]
        if self.finder is not None or not result.object_ids or (size > _MOST_ASIDE and not result.finds_runs):
            return self.seen(frame, result)
        self.frame_size = frame.size
        result.begin_runs()
        categories = dict(self.categories)  # the next frame may rename or remove objects

        def made() -> list[MaskRecord]:
            return tracked_records(result, None, frame, categories)

        return pool.submit(made)

    # --- storage ---------------------------------------------------------------------------------

    def snapshot(
        self, next_frame: int, run: str, previous_pts_seconds: float | None, *, rows: int, losses: int
    ) -> Callable[[], Snapshot]:
        """Copy the state after the last tracked frame; the arguments are fields of `Snapshot`.

        Returns:
            what makes a snapshot of the copy, later or in another thread. It takes several times as long.
        """
        tracker, size = self.state.frozen(), self.frame_size
        categories = tuple(self.categories.items())
        finder = None if self.finder is None else self.finder.to_bytes()

        def made() -> Snapshot:
            return Snapshot(
                next_frame=next_frame,
                tracker=tracker.to_bytes(),
                run=run,
                previous_pts_seconds=previous_pts_seconds,
                previous_size=size,
                categories=categories,
                rows=rows,
                losses=losses,
                finder=finder,
            )

        return made
