"""Prepares a live frame for tracking: applies pending requests and runs the detector."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame
from pipeline.detect.lifecycle.object_finder import ObjectFinder
from pipeline.live.record import LiveRecord, Request
from pipeline.live.requests import LiveRequests
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.tracking.objects import Masks, TrackedObjects
from pipeline.tracking.snapshots.memory_edit import COPY, MemoryEdit
from pipeline.tracks.object_copies import ObjectCopies
from xmem_core import VideoSegmenter

IDS_AHEAD = 16  # object ids reserved in advance


class Arrivals:
    """Prepares the frames of one live stream. To be used by the thread that steps the stream.

    Args:
        objects, requests, record: objects, requests and record of the stream.
        boxes: makes masks from the boxes of prompts.
        max_objects: maximum number of objects that one detector run may start.
        told: numbers of requests whose events are committed, though the state is older: an edit of the memory
            is made again, and not reported again.
        segmenter: that of the stream's state.
        copies: those of the stream.

    Attributes:
        applying: numbers of the requests applied to the frame prepared last; reset by the caller once that
            frame is tracked.
        memory_edited: whether the memory was edited since the caller reset it.
        detected: whether the detector ran on the frame prepared last.
    """

    def __init__(
        self,
        objects: TrackedObjects,
        requests: LiveRequests,
        record: LiveRecord,
        boxes: BoxSegmenter,
        max_objects: int,
        segmenter: VideoSegmenter,
        copies: ObjectCopies,
        told: Collection[int] = (),
    ) -> None:
        self.applying: tuple[int, ...] = ()
        self.memory_edited = self.detected = False
        self._told = told
        self._objects, self._requests, self._record = objects, requests, record
        self._boxes, self._max_objects = boxes, max_objects
        self._segmenter, self._copies = segmenter, copies

    def prepare(self, frame: Frame, *, may_detect: bool = True) -> Masks:
        """Prepare the next frame to track; returns the masks to prompt the segmenter with.

        Args:
            may_detect: whether the detector may run on it.
        """
        self._objects.arrive(frame)
        masks: Masks = {}
        self.applying = ()
        for request in self._requests.waiting():
            if not self._requests.refuses(request):
                self.applying += (request.number,)
                self._apply(frame, request, masks)
            self._requests.done(request)
            if masks:
                break  # prompts of two requests may cover each other; the next frame is soon here
        if self._objects.finder is not None:
            self._reserve_ids(self._objects.finder)
            self.detected = self._objects.look(frame, masks, may_detect=may_detect)
        return masks

    def _apply(self, frame: Frame, request: Request, masks: Masks) -> None:
        for object_id in request.content.get("remove", ()):
            if not self._objects.remove(frame, object_id, "requested"):
                cause = f"no object {object_id} is tracked that could be removed"
                self._requests.reject(request, cause)
        if "rename" in request.content:
            named = request.content["rename"]
            if not self._objects.rename(frame, named["id"], named["category"]):
                self._requests.reject(request, f"no object {named['id']} is tracked that could be renamed")
        if "memory" in request.content:
            self._edit_memory(frame, request)
        if "prompts" in request.content:
            try:
                asked = PromptSet.from_record(request.content["prompts"]).at(0)
                self._objects.check_room([entry.object_id for entry in asked])
                resolved = resolve(asked, frame, self._boxes, self._segmenter.aside)
                masks.update(self._objects.prompt(frame, resolved))
            except PromptError as error:
                self._requests.reject(request, str(error))

    def _edit_memory(self, frame: Frame, request: Request) -> None:
        edit, state = MemoryEdit.from_json(request.content["memory"]), self._objects.state
        copied = edit.object_id if edit.kind == COPY else None
        try:
            if copied is not None:
                self._objects.check_room([copied])
            edit.apply(
                state,
                state.time,
                self._copies,
                lambda state, i, copy: self._segmenter.adopt(state, i, copy, frame.size),
            )
        except (ValueError, PromptError) as error:
            self._requests.reject(request, str(error))
            return
        self.memory_edited = True
        if request.number in self._told:
            self._objects.changed = True
        else:
            self._objects.memory_edited(frame, edit, {**edit.to_json(), "request": request.number})
        if copied is not None:
            self._objects.copied(frame, copied, edit.category)
            self._objects.make_room(frame, [copied])

    def _reserve_ids(self, finder: ObjectFinder) -> None:
        """Reserve ids for all objects that the next detector run may start."""
        # Ids promised to requests lie below the reserved ones, so the finder must know them as well.
        while True:
            # Later requests get ids above this.
            free = self._record.ids_reserved
            finder.reserve(self._requests.promised_ids())
            if finder.next_id + self._max_objects <= free:
                break
            self._record.reserve(ids=finder.next_id + self._max_objects + IDS_AHEAD)
