"""A step on a GPU does not wait for it.

Tensors on torch's `meta` device have no values: whatever would bring one to the host, or needs a size that
depends on values, raises an error. The steps run there as on a GPU, in the branches that are not a CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.small_net import small_model
from torch import Tensor

from xmem_core import MemoryConfig, Prompt, TrackerState, VideoSegmenter, attention, segmenter
from xmem_core.attention import search, searchable
from xmem_core.memory import Memory, _summed
from xmem_core.steps import ModelSteps

SIZE = (64, 96)
FRAME = np.zeros((*SIZE, 3), np.uint8)
MASKS = {1: np.zeros(SIZE, bool), 5: np.zeros(SIZE, bool)}
MASKS[1][8:30, 10:40] = MASKS[5][40:60, 50:90] = True
# Consolidation after a few frames, and long-term memory that is soon full. A prompt may wait for the
# device, to see what it contradicts.
SETTINGS = MemoryConfig(
    mem_every=2,
    min_mid_term_frames=2,
    max_mid_term_frames=4,
    num_prototypes=8,
    max_long_term_elements=20,
    forget_contradicted=False,
)


def without_values(monkeypatch: pytest.MonkeyPatch, settings: MemoryConfig) -> VideoSegmenter:
    monkeypatch.setattr(segmenter, "model_fingerprint", lambda _: "0" * 32)
    # There is no autocast for this device.
    monkeypatch.setattr(ModelSteps, "autocast", lambda _: nullcontext())
    return VideoSegmenter(small_model().to("meta"), settings)


def test_a_step_waits_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = without_values(monkeypatch, SETTINGS)
    state = tracker.new_state()
    tracker.step(state, FRAME, Prompt({1: MASKS[1]}))
    for _ in range(7):
        tracker.step(state, FRAME)
    tracker.step(state, FRAME, Prompt({5: MASKS[5]}))
    for _ in range(24):
        result = tracker.step(state, FRAME)
    assert result.network_probabilities.device.type == "meta"
    assert result.foreground.labels.shape == SIZE
    assert isinstance(state.memory, Memory)
    assert state.memory.long_term.size > 8  # it was consolidated several times
    assert state.object_ids == (1, 5)


def test_values_of_the_device_are_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see a step that waits."""
    tracker = without_values(monkeypatch, SETTINGS)
    state = tracker.new_state()
    tracker.step(state, FRAME, Prompt(MASKS))
    choose = Memory.choose

    def waits(self: Memory, *given: Any, **named: Any) -> Any:
        found = choose(self, *given, **named)
        float(next(iter(found.values()))[0].sum())
        return found

    monkeypatch.setattr(Memory, "choose", waits)
    with pytest.raises(RuntimeError, match="meta"):
        tracker.step(state, FRAME)


def test_readers_read_the_same_elements_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(16, 900, generator=generator)
    shrinkage = 1 + torch.rand(1, 900, generator=generator)
    query = torch.randn(16, 300, generator=generator)
    selection = torch.rand(16, 300, generator=generator)
    old, wanted = torch.arange(900) < 500, torch.arange(300) % 3 > 0
    barred: list[Tensor | None] = [None, old]
    on_cpu = search(searchable(key, shrinkage), query, selection, 30, barred, wanted=[None, wanted])
    monkeypatch.setattr(attention, "_GPU_SCORES", 900 * 130)  # several blocks
    gpu = attention._search_all(searchable(key, shrinkage), query, selection, 30, barred, [None, wanted])
    for (weights, index), (own, chosen) in zip(on_cpu, gpu, strict=True):
        dense, other = (torch.zeros(300, 900).scatter_(1, i, w) for w, i in ((weights, index), (own, chosen)))
        torch.testing.assert_close(dense, other)
    assert not gpu[1][0][~wanted].any()


def test_uses_are_summed_as_whole_numbers_on_a_gpu() -> None:
    """As `bincount` does it, to the last bit of float32, and in any order."""
    generator = torch.Generator().manual_seed(5)
    places = torch.randint(0, 40, (3000,), generator=generator)
    weights = torch.softmax(torch.randn(3000, generator=generator), 0)
    wanted = _summed(places, weights, 40)
    whole = (weights.double() * 2.0**40).round().to(torch.int64)
    for order in (torch.arange(3000), torch.randperm(3000, generator=generator)):
        sums = torch.zeros(40, dtype=torch.int64).scatter_add_(0, places[order], whole[order])
        torch.testing.assert_close((sums.double() / 2.0**40).float(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("awaited", [1, 5])
def test_what_was_put_off_is_there_once_it_is_asked_for(
    awaited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Any]] = []
    state = TrackerState(MemoryConfig(), "0" * 32, None)
    state.once_known(torch.tensor([1, 2]), found.append)
    assert found == [[1, 2]]  # at once on a CPU

    class Later:
        device = torch.device("cuda")

        def __init__(self, number: int) -> None:
            self.tolist: Callable[[], list[int]] = lambda: [number]

    for number in range(awaited):
        state.once_known(Later(number), found.append)  # type: ignore[arg-type]
    assert found == [[1, 2]]
    assert state.sure == {}
    assert found[1:] == [[number] for number in range(awaited)]
    for number in range(100):
        state.once_known(Later(number), found.append)  # type: ignore[arg-type]
    assert len(state._awaited) <= 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_held_in_the_networks_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenter, "model_fingerprint", lambda _: "0" * 32)
    monkeypatch.setattr(ModelSteps, "autocast", lambda _: nullcontext())
    values = {}
    for kind in (torch.float32, dtype):
        tracker = VideoSegmenter(small_model().to("meta"), SETTINGS)
        tracker._steps.value_dtype = VideoSegmenter(small_model().to("meta"), dtype=kind)._steps.value_dtype
        state = tracker.new_state()
        tracker.step(state, FRAME, Prompt(MASKS))
        tracker.step(state, FRAME)
        assert isinstance(state.memory, Memory)
        assert state.memory.value_dtype == kind
        values[kind] = sum(value.nbytes for value in state.memory._values.values())
    assert values[dtype] * 2 == values[torch.float32]
    assert VideoSegmenter(small_model(), dtype=torch.bfloat16)._steps.value_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_read_and_restored(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    key, value = torch.randn(8, 24, generator=generator), torch.randn(6, 24, generator=generator)
    memories = [Memory(MemoryConfig(), 24, 8, 6, value_dtype=kind) for kind in (torch.float32, dtype)]
    for memory in memories:
        memory.add_frame(0, key, torch.ones(1, 24), torch.ones(8, 24), {3: value}, given=[3])
    exact, half = (memory.read(key, torch.ones(8, 24)) for memory in memories)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.03)
    tensors, facts = memories[1].export()
    restored = Memory.restore(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()},
        facts,
        MemoryConfig(),
    )
    assert restored.value_dtype == dtype
    assert torch.equal(restored.read(key, torch.ones(8, 24)), half)
    with pytest.raises(ValueError, match="'int8' are not allowed: float32, float16, bfloat16"):
        Memory.restore(tensors, facts | {"value_dtype": "int8"}, MemoryConfig())
