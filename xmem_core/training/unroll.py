"""Unrolls the network over a training clip: memory of the first frame and of later predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xmem_core.attention import readout, similarity
from xmem_core.network import KeyFeatures, XMem, aggregate


@dataclass(frozen=True)
class Plan:
    """The random choices of one unrolled clip.

    read[t]: the earlier frames that frame t reads; deep[t]: frame t updates the sensory memory from its
    value.
    """

    read: tuple[tuple[int, ...], ...]
    deep: tuple[bool, ...]


def draw_plan(rng: np.random.Generator, frames: int, deep_update: float, most: int = 3) -> Plan:
    """Draw a plan.

    Each frame reads the first frame, which updates deeply, and up to `most` - 1 later ones.
    """
    read: list[tuple[int, ...]] = [()]
    for t in range(1, frames):
        later = rng.permutation(np.arange(1, t))[: most - 1]
        read.append((0, *sorted(int(i) for i in later)))
    deep = [True, *(bool(rng.random() < deep_update) for _ in range(frames - 1))]
    return Plan(tuple(read), tuple(deep))


def unroll(
    model: XMem, images: Tensor, first_masks: Tensor, present: Tensor, plan: Plan, aged: int = 0
) -> list[Tensor]:
    """Predicts frames 1..T-1 of clips from the masks of frame 0.

    Args:
        images: (B, T, 3, H, W), normalised.
        first_masks: (B, O, H, W) in 0..1.
        present: (B, O): 1 for objects of the clip, else 0.
        plan: from `draw_plan`, for T frames.
        aged: frames 1..aged are run without gradients, and their logits are not returned: memories are then
            as old, and as wrong, as in use, for a third of the cost of learning from such frames.

    Returns:
        T - 1 - aged tensors of logits (B, O + 1, H, W), fp32, background first.
    """
    batch, frames = images.shape[:2]
    objects = first_masks.shape[1]
    selector = present[:, :, None, None].float()
    features = _encode(model, images, aged)
    keys = [f.key for f in features]
    height, width = keys[0].shape[2:]
    hidden: Tensor | None = None
    if model.config.hidden_dim > 0:
        hidden = images.new_zeros(batch, objects, model.config.hidden_dim, height, width)
    still_read = {i for t in range(1, frames) for i in plan.read[t]}
    values: dict[int, Tensor] = {}
    masks = first_masks
    outputs: list[Tensor] = []
    for t in range(frames):
        learning = not 1 <= t <= aged
        with contextlib.nullcontext() if learning else _no_gradients():
            if t > 0:
                read = plan.read[t]
                with torch.autocast(images.device.type, enabled=False):
                    scores = similarity(
                        _flat(torch.stack([keys[i] for i in read], 2)),
                        _flat(torch.stack([features[i].shrinkage for i in read], 2)),
                        _flat(keys[t]),
                        _flat(features[t].selection),
                    )
                memory = torch.stack([values[i] for i in read], 3).flatten(3)  # B, O, C_v, n*h*w
                read_out = readout(torch.softmax(scores, 1), memory)
                read_out = read_out.view(*read_out.shape[:3], height, width)
                hidden, logits = model.decode(
                    features[t].scales, read_out, hidden, update_hidden=t < frames - 1
                )
                combined = aggregate(torch.sigmoid(logits.float()) * selector)
                if learning:
                    outputs.append(combined)
                masks = torch.softmax(combined, 1)[:, 1:] * selector
            if t in still_read:
                image = images[:, t].contiguous()
                values[t], hidden = model.encode_value(
                    image, features[t].f16, hidden, masks, deep_update=plan.deep[t]
                )
    return outputs


@contextlib.contextmanager
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    # Autocast caches weights that it cast without gradients; they would not be trained.
    torch.clear_autocast_cache()


def _encode(model: XMem, images: Tensor, aged: int) -> list[KeyFeatures]:
    """Features of each frame of the clips; those of frames 1..aged without gradients."""
    frames = images.shape[1]
    found: dict[int, KeyFeatures] = {}
    for numbers, context in (
        ([0, *range(aged + 1, frames)], contextlib.nullcontext()),
        (list(range(1, aged + 1)), _no_gradients()),
    ):
        if not numbers:
            continue
        with context:
            together = images[:, numbers].flatten(0, 1).contiguous(memory_format=torch.channels_last)
            features = model.encode_key(together)
        for place, t in enumerate(numbers):
            parts = (features.key, features.shrinkage, features.selection, *features.scales)
            found[t] = KeyFeatures(
                *(x.view(len(images), len(numbers), *x.shape[1:])[:, place] for x in parts)
            )
    return [found[t] for t in range(frames)]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


def one_hot(labels: Tensor, objects: int) -> Tensor:
    """Convert labels (B, H, W) to masks (B, O, H, W) of objects 1..O, float32."""
    numbers: Sequence[int] = range(1, objects + 1)
    return torch.stack([labels == n for n in numbers], 1).float()
