"""Reference implementation of a step: XMem as its paper and the authors' code write it, in float32.

Every object's features are concatenated with the image's, norms are not folded, all memory elements are read
by a dense matrix product, and the whole frame is searched. What `xmem_core` does faster is compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core import MemoryConfig, VideoSegmenter, XMem
from xmem_core.attention import similarity
from xmem_core.blocks import FeatureFusion
from xmem_core.joint import Work
from xmem_core.memory import Memory
from xmem_core.steps import XMemSteps


def _each(shared: Tensor, own: Tensor) -> Tensor:
    """cat(shared, own) of every object: (B, C_s, h, w), (B, O, C_o, h, w) -> (B * O, C_s + C_o, h, w)."""
    b, o = own.shape[:2]
    return torch.cat([shared.unsqueeze(1).expand(b, o, -1, -1, -1), own], 2).flatten(0, 1)


def _fused(fuser: FeatureFusion, shared: Tensor, own: Tensor) -> Tensor:
    z = fuser.block1(_each(shared, own))
    out: Tensor = fuser.block2(z + fuser.attention(z))
    return out.view(*own.shape[:2], *out.shape[1:])


class PlainXMem(XMem):
    """The network without shared convolutions."""

    def encode_value(
        self,
        image: Tensor,
        f16: Tensor,
        hidden: Tensor | None,
        masks: Tensor,
        *,
        deep_update: bool = True,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert counts is None, "one stream at a time"
        encoder = self.value_encoder
        others = masks.sum(1, keepdim=True) - masks
        x = encoder.conv1(_each(image, torch.stack([masks, others], 2)))
        x = encoder.layer1(torch.relu(encoder.maxpool(encoder.bn1(x))))
        g = encoder.layer3(encoder.layer2(x))
        value = _fused(encoder.fuser, f16, g.view(*masks.shape[:2], *g.shape[1:]))
        if deep_update and hidden is not None:
            hidden = encoder.hidden_reinforce(value, hidden)
        return value, hidden

    def decode(
        self,
        scales: tuple[Tensor, Tensor, Tensor],
        readout: Tensor,
        hidden: Tensor | None,
        *,
        update_hidden: bool = True,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        assert counts is None, "one stream at a time"
        decoder = self.decoder
        f16, f8, f4 = scales
        own = readout if hidden is None else torch.cat([readout, hidden], 2)
        g16 = _fused(decoder.fuser, f16, own)
        g8 = decoder.up_16_8(f8, g16)
        g4 = decoder.up_8_4(f4, g8).flatten(0, 1)
        logit = decoder.pred(torch.relu(g4))
        if update_hidden and hidden is not None:
            update = decoder.hidden_update
            x = update.g16_conv(g16.flatten(0, 1)) + update.g8_conv(F.avg_pool2d(g8.flatten(0, 1), 2))
            x = x + update.g4_conv(F.avg_pool2d(torch.cat([g4, logit], 1), 4))
            hidden = update(x, hidden)
        logits = F.interpolate(logit, scale_factor=4, mode="bilinear", align_corners=False)
        return hidden, logits.view(*readout.shape[:2], *logits.shape[2:])


class DenseMemory(Memory):
    """The memory, read by a dense matrix product with zeros for all but the top k."""

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
        assert enough is None, "each object reads its own best elements here"
        rows = self._used_rows()
        columns = {name: column[rows] for name, column in self._columns.items()}
        scores = similarity(
            columns["key"].T[None],
            columns["shrinkage"].view(1, 1, -1),
            query_key[None],
            query_selection[None],
        )[0]
        everything = self._weights(scores)
        if count_use:
            self._columns["use"][rows] += everything.sum(1)
            self._columns["life"][rows] += 1
        out = []
        for i, first in self.first_time.items():
            barred = columns["time"] < first
            for start, end in self.doubted.get(i, ()):
                barred |= (columns["time"] >= start) & (columns["time"] <= end)
            own = everything
            if bool(barred.any()):
                own = self._weights(scores.masked_fill(barred.unsqueeze(1), float("-inf")))
            value = self._values[i][rows].T @ own
            if wanted is not None:
                value = value * wanted[i] if i in wanted else torch.zeros_like(value)
            out.append(value)
        return torch.stack(out)

    def _weights(self, scores: Tensor) -> Tensor:
        best, index = torch.topk(scores, min(self.config.top_k, len(scores)), dim=0)
        weights = torch.nan_to_num(torch.softmax(best, 0), nan=0.0)
        return torch.zeros_like(scores).scatter_(0, index, weights)


class PlainSteps(XMemSteps):
    """XMem's part of a step with these."""

    def remember(self, state: Any, *others: Any) -> Work[None]:
        yield from super().remember(state, *others)
        state.memory.__class__ = DenseMemory


def plain_segmenter(
    model: XMem, settings: MemoryConfig | None = None, *, size: int | None = None
) -> VideoSegmenter:
    """A segmenter that takes these steps on a CPU in float32."""
    settings = MemoryConfig(search_window=0) if settings is None else settings
    segmenter = VideoSegmenter(model, settings, size=size)
    network = copy.deepcopy(model).eval().requires_grad_(False)
    network.__class__ = PlainXMem
    segmenter._network = network
    segmenter._steps = PlainSteps(
        network, segmenter.memory_config, segmenter.device, torch.float32, torch.contiguous_format
    )
    return segmenter
