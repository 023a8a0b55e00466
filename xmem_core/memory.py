"""Working, permanent and long-term memory of one stream (paper section 3.3).

All elements live in one pool of preallocated columns with these regions:

    long-term | permanent | copied | working

An element stores one position of one memory frame: key, shrinkage, selection (needed until consolidation),
one value per object, use and life counts, and the time of its frame. An object has values for elements from
its own first frame on, so an element's validity for an object follows from the element's time and the time of
the object's first frame. Values of removed objects cannot be read: an id that is used again has a later first
frame than every element of its predecessor. Time spans on which the mask was on something else are barred for
the object (`doubt`).

Elements copied from another stream (`adopt`) are valid for the one object that they were copied for. They
have a negative time, which is that of the object's first frame, and stay as long as the object.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
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

logger = logging.getLogger(__name__)

# Initial life of an element, just above 0, so that use / life is defined before the first read.
_LIFE_AT_BIRTH = 1e-7
# Initial capacity of unlimited working memory, in frames.
_FIRST_FRAMES = 16

_VALUE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a weight of 1 is as a whole number: weights of float32 have 24 bits.
_ONE = 2.0**40

_COLUMNS = ("key", "shrinkage", "selection", "use", "life", "time")


@dataclass(frozen=True)
class MemoryFrame:
    """A whole frame in working or permanent memory.

    Args:
        time: the frame's time.
        given: objects prompted on the frame, except those removed or doubted since.
        anchor: whether it is the first frame of an empty memory, which always stays in working memory.
        pinned: whether it is kept as a whole, see `Memory.pin`.
    """

    time: int
    given: tuple[int, ...]
    anchor: bool
    pinned: bool = False

    @property
    def stays_whole(self) -> bool:
        """Whether it goes from working memory to the permanent store."""
        return self.pinned or bool(self.given)

    def without(self, object_id: int) -> MemoryFrame:
        """The frame without this object in `given`."""
        return replace(self, given=tuple(i for i in self.given if i != object_id))


_Validity = tuple[int, tuple[tuple[int, int], ...]]
"""From which time on elements are valid for an object, and in which spans they are not."""


def _barred(time: Tensor, first: int, spans: Iterable[tuple[int, int]]) -> Tensor:
    """Mask, (N,) bool, of the elements at `times`, (N,), that an object may not read."""
    barred = time < first
    for start, end in spans:
        barred |= (time >= start) & (time <= end)
    return barred


def _summed(places: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sum of the weights, (M,) in 0..1, at each of `count` places, (M,): float32.

    A GPU adds floats in any order, so sums of equal input would differ; and its `bincount` waits for it.
    There they are added as whole numbers.
    """
    if weights.device.type == "cpu":
        return torch.bincount(places, weights, minlength=count).to(torch.float32)
    whole = (weights.double() * _ONE).round().to(torch.int64)
    sums = torch.zeros(count, dtype=torch.int64, device=weights.device).scatter_add_(0, places, whole)
    return (sums.double() / _ONE).to(torch.float32)


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
    """The elements in use, prepared for reading; valid until the memory changes.

    Args:
        rows: rows of the pool, (N,)
        time: times of their frames, (N,)
        oldest: see `Memory._oldest`.
        elements: factors for `search`.
    """

    rows: Tensor
    time: Tensor
    oldest: int
    elements: Searchable | CoarselySearchable


