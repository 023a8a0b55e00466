"""Edits of what a stream remembers: checked, applied to a state, and found in a stream's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import StoreError, UsageError
from pipeline.tracks.store import StreamStore
from xmem_core import TrackerState

_KINDS = ("forget", "pin", "unpin")


@dataclass(frozen=True)
class MemoryEdit:
    """One edit of a memory.

    Args:
        kind: "forget": the frames `first`..`last` are forgotten; "pin": frame `first` stays whole, it is not
            consolidated; "unpin": no longer.
        first, last: frames of a file, or tracked times of a live stream; inclusive.
        object_id: the object that forgets, while the others go on reading the frames. None: all objects.
    """

    kind: str
    first: int
    last: int
    object_id: int | None = None

    @classmethod
    def from_json(cls, value: Any) -> MemoryEdit:
        """Of {"forget": [first, last], "object": id or left out}, {"pin": frame} or {"unpin": frame}.

        Raises:
            UsageError: it is anything else.
        """
        given = [kind for kind in _KINDS if isinstance(value, Mapping) and kind in value]
        if len(given) != 1:
            raise UsageError(f"an edit of the memory is one of {', '.join(_KINDS)}, not {str(value)[:60]!r}")
        kind = given[0]
        strange = sorted(map(str, set(value) - {kind, *(("object",) if kind == "forget" else ())}))
        if strange:
            raise UsageError(f"an edit of the memory, {kind}, has no field {strange[0][:40]!r}")
        frames = value[kind] if kind == "forget" else [value[kind]]
        if not isinstance(frames, list | tuple) or len(frames) != (2 if kind == "forget" else 1):
            raise UsageError(f"{kind}={str(value[kind])[:60]!r} is not allowed: the first and the last frame")
        if any(isinstance(f, bool) or not isinstance(f, int) or not 0 <= f < 2**53 for f in frames):
            raise UsageError(f"{kind}={str(value[kind])[:60]!r} is not allowed: frames are numbers from 0")
        if frames[0] > frames[-1]:
            raise UsageError(f"forget={list(frames)} is not allowed: the first frame is after the last")
        object_id = value.get("object")
        if object_id is not None and (isinstance(object_id, bool) or not isinstance(object_id, int)):
            raise UsageError(f"object={str(object_id)[:60]!r} is not allowed: the id of an object")
        return cls(kind, frames[0], frames[-1], object_id)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        if self.kind != "forget":
            return {self.kind: self.first}
        about = {} if self.object_id is None else {"object": self.object_id}
        return {"forget": [self.first, self.last], **about}

    def apply(self, state: TrackerState, newest: int) -> None:
        """Edit a state.

        Args:
            newest: number of the last frame that the state has seen.

        Raises:
            ValueError: it cannot be made; the message says why. The state is unchanged then.
        """
        shift = 0 if state.memory is None else state.time - newest
        first, last = self.first + shift, self.last + shift
        if self.kind == "forget":
            state.forget(first, last, self.object_id)
            return
        memory = state.memory
        whole = [] if memory is None else sorted({f.time for f in (*memory.frames, *memory.permanent_frames)})
        if first not in whole:
            named = ", ".join(str(time - shift) for time in whole) or "none"
            raise ValueError(f"frame {self.first} is not in memory as a whole; whole frames: {named}")
        if self.kind == "pin":
            state.pin(first)
        else:
            state.unpin(first)


@dataclass(frozen=True)
class PlannedEdit:
    """An edit to be made before frame `frame`."""

    frame: int
    edit: MemoryEdit


def planned_edits(store: StreamStore, since: int, committed: int) -> list[PlannedEdit]:
    """The edits that a run which has tracked the frames before `since` must make, in order.

    Args:
        committed: number of committed frames.

    Raises:
        StoreError: an edit is damaged or of a newer version.
    """
    found = []
    for frame, content in store.edits(since, committed):
        try:
            found.append(PlannedEdit(frame, MemoryEdit.from_json(content.get("edit"))))
        except UsageError as error:
            raise StoreError(
                f"an edit of stream {store.stream_id} in {store.root} is damaged: {error}"
            ) from error
    return found
