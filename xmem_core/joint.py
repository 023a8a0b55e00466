"""Network calls of a step, run for one stream at a time or batched over several streams.

A step of a stream is a generator that yields the calls of the network that it needs next, and is sent their
results. Whoever runs it decides whether they are made alone or in one batch with those of other streams. A
call changes nothing, so one that fails for many is made again for each: a stream fails only by itself.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from xmem_core.aside import each, helper

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Call(ABC):
    """A call of the network for one or several images of one stream.

    Attributes:
        stage: calls of an earlier stage are made first, so that streams get to the later one together.
    """

    stage: ClassVar[int]

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Calls of one kind can be made together."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Size of its batch."""

    @abstractmethod
    def alone(self, network: Any) -> Any:
        """Make this call."""

    @classmethod
    @abstractmethod
    def together(cls, network: Any, calls: Sequence[Any]) -> list[Any]:
        """Make calls of one kind in one batch; their results."""


Work = Generator[Sequence[Call], Sequence[Any], T]
"""A step, or a part of one: yields calls that do not depend on each other, and is sent their results."""


@dataclass(frozen=True, eq=False)
class EncodeKey(Call):
    """`encode_key` of an image, (1, 3, H, W)."""

    stage = 0
    image: Tensor

    @property
    def kind(self) -> Hashable:
        return EncodeKey, self.image.shape

    @property
    def rows(self) -> int:
        return 1

    def alone(self, network: Any) -> Any:
        return network.encode_key(self.image)

    @classmethod
    def together(cls, network: Any, calls: Sequence[EncodeKey]) -> list[Any]:
        keys = network.encode_key(torch.cat([call.image for call in calls]))
        return [keys.at(row) for row in range(len(calls))]


@dataclass(frozen=True, eq=False)
class Decode(Call):
    """`XMem.decode`.

    Args:
        scales: (f16, f8, f4), (B, C, ...) each.
        readout: (B, O, C_v, h, w)
        hidden: (B, O, C_h, h, w), or None.
        update_hidden: whether the next sensory memory is asked for.
    """

    stage = 1
    scales: tuple[Tensor, Tensor, Tensor]
    readout: Tensor
    hidden: Tensor | None
    update_hidden: bool

    @property
    def kind(self) -> Hashable:
        return (Decode, self.hidden is None, *(f.shape[1:] for f in self.scales))

    @property
    def rows(self) -> int:
        return self.readout.shape[0] * self.readout.shape[1]

    def alone(self, network: Any) -> tuple[Tensor | None, Tensor]:
        found: tuple[Tensor | None, Tensor] = network.decode(
            self.scales, self.readout, self.hidden, update_hidden=self.update_hidden
        )
        return found

    @classmethod
    def together(cls, network: Any, calls: Sequence[Decode]) -> list[Any]:
        counts = _counts([call.readout for call in calls])
        scales = tuple(torch.cat(parts) for parts in zip(*(call.scales for call in calls), strict=True))
        hidden = _joined([call.hidden for call in calls], counts)
        # For all if for any: it takes little of the time.
        renewed, logits = network.decode(
            scales,
            _joined([call.readout for call in calls], counts),
            hidden,
            update_hidden=any(call.update_hidden for call in calls),
            **_ragged(counts),
        )
        found = _parted(logits, [call.readout for call in calls])
        sensed = _own_hidden(renewed, [call.hidden for call in calls], [call.update_hidden for call in calls])
        return list(zip(sensed, found, strict=True))


