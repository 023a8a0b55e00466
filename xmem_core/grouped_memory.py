"""Memory of a stream whose objects are grouped by arrival, with a summary of each object: Cutie's.

Objects that arrived on the same frame form a group. Each group has a memory of its own, keys included, from
its first frame on: similarity, top k, usage, consolidation and eviction are per group. Beside these each
object has one accumulator of summaries, to which every memory frame adds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xmem_core.config import MemoryConfig
from xmem_core.memory import Memory, MemoryFrame


class GroupedMemory:
    """Memories of groups of objects, and the objects' accumulated summaries.

    Args:
        config: memory settings; their caps are each group's.
        positions: h * w, elements per frame.
        key_dim, value_dim: C_k and C_v.
        device: device of the memory.

    Attributes:
        groups: the group's memory by the time of its first frame, in this order.
        summaries: (Q, C + 1) float32 by object, accumulated since its first frame, the area last.
    """

    def __init__(
        self,
        config: MemoryConfig,
        positions: int,
        key_dim: int,
        value_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.positions = positions
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.device = torch.device(device)
        self.groups: dict[int, Memory] = {}
        self.summaries: dict[int, Tensor] = {}
        # Object -> time of its newest prompted frame, and its accumulator then: what `doubt` returns to.
        self._sure: dict[int, tuple[int, Tensor]] = {}

    def __repr__(self) -> str:
        return f"GroupedMemory({', '.join(f'{t}: {m!r}' for t, m in self.groups.items())})"

    @property
    def first_time(self) -> dict[int, int]:
        """Time of each object's first frame, in the order in which the objects were started."""
        return {i: t for memory in self.groups.values() for i, t in memory.first_time.items()}

    @property
    def frames(self) -> list[MemoryFrame]:
        """Frames in working memory, group by group."""
        return [frame for memory in self.groups.values() for frame in memory.frames]

    @property
    def permanent_frames(self) -> list[MemoryFrame]:
        """Frames in the permanent stores, group by group."""
        return [frame for memory in self.groups.values() for frame in memory.permanent_frames]

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of all groups in working memory (with the permanent store) and in long-term memory."""
        sizes = [memory.sizes for memory in self.groups.values()]
        return sum(a for a, _ in sizes), sum(b for _, b in sizes)

    @property
    def copied_elements(self) -> int:
        """Elements of all groups that were copied from other streams."""
        return sum(memory.copied_elements for memory in self.groups.values())

    def group_of(self, object_id: int) -> Memory:
        """The memory of the object's group."""
        return next(m for m in self.groups.values() if object_id in m.first_time)

    @property
    def capacity(self) -> int:
        """Elements that the groups' pools are allocated for."""
        return sum(memory.capacity for memory in self.groups.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the pools and the summaries are allocated for."""
        kept = (*self.summaries.values(), *(summary for _, summary in self._sure.values()))
        return sum(memory.nbytes for memory in self.groups.values()) + sum(t.nbytes for t in kept)

    def members(self) -> Iterator[tuple[Memory, list[int]]]:
        """Each group's memory and the positions of its objects in `first_time`."""
        start = 0
        for memory in self.groups.values():
            end = start + len(memory.first_time)
            yield memory, list(range(start, end))
            start = end

    def add_frame(
        self,
        time: int,
        key: Tensor,
        shrinkage: Tensor,
        selection: Tensor,
        values: Mapping[int, Tensor],
        summaries: Mapping[int, Tensor],
        *,
        given: Collection[int] = (),
    ) -> None:
        """Store a frame in every group; objects not seen before form a new one.

        Args:
            summaries: object id -> (Q, C + 1), for objects of `values`; those of others stay.
            Others as for `Memory.add_frame`.

        Raises:
            ValueError: as there.
        """
        known = self.first_time
        if any(i not in known for i in values):
            self.groups[time] = Memory(self.config, self.positions, self.key_dim, self.value_dim, self.device)
        for first, memory in self.groups.items():
            ids = [i for i in values if known.get(i, time) == first]
            own = {i: values[i] for i in ids}
            memory.add_frame(time, key, shrinkage, selection, own, given=[i for i in ids if i in given])
        for i, summary in summaries.items():
            self.summaries[i] = self.summaries[i] + summary if i in self.summaries else summary.clone()
            if i in given:
                self._sure[i] = (time, self.summaries[i].clone())

    def adopt(
        self, object_id: int, time: int, key: Tensor, shrinkage: Tensor, value: Tensor, summary: Tensor
    ) -> None:
        """Start an object, a group of its own, from elements of another stream, see `Memory.adopt`."""
        memory = Memory(self.config, self.positions, self.key_dim, self.value_dim, self.device)
        memory.adopt(object_id, time, key, shrinkage, value)
        self.groups[time] = memory
        self.summaries[object_id] = summary.to(self.device)
        self._sure[object_id] = (time, self.summaries[object_id].clone())

    def bar_last(self, object_ids: Iterable[int]) -> None:
        """Bar objects from reading the elements of the newest frame, see `Memory.bar_last`."""
        barred = set(object_ids)
        for memory in self.groups.values():
            memory.bar_last([i for i in memory.first_time if i in barred])

    def remove_objects(self, object_ids: list[int]) -> None:
        """Remove objects, their summaries, and groups without objects."""
        for i in object_ids:
            del self.summaries[i]
            self._sure.pop(i, None)
        for memory in self.groups.values():
            gone = [i for i in object_ids if i in memory.first_time]
            if gone:
                memory.remove_objects(gone)
        self.groups = {time: memory for time, memory in self.groups.items() if memory.first_time}

    def doubt(self, object_id: int, after: int) -> None:
        """Bar an object from reading elements of frames later than `after`, on which its mask was wrong.

        Its summaries go back to those of its newest prompted frame, which is not later.
        """
        memory = self.group_of(object_id)
        memory.doubt(object_id, after)
        time, summary = self._sure.get(object_id, (after + 1, None))
        if summary is not None and time <= after:
            self.summaries[object_id] = summary.clone()

    def check_forgets(self, first: int, last: int, object_id: int | None = None) -> None:
        """Raise ValueError if an object (None: any) could read nothing without the times `first`..`last`."""
        for memory in self.groups.values():
            if object_id is None or object_id in memory.first_time:
                memory.check_forgets(first, last, object_id)

    def forget(self, first: int, last: int) -> None:
        """Drop the elements of frames with times `first`..`last`. Summaries keep what they accumulated."""
        for memory in self.groups.values():
            memory.forget(first, last)

    def bar(self, object_id: int, first: int, last: int) -> None:
        """Bar an object from reading elements of the times `first`..`last`. Its summary stays."""
        self.group_of(object_id).bar(object_id, first, last)

    def pin(self, time: int, pinned: bool = True) -> None:
        """Keep a frame as a whole in all groups that hold it, or no longer; ValueError as in `Memory.pin`."""
        whole = {f.time for f in (*self.frames, *self.permanent_frames)}
        if time not in whole:
            raise ValueError(f"no whole frame of time {time} is in memory: there are {sorted(whole)}")
        holders = [
            memory
            for memory in self.groups.values()
            if time in {f.time for f in (*memory.frames, *memory.permanent_frames)}
        ]
        for done, memory in enumerate(holders):
            try:
                memory.pin(time, pinned)
            except ValueError:
                for earlier in holders[:done]:
                    earlier.pin(time, False)
                raise

    @property
    def doubted(self) -> dict[int, list[tuple[int, int]]]:
        """First and last time of each span that an object may not read, by object."""
        return {i: spans for memory in self.groups.values() for i, spans in memory.doubted.items()}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The elements in use as named tensors and a JSON-ready dict, for `restore`."""
        tensors: dict[str, Tensor] = {}
        groups = []
        for time, memory in self.groups.items():
            parts, facts = memory.export()
            tensors.update({f"{time}.{name}": tensor for name, tensor in parts.items()})
            groups.append([time, facts])
        tensors.update({f"summary.{i}": summary for i, summary in self.summaries.items()})
        tensors.update({f"sure.{i}": summary for i, (_, summary) in self._sure.items()})
        return tensors, {
            "groups": groups,
            "summarised": list(self.summaries),
            "sure": [[i, time] for i, (time, _) in self._sure.items()],
            "positions": self.positions,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
        }

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        config: MemoryConfig,
        device: torch.device | str = "cpu",
    ) -> GroupedMemory:
        """Build a memory from `export`'s output.

        Raises:
            ValueError: the tensors do not match the dict.
        """
        memory = cls(config, int(facts["positions"]), int(facts["key_dim"]), int(facts["value_dim"]), device)
        for time, inner in facts["groups"]:
            prefix = f"{time}."
            parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            memory.groups[int(time)] = Memory.restore(parts, inner, config, device)
        memory.summaries = {int(i): tensors[f"summary.{i}"].to(memory.device) for i in facts["summarised"]}
        memory._sure = {int(i): (int(t), tensors[f"sure.{i}"].to(memory.device)) for i, t in facts["sure"]}
        if sorted(memory.summaries) != sorted(memory.first_time):
            raise ValueError(
                f"summaries of objects {sorted(memory.summaries)}, memory of {sorted(memory.first_time)}"
            )
        return memory


StreamMemory = Memory | GroupedMemory
"""The memory of a stream, of whichever model."""


def restore_memory(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    config: MemoryConfig,
    device: torch.device | str = "cpu",
) -> StreamMemory:
    """Build either kind of memory from its `export`; ValueError if the tensors do not match the dict."""
    kind = GroupedMemory if "groups" in facts else Memory
    return kind.restore(tensors, facts, config, device)
