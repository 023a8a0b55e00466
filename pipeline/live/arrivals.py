"""Prepares a live frame for tracking: applies pending requests and runs the detector."""

from __future__ import annotations

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame
from pipeline.detect.lifecycle import ObjectFinder
from pipeline.live.record import LiveRecord, Request
from pipeline.live.requests import LiveRequests
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.tracking.objects import Masks, TrackedObjects

IDS_AHEAD = 16  # object ids that are reserved beyond those needed


class Arrivals:
    """Prepares the frames of one live stream. The thread that steps the stream uses it.

    Args:
        objects, requests, record: of the stream.
        boxes: makes masks of the boxes of prompts.
        max_objects: that may be found on one look.

    Attributes:
        applying: numbers of the requests that are done on the frame that was prepared last; set back by
            whoever tracked it.
    """

    def __init__(
        self,
        objects: TrackedObjects,
        requests: LiveRequests,
        record: LiveRecord,
        boxes: BoxSegmenter,
        max_objects: int,
    ) -> None:
        self.applying: tuple[int, ...] = ()
        self._objects, self._requests, self._record = objects, requests, record
        self._boxes, self._max_objects = boxes, max_objects

    def prepare(self, frame: Frame) -> Masks:
        """A frame is about to be tracked. The masks that the segmenter is to be prompted with on it."""
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
            self._objects.look(frame, masks)
        return masks

    def _apply(self, frame: Frame, request: Request, masks: Masks) -> None:
        for object_id in request.content.get("remove", ()):
            if not self._objects.remove(frame, object_id, "requested"):
                cause = f"no object {object_id} is tracked that could be removed"
                self._requests.reject(request, cause)
        if "prompts" in request.content:
            try:
                asked = PromptSet.from_record(request.content["prompts"]).at(0)
                self._objects.check_room([entry.object_id for entry in asked])
                masks.update(self._objects.prompt(frame, resolve(asked, frame, self._boxes)))
            except PromptError as error:
                self._requests.reject(request, str(error))

    def _reserve_ids(self, finder: ObjectFinder) -> None:
        """For all objects that may be found on the next look."""
        # Ids that requests were promised lie below what is reserved, so they must be known here as well.
        while True:
            # Requests that come from here on get ids above this.
            free = self._record.ids_reserved
            finder.reserve(self._requests.promised_ids())
            if finder.next_id + self._max_objects <= free:
                break
            self._record.reserve(ids=finder.next_id + self._max_objects + IDS_AHEAD)
