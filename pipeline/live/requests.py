"""LiveRequests: pending and applied requests (prompts, removals, names, pauses) of a live stream.

A request is durable before it is acknowledged, and applied to a later frame. It is therefore checked against
the tracked objects as the pending requests before it will change them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.base.errors import PromptError, UsageError
from pipeline.live.record import LiveRecord, Request
from pipeline.live.spec import LivePrompts, LiveSpec
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.tracking.snapshots.memory_edit import MemoryEdit

logger = logging.getLogger(__name__)

_HIGHEST_ID = 1_000_000_000  # highest id that a request may name; leaves room for new ids above
_KEPT = 512  # rejections kept
_KINDS = "prompts, remove, rename, memory and pause"
_LONGEST_CATEGORY = 100


@dataclass(frozen=True)
class Rejected:
    """A request that could not be applied."""

    number: int
    cause: str


class Tracked(Protocol):
    """The currently tracked objects, see `TrackedObjects`."""

    @property
    def object_ids(self) -> Sequence[int]: ...

    @property
    def detected_ids(self) -> Sequence[int]: ...


class LiveRequests:
    """One stream's requests. `ask` is thread-safe; methods that mark progress belong to the tracking thread.

    Args:
        record: stores the requests.
        tracked: the tracked objects.
        applied: number of the last applied request.
        paused: whether the stream was paused after that request.
        distrusted: reasons, by request number, why a request must not be applied.
        copies: stores a copy of an object that another stream remembers; returns its key, and the object's
            category. Raises UsageError if it cannot be copied into this stream.

    Attributes:
        paused: as last requested; a pause takes effect at once, not with the next frame.
        rejected: the most recent requests that could not be applied.
    """

    def __init__(
        self,
        spec: LiveSpec,
        record: LiveRecord,
        tracked: Tracked,
        *,
        applied: int = 0,
        paused: bool = False,
        distrusted: Mapping[int, str] | None = None,
        copies: Callable[[RememberedObject], tuple[str, str | None]] | None = None,
    ) -> None:
        self._spec, self._record, self._tracked = spec, record, tracked
        self._applied = applied
        self._distrusted = dict(distrusted or {})
        self._copies = copies
        self.rejected: deque[Rejected] = deque(maxlen=_KEPT)
        self.paused = self._pause_asked(paused)

    @property
    def applied(self) -> int:
        """Number of the last request that was applied or rejected."""
        return self._applied

    def waiting(self) -> list[Request]:
        """Pending requests, in order."""
        return self._record.requests(self._applied)

    def promised_ids(self) -> list[int]:
        """Ids of objects in pending prompts."""
        return [i for request in self.waiting() for i in request.object_ids]

    # --- asking ----------------------------------------------------------------------------------

    def ask(self, content: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
        """Check and store a request; see `LiveTracker.request`.

        Args:
            size: (height, width) of the stream's frames, if known; masks must have this size.

        Raises:
            UsageError: the request is wrong, or exceeds the limit of objects. StoreError: it could not be
                stored.
        """
        if not isinstance(content, Mapping) or len(content) != 1:
            raise UsageError(f"a request is one of {_KINDS}")
        kind, value = next(iter(content.items()))
        if kind == "prompts":
            request = self._record.ask(self._prompts_made(value, size))
        elif kind == "remove":
            ids = self._removals(value)
            request = self._record.ask(lambda free: ({"remove": ids}, ()))
        elif kind == "rename":
            named = self._renaming(value)
            request = self._record.ask(lambda free: ({"rename": named}, ()))
        elif kind == "memory":
            request = self._record.ask(self._memory_edit(MemoryEdit.from_json(value)))
        elif kind == "pause":
            if not isinstance(value, bool):
                raise UsageError(f"pause={value!r} is not allowed: true or false")
            request = self._record.ask(lambda free: ({"pause": value}, ()))
            self.paused = self._pause_asked(self.paused)
        else:
            raise UsageError(f"unknown request {str(kind)[:40]!r}: there are {_KINDS}")
        ids = request.object_ids or list(request.content.get("remove", []))
        if kind == "rename":
            ids = [named["id"]]
        return {"seq": request.number, "ids": ids}

    def begin_with(self, prompts: LivePrompts) -> None:
        """Request the prompts of the stream's spec, unless an earlier run did so."""
        digest = _digest(prompts.content)
        if self._record.finished or self._record.prompts_asked != digest:
            self._record.ask(self._prompts_made(prompts, None), prompts_asked=digest)

    def _prompts_made(
        self, content: LivePrompts | Mapping[str, Any], size: tuple[int, int] | None
    ) -> Callable[[int], tuple[dict[str, Any], list[int]]]:
        """Checked prompts as a request, for `LiveRecord.ask`: those without id get free ones."""
        prompts = LivePrompts.of(content)
        entries = [p.to_json() for p in prompts.objects]
        for entry in entries:
            _check_entry(entry, size)

        def make(free: int) -> tuple[dict[str, Any], list[int]]:
            named = [e["id"] for i, e in enumerate(entries) if i not in prompts.unnamed]
            unused = max([free, *(i + 1 for i in named)])
            for i in prompts.unnamed:
                entries[i]["id"] = unused
                unused += 1
            ids = [e["id"] for e in entries]
            self._check_room(ids)
            return {"prompts": {"version": 1, "objects": entries}}, ids

        return make

    def _memory_edit(self, edit: MemoryEdit) -> Callable[[int], tuple[dict[str, Any], list[int]]]:
        """An edit as a request, for `LiveRecord.ask`: an object that is copied gets a free id by default."""
        if edit.source is None:
            return lambda free: ({"memory": edit.to_json()}, [])
        if edit.source.out is not None or edit.source.stream_id is None:
            raise UsageError(
                f"copy={edit.source.to_json()} is not allowed: name the object and a stream of the same "
                "output folder"
            )
        if edit.object_id is not None and edit.object_id > _HIGHEST_ID:
            raise UsageError(
                f"object id {edit.object_id} is not allowed on a live stream: up to {_HIGHEST_ID}"
            )
        if self._copies is None:
            raise UsageError("objects cannot be copied into this stream")
        payload, category = self._copies(edit.source)

        def make(free: int) -> tuple[dict[str, Any], list[int]]:
            object_id = free if edit.object_id is None else edit.object_id
            if object_id in (*self._tracked.object_ids, *self.promised_ids()):
                raise UsageError(f"object {object_id} is tracked already: give the copy another id")
            self._check_room([object_id])
            return {"memory": edit.with_copy(payload, category, object_id).to_json()}, [object_id]

        return make

    def _check_room(self, asked: Sequence[int]) -> None:
        removed = {i for request in self.waiting() for i in request.content.get("remove", ())}
        prompted = {*self.promised_ids(), *asked}
        # Prompts displace objects that the detector started, see `TrackedObjects.prompt`.
        tracked = set(self._tracked.object_ids) - set(self._tracked.detected_ids)
        staying = ((tracked | prompted) - removed) | set(asked)
        most = self._spec.settings.finder.max_objects
        if len(staying) > most:
            raise UsageError(
                f"{len(staying)} objects would be tracked, {most} are allowed: remove some, or add the "
                "stream with a larger max_objects"
            )

    def _removals(self, value: Any) -> list[int]:
        if (
            not isinstance(value, list | tuple)
            or not value
            or any(isinstance(i, bool) or not isinstance(i, int) or not 0 < i < 2**31 for i in value)
        ):
            raise UsageError(f"remove={str(value)[:60]!r} is not allowed: a list of object ids")
        self._check_known(value)
        return sorted(set(value))

    def _renaming(self, value: Any) -> dict[str, Any]:
        given = value if isinstance(value, Mapping) and set(value) == {"id", "category"} else {}
        object_id, category = given.get("id"), given.get("category")
        if (
            isinstance(object_id, bool)
            or not isinstance(object_id, int)
            or not isinstance(category, str)
            or not 0 < len(category) <= _LONGEST_CATEGORY
        ):
            raise UsageError(
                f'rename={str(value)[:60]!r} is not allowed: {{"id": object, "category": 1 to '
                f"{_LONGEST_CATEGORY} characters}}"
            )
        self._check_known([object_id])
        return {"id": object_id, "category": category}

    def _check_known(self, ids: Sequence[int]) -> None:
        unknown = sorted(set(ids) - set(self.promised_ids()) - set(self._tracked.object_ids))
        if unknown:
            raise UsageError(
                f"no object {unknown[0]} is tracked: there are {sorted(self._tracked.object_ids) or 'none'}"
            )

    def _pause_asked(self, before: bool) -> bool:
        asked = [r.content["pause"] for r in self.waiting() if "pause" in r.content]
        return bool(asked[-1]) if asked else before

    # --- doing -----------------------------------------------------------------------------------

    def refuses(self, request: Request) -> bool:
        """Whether a request is distrusted; then it is rejected."""
        cause = self._distrusted.get(request.number)
        if cause is not None:
            self.reject(request, cause)
        return cause is not None

    def reject(self, request: Request, cause: str) -> None:
        """Reject a request; the cause goes to the log and the status."""
        logger.warning("stream %s: request %d: %s", self._spec.stream_id, request.number, cause)
        self.rejected.append(Rejected(request.number, cause))

    def done(self, request: Request) -> None:
        """Mark a request, and all before it, as applied."""
        self._applied = request.number


def _check_entry(entry: Mapping[str, Any], size: tuple[int, int] | None) -> None:
    if entry["id"] > _HIGHEST_ID:
        raise PromptError(f"object id {entry['id']} is not allowed on a live stream: up to {_HIGHEST_ID}")
    rle = entry.get("rle")
    if rle is not None and size is not None and tuple(rle["size"]) != size:
        raise PromptError(
            f"object {entry['id']}: its mask is {rle['size'][1]}x{rle['size'][0]}, the stream "
            f"{size[1]}x{size[0]}; give masks at the stream's size"
        )


def _digest(prompts: Mapping[str, Any]) -> str:
    text = json.dumps(prompts, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