@dataclass(frozen=True, eq=False)
class EncodeValue(Call):
    """`XMem.encode_value`.

    Args:
        image: (B, 3, H, W)
        f16: (B, C, h, w)
        hidden: (B, O, C_h, h, w), or None.
        masks: (B, O, H, W)
        deep_update: whether the sensory memory is renewed.
    """

    stage = 2
    image: Tensor
    f16: Tensor
    hidden: Tensor | None
    masks: Tensor
    deep_update: bool

    @property
    def kind(self) -> Hashable:
        return EncodeValue, self.hidden is None, self.image.shape[1:]

    @property
    def rows(self) -> int:
        return self.masks.shape[0] * self.masks.shape[1]

    def alone(self, network: Any) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = network.encode_value(
            self.image, self.f16, self.hidden, self.masks, deep_update=self.deep_update
        )
        return found

    @classmethod
    def together(cls, network: Any, calls: Sequence[EncodeValue]) -> list[Any]:
        masks = [call.masks for call in calls]
        counts = _counts(masks)
        value, renewed = network.encode_value(
            torch.cat([call.image for call in calls]),
            torch.cat([call.f16 for call in calls]),
            _joined([call.hidden for call in calls], counts),
            _joined(masks, counts),
            deep_update=any(call.deep_update for call in calls),
            **_ragged(counts),
        )
        sensed = _own_hidden(renewed, [call.hidden for call in calls], [call.deep_update for call in calls])
        return list(zip(_parted(value, masks), sensed, strict=True))


@dataclass(frozen=True, eq=False)
class Stacked(Call):
    """A method of the network of which arguments and results are batches: those of equal shapes go together.

    Args:
        method: its name.
        given: the arguments, (B, ...) each.
        options: arguments by name.
    """

    stage = 1
    method: str
    given: tuple[Tensor, ...]
    options: dict[str, bool] = field(default_factory=dict)

    @property
    def kind(self) -> Hashable:
        return (self.method, *self.options.items(), *(tensor.shape[1:] for tensor in self.given))

    @property
    def rows(self) -> int:
        return self.given[0].shape[0]

    def alone(self, network: Any) -> Any:
        return getattr(network, self.method)(*self.given, **self.options)

    @classmethod
    def together(cls, network: Any, calls: Sequence[Stacked]) -> list[Any]:
        given = tuple(torch.cat(parts) for parts in zip(*(call.given for call in calls), strict=True))
        found = Stacked(calls[0].method, given, calls[0].options).alone(network)
        sizes = [call.rows for call in calls]
        if isinstance(found, Tensor):
            return [part.clone() for part in found.split(sizes)]
        return list(zip(*([part.clone() for part in own.split(sizes)] for own in found), strict=True))


def _counts(own: Sequence[Tensor]) -> list[int]:
    """Number of objects of each image of all calls, of which these are (B, O, ...)."""
    return [tensor.shape[1] for tensor in own for _ in range(tensor.shape[0])]


def _equal(counts: Sequence[int]) -> bool:
    return len(set(counts)) == 1


def _ragged(counts: Sequence[int]) -> dict[str, Any]:
    """The argument `counts` of the network, where images have different numbers of objects."""
    return {} if _equal(counts) else {"counts": counts}


