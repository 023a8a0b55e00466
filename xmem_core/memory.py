"""Working, permanent and long-term memory of one stream (paper section 3.3).

All elements live in one pool of preallocated columns with three regions:

    long-term | permanent | working

An element is what one position of one remembered frame left behind: key, shrinkage, selection (needed only
while it may still be consolidated), one value per object, use and life counts, and the time of its frame. An
object has values for the elements from its own first frame on, so whether an element is valid for an object
follows from two numbers, the element's time and the object's. Nothing stale can survive a removed object: an
id that comes back has a later first frame than every element its predecessor wrote. What turned out to have
been somebody else is barred for the object by spans of time (`doubt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmem_core.attention import (
    CoarselySearchable,
    Searchable,
    coarsely_searchable,
    search,
    searchable,
    similarity,
    sparse_readout,
)
from xmem_core.config import MemoryConfig

# An element's life starts just above 0, so that use / life is defined before its first reading.
_LIFE_AT_BIRTH = 1e-7
# Frames that working memory is allocated for at first where its growth is unlimited.
_FIRST_FRAMES = 16

_COLUMNS = ("key", "shrinkage", "selection", "use", "life", "time")


@dataclass(frozen=True)
class MemoryFrame:
    """A whole frame in working or permanent memory."""

    time: int
    prompted: bool
    anchor: bool  # the first frame of an empty memory: it stays in working memory for good


_Validity = tuple[int, tuple[tuple[int, int], ...]]
"""From which time on elements are valid for an object, and in which spans they are not."""


def _barred(time: Tensor, first: int, spans: Iterable[tuple[int, int]]) -> Tensor:
    """Which elements of these times, (N,), an object may not read, (N,) bool."""
    barred = time < first
    for start, end in spans:
        barred |= (time >= start) & (time <= end)
    return barred


class _Region:
    """A span of the pool, filled from its start."""

    def __init__(self, start: int, capacity: int) -> None:
        self.start = start
        self.capacity = capacity
        self.size = 0

    @property
    def used(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class _Readable:
    """The elements in use, as readings want them; it holds until the memory changes.

    Args:
        rows: of the pool, (N,)
        time: of their frames, (N,)
        oldest: the least of them.
        elements: for `search`.
    """

    rows: Tensor
    time: Tensor
    oldest: int
    elements: Searchable | CoarselySearchable


class Memory:
    """All that one stream remembers of its frames, apart from the sensory memory.

    Args:
        config: caps and rhythm.
        positions: h * w, elements per frame.
        key_dim, value_dim: C_k and C_v.
        device, value_dtype: where, and in what precision values are kept (keys are always fp32).
    """

    def __init__(
        self,
        config: MemoryConfig,
        positions: int,
        key_dim: int,
        value_dim: int,
        device: torch.device | str = "cpu",
        value_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.positions = positions
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.device = torch.device(device)
        self.value_dtype = value_dtype
        self.frames: list[MemoryFrame] = []
        self.permanent_frames: list[MemoryFrame] = []
        self.first_time: dict[int, int] = {}  # object id -> time of its first frame
        self.doubted: dict[int, list[tuple[int, int]]] = {}  # object id -> first and last time of each span
        long_capacity = config.max_long_term_elements if config.enable_long_term else 0
        permanent_capacity = (config.max_permanent_frames - 1) * positions
        working_frames = config.max_mid_term_frames or _FIRST_FRAMES
        self.long_term = _Region(0, long_capacity)
        self.permanent = _Region(long_capacity, permanent_capacity)
        # Last, so that it alone can grow where it is allowed to.
        self.working = _Region(long_capacity + permanent_capacity, working_frames * positions)
        capacity = self.working.start + self.working.capacity
        self._columns = {
            "key": self._empty(capacity, key_dim),
            "shrinkage": self._empty(capacity),
            "selection": self._empty(capacity, key_dim),
            "use": self._empty(capacity),
            "life": self._empty(capacity),
            "time": torch.zeros(capacity, dtype=torch.int64, device=self.device),
        }
        self._values: dict[int, Tensor] = {}
        self._readable: _Readable | None = None

    def __repr__(self) -> str:
        return (
            f"Memory(objects={list(self.first_time)}, working={self.working.size}, "
            f"permanent={self.permanent.size}, long_term={self.long_term.size})"
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements in working memory (with the permanent store) and in long-term memory."""
        return self.working.size + self.permanent.size, self.long_term.size

    @property
    def capacity(self) -> int:
        """Elements that the pool is allocated for."""
        return len(self._columns["key"])

    @property
    def nbytes(self) -> int:
        """Bytes that the pool is allocated for."""
        return sum(t.nbytes for t in (*self._columns.values(), *self._values.values()))

    def usage(self, region: str) -> Tensor:
        """Use over life of the elements of `working`, `permanent` or `long_term`, (n,)."""
        used = getattr(self, region).used
        return self._columns["use"][used] / self._columns["life"][used]

    # --- reading ---------------------------------------------------------------------------------

    def read(
        self, query_key: Tensor, query_selection: Tensor, *, coarse: bool = False, count_use: bool = True
    ) -> Tensor:
        """Read every object's value at every query position, and count the use of what was read.

        Args:
            query_key: (C_k, P)
            query_selection: (C_k, P)
            coarse: look for what may be among the best in bfloat16, and only among these in float32.
            count_use: False for a reading that no mask comes of.

        Returns:
            (O, C_v, P), in the order of `first_time`.

        Raises:
            RuntimeError: there is nothing to read.
        """
        if self.sizes == (0, 0) or not self.first_time:
            raise RuntimeError(f"nothing to read: {self!r}")
        seen = self._readable
        if seen is None or isinstance(seen.elements, CoarselySearchable) != coarse:
            seen = self._readable = self._as_readable(coarse)
        # Objects that came together share one softmax; one older than all elements is barred from nothing.
        everything: _Validity = (seen.oldest, ())
        validity = {
            i: (max(first, seen.oldest), tuple(self.doubted.get(i, ())))
            for i, first in self.first_time.items()
        }
        readers = [everything, *sorted(set(validity.values()) - {everything})]
        barred = [None if valid == everything else _barred(seen.time, *valid) for valid in readers]
        found = search(seen.elements, query_key, query_selection, self.config.top_k, barred)
        rows = seen.rows
        if count_use:
            self._count_use(rows, *found[0])
        chosen = {valid: (w, rows[best]) for valid, (w, best) in zip(readers, found, strict=True)}
        out = [sparse_readout(*chosen[validity[i]], value).T for i, value in self._values.items()]
        return torch.stack(out)

    def _as_readable(self, coarse: bool) -> _Readable:
        rows = self._used_rows()
        column = self._columns
        time = column["time"][rows]
        key, shrinkage = column["key"][rows], column["shrinkage"][rows]
        elements: Searchable | CoarselySearchable
        if coarse:
            elements = coarsely_searchable(key, shrinkage)
        else:
            # One row per channel in memory too, which is how the matrix products like them.
            elements = searchable(key.T.contiguous(), shrinkage.unsqueeze(0))
        return _Readable(rows, time, int(time.min()), elements)

    def _used_rows(self) -> Tensor:
        regions = (self.long_term, self.permanent, self.working)
        return torch.cat([torch.arange(r.start, r.start + r.size, device=self.device) for r in regions])

    def _count_use(self, rows: Tensor, weights: Tensor, best: Tensor) -> None:
        use = torch.bincount(best.flatten(), weights.flatten(), minlength=len(rows))
        self._columns["use"][rows] += use.to(torch.float32)
        self._columns["life"][rows] += 1

    # --- writing ---------------------------------------------------------------------------------

    def add_frame(
        self,
        time: int,
        key: Tensor,
        shrinkage: Tensor,
        selection: Tensor,
        values: Mapping[int, Tensor],
        *,
        prompted: bool,
    ) -> None:
        """Remember a frame, and consolidate when working memory is full.

        Args:
            time: later than that of every frame before.
            key, selection: (C_k, P)
            shrinkage: (1, P)
            values: object id -> (C_v, P), for every object; an id not seen before starts an object here.
            prompted: a user's mask was given on this frame.

        Raises:
            ValueError: an object has no value, or the shapes or the time do not fit. Nothing is changed then.
        """
        missing = sorted(set(self.first_time) - set(values))
        if missing:
            raise ValueError(f"objects {missing} have no value at time {time}: give every object one")
        if self.frames and time <= self.frames[-1].time:
            raise ValueError(f"time {time} is not after the last memory frame's, {self.frames[-1].time}")
        parts = [
            ("key", key, self.key_dim),
            ("shrinkage", shrinkage, 1),
            ("selection", selection, self.key_dim),
        ]
        parts += [(f"value of object {i}", value, self.value_dim) for i, value in values.items()]
        for name, tensor, dim in parts:
            if tensor.shape != (dim, self.positions):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}: need {(dim, self.positions)}")
        self._readable = None
        limit = self.config.max_mid_term_frames
        if not self.config.enable_long_term and limit is not None and len(self.frames) == limit:
            self._drop_oldest()
        if self.working.size + self.positions > self.working.capacity:
            self._grow()
        for object_id in values:
            if object_id not in self.first_time:
                self.first_time[object_id] = time
                self._values[object_id] = self._empty(self.capacity, self.value_dim, dtype=self.value_dtype)
        anchor = self.working.size + self.permanent.size + self.long_term.size == 0
        self.frames.append(MemoryFrame(time, prompted, anchor))
        self._append(
            self.working,
            {"key": key.T, "shrinkage": shrinkage[0], "selection": selection.T},
            torch.full((self.positions,), time, device=self.device),
            {i: v.T for i, v in values.items()},
        )
        if self.config.enable_long_term and len(self.frames) == limit:
            self._consolidate()

    def remove_objects(self, object_ids: list[int]) -> None:
        """Forget objects, and free the elements that are valid for none of those that stay."""
        self._readable = None
        for object_id in object_ids:
            del self.first_time[object_id]
            del self._values[object_id]
            self.doubted.pop(object_id, None)
        if not self.first_time:
            self.frames, self.permanent_frames = [], []
            self.working.size = self.permanent.size = self.long_term.size = 0
            return
        oldest = min(self.first_time.values())
        for region in (self.working, self.permanent, self.long_term):
            valid = self._columns["time"][region.used] >= oldest
            self._keep(region, torch.nonzero(valid).flatten() + region.start)
        self.frames = [f for f in self.frames if f.time >= oldest]
        self.permanent_frames = [f for f in self.permanent_frames if f.time >= oldest]

    def doubt(self, object_id: int, after: int) -> None:
        """Bar an object from all that is remembered of frames later than `after`: it was something else.

        The others go on reading it. Spans of which nothing is left in memory are dropped, so that a stream of
        corrections without end doesn't fill memory.
        """
        time = self._columns["time"][self._used_rows()]
        if len(time) == 0 or int(time.max()) <= after:
            return
        spans = [(a, b) for a, b in self.doubted.get(object_id, ()) if a <= after]
        spans = [(a, min(b, after)) for a, b in spans] + [(after + 1, int(time.max()))]
        self.doubted[object_id] = [(a, b) for a, b in spans if bool(((time >= a) & (time <= b)).any())]

    def _append(
        self,
        region: _Region,
        columns: Mapping[str, Tensor],
        time: Tensor,
        values: Mapping[int, Tensor],
        counts: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        count = len(time)
        span = slice(region.start + region.size, region.start + region.size + count)
        for name, column in columns.items():
            self._columns[name][span] = column
        self._columns["time"][span] = time
        self._columns["use"][span] = 0 if counts is None else counts[0]
        self._columns["life"][span] = _LIFE_AT_BIRTH if counts is None else counts[1]
        for object_id, value in values.items():
            self._values[object_id][span] = value.to(self.value_dtype)
        region.size += count

    def _keep(self, region: _Region, rows: Tensor) -> None:
        """Keep these rows of a region, in their order, and close the gaps."""
        if len(rows) == region.size:
            return
        span = slice(region.start, region.start + len(rows))
        for column in (*self._columns.values(), *self._values.values()):
            column[span] = column[rows]
        region.size = len(rows)

    def _frame_rows(self, index: int) -> slice:
        start = self.working.start + index * self.positions
        return slice(start, start + self.positions)

    def _keep_frames(self, stay: list[int]) -> None:
        rows = [torch.arange(r.start, r.stop, device=self.device) for r in map(self._frame_rows, stay)]
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._keep(self.working, torch.cat(rows) if rows else none)
        self.frames = [self.frames[i] for i in stay]

    def _make_permanent(self, index: int) -> None:
        """Copy a frame of working memory into the permanent store; the oldest there makes room."""
        region = self.permanent
        if region.size == region.capacity:
            keep = torch.arange(region.start + self.positions, region.start + region.size, device=self.device)
            self._keep(region, keep)
            self.permanent_frames.pop(0)
        rows = self._frame_rows(index)
        column = self._columns
        self._append(
            region,
            {name: column[name][rows] for name in ("key", "shrinkage", "selection")},
            column["time"][rows],
            {i: v[rows] for i, v in self._values.items()},
            (column["use"][rows], column["life"][rows]),
        )
        self.permanent_frames.append(self.frames[index])

    def _stays_for_good(self, frame: MemoryFrame) -> bool:
        return frame.prompted and self.permanent.capacity > 0

    def _drop_oldest(self) -> None:
        # There is at most one anchor, and a limit is at least 2 frames.
        index = next(i for i, f in enumerate(self.frames) if not f.anchor)
        if self._stays_for_good(self.frames[index]):
            self._make_permanent(index)
        self._keep_frames([i for i in range(len(self.frames)) if i != index])

    # --- consolidation ---------------------------------------------------------------------------

    def _consolidate(self) -> None:
        """Turn the middle of working memory into prototypes in long-term memory (section 3.3.2)."""
        newest = len(self.frames) - (self.config.min_mid_term_frames - 1)
        taken = [i for i in range(newest) if not self.frames[i].anchor]
        permanent = [i for i in taken if self._stays_for_good(self.frames[i])]
        candidates = [i for i in taken if i not in permanent]
        if candidates:
            self._make_room(self.config.max_long_term_elements - self.config.num_prototypes)
            spans = map(self._frame_rows, candidates)
            rows = torch.cat([torch.arange(r.start, r.stop, device=self.device) for r in spans])
            self._add_prototypes(rows)
        for index in permanent:
            self._make_permanent(index)
        self._keep_frames([i for i in range(len(self.frames)) if i not in taken])

    def _make_room(self, limit: int) -> None:
        """The least-used long-term elements leave until `limit` remain; of equals, the older one."""
        surplus = self.long_term.size - limit
        if surplus <= 0:
            return
        order = torch.argsort(self.usage("long_term"), stable=True)
        survivors = torch.sort(order[surplus:]).values
        self._keep(self.long_term, survivors + self.long_term.start)

    def _add_prototypes(self, rows: Tensor) -> None:
        column = self._columns
        usage = column["use"][rows] / column["life"][rows]
        picked = torch.argsort(usage, descending=True, stable=True)[: self.config.num_prototypes]
        prototypes = rows[picked]
        scores = similarity(
            column["key"][rows].T.unsqueeze(0),
            column["shrinkage"][rows].view(1, 1, -1),
            column["key"][prototypes].T.unsqueeze(0),
            column["selection"][prototypes].T.unsqueeze(0),
        )[0]  # candidates, prototypes
        weights = torch.softmax(scores, 0)
        time = column["time"][rows]
        values = {}
        for object_id, first in self.first_time.items():
            valid = ~_barred(time, first, self.doubted.get(object_id, ()))
            own = weights
            if not bool(valid.all()):
                # Where no candidate is valid nothing is either: such a prototype is older than the object.
                barred = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
                own = torch.nan_to_num(torch.softmax(barred, 0), nan=0.0)
            values[object_id] = own.T @ self._values[object_id][rows].float()
        self._append(
            self.long_term,
            {
                "key": column["key"][prototypes],
                "shrinkage": weights.T @ column["shrinkage"][rows],
                "selection": column["selection"][prototypes],
            },
            column["time"][prototypes],
            values,
        )

    # --- allocation and storage ------------------------------------------------------------------

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # Zeros, not empty: untouched pages then cost no memory, and a stray row could never hold NaN.
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _grow(self) -> None:
        """Double working memory: only where its frames are unlimited."""
        extra = self.working.capacity

        def longer(t: Tensor) -> Tensor:
            return torch.cat([t, torch.zeros((extra, *t.shape[1:]), dtype=t.dtype, device=t.device)])

        self._columns = {name: longer(t) for name, t in self._columns.items()}
        self._values = {i: longer(t) for i, t in self._values.items()}
        self.working.capacity += extra

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is in use, as named tensors and JSON-ready facts, for `restore`."""
        rows = self._used_rows()
        tensors = {name: self._columns[name][rows] for name in _COLUMNS}
        for object_id, value in self._values.items():
            tensors[f"value.{object_id}"] = value[rows]
        facts = {
            "sizes": [r.size for r in (self.long_term, self.permanent, self.working)],
            "objects": [[i, t] for i, t in self.first_time.items()],
            "frames": [[f.time, f.prompted, f.anchor] for f in self.frames],
            "permanent_frames": [[f.time, f.prompted, f.anchor] for f in self.permanent_frames],
            "positions": self.positions,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
        }
        if self.doubted:
            facts["doubted"] = [[i, [list(span) for span in spans]] for i, spans in self.doubted.items()]
        return tensors, facts

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        config: MemoryConfig,
        device: torch.device | str = "cpu",
    ) -> Memory:
        """Build a memory from `export`'s output.

        Raises:
            ValueError: the tensors contradict the facts.
        """
        objects = {int(i): int(t) for i, t in facts["objects"]}
        dtype = next((tensors[f"value.{i}"].dtype for i in objects), torch.float32)
        memory = cls(config, facts["positions"], facts["key_dim"], facts["value_dim"], device, dtype)
        sizes = [int(n) for n in facts["sizes"]]
        memory.frames = [MemoryFrame(*f) for f in facts["frames"]]
        memory.permanent_frames = [MemoryFrame(*f) for f in facts["permanent_frames"]]
        if sizes[2] != len(memory.frames) * memory.positions:
            raise ValueError(f"{sizes[2]} working elements do not make {len(memory.frames)} frames")
        while sizes[2] > memory.working.capacity and config.max_mid_term_frames is None:
            memory._grow()
        memory.first_time = objects
        memory.doubted = {
            int(i): [(int(a), int(b)) for a, b in spans] for i, spans in facts.get("doubted", ())
        }
        memory._values = {i: memory._empty(memory.capacity, memory.value_dim, dtype=dtype) for i in objects}
        start = 0
        for region, size in zip((memory.long_term, memory.permanent, memory.working), sizes, strict=True):
            if size > region.capacity:
                raise ValueError(f"{size} elements do not fit a region of {region.capacity}")
            region.size = size
            for name in _COLUMNS:
                memory._columns[name][region.used] = tensors[name][start : start + size].to(memory.device)
            for object_id in objects:
                part = tensors[f"value.{object_id}"][start : start + size]
                memory._values[object_id][region.used] = part.to(memory.device)
            start += size
        return memory
