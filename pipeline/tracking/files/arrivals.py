"""Prepares a video file's frame for tracking: edits of the memory, prompts, removals, detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame
from pipeline.prompts.resolving import PromptObject, PromptSet
from pipeline.tracking.files.chunk_rows import ChunkRows
from pipeline.tracking.frame_prompts import FramePrompts
from pipeline.tracking.objects import Masks, TrackedObjects
from pipeline.tracking.settings import BACKWARD, TrackSettings
from pipeline.tracking.small_objects import has_small_object
from pipeline.tracking.snapshots.memory_edit import COPY, PlannedEdit
from pipeline.tracking.snapshots.object_states import read_object
from pipeline.tracking.stream_record import StreamSummary
from pipeline.tracks.store import StreamStore
from xmem_core import Prompt, TrackerState, VideoSegmenter
from xmem_core.object_copy import ObjectCopy


@dataclass(frozen=True)
class Arrivals:
    """What precedes the step on each frame of a stream's pass.

    Args:
        settings, segmenter, store, summary: those of the stream.
        prompts: what to track, made into masks by `frame_prompts`.
        starts: frame of each object's first prompt, in passes of which a part is tracked backward.
        edits: edits of the memory that are still to be made, in order; taken from when they are made.
        rows: of the chunk under way; gets the events.
        objects: the tracked objects.
        keep_prompts: called before a row depends on a mask that was made from a box.
    """

    settings: TrackSettings
    segmenter: VideoSegmenter
    store: StreamStore
    summary: StreamSummary
    frame_prompts: FramePrompts
    prompts: PromptSet
    starts: Mapping[int, int]
    edits: list[PlannedEdit]
    rows: ChunkRows
    objects: TrackedObjects
    keep_prompts: Callable[[], None]

    @property
    def copies_planned(self) -> int:
        """Number of objects of other streams that are still to be copied."""
        return sum(planned.edit.kind == COPY for planned in self.edits)

    def arrive(self, frame: Frame) -> Prompt | None:
        """Do what precedes the step on a frame; returns the masks given on it."""
        for loss in frame.losses:
            self.rows.add(loss)
        self._edit_memory(frame)
        self.objects.arrive(frame)
        if self.settings.direction == BACKWARD:
            self._pass_on(frame)
            return None
        prompt = self.frame_prompts.at(frame, self.prompts, self.keep_prompts)
        for object_id in self.prompts.removals_at(frame.frame_index):
            if self.starts.get(object_id, 0) > frame.frame_index:
                continue  # it ended the object backward
            if not self.objects.remove(frame, object_id, "requested") and self.rows.is_new(frame):
                self.summary.warn(
                    f"frame {frame.frame_index}: no object {object_id} is tracked that could be removed"
                )
        for entry in self.prompts.at(frame.frame_index):
            if entry.state is not None:
                self._begin_from_state(frame, entry)
        masks: Masks = {} if prompt is None else self.objects.prompt(frame, prompt)
        self.objects.look(frame, masks)
        self._choose_size(frame, masks)
        return Prompt(masks) if masks else None

    def _choose_size(self, frame: Frame, masks: Masks) -> None:
        """Let the network see the video larger if an object of the first frame with prompts is small."""
        size = self.settings.model.small_size
        if size is None or not masks or self.objects.state.memory is not None:
            return
        height, width = frame.size
        seen = self.segmenter.network_size(height, width)
        if has_small_object(masks, seen[0] / height):
            self.objects.state.network_size = self.segmenter.network_size(height, width, size)

    def _pass_on(self, frame: Frame) -> None:
        """Record what begins on a frame that gets rows of the backward pass only."""
        for entry in self.prompts.at(frame.frame_index):
            if self.starts[entry.object_id] == frame.frame_index:
                detail = {"category": entry.category}
                self.rows.happened(
                    frame, "object_added", object_id=entry.object_id, reason="prompt", detail=detail
                )

    def _edit_memory(self, frame: Frame) -> None:
        """Make the edits that take effect before a frame."""

        def begin(state: TrackerState, object_id: int, copy: ObjectCopy) -> None:
            self.segmenter.adopt(state, object_id, copy, frame.size)

        while self.edits and self.edits[0].frame <= frame.frame_index:
            edit = self.edits.pop(0).edit
            detail = edit.to_json()
            try:
                edit.apply(self.objects.state, frame.frame_index - 1, self.store.object_copies, begin)
                if edit.kind == COPY and edit.object_id is not None:
                    self.objects.copied(frame, edit.object_id, edit.category)
            except ValueError as error:
                # It was checked on the newest snapshot, after which other frames followed.
                detail["refused"] = str(error)
                if self.rows.is_new(frame):
                    self.summary.warn(f"frame {frame.frame_index}: {edit.kind} was not possible: {error}")
            self.objects.memory_edited(frame, edit, detail)

    def _begin_from_state(self, frame: Frame, entry: PromptObject) -> None:
        """Start an object from another stream's state, as it was when this was done first."""
        assert entry.state is not None
        copies = self.store.object_copies
        about = f"{frame.frame_index} {entry.object_id} {entry.state.to_json()}"
        key = copies.key(about.encode("utf-8", "surrogatepass"))
        if not copies.holds(key):
            share = self.segmenter.memory_config.max_long_term_elements // len(self.prompts.states)
            copy, _ = read_object(entry.state, self.store, self.segmenter.fingerprint, share)
            # Durable before any row that depends on it.
            copies.add(copy.to_bytes(), about)
        try:
            copy = ObjectCopy.from_bytes(copies.read(key))
            self.segmenter.adopt(self.objects.state, entry.object_id, copy, frame.size)
        except ValueError as error:
            raise PromptError(f"object {entry.object_id} on frame {frame.frame_index}: {error}") from error
        self.objects.copied(frame, entry.object_id, entry.category)
