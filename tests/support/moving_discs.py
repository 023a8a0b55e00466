"""A clip made up for measurements, and a memory filled with made-up elements. Needs torch and numpy only."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from xmem_core import Prompt, TrackerState
from xmem_core.memory import Memory


def clip(count: int, objects: int, height: int, width: int) -> tuple[list[NDArray[np.uint8]], Prompt]:
    """Discs that move over blocks of noise, and the masks of the first frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    back = np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]
    y, x = np.mgrid[:height, :width]
    frames, masks = [], {}
    for t in range(count):
        frame = back.copy()
        for k in range(objects):
            left, top = width * (k % 5 + 0.5) / 5 + 2 * t, height * (0.25 if k < 5 else 0.75)
            disc = (x - left) ** 2 + (y - top) ** 2 < (height / 11) ** 2
            frame[disc] = (25 * k, 200, 255 - 25 * k)
            if t == 0:
                masks[k + 1] = disc
        frames.append(frame)
    return frames, Prompt(masks)


def fill_memory(state: TrackerState) -> None:
    """Fill long-term memory with slightly changed copies of what is remembered."""
    memory = state.memory
    assert isinstance(memory, Memory)
    region, device = memory.long_term, memory.device
    rng = torch.Generator().manual_seed(0)
    kept = memory._rows([memory.working.used])
    rows = kept[torch.arange(region.capacity - region.size, device=device) % len(kept)]
    columns = {name: memory._columns[name][rows] for name in ("key", "shrinkage", "selection")}
    noise = torch.randn(columns["key"].shape, generator=rng).to(device)
    columns["key"] += 0.1 * columns["key"].std() * noise
    memory._append(
        region,
        columns,
        memory._columns["time"][rows],
        {i: value[rows] for i, value in memory._values.items()},
        (torch.rand(len(rows), generator=rng).to(device), torch.ones(len(rows), device=device)),
    )
    memory._readable = None


def mean_iou(a: NDArray[np.int32], b: NDArray[np.int32], objects: int) -> float:
    """Mean over objects 1..`objects` of two label maps; 1 for an object that is in neither."""
    found = []
    for i in range(1, objects + 1):
        union = int(((a == i) | (b == i)).sum())
        found.append(int(((a == i) & (b == i)).sum()) / union if union else 1.0)
    return float(np.mean(found))
