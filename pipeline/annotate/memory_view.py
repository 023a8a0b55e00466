"""Memory at a frame of an annotation: its listing, its reads, and checks of edits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.annotate.gauges import gauges
from pipeline.annotate.propagation import Propagation
from pipeline.annotate.recipe import Recipe
from pipeline.base.closeable import Closing
from pipeline.base.errors import UsageError
from pipeline.memory.memory_reads import shares_at
from pipeline.tracking.files.replay import Replay
from pipeline.tracking.snapshots.memory_edit import MemoryEdit
from pipeline.tracks.masks import rle_to_mask
from pipeline.video.random_access import FrameAccess
from xmem_core import TrackerState
from xmem_core.contents import contents

# From so many frames ahead a new replay, from a snapshot, is tried.
_AHEAD = 100


class MemoryView(Closing):
    """The state before any tracked frame, by a replay that goes on from question to question. Thread-safe.

    Args:
        propagation: tracks the annotation.
        frames: pictures of the video.
    """

    def __init__(self, propagation: Propagation, frames: FrameAccess) -> None:
        self._propagation, self._frames = propagation, frames
        self._lock = threading.Lock()
        self._replay: Replay | None = None
        self._of: Recipe | None = None
        self._kept: tuple[Recipe, int, TrackerState] | None = None

    def listing(self, recipe: Recipe, frame: int) -> dict[str, Any]:
        """What is remembered before a frame, after its edits, JSON-ready.

        Raises:
            UsageError: the frame is not tracked yet.
        """
        with self._lock:
            state = self._before(recipe, frame)
            shift = frame - 1 - state.time
            entries = [
                {**asdict(entry), "frame": entry.time + shift, "use": round(entry.use, 6)}
                for entry in contents(state.memory)
            ]
            return {"frame": frame, "frames": entries, "gauges": gauges(state)}

    def reads(
        self,
        recipe: Recipe,
        frame: int,
        pixel: tuple[int, int] | None,
        object_id: int | None,
        rle: str | None,
    ) -> dict[str, Any]:
        """From which remembered frames objects are read on a frame, JSON-ready, see `memory_reads`.

        Args:
            pixel: (x, y); None: on the object's mask.
            rle: that mask; None: wherever the object is read.

        Raises:
            UsageError: the frame is not tracked yet, or there is no such pixel or object.
        """
        with self._lock:
            state = self._before(recipe, frame)
            segmenter = self._propagation.segmenter(recipe)
            image = self._frames.at(frame).image
            masks = {}
            if rle is not None and object_id is not None:
                masks[object_id] = rle_to_mask(rle, *image.shape[:2])
            found = shares_at(segmenter, state, image, frame, masks, pixel, object_id)
        return {
            "frame": frame,
            "objects": [{"id": i, "frames": [asdict(share) for share in own]} for i, own in found.items()],
        }

    def checked(self, recipe: Recipe, frame: int, edits: Sequence[MemoryEdit]) -> None:
        """Raise UsageError if the edits cannot be made before a frame, after those that it has."""
        with self._lock:
            state = _copied(self._before(recipe, frame))
        for edit in edits:
            _apply(edit, state, frame)

    def clearing(self, recipe: Recipe, frame: int) -> list[MemoryEdit]:
        """The edits that forget everything before a frame but frames with prompts and pinned ones."""
        with self._lock:
            state = self._before(recipe, frame)
            shift = frame - 1 - state.time
            entries = contents(state.memory)
        kept = {e.time + shift for e in entries if e.kind == "permanent" or e.given or e.pinned}
        gone = sorted({e.time + shift for e in entries} - kept)
        if not gone:
            raise UsageError(f"before frame {frame} only frames with prompts and pinned ones are remembered")
        bounds = [*sorted(kept), frame]
        spans = [(a + 1, b - 1) for a, b in zip([-1, *bounds], bounds, strict=False)]
        return [MemoryEdit("forget", a, b) for a, b in spans if any(a <= time <= b for time in gone)]

    def close(self) -> None:
        """Stop the replay."""
        with self._lock:
            self._forget()

    # --- the state -------------------------------------------------------------------------------

    def _before(self, recipe: Recipe, frame: int) -> TrackerState:
        """The state before a frame with the frame's edits made, not to be changed."""
        if self._kept is not None and self._kept[0].equals(recipe) and self._kept[1] == frame:
            return self._kept[2]
        segmenter = self._propagation.segmenter(recipe)
        state = segmenter.new_state()
        if frame > 0:
            state = _copied(self._replayed(recipe, frame))
        for edit in recipe.edits.get(frame, ()):
            try:
                edit.apply(state, frame - 1)
            except ValueError:
                continue  # an event of its frame says so
        gone = [i for i in recipe.prompts.removals_at(frame) if i in state.object_ids]
        state.remove_objects(gone)
        self._kept = (recipe, frame, state)
        return state

    def _replayed(self, recipe: Recipe, frame: int) -> TrackerState:
        """The replay's state after the frame before `frame`."""
        if self._propagation.tracked(recipe) < frame:
            raise UsageError(f"frame {frame} is not tracked with the present prompts yet: propagate first")
        replay = self._replay
        if replay is None or not self._serves(replay, recipe, frame):
            self._forget()
            self._replay = replay = self._propagation.replay(recipe, frame)
            self._of = recipe
        try:
            return replay.after(frame - 1)
        except BaseException:
            self._forget()
            raise

    def _serves(self, replay: Replay, recipe: Recipe, frame: int) -> bool:
        """Whether the replay at hand can go on to a frame, and has the recipe's state there."""
        if self._of is None or not replay.position <= frame <= replay.position + _AHEAD:
            return False
        change = self._of.first_change(recipe)
        return change is None or change >= frame

    def _forget(self) -> None:
        replay, self._replay, self._kept = self._replay, None, None
        if replay is not None:
            replay.close()


def _copied(state: TrackerState) -> TrackerState:
    device = "cpu" if state.memory is None else state.memory.device
    return TrackerState.from_bytes(state.to_bytes(), device)


def _apply(edit: MemoryEdit, state: TrackerState, frame: int) -> None:
    try:
        edit.apply(state, frame - 1)
    except ValueError as error:
        raise UsageError(f"before frame {frame}: {error}") from None
