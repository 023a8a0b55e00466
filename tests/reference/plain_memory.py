"""Reference implementation of the memory: lists of elements in float64, as simple as possible.

Written from the description of the model alone, as an oracle for `xmem_core.memory.Memory`. An element has
its values in a dict, so an object without a value is simply a missing entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xmem_core.config import MemoryConfig

Vector = NDArray[np.float64]


@dataclass
class Element:
    key: Vector
    shrinkage: float
    selection: Vector
    values: dict[int, Vector]
    time: int
    doubted: set[int] = field(default_factory=set)
    use: float = 0.0
    life: float = 1e-7

    def tells(self, object_id: int) -> bool:
        return object_id in self.values and object_id not in self.doubted

    @property
    def usage(self) -> float:
        return self.use / self.life


@dataclass(eq=False)
class WholeFrame:
    given: set[int]
    is_first: bool
    elements: list[Element]

    def is_given_for(self, object_id: int) -> bool:
        """Whether the frame has a user's mask of this object, which is alive and not doubted."""
        return object_id in self.given and self.elements[0].tells(object_id)

    @property
    def alive(self) -> list[int]:
        return [i for i in self.given if self.is_given_for(i)]


def similarity(element: Element, query: Vector, selection: Vector) -> float:
    """-s / sqrt(C_k) * sum_c e_c (k_c - q_c)^2"""
    distance = sum(e * (k - q) ** 2 for e, k, q in zip(selection, element.key, query, strict=True))
    return float(-element.shrinkage / math.sqrt(len(query)) * distance)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def weighted(values: list[Vector], weights: list[float]) -> Vector:
    """Sum of the values times their weights."""
    total = np.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total = total + weight * value
    return total


