"""Backward tracking: from each object's first prompt to the beginning of the video.

A stream of the direction `backward` or `both` is tracked in two passes. The first one goes backward, from
the latest first prompt down to frame 0, with memory as forward. It is an ordinary stream: its source is the
video read backward (`pipeline.video.reversed_video`), and its rows, snapshots and record are in a folder of
its own,

    OUT/backward/<stream>/<digest of what determines its rows>/

so that it is committed exactly once and resumed after any interruption like every other stream. The second
pass goes forward and adds to each frame the backward rows of the objects whose first prompt is later. So the
files in `tracks/` are written once, in order, and readers see one row per frame and object. The folder is
removed once all its rows are merged. Forward rows do not depend on the direction.

An object goes backward from its first prompt only; corrections act forward. A removal before an object's
first prompt ends it backward: it has no rows on that frame and before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.base.errors import SourceError
from pipeline.base.records import Frame, MaskRecord
from pipeline.prompts.resolving import PromptObject, PromptSet, ResolvedPrompt
from pipeline.tracking.frame_prompts import FramePrompts
from pipeline.tracking.settings import BACKWARD, FORWARD, DetectorSettings, TrackSettings
from pipeline.tracking.stream_record import StreamIdentity
from pipeline.tracks.reader import TrackReader
from pipeline.video.sources import VideoSource


@dataclass(frozen=True)
class BackwardPlan:
    """What a backward pass tracks. Frame k of the pass is frame `last` - k of the video.

    Args:
        last: frame of the latest first prompt, where the pass begins.
        rows_until: frames from this one on get no rows of the pass.
        starts: frame of the first prompt of each object of the pass.
        prompts: the objects' first prompts and removals, on frames of the pass.
        given: all prompts on the frames of these first prompts; they determine how overlaps are resolved.
    """

    last: int
    rows_until: int
    starts: dict[int, int]
    prompts: PromptSet
    given: PromptSet

    @classmethod
    def of(cls, prompts: PromptSet, direction: str) -> BackwardPlan | None:
        """The backward pass of prompts; None if there is nothing to track backward."""
        if direction == FORWARD:
            return None
        starts = first_prompts(prompts)
        if direction != BACKWARD:
            starts = {object_id: frame for object_id, frame in starts.items() if frame}
        if not starts:
            return None
        last = max(starts.values())
        objects: dict[int, tuple[PromptObject, ...]] = {}
        for frame in sorted(set(starts.values()), reverse=True):
            own = tuple(e for e in prompts.at(frame) if starts.get(e.object_id) == frame)
            objects[last - frame] = own
        removals: dict[int, tuple[int, ...]] = {}
        for object_id, start in starts.items():
            ends = [f for f, ids in prompts.removals.items() if object_id in ids and f < start]
            if ends:
                frame = last - max(ends)
                removals[frame] = (*removals.get(frame, ()), object_id)
        given = PromptSet({frame: prompts.at(frame) for frame in sorted(set(starts.values()))})
        rows_until = last + 1 if direction == BACKWARD else last
        return cls(last, rows_until, starts, PromptSet(objects, removals), given)

    @property
    def frames(self) -> int:
        """Number of frames of the pass."""
        return self.last + 1

    def digest(self, source: VideoSource, settings: TrackSettings) -> str:
        """16 hex digits; the same for the same rows of the pass."""
        facts = [StreamIdentity.of(source, settings, self.prompts).digest(), self.given.to_record()]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def first_prompts(prompts: PromptSet) -> dict[int, int]:
    """The frame of each object's first prompt."""
    starts: dict[int, int] = {}
    for frame in sorted(prompts.objects):
        for entry in prompts.objects[frame]:
            starts.setdefault(entry.object_id, frame)
    return starts


def first_changed_frame(old: PromptSet, new: PromptSet, direction: str) -> int | None:
    """The first frame whose rows may differ between two sets of prompts; None if all are equal.

    A change of what a backward pass tracks may change the rows of every frame.
    """
    if BackwardPlan.of(old, direction) != BackwardPlan.of(new, direction):
        return 0
    return old.first_difference(new)


def backward_settings(settings: TrackSettings) -> TrackSettings:
    """The settings of a stream's backward pass: prompts only, in full length, to no sink."""
    commit = replace(settings.commit, max_frames=None, sinks=(), keep_state=False)
    return replace(settings, direction=FORWARD, detector=DetectorSettings(), commit=commit)


class BackwardPrompts(FramePrompts):
    """Resolves the prompts of a backward pass as the forward pass does, each box once for both.

    Args:
        forward: resolves and keeps the prompts of the stream.
        prompts: all prompts of the stream.
        last: frame where the pass begins.
        keep: makes resolved prompts durable, see `FramePrompts.at`.
    """

    def __init__(
        self, forward: FramePrompts, prompts: PromptSet, last: int, keep: Callable[[], None]
    ) -> None:
        super().__init__("", None, [])
        self._forward, self._all, self._last, self._keep = forward, prompts, last, keep

    def at(self, frame: Frame, prompts: PromptSet, keep: Callable[[], None]) -> ResolvedPrompt | None:
        """As `FramePrompts.at`, for a frame of the pass."""
        ids = [entry.object_id for entry in prompts.at(frame.frame_index)]
        if not ids:
            return None
        shown = replace(frame, frame_index=self._last - frame.frame_index)
        found = self._forward.at(shown, self._all, self._keep)
        assert found is not None
        return ResolvedPrompt({i: found.masks[i] for i in ids}, {i: found.categories.get(i) for i in ids})


class BackwardRows:
    """The rows of a finished backward pass, by frame of the video."""

    def __init__(self, plan: BackwardPlan, reader: TrackReader) -> None:
        self._plan, self._reader = plan, reader

    def at(self, frame: Frame) -> list[MaskRecord]:
        """The rows that the pass adds to a frame.

        Raises:
            SourceError: the frame had another time when the pass was tracked.
        """
        number = frame.frame_index
        if number >= self._plan.rows_until:
            return []
        # At its first prompt, an object has a row of the forward pass if there is one.
        merged = self._plan.rows_until == self._plan.last
        found = [
            replace(record, frame_index=number)
            for record in self._reader.at(self._plan.last - number)
            if not (merged and self._plan.starts[record.object_id] == number)
        ]
        if any(record.pts_seconds != frame.pts_seconds for record in found):
            raise SourceError(
                f"frame {number} is at {frame.pts_seconds} s, and was at {found[0].pts_seconds} s in the "
                "backward pass: the video has changed, or is read by another version of FFmpeg"
            )
        return found
