"""Cutie's part of a step (Cheng et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core.config import CutieConfig, MemoryConfig
from xmem_core.cutie import Cutie, PixelFeatures
from xmem_core.grouped_memory import GroupedMemory
from xmem_core.joint import Stacked, Work
from xmem_core.network import aggregate
from xmem_core.state import TrackerState
from xmem_core.steps import Choice, ModelSteps, as_stored, padding
from xmem_core.windows import STRIDE

# The published defaults. Settings with a small long-term memory get the same share of it as buffer.
_STAGGER_UPDATES = 5
_BUFFER_TOKENS, _BUFFER_SHARE = 2000, 5


def staggered(mem_every: int, updates: int) -> frozenset[int]:
    """Frames after a memory frame on which the decoder's update of the sensory memory is kept."""
    if updates >= mem_every:
        return frozenset(range(1, mem_every + 1))
    # Halves go to the even number, in numpy as in the published code.
    return frozenset(int(n) for n in np.round(np.linspace(1, mem_every, updates)))


class CutieSteps(ModelSteps[Cutie, PixelFeatures]):
    """Cutie's part of a step."""

    @staticmethod
    def resolve(settings: MemoryConfig, config: CutieConfig, device: torch.device) -> MemoryConfig:
        if settings.search_window:
            raise ValueError(
                f"search_window={settings.search_window} is not allowed: Cutie's object transformer reads "
                "whole frames; leave it out"
            )
        if settings.deep_update_every >= 0:
            raise ValueError(
                f"deep_update_every={settings.deep_update_every} is not allowed: each of Cutie's memory "
                "frames is a deep update; leave it out, see stagger_updates"
            )
        if settings.least_area:
            raise ValueError(
                f"least_area={settings.least_area} is not allowed: Cutie has no such setting; leave it out"
            )
        stagger, buffer = settings.stagger_updates, settings.buffer_tokens
        if buffer is None:
            buffer = min(_BUFFER_TOKENS, settings.max_long_term_elements // _BUFFER_SHARE)
        return replace(
            settings,
            search_window=None,
            least_area=None,
            stagger_updates=_STAGGER_UPDATES if stagger is None else stagger,
            buffer_tokens=buffer,
        )

    def network_size(self, height: int, width: int, shorter: int) -> tuple[int, int]:
        least = min(height, width)
        return max(1, int(height / least * shorter)), max(1, int(width / least * shorter))

    def network_input(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        pixels = image.float().div_(255)
        if tuple(image.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        # Padded before it is normalised: the padding is black.
        padded = F.pad(pixels, padding(size)).sub_(self.mean).div_(self.std)
        return padded.contiguous(memory_format=self.layout)

    def keeps_update(self, state: TrackerState, deep_update: bool) -> bool:
        # On memory frames too: the deep update then starts from it.
        stagger = self.settings.stagger_updates or _STAGGER_UPDATES
        return state.time - state.last_memory_time in staggered(self.settings.mem_every, stagger)

    def predicts(self, known: Sequence[int], given: Collection[int]) -> bool:
        new = any(i not in known for i in given)
        return any(i not in given for i in known) or (new and bool(known))

    def decode(
        self, state: TrackerState, keys: PixelFeatures, update_hidden: bool, *, count_use: bool = True
    ) -> Work[Tensor]:
        memory = state.memory
        assert isinstance(memory, GroupedMemory)
        assert state.hidden is not None
        assert state.masks is not None
        grid = (int(keys.key.shape[2]), int(keys.key.shape[3]))
        key, selection = keys.key[0].flatten(1).float(), keys.selection[0].flatten(1).float()
        ids = state.object_ids
        summaries = torch.stack([memory.summaries[i] for i in ids])
        read = []
        for group, places in memory.members():
            found = group.read(key, selection, coarse=self.searches_coarsely(group), count_use=count_use)
            given: tuple[Tensor, ...] = (
                keys.p16,
                found.view(1, *found.shape[:2], *grid),
                state.hidden[places].unsqueeze(0),
                state.masks[places].unsqueeze(0),
                summaries[places].unsqueeze(0),
            )
            (refined,) = yield [Stacked("read_objects", given)]
            read.append(refined)
        given = (keys.s8, keys.s4, torch.cat(read, 1), state.hidden.unsqueeze(0))
        ((hidden, logits),) = yield [Stacked("decode", given, {"update_hidden": update_hidden})]
        state.hidden = as_stored(hidden[0])
        # Aggregated at stride 4, then enlarged: the other way round than XMem.
        joint = aggregate(torch.sigmoid(logits.float()))
        full = F.interpolate(joint, scale_factor=4, mode="bilinear", align_corners=False)
        return torch.softmax(full, 1)[0]

    def choices(self, state: TrackerState, keys: PixelFeatures) -> dict[int, Choice]:
        memory = state.memory
        assert isinstance(memory, GroupedMemory)
        key, selection = keys.key[0].flatten(1).float(), keys.selection[0].flatten(1).float()
        cells = torch.arange(key.shape[1], device=self.device)
        return {
            i: Choice(group, cells, *own)
            for group, _ in memory.members()
            for i, own in group.choose(
                key, selection, coarse=self.searches_coarsely(group), count_use=False
            ).items()
        }

    def look_next(self, state: TrackerState, object_ids: tuple[int, ...], planes: Tensor) -> None:
        state.masks = F.avg_pool2d(planes.unsqueeze(0), STRIDE)[0]

    def remember(
        self,
        state: TrackerState,
        image: Tensor,
        keys: PixelFeatures,
        masks: Tensor,
        object_ids: tuple[int, ...],
        given: tuple[int, ...],
        deep_update: bool,
    ) -> Work[None]:
        h, w = keys.key.shape[2:]
        hidden = self.hidden_for(state, len(object_ids), (h, w))
        assert hidden is not None
        call = Stacked("encode_value", (image, keys.p16, hidden, masks.unsqueeze(0)))
        ((value, summaries, renewed),) = yield [call]
        if state.memory is None:
            config = self.network.config
            state.memory = GroupedMemory(self.settings, h * w, config.key_dim, config.value_dim, self.device)
        assert isinstance(state.memory, GroupedMemory)
        state.memory.add_frame(
            state.time,
            keys.key[0].flatten(1).float(),
            keys.shrinkage[0].flatten(1).float(),
            keys.selection[0].flatten(1).float(),
            dict(zip(object_ids, value[0].flatten(2).float(), strict=True)),
            {i: s for i, s in zip(object_ids, summaries[0].float(), strict=True) if i not in state.sought},
            given=given,
        )
        state.memory.bar_last(i for i in object_ids if i in state.sought)
        state.hidden = as_stored(renewed[0])