def _joined(own: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """(B, O, ...) of each call as (B, O, ...) of all, or as (N, 1, ...) if there are different O."""
    there = [tensor for tensor in own if tensor is not None]
    if not there:
        return None
    if _equal(counts):
        return torch.cat(there)
    return torch.cat([tensor.flatten(0, 1) for tensor in there]).unsqueeze(1)


def _parted(joined: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """What is for all objects as (B, O, ...) of each call; `own` has this many. Views."""
    sizes = [tensor.shape[0] * tensor.shape[1] for tensor in own]
    parts = joined.flatten(0, 1).split(sizes)
    return [part.view(*tensor.shape[:2], *part.shape[1:]) for part, tensor in zip(parts, own, strict=True)]


def _own_hidden(
    renewed: Tensor | None, before: Sequence[Tensor | None], asked: Sequence[bool]
) -> list[Tensor | None]:
    """The sensory memory of each call: the new one where it was asked for."""
    there = [tensor for tensor in before if tensor is not None]
    if renewed is None or not there:
        return list(before)
    # Copies: a stream keeps it, and would keep that of all streams with it.
    parts = [
        part.clone() if wanted else None for part, wanted in zip(_parted(renewed, there), asked, strict=True)
    ]
    return [old if new is None else new for old, new in zip(before, parts, strict=True)]


class Caller:
    """Makes calls of a network.

    Args:
        network: prepared for inference.
        context: makes the context in which it runs.
        most: by kind of call the rows of a batch that memory suffices for, where it was too little; changed
            in place.
    """

    def __init__(
        self, network: Any, context: Callable[[], AbstractContextManager[Any]], most: dict[Hashable, int]
    ) -> None:
        self._network, self._context, self._most = network, context, most

    def alone(self, work: Work[T]) -> T:
        """Run a step whose calls are made one by one, or shared with another thread."""
        try:
            calls = next(work)
            while True:
                calls = work.send(each([partial(self._alone, call) for call in calls], helper()))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def together(self, works: Sequence[Work[T]]) -> list[T | Exception]:
        """Run steps of several streams whose calls are made together where they can be.

        Returns:
            of each its result, or what it raised.
        """
        outcomes: list[Any] = [None] * len(works)
        waiting: dict[int, Sequence[Call]] = {}

        def go_on(i: int, results: Sequence[Any] | None) -> None:
            work = works[i]
            try:
                failed = next((r for r in results or () if isinstance(r, Exception)), None)
                if failed is not None:
                    waiting[i] = work.throw(failed)
                else:
                    waiting[i] = next(work) if results is None else work.send(results)
            except StopIteration as stop:
                outcomes[i] = stop.value
            except Exception as error:
                outcomes[i] = error

        for i in range(len(works)):
            go_on(i, None)
        while waiting:
            first = min(call.stage for calls in waiting.values() for call in calls)
            now = {i: c for i, c in waiting.items() if min(call.stage for call in c) == first}
            places = [(i, k) for i, calls in now.items() for k in range(len(calls))]
            results = dict(zip(places, self.made([now[i][k] for i, k in places]), strict=True))
            for i, calls in now.items():
                del waiting[i]
                go_on(i, [results[i, k] for k in range(len(calls))])
        return outcomes

    def made(self, calls: Sequence[Call]) -> list[Any]:
        """Make calls, those of one kind together; of each its result, or what it raised."""
        groups: dict[Hashable, list[int]] = {}
        for i, call in enumerate(calls):
            groups.setdefault(call.kind, []).append(i)
        results: list[Any] = [None] * len(calls)
        for kind, members in groups.items():
            for part in self._parts(kind, [(i, calls[i].rows) for i in members]):
                for i, result in zip(part, self._attempt([calls[i] for i in part]), strict=True):
                    results[i] = result
        return results

    def _parts(self, kind: Hashable, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The calls (index, rows) in parts that memory suffices for, as far as is known."""
        most = self._most.get(kind)
        parts: list[list[int]] = [[]]
        held = 0
        for i, rows in sizes:
            if most is not None and parts[-1] and held + rows > most:
                parts.append([])
                held = 0
            parts[-1].append(i)
            held += rows
        return parts

    def _attempt(self, calls: Sequence[Call]) -> list[Any]:
        if len(calls) > 1:
            try:
                with self._context():
                    return calls[0].together(self._network, calls)
            except Exception as error:
                self._note(calls, error)
        # Here and not above: there, the exception keeps what the failed call computed.
        return [self._tried(call) for call in calls]

    def _note(self, calls: Sequence[Call], error: Exception) -> None:
        rows = sum(call.rows for call in calls)
        if isinstance(error, torch.OutOfMemoryError):
            most = self._most[calls[0].kind] = max(1, rows // 2)
            logger.warning("no memory for %d in a batch: from now on %d at most", rows, most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            logger.warning("a batch of %d streams' calls failed, trying one by one: %s", len(calls), error)

    def _tried(self, call: Call) -> Any:
        try:
            return self._alone(call)
        except Exception as error:
            return error

    def _alone(self, call: Call) -> Any:
        with self._context():
            return call.alone(self._network)
