"""State of an `ObjectFinder`: objects it started, candidates, contacts; part of the stream's snapshots."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Frame
from pipeline.detect.lifecycle.association import shown_in
from pipeline.detect.lifecycle.candidates import Candidate, reaches_out
from pipeline.detect.lifecycle.decisions import Decisions
from pipeline.detect.lifecycle.found_object import FoundObject

DAMAGED = (struct.error, zlib.error, LookupError, TypeError, ValueError)
"""What `FinderState.from_bytes` raises on bytes that are damaged or foreign."""

_MAGIC, _OLD_MAGIC = b"xmem-finder-2\n", b"xmem-finder-1\n"
# Confirmations after which an object is remembered when it is given up.
_PROVEN = 2


@dataclass
class FinderState:
    """What is known of a stream's detected objects between two frames.

    Args:
        next_id: id of the next new object.
        next_look, looked: frames of the next and the last run of the detector; -1: there was none.
        instances: whether the last run detected one thing each.
        candidates: what was detected, but not often enough.
        objects, remembered: objects that were started here, tracked and no longer tracked.
        labels: H x W int32, of the previous frame; None: there was none.
        labelled: the objects that were tracked on it.
        saw: its frame_index; -1: not known.
        waiting: confirmed candidates without room at the last run.
        homes: H x W int32, homes of the objects, see `homes_of`.
    """

    next_id: int = 1
    next_look: int = 0
    looked: int = -1
    instances: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    objects: dict[int, FoundObject] = field(default_factory=dict)
    remembered: dict[int, FoundObject] = field(default_factory=dict)
    labels: NDArray[np.int32] | None = None
    labelled: set[int] = field(default_factory=set)
    saw: int = -1
    waiting: int = 0
    homes: NDArray[np.int32] | None = None

    @property
    def known(self) -> dict[int, FoundObject]:
        """All objects that were started here, tracked or not."""
        return self.remembered | self.objects

    def has_left(self, object_id: int, frame: Frame) -> bool:
        """Whether an object is expected at the edge of the frame, or beyond it."""
        found = self.objects.get(object_id) or self.remembered[object_id]
        return reaches_out(found.expected(frame.frame_index), frame)

    def give_up(self, object_id: int, reason: str, decided: Decisions) -> None:
        """Track an object no longer; it is remembered if it was confirmed often enough."""
        found = self.objects.pop(object_id)
        if found.hits >= _PROVEN:
            self.remembered[object_id] = found
        decided.gone[object_id] = reason

    def to_bytes(self, detector: bytes) -> bytes:
        """Serialize the state, and that of the detector."""
        labels, homes = _packed(self.labels), _packed(self.homes)
        facts: dict[str, Any] = {
            "next_id": self.next_id,
            "next_look": self.next_look,
            "looked": self.looked,
            "instances": self.instances,
            "candidates": [c.to_json() for c in self.candidates],
            "objects": [[i, found.to_json()] for i, found in self.objects.items()],
            "remembered": [[i, found.to_json()] for i, found in self.remembered.items()],
            "waiting": self.waiting,
            "labelled": sorted(self.labelled),
            "saw": self.saw,
            "labels": None if self.labels is None else list(self.labels.shape),
            "homes": None if self.homes is None else list(self.homes.shape),
            "lengths": [len(labels), len(homes), len(detector)],
        }
        text = json.dumps(facts, sort_keys=True).encode()
        return _MAGIC + struct.pack("<I", len(text)) + text + labels + homes + detector

    @classmethod
    def from_bytes(cls, blob: bytes) -> tuple[FinderState, bytes]:
        """The state and the detector's bytes from `to_bytes`. Raises an error of `DAMAGED` on other bytes."""
        if not blob.startswith((_MAGIC, _OLD_MAGIC)):
            raise ValueError("they are of another kind or version")
        head = len(_MAGIC) + 4
        (length,) = struct.unpack_from("<I", blob, len(_MAGIC))
        facts = json.loads(blob[head : head + length])
        parts, end = [], head + length
        for size in facts["lengths"]:
            parts.append(blob[end : end + size])
            end += size
        if len(blob) != end:
            raise ValueError(f"{len(blob)} bytes, {end} expected")
        labels = _unpacked(parts[0], facts["labels"])
        if blob.startswith(_OLD_MAGIC):
            facts = _updated(facts, labels)
        objects, remembered = (
            {int(i): FoundObject.from_json(values) for i, values in facts[name]}
            for name in ("objects", "remembered")
        )
        state = cls(
            next_id=int(facts["next_id"]),
            next_look=int(facts["next_look"]),
            looked=int(facts["looked"]),
            instances=bool(facts["instances"]),
            candidates=[Candidate.from_json(values) for values in facts["candidates"]],
            objects=objects,
            remembered=remembered,
            labels=labels,
            labelled={int(i) for i in facts["labelled"]},
            saw=int(facts.get("saw", -1)),  # earlier versions did not store it
            waiting=int(facts["waiting"]),
            homes=_unpacked(parts[1], facts["homes"]),
        )
        return state, parts[2]


def _packed(labels: NDArray[np.int32] | None) -> bytes:
    return b"" if labels is None else zlib.compress(np.ascontiguousarray(labels, np.int32).tobytes(), 1)


def _unpacked(blob: bytes, shape: list[int] | None) -> NDArray[np.int32] | None:
    return None if shape is None else np.frombuffer(zlib.decompress(blob), np.int32).reshape(shape)


def _updated(facts: dict[str, Any], labels: NDArray[np.int32] | None) -> dict[str, Any]:
    """Facts of the previous version, which kept only the last visible frame of an object, as this one's."""
    last_seen = {int(i): int(seen) for i, seen in facts["last_seen"]}
    shown = {} if labels is None else shown_in(labels, list(last_seen))
    objects = {
        i: FoundObject(shown[i].box if i in shown else (0, 0, 1, 1), seen, seen)
        for i, seen in last_seen.items()
    }
    return {
        **facts,
        "candidates": [{**values, "unsearched": 0} for values in facts["candidates"]],
        "objects": [[i, found.to_json()] for i, found in objects.items()],
        "remembered": [],
        "looked": -1,
        "instances": False,
    }
