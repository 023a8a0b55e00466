"""`ModelSteps`: the parts of a step that depend on the network, and XMem's implementation of them.

`VideoSegmenter` checks input, schedules memory frames, applies prompts and corrections, and aggregates; it
knows no network. A `ModelSteps` prepares the image, reads memory and decodes, and remembers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD
from xmem_core.blocks import as_channels_last
from xmem_core.bounds import above
from xmem_core.config import MemoryConfig, ModelConfig
from xmem_core.cutie import Cutie, PixelFeatures
from xmem_core.joint import Decode, EncodeValue, Work
from xmem_core.memory import Memory
from xmem_core.network import KeyFeatures, XMem, aggregate
from xmem_core.state import TrackerState
from xmem_core.windows import (
    STRIDE,
    Window,
    aggregated_within,
    covered,
    decode_in_windows,
    inside,
    looked_for,
    next_window,
    union,
    whole,
)

Network = XMem | Cutie
"""A network that `VideoSegmenter` can track with."""
Features = KeyFeatures | PixelFeatures
"""What `encode_key` of a network returns."""

# Per frame, by which share of the difference an object's usual area follows a larger or a smaller mask.
_AREA_GROWS, _AREA_SHRINKS = 0.1, 0.02
# Pixels of the network's input from which on an object is too large to count as hidden: memory of a few cells
# is easily taken over by whatever hides the object, while a large object only changes its shape. Without this
# limit bmx-trees and libby of DAVIS lose 1.6 and 1.5 points of J&F.
_LARGE = 16 * STRIDE**2
# Number of elements from which a coarse search is faster where the CPU multiplies bfloat16 itself. With one
# thread and 768 queries, 5,000 elements take 36 ms coarsely and 29 exactly, 10,000 take 46 and 34, 17,000
# take 66 and 100.
_COARSE_FROM = 16_384
# With `least_area`, the part of `top_k` that suffices where better elements are of frames on which an object
# was hidden. With an exact search for each object a frame takes 9 % more CPU time, for nearly the same masks.
_ENOUGH = 3

N = TypeVar("N", bound=Network)
K = TypeVar("K", bound=Features)


class Choice(NamedTuple):
    """The elements that an object is read from on a frame.

    Attributes:
        memory: holds the elements.
        cells: positions at which the object is read, (n,), as indices into the flattened grid.
        weights, rows: (n, k), as `Memory.choose` gives them.
    """

    memory: Memory
    cells: Tensor
    weights: Tensor
    rows: Tensor


class _Look(NamedTuple):
    """How memory is read on a frame.

    Attributes:
        key, selection: the queries, (C_k, n).
        cells: their positions, as indices into the flattened grid; None: all.
        windows: windows of the objects that are searched, by position in `object_ids`; None: the whole frame.
        wanted: as for `Memory.read`.
        enough: likewise.
        coarse: likewise.
    """

    key: Tensor
    selection: Tensor
    cells: Tensor | None
    windows: dict[int, Window] | None
    wanted: dict[int, Tensor] | None
    enough: int | None
    coarse: bool


class ModelSteps(ABC, Generic[N, K]):
    """A network's part of a step.

    Args:
        network: prepared for inference.
        settings: memory settings, resolved by `resolve`.
        device: the network's.
        dtype: float32, or the precision of autocast.
        layout: memory format of images.
    """

    def __init__(
        self,
        network: N,
        settings: MemoryConfig,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
    ) -> None:
        self.network = network
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.layout = layout
        self.coarse = dtype == torch.bfloat16 and device.type == "cpu"
        # On a GPU memory is read in the network's precision, in half the space; keys stay in float32. On a
        # CPU sums of half-precision values are not faster.
        self.value_dtype = torch.float32 if device.type == "cpu" else dtype
        self.mean = torch.tensor(IMAGE_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGE_STD, device=device).view(1, 3, 1, 1)

    @staticmethod
    @abstractmethod
    def resolve(settings: MemoryConfig, config: Any, device: torch.device) -> MemoryConfig:
        """Fill in the model's own defaults. Raises ValueError for a setting that the model does not have."""

    def network_size(self, height: int, width: int, shorter: int) -> tuple[int, int]:
        """(height, width) of a frame brought down to a shorter side, which is larger than `shorter`."""
        scale = shorter / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    @abstractmethod
    def network_input(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, 3, H, W) uint8 on the device -> (1, 3, h', w'): resized, normalised, padded to the stride."""

    def deep_update_due(self, state: TrackerState, is_memory_frame: bool) -> bool:
        """Whether remembering renews the sensory memory on this frame."""
        every = self.settings.deep_update_every
        return is_memory_frame if every < 0 else state.time - state.last_deep_time >= every

    @abstractmethod
    def keeps_update(self, state: TrackerState, deep_update: bool) -> bool:
        """Whether the decoder's update of the sensory memory is kept on this frame."""

    @abstractmethod
    def predicts(self, known: Sequence[int], given: Collection[int]) -> bool:
        """Whether a frame with masks given of these objects is decoded too."""

    @abstractmethod
    def decode(
        self, state: TrackerState, keys: K, update_hidden: bool, *, count_use: bool = True
    ) -> Work[Tensor]:
        """Read memory and decode: (O + 1, H', W') probabilities of the known objects."""

    @abstractmethod
    def choices(self, state: TrackerState, keys: K) -> dict[int, Choice]:
        """What `decode` would read on the frame after the state's, by object; nothing changes."""

    @abstractmethod
    def look_next(self, state: TrackerState, object_ids: tuple[int, ...], planes: Tensor) -> None:
        """Keep of a frame's final probabilities, (O, H', W'), what the next frame needs."""

    @abstractmethod
    def remember(
        self,
        state: TrackerState,
        image: Tensor,
        keys: K,
        masks: Tensor,
        object_ids: tuple[int, ...],
        given: tuple[int, ...],
        deep_update: bool,
    ) -> Work[None]:
        """Store a frame in memory, and renew the sensory memory on a deep update."""

    def searches_coarsely(self, memory: Memory) -> bool:
        """Whether candidate elements are found in bfloat16: where that is faster."""
        return self.coarse and sum(memory.sizes) >= _COARSE_FROM

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def hidden_for(self, state: TrackerState, count: int, grid: tuple[int, int]) -> Tensor | None:
        """Sensory memory of `count` objects, (1, O, C_h, h, w); zeros for new objects."""
        dim = self.network.config.hidden_dim
        if dim == 0:
            return None
        known = 0 if state.hidden is None else len(state.hidden)
        new = torch.zeros(count - known, dim, *grid, device=self.device)
        return (new if state.hidden is None else torch.cat([state.hidden, new])).unsqueeze(0)


