"""Edits of what a stream remembers: checked, applied to a state, and found in a stream's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.errors import StoreError, UsageError
from pipeline.prompts import values as check
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.tracks.object_copies import ObjectCopies
from pipeline.tracks.store import StreamStore
from xmem_core import TrackerState
from xmem_core.object_copy import ObjectCopy

COPY = "copy"
_FIELDS = {"forget": ("object",), "pin": (), "unpin": (), COPY: ("object", "category", "payload")}

Begin = Callable[[TrackerState, int, ObjectCopy], None]
"""Starts an object of an id from a copy in a state, as `TrackerState.adopt` does."""


@dataclass(frozen=True)
class MemoryEdit:
    """One edit of a memory.

    Args:
        kind: "forget": the frames `first`..`last` are forgotten; "pin": frame `first` stays whole, it is not
            consolidated; "unpin": no longer; "copy": an object starts from what another stream remembers.
        first, last: frames of a file, or tracked times of a live stream; inclusive. 0 for copies.
        object_id: of "forget": the object that forgets, while the others go on reading the frames. None: all
            objects. Of "copy": id of the new object. None: until it is chosen.
        source: of "copy": the object that is copied.
        category: of "copy": category of the new object; None: that of the source.
        payload: of "copy": key of the copy in `StreamStore.object_copies`. None: until it is stored.
    """

    kind: str
    first: int
    last: int
    object_id: int | None = None
    source: RememberedObject | None = None
    category: str | None = None
    payload: str | None = None

    @classmethod
    def from_json(cls, value: Any) -> MemoryEdit:
        """Of {"forget": [first, last], "object": id or left out}, {"pin": frame}, {"unpin": frame} or
        {"copy": a `RememberedObject`, "object": id or left out, "category": text or left out}.

        Raises:
            UsageError: it is anything else.
        """
        given = [kind for kind in _FIELDS if isinstance(value, Mapping) and kind in value]
        if len(given) != 1:
            raise UsageError(f"an edit of the memory is one of {', '.join(_FIELDS)}, not {str(value)[:60]!r}")
        kind = given[0]
        strange = sorted(map(str, set(value) - {kind, *_FIELDS[kind]}))
        if strange:
            raise UsageError(f"an edit of the memory, {kind}, has no field {strange[0][:40]!r}")
        if kind == COPY:
            return cls._copy(value)
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

    @classmethod
    def _copy(cls, value: Mapping[str, Any]) -> MemoryEdit:
        object_id, payload = value.get("object"), value.get("payload")
        return cls(
            COPY,
            0,
            0,
            None if object_id is None else check.object_id(object_id, COPY),
            RememberedObject.from_json(value[COPY], COPY),
            check.category(value.get("category"), COPY),
            None if payload is None else str(payload),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        if self.source is not None:
            rest = {"object": self.object_id, "category": self.category, "payload": self.payload}
            return {COPY: self.source.to_json(), **{k: v for k, v in rest.items() if v is not None}}
        if self.kind != "forget":
            return {self.kind: self.first}
        about = {} if self.object_id is None else {"object": self.object_id}
        return {"forget": [self.first, self.last], **about}

    def with_copy(self, payload: str, category: str | None, object_id: int) -> MemoryEdit:
        """The edit "copy", ready to be applied.

        Args:
            category: category of the source.
        """
        return replace(self, payload=payload, category=self.category or category, object_id=object_id)

    def apply(
        self,
        state: TrackerState,
        newest: int,
        copies: ObjectCopies | None = None,
        begin: Begin = TrackerState.adopt,
    ) -> None:
        """Edit a state.

        Args:
            newest: number of the last frame that the state has seen.
            copies: those of the stream; needed for "copy".
            begin: starts a copied object; the default needs a state that has seen a frame.

        Raises:
            ValueError: it cannot be made; the message says why. The state is unchanged then.
            StoreError: the copy is missing.
        """
        if self.kind == COPY:
            if copies is None or self.payload is None or self.object_id is None:
                raise ValueError("the edit names no stored copy")
            begin(state, self.object_id, ObjectCopy.from_bytes(copies.read(self.payload)))
            return
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
