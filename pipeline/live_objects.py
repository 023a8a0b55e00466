"""LiveObjects: who is tracked on a live stream. Objects come by prompts or are found, go when asked or lost.

Each that comes or goes is told as it happens: a frame may fail half-way, and what is gone by then stays gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import BoxSegmenter
from pipeline.errors import PromptError
from pipeline.finder import ObjectFinder
from pipeline.live_unwritten import Unwritten
from pipeline.masks import tracked_records
from pipeline.prompts import PromptSet, resolve
from pipeline.records import Frame, MaskRecord
from xmem_core import StepResult, TrackerState

Masks = dict[int, NDArray[np.bool_]]
"""By object id, (height, width): what the segmenter is prompted with."""


class LiveObjects:
    """The objects of one stream. The thread that steps the stream uses it.

    Args:
        state: what the segmenter remembers. Objects leave it here; they enter it when the step is done that
            their masks prompt.
        boxes: makes masks of boxes.
        most: objects at the same time.
        unwritten: told who comes and goes.
        finder: finds objects by itself; None without a detector.
        categories: of the objects in the state, by id.

    Attributes:
        changed: whether objects came or went; set back by whoever takes a snapshot.
    """

    def __init__(
        self,
        state: TrackerState,
        boxes: BoxSegmenter,
        most: int,
        unwritten: Unwritten,
        *,
        finder: ObjectFinder | None = None,
        categories: Mapping[int, str | None] | None = None,
    ) -> None:
        self.state, self.finder = state, finder
        self.categories = dict(categories or {})
        self.changed = False
        self._boxes, self._most, self._unwritten = boxes, most, unwritten

    def living(self) -> dict[int, str | None]:
        """Categories of the objects that are tracked, by id."""
        return {i: self.categories.get(i) for i in self.state.object_ids}

    @property
    def object_ids(self) -> Sequence[int]:
        """Ids of the objects that are tracked. Any thread may ask."""
        return self.state.object_ids

    @property
    def detected_ids(self) -> Sequence[int]:
        """Ids of those that the detector started and no prompt corrected. Any thread may ask."""
        started = () if self.finder is None else self.finder.started
        return [i for i in started if i in self.state.object_ids]

    def remove(
        self, frame: Frame, object_id: int, reason: str, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Track an object no longer, from this frame on."""
        self.state.remove_objects([object_id])
        if self.finder is not None:
            self.finder.release([object_id])
        self._unwritten.happened(frame, "object_removed", object_id=object_id, reason=reason, detail=detail)
        self.categories.pop(object_id, None)
        self.changed = True

    def prompt(self, frame: Frame, content: Mapping[str, Any]) -> Masks:
        """The masks of a request's prompts, on this frame. Detected objects give way where there is no room.

        Args:
            content: of a prompts file, in the words of a record.

        Raises:
            PromptError: they cannot be had, or there would be too many objects of prompts alone; then nothing
                has changed.
        """
        asked = PromptSet.from_record(content).at(0)
        ids = {entry.object_id for entry in asked}
        living = {*self.state.object_ids, *ids}
        yielding = set(self.detected_ids) - ids
        staying = living - yielding
        if len(staying) > self._most:
            raise PromptError(f"{len(staying)} objects would be tracked, {self._most} are allowed")
        resolved = resolve(asked, frame, self._boxes)
        if self.finder is not None:
            excess = max(0, len(living) - self._most)
            for object_id, unseen in self.finder.make_room(frame.frame_index, excess, yielding).items():
                self.remove(frame, object_id, "made_room", {"for": sorted(ids), "unseen_frames": unseen})
            self.finder.release(ids)
        for object_id in resolved.masks:
            known = object_id in self.state.object_ids
            category = resolved.categories.get(object_id)
            if category is not None or not known:
                self.categories[object_id] = category
            kind, detail = ("corrected", None) if known else ("object_added", {"category": category})
            self._unwritten.happened(frame, kind, object_id=object_id, reason="prompt", detail=detail)
        if self.finder is not None:
            self.finder.reserve(resolved.masks)
        self.changed = True
        return dict(resolved.masks)

    def look(self, frame: Frame, masks: Masks) -> None:
        """Have the finder look: what was lost for long goes, what is found comes.

        Args:
            masks: prompts of this frame; those of the objects found are added.
        """
        if self.finder is None:
            return
        for object_id in self.finder.given_up(frame.frame_index):
            if object_id in self.state.object_ids and object_id not in masks:
                self.remove(frame, object_id, "out_of_sight")
        for new in self.finder.look(frame, self.state.object_ids, masks):
            masks[new.object_id] = new.mask
            self.categories[new.object_id] = new.category
            detail = {"score": round(new.score, 4), "category": new.category}
            self._unwritten.happened(
                frame, "object_added", object_id=new.object_id, reason="detector", detail=detail
            )
            self.changed = True

    def seen(self, frame: Frame, result: StepResult) -> list[MaskRecord]:
        """The frame was tracked: its records. The finder learns what is where."""
        ids = result.object_ids
        if not ids and self.finder is None:
            return []  # nothing needs the label map: it stays on the device
        label_map = result.label_map.cpu().numpy()
        if self.finder is not None:
            self.finder.saw(frame.frame_index, label_map, ids)
        if not ids:
            return []
        return tracked_records(result, label_map, frame, self.categories)
