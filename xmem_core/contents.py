"""Contents of a memory, frame by frame, for display; reads do not use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from xmem_core.grouped_memory import GroupedMemory, StreamMemory
from xmem_core.memory import Memory, MemoryFrame

Kind = Literal["working", "permanent", "long_term", "copied"]


@dataclass(frozen=True)
class MemoryEntry:
    """The elements of one frame in one region of the memory.

    Args:
        time: time of the frame, as in `TrackerState.time`; negative for elements copied from another stream.
        kind: "working": a whole frame that may be consolidated later; "permanent": a whole frame that a
            prompt was given on; "long_term": prototypes of a consolidated frame;
            "copied": what an object remembers of another stream, see `TrackerState.adopt`.
        elements: number of elements.
        objects: ids of the objects that may read them.
        given: ids of the objects that were prompted on the frame; known of whole frames.
        pinned: whether the frame is kept as a whole, see `TrackerState.pin`.
        use: mean use of the elements in a frame that read them, see `Memory.usage`.
    """

    time: int
    kind: Kind
    elements: int
    objects: tuple[int, ...]
    given: tuple[int, ...]
    pinned: bool
    use: float


def contents(memory: StreamMemory | None) -> list[MemoryEntry]:
    """The entries of a memory, the oldest first; those of a frame in the order working, permanent, long_term.

    In a grouped memory (Cutie's), each group of objects has entries of its own.
    """
    if memory is None:
        return []
    parts = memory.groups.values() if isinstance(memory, GroupedMemory) else [memory]
    return sorted((entry for part in parts for entry in _entries(part)), key=lambda entry: entry.time)


@dataclass(frozen=True)
class Occupancy:
    """How full one region of a memory is; in a grouped memory (Cutie's), the regions of all groups together.

    Args:
        kind: as in `MemoryEntry`.
        elements: number of elements in use.
        limit: number of elements that fit; None: no limit.
        frames: number of frames that they are of.
    """

    kind: Kind
    elements: int
    limit: int | None
    frames: int


def occupancy(memory: StreamMemory | None) -> list[Occupancy]:
    """How full working, permanent and long-term memory are; an empty list before the first prompt."""
    if memory is None:
        return []
    parts = list(memory.groups.values()) if isinstance(memory, GroupedMemory) else [memory]
    unlimited = memory.config.max_mid_term_frames is None
    kinds: tuple[Kind, ...] = ("working", "permanent", "long_term")
    found = []
    for kind in kinds:
        regions = [getattr(part, kind) for part in parts]
        limit = None if kind == "working" and unlimited else sum(region.capacity for region in regions)
        frames = {time for part in parts for time in torch.unique(part.times(kind)).tolist()}
        found.append(Occupancy(kind, sum(region.size for region in regions), limit, len(frames)))
    return found


def _entries(memory: Memory) -> Iterator[MemoryEntry]:
    whole: tuple[tuple[Kind, list[MemoryFrame]], ...] = (
        ("working", memory.frames),
        ("permanent", memory.permanent_frames),
    )
    for kind, frames in whole:
        use = memory.usage(kind).view(-1, memory.positions).mean(1)
        for frame, mean in zip(frames, use.tolist(), strict=True):
            readers = _readers(memory, frame.time)
            yield MemoryEntry(frame.time, kind, memory.positions, readers, frame.given, frame.pinned, mean)
    single: tuple[Kind, ...] = ("long_term", "copied")
    for kind in single:
        times, usage = memory.times(kind), memory.usage(kind)
        for time in torch.unique(times).tolist():
            own = times == time
            readers = _readers(memory, time)
            yield MemoryEntry(time, kind, int(own.sum()), readers, (), False, float(usage[own].mean()))


def _readers(memory: Memory, time: int) -> tuple[int, ...]:
    """The objects that may read elements of that time."""
    return tuple(
        object_id
        for object_id, first in memory.first_time.items()
        if (time == first if time < 0 else time >= first)
        and not any(a <= time <= b for a, b in memory.doubted.get(object_id, ()))
    )