@dataclass
class PlainMemory:
    """Attributes:
    closest_call: smallest difference, except exact ties, that ever decided between two elements. Near fp32's
        precision, the fp32 memory may legitimately decide otherwise.
    """

    config: MemoryConfig
    objects: list[int] = field(default_factory=list)
    working: list[WholeFrame] = field(default_factory=list)
    permanent: list[WholeFrame] = field(default_factory=list)
    long_term: list[Element] = field(default_factory=list)
    closest_call: float = math.inf

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(len(f.elements) for f in self.permanent + self.working), len(self.long_term)

    def pool(self) -> list[Element]:
        frames = [e for f in self.permanent + self.working for e in f.elements]
        return self.long_term + frames

    # --- reading -------------------------------------------------------------------------------------

    def read(self, query_key: Vector, query_selection: Vector) -> Vector:
        """(C_k, P), (C_k, P) -> (O, C_v, P)"""
        pool = self.pool()
        out = []
        for object_id in [None, *self.objects]:  # use counts ignore barred elements
            columns = []
            for j in range(query_key.shape[1]):
                mine = [e for e in pool if object_id is None or e.tells(object_id)]
                if not mine:
                    columns.append(np.zeros(len(next(iter(pool[0].values.values())))))
                    continue
                scores = [similarity(e, query_key[:, j], query_selection[:, j]) for e in mine]
                order = sorted(range(len(mine)), key=lambda i: -scores[i])
                self._note([scores[i] for i in order], self.config.top_k)
                best = order[: self.config.top_k]
                weights = softmax([scores[i] for i in best])
                if object_id is None:
                    for w, i in zip(weights, best, strict=True):
                        mine[i].use += w
                    continue
                columns.append(weighted([mine[i].values[object_id] for i in best], weights))
            if object_id is not None:
                out.append(np.stack(columns, 1))
        for element in pool:
            element.life += 1
        return np.stack(out)

    def _note(self, falling: list[float], cut: int) -> None:
        """Record the difference between the last element taken and the first one not taken."""
        if cut < len(falling) and falling[cut - 1] != falling[cut]:
            self.closest_call = min(self.closest_call, abs(falling[cut - 1] - falling[cut]))

    # --- writing -------------------------------------------------------------------------------------

    def add_frame(
        self,
        key: Vector,
        shrinkage: Vector,
        selection: Vector,
        values: dict[int, Vector],
        *,
        time: int,
        given: set[int],
    ) -> None:
        """(C_k, P), (1, P), (C_k, P), {id: (C_v, P)}"""
        limit = self.config.max_mid_term_frames
        if not self.config.enable_long_term and limit is not None and len(self.working) == limit:
            leaving = next(f for f in self.working if not f.is_first)
            self._keep_or_let_go([leaving])
        is_first = not self.pool()
        self.objects += [i for i in values if i not in self.objects]
        elements = []
        for i in range(key.shape[1]):
            own = {object_id: value[:, i] for object_id, value in values.items()}
            elements.append(Element(key[:, i], float(shrinkage[0, i]), selection[:, i], own, time))
        self.working.append(WholeFrame(given, is_first, elements))
        if self.config.enable_long_term and len(self.working) == limit:
            self._consolidate()

    def _keep_or_let_go(self, leaving_working: list[WholeFrame]) -> list[WholeFrame]:
        """Move frames out of working memory, into the permanent store if they are prompted; return the
        prompted ones that are not kept whole.
        """
        let_go = []
        for frame in leaving_working:
            if frame.alive:
                self.working.remove(frame)
                self.permanent.append(frame)
                if len(self.permanent) > self.config.max_permanent_frames - 1:
                    unlucky = self._least_needed(also_whole=self.working)
                    self.permanent.remove(unlucky)
                    if unlucky.alive:
                        let_go.append(unlucky)
        for frame in leaving_working:
            if frame in self.working:
                self.working.remove(frame)
        return let_go

    def _least_needed(self, also_whole: list[WholeFrame]) -> WholeFrame:
        for frame in self.permanent:
            if not frame.alive:
                return frame
        for frame in self.permanent:
            others = [f for f in self.permanent + also_whole if f is not frame]
            if all(any(f.is_given_for(i) for f in others) for i in frame.alive):
                return frame
        return self.permanent[0]

    def _consolidate(self) -> None:
        newest = self.config.min_mid_term_frames - 1
        old = [f for f in self.working[: len(self.working) - newest] if not f.is_first]
        together = [e for f in old if not f.alive for e in f.elements]
        batches = [together] if together else []
        batches += [f.elements for f in self._keep_or_let_go(old)]
        if not batches:
            return
        most = self.config.max_long_term_elements
        count = min(self.config.num_prototypes, most // len(batches)) or 1
        limit = max(0, most - count * len(batches))
        if len(self.long_term) > limit:
            # Python's sort is stable: among equals the older element is removed.
            by_usage = sorted(self.long_term, key=lambda e: e.usage)
            leaving = len(self.long_term) - limit
            self._note([e.usage for e in by_usage], leaving)
            gone = {id(e) for e in by_usage[:leaving]}
            self.long_term = [e for e in self.long_term if id(e) not in gone]
        for candidates in batches:
            if len(self.long_term) == most:
                return
            falling = sorted(candidates, key=lambda e: -e.usage)
            for cut in range(1, count + 1):
                self._note([e.usage for e in falling], cut)
            self.long_term += [self._prototype(c, candidates) for c in falling[:count]]

    def _prototype(self, picked: Element, candidates: list[Element]) -> Element:
        weights = softmax([similarity(c, picked.key, picked.selection) for c in candidates])
        shrinkage = sum(w * c.shrinkage for w, c in zip(weights, candidates, strict=True))
        values = {}
        for object_id in picked.values:
            mine = [c for c in candidates if c.tells(object_id)]
            if not mine:  # then it has no information about it either
                values[object_id] = np.zeros_like(picked.values[object_id])
                continue
            own = softmax([similarity(c, picked.key, picked.selection) for c in mine])
            values[object_id] = weighted([c.values[object_id] for c in mine], own)
        return Element(picked.key, shrinkage, picked.selection, values, picked.time, set(picked.doubted))

    def doubt(self, object_id: int, after: int) -> None:
        for element in self.pool():
            if element.time > after:
                element.doubted.add(object_id)

    def remove_objects(self, object_ids: list[int]) -> None:
        self.objects = [i for i in self.objects if i not in object_ids]
        for element in self.pool():
            for object_id in object_ids:
                element.values.pop(object_id, None)
                element.doubted.discard(object_id)
        for frame in self.permanent + self.working:
            frame.elements = [e for e in frame.elements if e.values]
        self.permanent = [f for f in self.permanent if f.elements]
        self.working = [f for f in self.working if f.elements]
        self.long_term = [e for e in self.long_term if e.values]