class XMemSteps(ModelSteps[XMem, KeyFeatures]):
    """XMem's part of a step (Cheng & Schwing, ECCV 2022)."""

    @staticmethod
    def resolve(settings: MemoryConfig, config: ModelConfig, device: torch.device) -> MemoryConfig:
        if settings.stagger_updates is not None:
            raise ValueError(
                f"stagger_updates={settings.stagger_updates} is not allowed: XMem has no such setting, see "
                "deep_update_every"
            )
        window = config.default_search_window
        # On a GPU decoding the whole frame is as fast as cutting out windows.
        if settings.search_window is None and window and device.type == "cpu":
            settings = replace(settings, search_window=window)
        least = config.default_least_area if settings.least_area is None else settings.least_area
        # None where it is off, as in states of versions that did not have it.
        return replace(settings, least_area=least or None)

    def network_input(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(image.shape[2:]) != size:
            # On a CPU uint8 tensors are resized in fixed point, many times faster than floats.
            if self.device.type != "cpu":
                image = image.float()
            image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        # This order, without folding, makes the input bit-identical to the published model's. A last bit
        # matters where several objects saturate (up to 0.1 in probability at single pixels).
        if self.device.type != "cpu":
            normalised = image.float().div_(255).sub_(self.mean).div_(self.std)
            return F.pad(normalised, padding(size)).contiguous(memory_format=self.layout)
        # The same in place and in whole rows, several times faster: torch is slow with three channels.
        left, right, top, bottom = padding(size)
        (height, width), channels = size, image.shape[1]
        padded = torch.empty(top + height + bottom, left + width + right, channels)
        for margin in (padded[:top], padded[top + height :], padded[:, :left], padded[:, left + width :]):
            margin.zero_()
        rows = padded.flatten(1)[top : top + height, left * channels : (left + width) * channels]
        rows.copy_(image[0].permute(1, 2, 0).reshape(height, -1))
        mean, std = (of_channel.flatten().repeat(width) for of_channel in (self.mean, self.std))
        rows.div_(255).sub_(mean).div_(std)
        return as_channels_last(padded.permute(2, 0, 1).unsqueeze(0)).contiguous(memory_format=self.layout)

    def keeps_update(self, state: TrackerState, deep_update: bool) -> bool:
        # A synchronised deep update overwrites the decoder's update, which is therefore skipped.
        return not (self.settings.deep_update_every < 0 and deep_update)

    def predicts(self, known: Sequence[int], given: Collection[int]) -> bool:
        return any(i not in given for i in known)

    def decode(
        self, state: TrackerState, keys: KeyFeatures, update_hidden: bool, *, count_use: bool = True
    ) -> Work[Tensor]:
        assert isinstance(state.memory, Memory)
        grid = (int(keys.key.shape[2]), int(keys.key.shape[3]))
        look = self._look(state, keys, state.time)
        if look.windows is not None and look.cells is not None:
            count, windows = len(state.object_ids), look.windows
            read = look.key.new_zeros((count, self.network.config.value_dim, grid[0] * grid[1]))
            if windows:
                found = state.memory.read(
                    look.key,
                    look.selection,
                    coarse=look.coarse,
                    count_use=count_use,
                    wanted=look.wanted,
                    enough=look.enough,
                )
                read.index_copy_(2, look.cells, found.to(read.dtype))
            hidden, probabilities = yield from decode_in_windows(
                keys.scales,
                read.view(*read.shape[:2], *grid),
                state.hidden,
                windows,
                update_hidden=update_hidden,
            )
            state.hidden = as_stored(hidden)
            return aggregated_within(probabilities, union(windows.values()))
        read = state.memory.read(
            look.key, look.selection, coarse=look.coarse, count_use=count_use, enough=look.enough
        )
        hidden = None if state.hidden is None else state.hidden.unsqueeze(0)
        own = read.view(1, *read.shape[:2], *grid)
        ((hidden, logits),) = yield [Decode(keys.scales, own, hidden, update_hidden)]
        if hidden is not None:
            state.hidden = as_stored(hidden[0])
        return torch.softmax(aggregate(torch.sigmoid(logits.float())), 1)[0]

    def _look(self, state: TrackerState, keys: KeyFeatures, time: int) -> _Look:
        """How memory is read on the frame of a time."""
        assert isinstance(state.memory, Memory)
        grid = (int(keys.key.shape[2]), int(keys.key.shape[3]))
        key, selection = keys.key[0].flatten(1).float(), keys.selection[0].flatten(1).float()
        coarse = self.searches_coarsely(state.memory)
        enough = None if self.settings.least_area is None else max(1, self.settings.top_k // _ENOUGH)
        if not self.settings.search_window:
            return _Look(key, selection, None, None, None, enough, coarse)
        ids = state.object_ids
        places = looked_for(state.windows, ids, time)
        windows = {k: state.windows.get(ids[k], whole(grid)) for k in places}
        cells = covered(windows.values(), grid).to(self.device)
        wanted = {
            ids[k]: inside(window, grid).to(self.device).flatten()[cells] for k, window in windows.items()
        }
        return _Look(key[:, cells], selection[:, cells], cells, windows, wanted, enough, coarse)

    def choices(self, state: TrackerState, keys: KeyFeatures) -> dict[int, Choice]:
        memory = state.memory
        assert isinstance(memory, Memory)
        look = self._look(state, keys, state.time + 1)
        cells = look.cells
        if cells is None:
            cells = torch.arange(look.key.shape[1], device=self.device)
        elif not len(cells):
            return {}
        found = memory.choose(
            look.key,
            look.selection,
            coarse=look.coarse,
            count_use=False,
            wanted=look.wanted,
            enough=look.enough,
        )
        if look.wanted is None:
            return {i: Choice(memory, cells, *own) for i, own in found.items()}
        return {
            i: Choice(memory, cells[own], found[i][0][own], found[i][1][own])
            for i, own in look.wanted.items()
        }

    def look_next(self, state: TrackerState, object_ids: tuple[int, ...], planes: Tensor) -> None:
        if self.settings.least_area is not None:
            state.once_known(_areas(planes), partial(_follow_areas, state, object_ids))
        if not self.settings.search_window:
            return
        grid = (planes.shape[1] // STRIDE, planes.shape[2] // STRIDE)
        least = self.settings.search_window // STRIDE
        state.windows = {
            i: next_window(p, state.windows.get(i, whole(grid)), least)
            for i, p in zip(object_ids, planes, strict=True)
        }

    def hidden_objects(
        self, state: TrackerState, object_ids: tuple[int, ...], planes: Tensor, given: Collection[int]
    ) -> list[int]:
        """Small objects whose masks are much smaller than usual; a given mask says at once what is usual.

        Args:
            planes: the frame's final probabilities, (O, H', W'); after `look_next`.
        """
        least = self.settings.least_area
        if least is None:
            return []
        hidden = []
        for object_id, area in zip(object_ids, _areas(planes).tolist(), strict=True):
            usual = state.areas[object_id]
            if object_id in given:
                state.areas[object_id] = float(area)
            elif usual < _LARGE and area < least * usual:
                hidden.append(object_id)
        return hidden

    def remember(
        self,
        state: TrackerState,
        image: Tensor,
        keys: KeyFeatures,
        masks: Tensor,
        object_ids: tuple[int, ...],
        given: tuple[int, ...],
        deep_update: bool,
    ) -> Work[None]:
        h, w = keys.key.shape[2:]
        hidden = self.hidden_for(state, len(object_ids), (h, w))
        call = EncodeValue(image, keys.f16, hidden, masks.unsqueeze(0), deep_update)
        ((value, renewed),) = yield [call]
        if state.memory is None:
            config = self.network.config
            dims = config.key_dim, config.value_dim
            state.memory = Memory(self.settings, h * w, *dims, self.device, self.value_dtype)
        assert isinstance(state.memory, Memory)
        flat = value[0].flatten(2).float()
        state.memory.add_frame(
            state.time,
            keys.key[0].flatten(1).float(),
            keys.shrinkage[0].flatten(1).float(),
            keys.selection[0].flatten(1).float(),
            dict(zip(object_ids, flat, strict=True)),
            given=given,
        )
        out = [i for i in self.hidden_objects(state, object_ids, masks, given) if i not in state.sought]
        out += [i for i in object_ids if i in state.sought]
        state.memory.bar_last(out)
        if deep_update and out and hidden is not None and renewed is not None:
            kept = [object_ids.index(i) for i in out]
            renewed = renewed.clone()
            renewed[0, kept] = hidden[0, kept].to(renewed.dtype)
        state.hidden = None if renewed is None else as_stored(renewed[0])


def _areas(planes: Tensor) -> Tensor:
    """Pixels of each object's mask, (O,) int64, from probabilities (O, H', W')."""
    masks = above(planes, 0.5)
    if masks.device.type == "cpu":  # numpy counts many times faster than torch
        return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int64)
    return masks.flatten(1).sum(1)


def _follow_areas(state: TrackerState, object_ids: tuple[int, ...], areas: list[int]) -> None:
    """Let the objects' usual areas follow those of a frame."""
    for object_id, area in zip(object_ids, areas, strict=True):
        usual = state.areas.setdefault(object_id, float(area))
        # An object out of sight keeps its usual area.
        if area:
            rate = _AREA_GROWS if area > usual else _AREA_SHRINKS
            state.areas[object_id] = usual + rate * (area - usual)


def as_stored(hidden: Tensor | None) -> Tensor | None:
    """The tensor in the layout it has after deserialisation: last bits of convolutions depend on it."""
    return None if hidden is None else hidden.float().contiguous()


def padding(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that make a size multiples of the stride; the smaller half comes first."""
    height, width = -size[0] % STRIDE, -size[1] % STRIDE
    return width // 2, width - width // 2, height // 2, height - height // 2