class Memory:
    """Memory of one stream, except the sensory memory.

    Args:
        config: memory settings.
        positions: h * w, elements per frame.
        key_dim, value_dim: C_k and C_v.
        device, value_dtype: device of the memory and dtype of values (keys are always fp32).
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
        # The last region, so that it can grow.
        self.copied = _Region(long_capacity + permanent_capacity, 0)
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
            f"permanent={self.permanent.size}, long_term={self.long_term.size}, copied={self.copied.size})"
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements in working memory (with permanent ones) and in long-term memory (with copied ones)."""
        return self.working.size + self.permanent.size, self.long_term.size + self.copied.size

    @property
    def capacity(self) -> int:
        """Elements that the pool is allocated for."""
        return len(self._columns["key"])

    @property
    def nbytes(self) -> int:
        """Bytes that the pool is allocated for."""
        return sum(t.nbytes for t in (*self._columns.values(), *self._values.values()))

    @property
    def copied_elements(self) -> int:
        """Elements copied from other streams."""
        return self.copied.size

    def elements_of(self, object_id: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key (N, C_k), shrinkage (N,) and value (N, C_v) of the elements that an object may read.

        Args:
            most: N at most. Frames that were prompted with the object come first, then pinned ones, then the
                elements that are used most.
        """
        rows = self._used_rows()
        time = self._columns["time"][rows]
        first = self.first_time[object_id]
        barred = _barred(time, first, self.doubted.get(object_id, ()))
        if first >= 0:
            barred |= time < 0
        rows, time = rows[~barred], time[~barred]
        whole = [*self.permanent_frames, *self.frames]
        given = torch.tensor([f.time for f in whole if object_id in f.given], device=self.device)
        pinned = torch.tensor([f.time for f in whole if f.pinned], device=self.device)
        use = self._columns["use"][rows] / self._columns["life"][rows]
        # Use over life is at most the number of queries, and far below these.
        rank = torch.isin(time, given).double() * 2e9 + torch.isin(time, pinned).double() * 1e9 + use
        best = torch.argsort(rank, descending=True, stable=True)[:most]
        rows = rows[torch.sort(best).values]
        value = self._values[object_id][rows].float()
        return self._columns["key"][rows], self._columns["shrinkage"][rows], value

    def usage(self, region: str) -> Tensor:
        """Use over life of the elements of `working`, `permanent`, `long_term` or `copied`, (n,)."""
        used = getattr(self, region).used
        return self._columns["use"][used] / self._columns["life"][used]

    def times(self, region: str) -> Tensor:
        """Times of the elements of `working`, `permanent`, `long_term` or `copied`, (n,)."""
        return self._columns["time"][getattr(self, region).used]

    # --- reading ---------------------------------------------------------------------------------

    def read(
        self,
        query_key: Tensor,
        query_selection: Tensor,
        *,
        coarse: bool = False,
        count_use: bool = True,
        wanted: Mapping[int, Tensor] | None = None,
        enough: int | None = None,
    ) -> Tensor:
        """Read every object's value at every query position, and count the use of what was read.

        Args:
            query_key: (C_k, P)
            query_selection: (C_k, P)
            coarse: find candidates in bfloat16 and select the best of them in float32.
            count_use: False for a read that produces no mask.
            wanted: object id -> query positions at which the object's value is read, (P,) bool; elsewhere,
                and for objects without an entry, it is 0. None: everywhere, for all objects.
            enough: where better elements are of frames that an object is barred from, it is content with so
                many others (see `search`). None: it reads exactly its own best `top_k`.

        Returns:
            (O, C_v, P), in the order of `first_time`.

        Raises:
            RuntimeError: there is nothing to read.
        """
        chosen = self.choose(
            query_key, query_selection, coarse=coarse, count_use=count_use, wanted=wanted, enough=enough
        )
        nowhere = torch.zeros(query_key.shape[1], dtype=torch.bool, device=self.device)
        out = []
        for i, value in self._values.items():
            weights, best = chosen[i]
            if wanted is None:
                out.append(sparse_readout(weights, best, value).T)
            else:
                places = wanted.get(i, nowhere).nonzero().flatten()
                own = value.new_zeros((len(weights), self.value_dim))
                own[places] = sparse_readout(weights[places], best[places], value)
                out.append(own.T)
        return torch.stack(out)

    def choose(
        self,
        query_key: Tensor,
        query_selection: Tensor,
        *,
        coarse: bool = False,
        count_use: bool = True,
        wanted: Mapping[int, Tensor] | None = None,
        enough: int | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The elements that `read` reads, and their weights. Arguments and errors are those of `read`.

        Returns:
            by object weights (P, k), which sum to 1 at a position or are all 0, and elements (P, k) as rows
            of the pool, see `origin`. Where the object's value is not wanted they mean nothing.
        """
        if self.sizes == (0, 0) or not self.first_time:
            raise RuntimeError(f"nothing to read: {self!r}")
        seen = self._readable
        if seen is None or isinstance(seen.elements, CoarselySearchable) != coarse:
            seen = self._readable = self._as_readable(coarse)
        # Objects with the same valid elements share one softmax; one older than all elements of this stream
        # may read all of these. What was copied takes no part in the use of these elements.
        everything: _Validity = (seen.oldest, ())
        validity = {
            i: (first if first < 0 else max(first, seen.oldest), tuple(self.doubted.get(i, ())))
            for i, first in self.first_time.items()
        }
        readers = [everything, *sorted(set(validity.values()) - {everything})]
        barred: list[Tensor | None] = [_barred(seen.time, *valid) for valid in readers[1:]]
        barred.insert(0, _barred(seen.time, *everything) if self.copied.size else None)
        used: list[Tensor | None] = [None] * len(readers)
        if wanted is not None:
            nowhere = torch.zeros(query_key.shape[1], dtype=torch.bool, device=self.device)
            wanted = {i: wanted.get(i, nowhere) for i in self.first_time}
            for n, valid in enumerate(readers[1:], 1):
                used[n] = torch.stack([wanted[i] for i in wanted if validity[i] == valid]).any(0)
        # Frames that an object with a copy may not read are like what is seen: it must search its own.
        least = [enough if spans and first >= 0 else None for first, spans in readers]
        found = search(
            seen.elements,
            query_key,
            query_selection,
            self.config.top_k,
            barred,
            wanted=used,
            enough=least,
        )
        rows = seen.rows
        if count_use:
            self._count_use(rows, *found[0])
        chosen = {valid: (w, rows[best]) for valid, (w, best) in zip(readers, found, strict=True)}
        return {i: chosen[valid] for i, valid in validity.items()}

    def origin(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Region (0: long-term, 1: permanent, 2: copied, 3: working) and time of rows of the pool, int64."""
        starts = [region.start for region in (self.permanent, self.copied, self.working)]
        bounds = torch.tensor(starts, device=rows.device)
        return torch.bucketize(rows, bounds, right=True), self._columns["time"][rows]

    def _as_readable(self, coarse: bool) -> _Readable:
        rows = self._used_rows()
        column = self._columns
        time = column["time"][rows]
        key, shrinkage = column["key"][rows], column["shrinkage"][rows]
        elements: Searchable | CoarselySearchable
        if coarse:
            elements = coarsely_searchable(key, shrinkage)
        else:
            # One contiguous row per channel, which is the fast layout for the matrix products.
            elements = searchable(key.T.contiguous(), shrinkage.unsqueeze(0))
        return _Readable(rows, time, self._oldest(), elements)

    def _oldest(self) -> int:
        """A time that none of this stream's elements is before; of copied ones if there are no others.

        From what the host knows: to ask a GPU for the smallest time would wait for it.
        """
        own = [first for first in self.first_time.values() if first >= 0]
        if own:
            return min(own)
        there = self.working.size or self.permanent.size or self.long_term.size
        return 0 if there else min(self.first_time.values())

    def _used_rows(self) -> Tensor:
        regions = (self.long_term, self.permanent, self.copied, self.working)
        return torch.cat([torch.arange(r.start, r.start + r.size, device=self.device) for r in regions])

    def _count_use(self, rows: Tensor, weights: Tensor, best: Tensor) -> None:
        self._columns["use"][rows] += _summed(best.flatten(), weights.flatten(), len(rows))
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
        given: Collection[int] = (),
    ) -> None:
        """Store a frame, and consolidate when working memory is full.

        Args:
            time: later than that of every frame before.
            key, selection: (C_k, P)
            shrinkage: (1, P)
            values: object id -> (C_v, P), for every object; an id not seen before starts an object here.
            given: objects prompted on this frame.

        Raises:
            ValueError: an object has no value, or the shapes, the time or `given` do not fit. The memory is
                unchanged then.
        """
        missing = sorted(set(self.first_time) - set(values))
        if missing:
            raise ValueError(f"objects {missing} have no value at time {time}: give every object one")
        strange = sorted(set(given) - set(values))
        if strange:
            raise ValueError(f"objects {strange} are given at time {time} and have no value")
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
            # There is at most one anchor, and the limit is at least 2 frames.
            self._leave_working(self._taken(0)[:1])
        if self.working.size + self.positions > self.working.capacity:
            self._grow()
        for object_id in values:
            if object_id not in self.first_time:
                self.first_time[object_id] = time
                self._values[object_id] = self._empty(self.capacity, self.value_dim, dtype=self.value_dtype)
        anchor = self.sizes == (0, 0)
        self.frames.append(MemoryFrame(time, tuple(sorted(set(given))), anchor))
        self._append(
            self.working,
            {"key": key.T, "shrinkage": shrinkage[0], "selection": selection.T},
            torch.full((self.positions,), time, device=self.device),
            {i: v.T for i, v in values.items()},
        )
        if self.config.enable_long_term and len(self.frames) == limit:
            self._leave_working(self._taken(self.config.min_mid_term_frames - 1))

    def remove_objects(self, object_ids: list[int]) -> None:
        """Remove objects, and free elements that are valid for no remaining object."""
        self._readable = None
        for object_id in object_ids:
            del self.first_time[object_id]
            del self._values[object_id]
            self.doubted.pop(object_id, None)
            self._not_given(object_id, after=-1)
        if not self.first_time:
            self.frames, self.permanent_frames = [], []
            self.working.size = self.permanent.size = self.long_term.size = self.copied.size = 0
            return
        living = torch.tensor(list(self.first_time.values()), device=self.device)
        kept = torch.isin(self._columns["time"][self.copied.used], living)
        self._keep(self.copied, torch.nonzero(kept).flatten() + self.copied.start)
        oldest = min(self.first_time.values())
        for region in (self.working, self.permanent, self.long_term):
            valid = self._columns["time"][region.used] >= oldest
            self._keep(region, torch.nonzero(valid).flatten() + region.start)
        self.frames = [f for f in self.frames if f.time >= oldest]
        self.permanent_frames = [f for f in self.permanent_frames if f.time >= oldest]

    def adopt(self, object_id: int, time: int, key: Tensor, shrinkage: Tensor, value: Tensor) -> None:
        """Start an object from elements of another stream. It may not read what is in memory by now.

        Args:
            time: of its first frame; negative, and smaller than all times in memory.
            key: (N, C_k)
            shrinkage: (N,)
            value: (N, C_v)
        """
        self._readable = None
        known = self._columns["time"][self._used_rows()]
        lacking = self.copied.size + len(key) - self.copied.capacity
        if lacking > 0:
            self._insert(self.copied.start + self.copied.capacity, lacking)
            self.copied.capacity += lacking
            self.working.start += lacking
        self.first_time[object_id] = time
        self._values[object_id] = self._empty(self.capacity, self.value_dim, dtype=self.value_dtype)
        self._append(
            self.copied,
            {"key": key.to(self.device), "shrinkage": shrinkage.to(self.device)},
            torch.full((len(key),), time, device=self.device),
            {object_id: value.to(self.device)},
        )
        if len(known):
            self.doubted[object_id] = [(time + 1, int(known.max()))]

    def doubt(self, object_id: int, after: int) -> None:
        """Bar an object from reading elements of frames later than `after`, on which its mask was wrong.

        Other objects still read them. Spans without elements in memory are dropped, so that any number of
        corrections takes bounded memory.
        """
        self._not_given(object_id, after)
        time = self._columns["time"][self._used_rows()]
        if len(time) == 0 or int(time.max()) <= after:
            return
        spans = [(a, b) for a, b in self.doubted.get(object_id, ()) if a <= after]
        spans = [(a, min(b, after)) for a, b in spans] + [(after + 1, int(time.max()))]
        self.doubted[object_id] = [(a, b) for a, b in spans if bool(((time >= a) & (time <= b)).any())]

    def bar_last(self, object_ids: Iterable[int]) -> None:
        """Bar objects from reading the elements of the newest frame, on which they are not wholly visible.

        Other objects still read them. Frames in a row make one span, and spans without elements in memory
        are dropped.
        """
        barred = list(object_ids)
        if not barred:
            return
        newest = self.frames[-1].time
        before = self.frames[-2].time if len(self.frames) > 1 else newest
        time = self._columns["time"][self._used_rows()]
        for object_id in barred:
            spans = list(self.doubted.get(object_id, ()))
            if spans and spans[-1][1] >= before:
                spans[-1] = (spans[-1][0], newest)
            else:
                spans.append((newest, newest))
            self.doubted[object_id] = [(a, b) for a, b in spans if bool(((time >= a) & (time <= b)).any())]

    def check_forgets(self, first: int, last: int, object_id: int | None = None) -> None:
        """Raise ValueError if an object (None: any) could read nothing without the times `first`..`last`."""
        time = self._columns["time"][self._used_rows()]
        left = time[(time < first) | (time > last)]
        wanted = self.first_time if object_id is None else {object_id: self.first_time[object_id]}
        for object_id, start in wanted.items():
            spans = self.doubted.get(object_id, ())
            if bool(_barred(left, start, spans).all()) and not bool(_barred(time, start, spans).all()):
                raise ValueError(
                    f"object {object_id} would remember nothing any more: forget less, or remove the object"
                )

    def forget(self, first: int, last: int) -> None:
        """Drop the elements of frames with times `first`..`last`; see `check_forgets`."""
        self._readable = None
        for region in (self.working, self.permanent, self.long_term, self.copied):
            time = self._columns["time"][region.used]
            self._keep(region, torch.nonzero((time < first) | (time > last)).flatten() + region.start)
        self.frames = [f for f in self.frames if not first <= f.time <= last]
        self.permanent_frames = [f for f in self.permanent_frames if not first <= f.time <= last]

    def bar(self, object_id: int, first: int, last: int) -> None:
        """Bar an object from reading elements of the times `first`..`last`; see `check_forgets`.

        Other objects still read them. Spans without elements in memory are dropped.
        """
        for frames in (self.frames, self.permanent_frames):
            frames[:] = [f.without(object_id) if first <= f.time <= last else f for f in frames]
        time = self._columns["time"][self._used_rows()]
        last = min(last, int(time.max()))  # not those of later frames
        spans: list[tuple[int, int]] = []
        for a, b in sorted([*self.doubted.get(object_id, ()), (first, last)]):
            if spans and a <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
            else:
                spans.append((a, b))
        spans = [(a, b) for a, b in spans if bool(((time >= a) & (time <= b)).any())]
        if spans:
            self.doubted[object_id] = spans

    def pin(self, time: int, pinned: bool = True) -> None:
        """Keep a frame as a whole, like those with prompts, which give way to it; or no longer.

        Raises:
            ValueError: no whole frame of that time is in memory, or the permanent store has no room for one
                more pinned frame.
        """
        whole = [*self.permanent_frames, *self.frames]
        if time not in [f.time for f in whole]:
            raise ValueError(
                f"no whole frame of time {time} is in memory: there are {sorted(f.time for f in whole)}"
            )
        others = sum(f.pinned and f.time != time for f in whole)
        if pinned and others >= self.config.max_permanent_frames - 1:
            raise ValueError(
                f"{others} frames are pinned, and max_permanent_frames={self.config.max_permanent_frames} "
                "leaves no room for more: unpin one"
            )
        for frames in (self.frames, self.permanent_frames):
            frames[:] = [replace(f, pinned=pinned) if f.time == time else f for f in frames]

    def _not_given(self, object_id: int, after: int) -> None:
        """Remove the object from `given` of frames later than `after`."""
        for frames in (self.frames, self.permanent_frames):
            frames[:] = [f.without(object_id) if f.time > after else f for f in frames]

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

    def _leave_working(self, taken: list[int]) -> None:
        """Move frames out of working memory: prompted and pinned ones to the permanent store, the others, and
        those for which it has no room, to long-term memory, if enabled.
        """
        entering = [self.frames[i] for i in taken if self.frames[i].stays_whole]
        store, leaving = self._share_store(entering)
        if self.config.enable_long_term:
            others = [self._frame_rows(i) for i in taken if not self.frames[i].stays_whole]
            # A prompted frame is consolidated separately: among others, few prototypes would be its own.
            self._consolidate([others] * bool(others) + [[self._rows_of(f)] for f in leaving if f.given])
        stayed = [self._rows_of(f) for f in self.permanent_frames if f in store]
        self._keep(self.permanent, self._rows(stayed))
        column = self._columns
        for frame in entering:
            if frame in store:
                rows = self._rows_of(frame)
                self._append(
                    self.permanent,
                    {name: column[name][rows] for name in ("key", "shrinkage", "selection")},
                    column["time"][rows],
                    {i: v[rows] for i, v in self._values.items()},
                    (column["use"][rows], column["life"][rows]),
                )
        self.permanent_frames = store
        stay = [i for i in range(len(self.frames)) if i not in taken]
        self._keep(self.working, self._rows([self._frame_rows(i) for i in stay]))
        self.frames = [self.frames[i] for i in stay]

    def _share_store(self, entering: list[MemoryFrame]) -> tuple[list[MemoryFrame], list[MemoryFrame]]:
        """Split frames into those that the permanent store keeps and those that must leave, in order.

        Frames without a prompted living object go first, then those whose objects were all also prompted on
        another kept frame, then the others; the oldest first within each kind. Pinned frames stay.
        """
        store, leaving = list(self.permanent_frames), []
        whole = [*self.permanent_frames, *self.frames]
        for frame in entering:
            store.append(frame)
            if len(store) * self.positions > self.permanent.capacity:
                given = Counter(i for f in whole for i in f.given)
                least = [
                    3 if f.pinned else 0 if not f.given else 1 if all(given[i] > 1 for i in f.given) else 2
                    for f in store
                ]
                leaver = store.pop(least.index(min(least)))
                whole.remove(leaver)
                leaving.append(leaver)
                if min(least) == 2 and not self.config.enable_long_term:
                    logger.warning(
                        "the masks given of objects %s at time %d are forgotten: living objects were given "
                        "on more frames than max_permanent_frames=%d, and long-term memory is off",
                        list(leaver.given), leaver.time, self.config.max_permanent_frames,
                    )  # fmt: skip
        return store, leaving

    def _rows_of(self, frame: MemoryFrame) -> slice:
        """Rows of a whole frame's elements in the pool."""
        if frame in self.permanent_frames:
            start = self.permanent.start + self.permanent_frames.index(frame) * self.positions
            return slice(start, start + self.positions)
        return self._frame_rows(self.frames.index(frame))

    def _rows(self, spans: list[slice]) -> Tensor:
        rows = [torch.arange(span.start, span.stop, device=self.device) for span in spans]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _taken(self, newest: int) -> list[int]:
        """The frames of working memory except the newest ones and the anchor."""
        return [i for i in range(len(self.frames) - newest) if not self.frames[i].anchor]

    # --- consolidation ---------------------------------------------------------------------------

    def _consolidate(self, groups: list[list[slice]]) -> None:
        """Turn each group of frames into prototypes in long-term memory (section 3.3.2)."""
        if not groups:
            return
        most = self.config.max_long_term_elements
        # Fewer prototypes per group only if long-term memory cannot hold those of all groups.
        each = max(1, min(self.config.num_prototypes, most // len(groups)))
        self._make_room(most - each * len(groups))
        for spans in groups[: most // each]:
            self._add_prototypes(self._rows(spans), each)

    def _make_room(self, limit: int) -> None:
        """Remove the least-used long-term elements until `limit` remain; ties remove the older one.

        With `buffer_tokens`, when `limit` is reached so many more are removed.
        """
        if self.long_term.size < limit:
            return
        surplus = self.long_term.size - max(0, limit - (self.config.buffer_tokens or 0))
        if surplus == 0:
            return
        order = torch.argsort(self.usage("long_term"), stable=True)
        survivors = torch.sort(order[surplus:]).values
        self._keep(self.long_term, survivors + self.long_term.start)

    def _add_prototypes(self, rows: Tensor, most: int) -> None:
        column = self._columns
        usage = column["use"][rows] / column["life"][rows]
        picked = torch.argsort(usage, descending=True, stable=True)[:most]
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
            # On a GPU always: to ask whether it is needed would wait for it.
            if valid.device.type != "cpu" or not bool(valid.all()):
                # If no candidate is valid for the object, the prototype is older than the object: not valid.
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
        # Zeros: untouched pages take no physical memory, and unused rows never hold NaN.
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _grow(self) -> None:
        """Double the capacity of working memory; used only if it is unlimited."""
        extra = self.working.capacity
        self._insert(self.capacity, extra)
        self.working.capacity += extra

    def _insert(self, at: int, extra: int) -> None:
        """Insert unused rows into the pool."""

        def longer(t: Tensor) -> Tensor:
            new = torch.zeros((extra, *t.shape[1:]), dtype=t.dtype, device=t.device)
            return torch.cat([t[:at], new, t[at:]])

        self._columns = {name: longer(t) for name, t in self._columns.items()}
        self._values = {i: longer(t) for i, t in self._values.items()}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The elements in use as named tensors and a JSON-ready dict, for `restore`."""
        rows = self._used_rows()
        tensors = {name: self._columns[name][rows] for name in _COLUMNS}
        for object_id, value in self._values.items():
            tensors[f"value.{object_id}"] = value[rows]
        facts = {
            "sizes": [r.size for r in (self.long_term, self.permanent, self.working)],
            "objects": [[i, t] for i, t in self.first_time.items()],
            "frames": [[f.time, bool(f.given), f.anchor] for f in self.frames],
            "permanent_frames": [[f.time, bool(f.given), f.anchor] for f in self.permanent_frames],
            "given": [[f.time, list(f.given)] for f in (*self.permanent_frames, *self.frames) if f.given],
            "positions": self.positions,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
        }
        if self.value_dtype != torch.float32:
            facts["value_dtype"] = str(self.value_dtype).removeprefix("torch.")
        if pinned := [f.time for f in (*self.permanent_frames, *self.frames) if f.pinned]:
            facts["pinned"] = pinned
        if self.copied.size:
            facts["copied"] = self.copied.size
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
            ValueError: the tensors do not match the dict.
        """
        objects = {int(i): int(t) for i, t in facts["objects"]}
        kind = facts.get("value_dtype", "float32")
        if kind not in _VALUE_DTYPES:
            raise ValueError(f"values of {kind!r} are not allowed: {', '.join(_VALUE_DTYPES)}")
        dtype = _VALUE_DTYPES[kind]
        memory = cls(config, facts["positions"], facts["key_dim"], facts["value_dim"], device, dtype)
        sizes = [int(n) for n in facts["sizes"]]
        given, pinned = _given(facts, objects), {int(time) for time in facts.get("pinned", ())}
        memory.frames, memory.permanent_frames = (
            [
                MemoryFrame(int(t), given.get(int(t), ()), bool(anchor), int(t) in pinned)
                for t, _, anchor in facts[name]
            ]
            for name in ("frames", "permanent_frames")
        )
        if sizes[2] != len(memory.frames) * memory.positions:
            raise ValueError(f"{sizes[2]} working elements do not make {len(memory.frames)} frames")
        while sizes[2] > memory.working.capacity and config.max_mid_term_frames is None:
            memory._grow()
        memory.first_time = objects
        memory.doubted = {
            int(i): [(int(a), int(b)) for a, b in spans] for i, spans in facts.get("doubted", ())
        }
        copied = int(facts.get("copied", 0))
        memory._insert(memory.copied.start, copied)
        memory.copied.capacity = copied
        memory.working.start += copied
        memory._values = {i: memory._empty(memory.capacity, memory.value_dim, dtype=dtype) for i in objects}
        start = 0
        regions = (memory.long_term, memory.permanent, memory.copied, memory.working)
        for region, size in zip(regions, [*sizes[:2], copied, *sizes[2:]], strict=True):
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


def _given(facts: Mapping[str, Any], objects: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """Prompted objects by time. States of older versions hold the times only: the objects are then those
    that start at that time, or all living ones if none does.
    """
    if "given" in facts:
        return {int(time): tuple(int(i) for i in ids) for time, ids in facts["given"]}
    found = {}
    for time in (int(t) for t, prompted, _ in (*facts["permanent_frames"], *facts["frames"]) if prompted):
        new = [i for i, first in objects.items() if first == time]
        found[time] = tuple(sorted(new or (i for i, first in objects.items() if first < time)))
    return found
