"""The network run over a training clip: memory of the first frame and of its own later predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xmem_core.attention import readout, similarity
from xmem_core.network import XMem, aggregate


@dataclass(frozen=True)
class Plan:
    """The random choices of one unrolled clip.

    read[t]: the earlier frames that frame t reads; deep[t]: frame t renews the sensory memory from its value.
    """

    read: tuple[tuple[int, ...], ...]
    deep: tuple[bool, ...]


def draw_plan(rng: np.random.Generator, frames: int, deep_update: float, most: int = 3) -> Plan:
    """The first frame is always read, and up to `most` - 1 later ones; it also always updates deeply."""
    read: list[tuple[int, ...]] = [()]
    for t in range(1, frames):
        later = rng.permutation(np.arange(1, t))[: most - 1]
        read.append((0, *sorted(int(i) for i in later)))
    deep = [True, *(bool(rng.random() < deep_update) for _ in range(frames - 1))]
    return Plan(tuple(read), tuple(deep))


def unroll(model: XMem, images: Tensor, first_masks: Tensor, present: Tensor, plan: Plan) -> list[Tensor]:
    """Predicts frames 1..T-1 of clips from the masks of frame 0.

    Args:
        images: (B, T, 3, H, W), normalised.
        first_masks: (B, O, H, W) in 0..1.
        present: (B, O): 1 for an object that the clip has, else 0.
        plan: from `draw_plan`, for T frames.

    Returns:
        T - 1 tensors of logits (B, O + 1, H, W), fp32, background first.
    """
    batch, frames = images.shape[:2]
    objects = first_masks.shape[1]
    selector = present[:, :, None, None].float()
    features = model.encode_key(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))

    def of_frame(x: Tensor, t: int) -> Tensor:
        return x.view(batch, frames, *x.shape[1:])[:, t]

    keys = [of_frame(features.key, t) for t in range(frames)]
    height, width = keys[0].shape[2:]
    hidden: Tensor | None = None
    if model.config.hidden_dim > 0:
        hidden = images.new_zeros(batch, objects, model.config.hidden_dim, height, width)
    still_read = {i for t in range(1, frames) for i in plan.read[t]}
    values: dict[int, Tensor] = {}
    masks = first_masks
    outputs: list[Tensor] = []
    for t in range(frames):
        f16 = of_frame(features.f16, t)
        if t > 0:
            read = plan.read[t]
            with torch.autocast(images.device.type, enabled=False):
                scores = similarity(
                    _flat(torch.stack([keys[i] for i in read], 2)),
                    _flat(torch.stack([of_frame(features.shrinkage, i) for i in read], 2)),
                    _flat(keys[t]),
                    _flat(of_frame(features.selection, t)),
                )
            memory = torch.stack([values[i] for i in read], 3).flatten(3)  # B, O, C_v, n*h*w
            read_out = readout(torch.softmax(scores, 1), memory)
            read_out = read_out.view(*read_out.shape[:3], height, width)
            scales = (f16, of_frame(features.f8, t), of_frame(features.f4, t))
            hidden, logits = model.decode(scales, read_out, hidden, update_hidden=t < frames - 1)
            combined = aggregate(torch.sigmoid(logits.float()) * selector)
            outputs.append(combined)
            masks = torch.softmax(combined, 1)[:, 1:] * selector
        if t in still_read:
            image = images[:, t].contiguous()
            values[t], hidden = model.encode_value(image, f16, hidden, masks, deep_update=plan.deep[t])
    return outputs


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


def one_hot(labels: Tensor, objects: int) -> Tensor:
    """(B, H, W) labels to (B, O, H, W) masks of objects 1..O, float32."""
    numbers: Sequence[int] = range(1, objects + 1)
    return torch.stack([labels == n for n in numbers], 1).float()
