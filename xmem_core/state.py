"""TrackerState: the memory of one stream's tracker, and its serialised form."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from xmem_core.config import MemoryConfig
from xmem_core.grouped_memory import GroupedMemory, StreamMemory, restore_memory
from xmem_core.memory import Memory
from xmem_core.object_copy import MOST_ELEMENTS, ObjectCopy
from xmem_core.windows import STRIDE, Window

_FORMAT = "xmem-tracker-state"
_VERSION = 1
# Version of states with copied objects. Others keep the older version, which older releases can read.
_VERSION_WITH_COPIES = 2
# Number of values from which a tensor is worth halving.
_LARGE = 2**12


# Values of a GPU that steps leave for later: more would be held for long.
_MOST_AWAITED = 64


class PoisonedStateError(RuntimeError):
    """A failed step left the state half-changed; resume from an earlier snapshot (`to_bytes`)."""


class TrackerState:
    """One stream's memory, object ids and frame counter. Made by `VideoSegmenter.new_state`.

    A state holds no pixels and no weights. It can be used only with the settings and the model that it was
    made with; others raise an error.

    Attributes:
        memory_config: memory settings.
        model_fingerprint: fingerprint of the model whose features it holds.
        size: the segmenter's `size`, or None.
        network_size: (height, width) of the network's input before padding; None until the first frame.
        time: frames since the first prompted frame, which is 0; -1 before it.
        last_memory_time, last_deep_time: time of the last memory frame and of the last deep update.
        memory: working and long-term memory; None until the first prompt.
        hidden: sensory memory, (O, C_h, h, w), in the order of `object_ids`; None if the model has none.
        masks: the objects' probabilities on the last frame, averaged to stride 16, (O, h, w); None for
            a model that does not read them.
        windows: search windows on the next frame, by object id; an object without one is searched everywhere.
        sure: time at which an object was last prompted or stored as out of sight, by object id.
        areas: usual area of an object's mask, in pixels of the network's input, by object id; kept only with
            a `least_area`.
        sought: objects that were copied into the state and have not been seen in this stream yet. They have
            no sensory memory and read nothing of this stream, in which they would be background.
    """

    def __init__(self, memory_config: MemoryConfig, model_fingerprint: str, size: int | None) -> None:
        self.memory_config = memory_config
        self.model_fingerprint = model_fingerprint
        self.size = size
        self.network_size: tuple[int, int] | None = None
        self.time = -1
        self.last_memory_time = 0
        # Early enough that the first deep update is due at once.
        self.last_deep_time = -max(memory_config.deep_update_every, 1)
        self.memory: StreamMemory | None = None
        self.hidden: Tensor | None = None
        self.masks: Tensor | None = None
        self.windows: dict[int, Window] = {}
        self._sure: dict[int, int] = {}
        self._areas: dict[int, float] = {}
        self._awaited: list[tuple[Tensor, Callable[[list[Any]], None]]] = []
        self.sought: set[int] = set()
        self.poisoned: str | None = None

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Ids of the living objects, in the order in which they were started."""
        return () if self.memory is None else tuple(self.memory.first_time)

    def __repr__(self) -> str:
        return (
            f"TrackerState(time={self.time}, objects={list(self.object_ids)}, "
            f"network_size={self.network_size}, memory={self.memory!r})"
        )

    @property
    def sure(self) -> dict[int, int]:
        """By object id the time since which its mask may be wrong, see `VideoSegmenter`."""
        self.settle()
        return self._sure

    @property
    def areas(self) -> dict[int, float]:
        """By object id the usual area of its mask; on a GPU, reading it waits for the device."""
        self.settle()
        return self._areas

    def once_known(self, values: Tensor, use: Callable[[list[Any]], None]) -> None:
        """Call `use` with the values: at once on a CPU, on a GPU when something depends on it.

        So a step does not wait for a GPU. It does once in so many calls that little memory is held.
        """
        self._awaited.append((values, use))
        if values.device.type == "cpu" or len(self._awaited) > _MOST_AWAITED:
            self.settle()

    def settle(self) -> None:
        """Make the calls that `once_known` put off, in order."""
        awaited, self._awaited = self._awaited, []
        for values, use in awaited:
            use(values.tolist())

    def check_usable(self) -> None:
        """Raise PoisonedStateError if an earlier step left this state half-changed."""
        if self.poisoned is not None:
            raise PoisonedStateError(
                f"this state was left half-changed by a failed step ({self.poisoned}): "
                "restore one with TrackerState.from_bytes"
            )

    def remove_objects(self, object_ids: Iterable[int]) -> None:
        """Remove objects; their ids may be used again for new objects.

        Raises:
            ValueError: an id is not that of a living object. Nothing is removed then.
        """
        self.check_usable()
        gone = list(dict.fromkeys(int(i) for i in object_ids))
        unknown = [i for i in gone if i not in self.object_ids]
        if unknown:
            raise ValueError(f"cannot remove objects {unknown}: living are {list(self.object_ids)}")
        if self.memory is None or not gone:
            return
        stay = [k for k, i in enumerate(self.object_ids) if i not in gone]
        for i in gone:
            self.windows.pop(i, None)
            self.sure.pop(i, None)
            self.areas.pop(i, None)
            self.sought.discard(i)
        if self.hidden is not None:
            self.hidden = self.hidden[stay] if stay else None
        if self.masks is not None:
            self.masks = self.masks[stay] if stay else None
        self.memory.remove_objects(gone)

    def forget(self, first: int, last: int, object_id: int | None = None) -> None:
        """Forget the frames with times `first`..`last` (inclusive), given masks among them.

        Times are those of `time`; `xmem_core.contents.contents` lists what is remembered. The summaries of
        Cutie's objects keep what they accumulated, and what was copied into the state stays (`adopt`).

        Args:
            object_id: the object that forgets them, while the others go on reading them. None: all.

        Raises:
            ValueError: an object would remember nothing any more, or there is no such object. Nothing is
                changed then.
        """
        self.check_usable()
        if first > last:
            raise ValueError(f"times {first} to {last}: the first must not be after the last")
        if object_id is not None and object_id not in self.object_ids:
            raise ValueError(f"no object {object_id} is tracked: there are {list(self.object_ids)}")
        first = max(first, 0)  # negative times are those of copied objects
        if self.memory is None or last < 0:
            return
        self.memory.check_forgets(first, last, object_id)
        if object_id is None:
            self.memory.forget(first, last)
        else:
            self.memory.bar(object_id, first, last)

    def pin(self, time: int) -> None:
        """Keep the frame of a time as a whole for as long as its objects live: it is not consolidated.

        Raises:
            ValueError: no whole frame of that time is remembered, or too many are pinned (at most
                `max_permanent_frames` - 1).
        """
        self._pin(time, True)

    def unpin(self, time: int) -> None:
        """Undo `pin`. ValueError: no whole frame of that time is remembered."""
        self._pin(time, False)

    def _pin(self, time: int, pinned: bool) -> None:
        self.check_usable()
        if self.memory is None:
            raise ValueError(f"no whole frame of time {time} is in memory: nothing is remembered")
        self.memory.pin(time, pinned)

    def copy_object(self, object_id: int, most: int = MOST_ELEMENTS) -> ObjectCopy:
        """What is remembered of an object, for `adopt` of another state of the same model.

        Frames that were prompted with the object come first, then pinned ones, then the most used elements.

        Args:
            most: number of elements of the copy at most.

        Raises:
            ValueError: there is no such object, or it may read nothing.
        """
        self.check_usable()
        if self.memory is None or object_id not in self.object_ids:
            raise ValueError(f"no object {object_id} is tracked: there are {list(self.object_ids)}")
        summary, memory = None, self.memory
        if isinstance(memory, GroupedMemory):
            summary, memory = memory.summaries[object_id].cpu(), memory.group_of(object_id)
        key, shrinkage, value = memory.elements_of(object_id, most)
        if not len(key):
            raise ValueError(f"object {object_id} remembers nothing that could be copied")
        hidden = 0 if self.hidden is None else self.hidden.shape[1]
        return ObjectCopy(self.model_fingerprint, hidden, key.cpu(), shrinkage.cpu(), value.cpu(), summary)

    @property
    def room_for_copies(self) -> int:
        """Number of elements that may still be copied into the state, see `adopt`."""
        there = 0 if self.memory is None else self.memory.copied_elements
        return max(0, self.memory_config.max_long_term_elements - there)

    def check_adopts(self, object_id: int, copy: ObjectCopy) -> None:
        """Raise ValueError if `adopt` would."""
        if object_id in self.object_ids:
            raise ValueError(f"object {object_id} is tracked already: give the copy another id")
        if copy.model_fingerprint != self.model_fingerprint:
            raise ValueError(
                f"the copy is of a model with other weights ({copy.model_fingerprint[:8]}, this stream's are "
                f"{self.model_fingerprint[:8]}): what one model remembers, another cannot read"
            )
        most = self.memory_config.max_long_term_elements
        there = most - self.room_for_copies
        if there + len(copy.key) > most:
            raise ValueError(
                f"there would be {there + len(copy.key)} copied elements, max_long_term_elements={most} are "
                "allowed: copy fewer objects, or remove some"
            )

    def adopt(
        self,
        object_id: int,
        copy: ObjectCopy,
        network_size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start an object from what another state remembers of it: it is out of sight, and sought.

        Args:
            object_id: id of the new object.
            copy: from `copy_object`, of a video of any size.
            network_size, device: size of the stream's first frame for the network, and device of the memory.
                Needed by a state that has seen no frame; `VideoSegmenter.adopt` gives them.

        Raises:
            ValueError: it is of another model, the id is taken, or there would be more than
                `max_long_term_elements` copied elements. The state is unchanged then.
        """
        self.check_usable()
        self.check_adopts(object_id, copy)
        size = self.network_size or network_size
        if size is None:
            raise ValueError("the state has seen no frame: give the network_size of the first one")
        h, w = (-(-side // STRIDE) for side in size)
        memory = self.memory
        if memory is None:
            kind = Memory if copy.summary is None else GroupedMemory
            dims = copy.key.shape[1], copy.value.shape[1]
            memory = self.memory = kind(self.memory_config, h * w, *dims, device)
        time = min([0, *memory.first_time.values()]) - 1
        if isinstance(memory, GroupedMemory):
            assert copy.summary is not None
            memory.adopt(object_id, time, copy.key, copy.shrinkage, copy.value, copy.summary)
            nowhere = torch.zeros(1, h, w, device=memory.device)
            self.masks = nowhere if self.masks is None else torch.cat([self.masks, nowhere])
        else:
            memory.adopt(object_id, time, copy.key, copy.shrinkage, copy.value)
        if copy.hidden_dim:
            new = torch.zeros(1, copy.hidden_dim, h, w, device=memory.device)
            self.hidden = new if self.hidden is None else torch.cat([self.hidden, new])
        self.sought.add(object_id)

    def to_bytes(self, *, half: bool = False) -> bytes:
        """The complete state as safetensors bytes; tracking resumed from them is bit-identical.

        Args:
            half: store keys, values and sensory memory in float16, in half the bytes. Masks of the resumed
                stream then differ slightly, mostly along outlines.
        """
        return self.frozen().to_bytes(half=half)

    def frozen(self) -> FrozenState:
        """A copy of the complete state as it is now, to be serialised later or in another thread."""
        self.check_usable()
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {
            "memory_config": self.memory_config.to_dict(),
            "model_fingerprint": self.model_fingerprint,
            "size": self.size,
            "network_size": self.network_size,
            "time": self.time,
            "last_memory_time": self.last_memory_time,
            "last_deep_time": self.last_deep_time,
            "memory": None,
            "sure": [[i, time] for i, time in self.sure.items()],
        }
        if self.windows:
            facts["windows"] = [[i, *window.to_json()] for i, window in self.windows.items()]
        if self.areas:
            facts["areas"] = [[i, area] for i, area in self.areas.items()]
        if self.sought:
            facts["sought"] = sorted(self.sought)
        if self.memory is not None:
            parts, facts["memory"] = self.memory.export()
            tensors.update({f"memory.{name}": t for name, t in parts.items()})
        # No step changes these in place, nor what `export` copied.
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        if self.masks is not None:
            tensors["masks"] = self.masks
        copied = self.memory is not None and self.memory.copied_elements > 0
        return FrozenState(
            _VERSION_WITH_COPIES if copied or self.sought else _VERSION,
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            json.dumps(facts, sort_keys=True),
        )

    @classmethod
    def from_bytes(cls, blob: bytes, device: torch.device | str = "cpu") -> TrackerState:
        """Restore a state from `to_bytes`'s output.

        Raises:
            ValueError: the bytes are damaged, of another kind, or of a newer version.
        """
        envelope = _envelope(blob)
        if envelope.get("version") not in (_VERSION, _VERSION_WITH_COPIES):
            raise ValueError(
                f"tracker state of version {envelope.get('version')!r}: this release reads versions "
                f"{_VERSION} and {_VERSION_WITH_COPIES}"
            )
        try:
            tensors = safetensors.torch.load(blob)
            if _checksum(tensors, envelope["facts"]) != envelope["crc32"]:
                raise ValueError("its checksum does not match")
            tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
            facts = json.loads(envelope["facts"])
            state = cls(
                MemoryConfig.from_dict(facts["memory_config"]), facts["model_fingerprint"], facts["size"]
            )
            if facts["network_size"] is not None:
                state.network_size = (int(facts["network_size"][0]), int(facts["network_size"][1]))
            state.time = int(facts["time"])
            state.last_memory_time = int(facts["last_memory_time"])
            state.last_deep_time = int(facts["last_deep_time"])
            if facts["memory"] is not None:
                parts = {k.removeprefix("memory."): t for k, t in tensors.items() if k.startswith("memory.")}
                state.memory = restore_memory(parts, facts["memory"], state.memory_config, device)
            state.windows = {int(i): Window.from_json(rest) for i, *rest in facts.get("windows", ())}
            state._sure = {int(i): int(time) for i, time in facts.get("sure", ())}
            state._areas = {int(i): float(area) for i, area in facts.get("areas", ())}
            state.sought = {int(i) for i in facts.get("sought", ())}
            if "hidden" in tensors:
                state.hidden = tensors["hidden"].to(device)
            if "masks" in tensors:
                state.masks = tensors["masks"].to(device)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:
            raise ValueError(f"damaged tracker state: {error}; take an older snapshot") from error
        return state


class FrozenState:
    """A copy of a `TrackerState`, made by `TrackerState.frozen`: later steps do not change it.

    Args:
        version: of the format.
        tensors: by name, on the CPU.
        facts: everything else, as JSON.
    """

    def __init__(self, version: int, tensors: dict[str, Tensor], facts: str) -> None:
        self._version, self._tensors, self._facts = version, tensors, facts

    def to_bytes(self, *, half: bool = False) -> bytes:
        """As `TrackerState.to_bytes` would have given them; takes several times as long as the copy."""
        tensors = {name: _halved(t) for name, t in self._tensors.items()} if half else self._tensors
        crc = _checksum(tensors, self._facts)
        envelope = {"version": self._version, "facts": self._facts, "crc32": crc}
        # A single entry: safetensors writes several in random order, and equal states must have equal bytes.
        return safetensors.torch.save(tensors, {_FORMAT: json.dumps(envelope, sort_keys=True)})


def _halved(tensor: Tensor) -> Tensor:
    """A large tensor in float16, unless a value is out of its range. Counts and sums are small tensors."""
    if tensor.dtype != torch.float32 or tensor.ndim < 2 or tensor.numel() < _LARGE:
        return tensor
    return tensor.half() if float(tensor.abs().max()) <= torch.finfo(torch.float16).max else tensor


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> int:
    crc = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _envelope(blob: bytes) -> dict[str, Any]:
    """The metadata from the safetensors header: 8 bytes with its length, then JSON."""
    try:
        (length,) = struct.unpack_from("<Q", blob)
        header = json.loads(blob[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if _FORMAT not in metadata:
            raise ValueError(f"not a tracker state: its header has no {_FORMAT!r}")
        envelope = json.loads(metadata[_FORMAT])
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged tracker state: no readable header in {len(blob)} bytes") from error
    if not isinstance(envelope, dict):
        raise ValueError("damaged tracker state: its header holds no facts")
    return envelope
