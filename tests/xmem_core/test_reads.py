"""Which remembered frames an object is read from: a made-up memory with a known answer, and real steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import SHORT_MEMORY, tiny_model

from xmem_core import MemoryConfig, Prompt, VideoSegmenter
from xmem_core.memory import Memory
from xmem_core.reads import ReadShare, read_shares
from xmem_core.steps import Choice


def add(memory: Memory, time: int, keys: list[float], ids: tuple[int, ...], **more: Any) -> None:
    """A frame of two positions with one key channel each; similarity is -(k - q)^2."""
    key = torch.tensor([keys])
    values = {i: torch.zeros(1, 2) for i in ids}
    memory.add_frame(time, key, torch.ones(1, 2), torch.ones(1, 2), values, **more)


def shares(memory: Memory, query: float, object_id: int = 1) -> list[ReadShare]:
    key = torch.tensor([[query]])
    chosen = memory.choose(key, torch.ones(1, 1), count_use=False)
    own = {i: Choice(memory, torch.arange(1), *found) for i, found in chosen.items()}
    return read_shares(own)[object_id]


def test_shares_of_a_made_up_memory() -> None:
    config = MemoryConfig(
        top_k=3,
        min_mid_term_frames=1,
        max_mid_term_frames=3,
        num_prototypes=2,
        max_long_term_elements=8,
        max_permanent_frames=3,
    )
    memory = Memory(config, positions=2, key_dim=1, value_dim=1)
    add(memory, 0, [0.0, 9.0], (1,), given=(1,))
    add(memory, 5, [1.0, 9.0], (1,))
    # The best three are at distances 0, 1 and 9.
    total = 1 + math.exp(-1) + math.exp(-81)
    one, other = shares(memory, 0.0)
    assert (one.kind, one.time, other.kind, other.time) == ("working", 0, "working", 5)
    assert one.share == pytest.approx((1 + math.exp(-81)) / total, abs=1e-6)
    assert other.share == pytest.approx(math.exp(-1) / total, abs=1e-6)
    # A third frame, prompted: object 2 starts, frame 5 is consolidated, frame 9 stays whole.
    add(memory, 9, [2.0, 0.5], (1, 2), given=(2,))
    assert memory.long_term.size == 2
    found = {(s.kind, s.time): s.share for s in shares(memory, 0.0)}
    assert set(found) == {("working", 0), ("permanent", 9), ("long_term", None)}
    assert sum(found.values()) == pytest.approx(1)
    # Object 2 may read frame 9 only.
    assert {s.time for s in shares(memory, 0.0, 2)} == {9}
    # Barred from frame 0, object 1 reads the others.
    memory.bar(1, 0, 0)
    assert 0 not in {s.time for s in shares(memory, 0.0)}


def test_shares_are_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each element's value says which frame it is of: what the readout gives is then its share."""
    segmenter = VideoSegmenter(tiny_model(), SHORT_MEMORY)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (14, 48, 80, 3), dtype=np.uint8)
    state = segmenter.new_state()
    mask = np.zeros((48, 80), bool)
    mask[10:30, 20:50] = True
    for n, frame in enumerate(frames[:-1]):
        segmenter.step(state, frame, Prompt({n + 1: np.roll(mask, 9 * n, 1)}) if n in (0, 3) else None)
    memory = state.memory
    assert isinstance(memory, Memory)
    assert memory.long_term.size
    assert memory.permanent.size
    rows = memory._used_rows()
    region, time = memory.origin(rows)
    keys = [(int(r), int(t) if r else None) for r, t in zip(region, time, strict=True)]
    origins = sorted(set(keys), key=str)
    assert len(origins) <= memory.value_dim
    for value in memory._values.values():
        value.zero_()
        value[rows, torch.tensor([origins.index(key) for key in keys])] = 1
    before = state.to_bytes()
    pixel = np.zeros((48, 80), bool)
    pixel[24, 33] = True
    found = segmenter.reads(state, frames[-1], pixel)
    everywhere = segmenter.reads(state, frames[-1])
    assert state.to_bytes() == before

    read: list[torch.Tensor] = []
    original = Memory.read

    def spied(self: Memory, *args: Any, **options: Any) -> torch.Tensor:
        read.append(original(self, *args, **options))
        return read[-1]

    monkeypatch.setattr(Memory, "read", spied)
    segmenter.step(state, frames[-1])
    names = {0: "long_term", 1: "permanent", 2: "copied", 3: "working"}
    cell = (24 // 16) * 5 + 33 // 16
    for k, object_id in enumerate((1, 4)):
        for shares_of, got in (
            (found[object_id], read[0][k, :, cell]),
            (everywhere[object_id], read[0][k].mean(1)),
        ):
            told = {(str(s.kind), s.time): s.share for s in shares_of}
            assert sum(told.values()) == pytest.approx(1)
            for origin, share in zip(origins, got.tolist(), strict=False):
                assert told.get((names[origin[0]], origin[1]), 0.0) == pytest.approx(share, abs=1e-5)
    with pytest.raises(ValueError, match="where is"):
        segmenter.reads(state, frames[-1], np.zeros((48, 80), bool))
