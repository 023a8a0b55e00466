"""Predicted and measured memory: states by tensor, workspace by PyTorch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from support.small_net import small_cutie
from support.tiny import tiny_model

from pipeline.base.errors import UsageError
from pipeline.tracking.memory_plan import network_grid, predict_state_bytes, predict_workspace_bytes
from xmem_core import (
    Cutie,
    MemoryConfig,
    ModelConfig,
    Prompt,
    TrackerState,
    VideoSegmenter,
    XMem,
    load_model,
)
from xmem_core.memory import Memory

SMALL_MEMORY = MemoryConfig(
    mem_every=1,
    min_mid_term_frames=2,
    max_mid_term_frames=4,
    num_prototypes=32,
    max_long_term_elements=100,
    max_permanent_frames=3,
)
WIDE_MEMORY = MemoryConfig(
    mem_every=1, min_mid_term_frames=2, max_mid_term_frames=5, max_long_term_elements=4000
)


def _state_bytes(state: TrackerState) -> int:
    """Bytes of all storages that the state refers to, each counted once."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            walk(vars(value))

    walk(state)
    return sum(found.values())


def _is_within(predicted: int, state: TrackerState) -> bool:
    """The pool, summaries, sensory memory and masks exactly; besides, what is prepared for reading."""
    memory, hidden = state.memory, state.hidden
    assert memory is not None
    exact = memory.nbytes + sum(t.nbytes for t in (hidden, state.masks) if t is not None)
    prepared = memory.capacity * (2 * memory.key_dim * 4 + 4 + 16)
    return _state_bytes(state) <= predicted == exact + prepared


def _peak_of_steps(run: Callable[[], object]) -> int:
    """The highest increase of the allocator's memory in one of the parts of `run` that are marked as steps.

    In bytes, including PyTorch's kernels. `run` also makes what the steps use: the profiler does not see
    that memory is freed which was taken before it started, such as weights that a step lays out anew.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    steps = [(e.start_ns(), e.end_ns()) for e in events if e.name() == "step"]
    assert steps
    return max(
        max(accumulate(size for time, size in changes if begin <= time <= end), default=0)
        for begin, end in steps
    )


def _frame(index: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _prompt(object_id: int, height: int, width: int) -> Prompt:
    mask = np.zeros((height, width), np.bool_)
    top = height * (object_id - 1) // 4
    mask[top : top + height // 5, width // 4 : width // 2] = True
    return Prompt({object_id: mask})


def _track(
    model: XMem | Cutie,
    memory: MemoryConfig,
    height: int,
    width: int,
    objects: int,
    size: int | None,
    frames: int,
) -> tuple[TrackerState, int]:
    """A state after that many frames, with one new object per frame; and the steps' highest peak."""
    states: list[TrackerState] = []

    def run() -> None:
        segmenter = VideoSegmenter(model, memory, size=size)
        states.append(segmenter.new_state())
        for index in range(frames):
            prompt = _prompt(index + 1, height, width) if index < objects else None
            frame = _frame(index, height, width)
            with torch.profiler.record_function("step"):
                result = segmenter.step(states[0], frame, prompt)
                assert result.label_map.shape == result.probabilities.shape[1:]
                del result

    peak = _peak_of_steps(run)
    return states[0], peak


@pytest.mark.parametrize("objects", [1, 2, 4])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(48, 64, None), (100, 151, 48), (151, 100, None), (200, 333, None)]
)
def test_tiny_network(height: int, width: int, size: int | None, objects: int) -> None:
    model = tiny_model()
    state, peak = _track(model, SMALL_MEMORY, height, width, objects, size, frames=12)
    assert isinstance(state.memory, Memory)
    assert state.memory.long_term.size > 0
    predicted = predict_state_bytes(model.config, SMALL_MEMORY, height, width, objects, size)
    assert _is_within(predicted, state)
    workspace = predict_workspace_bytes(model.config, SMALL_MEMORY, height, width, objects, size)
    assert peak <= workspace <= 1.5 * peak + 500_000


@pytest.mark.parametrize("objects", [1, 4])
@pytest.mark.parametrize(
    ("height", "width", "size", "memory"),
    [(240, 320, None, SMALL_MEMORY), (480, 640, 240, SMALL_MEMORY), (320, 240, None, WIDE_MEMORY)],
)
def test_bundled_network(
    height: int, width: int, size: int | None, memory: MemoryConfig, objects: int
) -> None:
    model = load_model("xmem-lite")
    state, peak = _track(model, memory, height, width, objects, size, frames=8)
    assert _is_within(predict_state_bytes(model.config, memory, height, width, objects, size), state)
    workspace = predict_workspace_bytes(model.config, memory, height, width, objects, size)
    # Memory is not full yet, and reading it is counted as if it were.
    assert peak <= workspace <= 1.5 * peak + 10_000_000


def test_published_shape() -> None:
    model = XMem(ModelConfig()).eval()
    state, peak = _track(model, SMALL_MEMORY, 128, 160, 2, None, frames=6)
    assert _is_within(predict_state_bytes(model.config, SMALL_MEMORY, 128, 160, 2), state)
    workspace = predict_workspace_bytes(model.config, SMALL_MEMORY, 128, 160, 2)
    # Two copies of its widest weights, 30 MB each, are counted; they are made in a size's first step only.
    assert peak <= workspace <= 1.5 * peak + 30_000_000


@pytest.mark.parametrize("objects", [1, 3])
def test_cutie(objects: int) -> None:
    """Objects that came one by one, so each with keys of its own."""
    model = small_cutie()
    state, peak = _track(model, SMALL_MEMORY, 96, 128, objects, None, frames=12)
    assert _is_within(predict_state_bytes(model.config, SMALL_MEMORY, 96, 128, objects), state)
    workspace = predict_workspace_bytes(model.config, SMALL_MEMORY, 96, 128, objects)
    # Two copies of its widest weights, 2.4 MB each, are counted and not always made.
    assert peak <= workspace <= 1.5 * peak + 3_000_000


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(mem_every=2, enable_long_term=False, min_mid_term_frames=1, max_mid_term_frames=3),
        MemoryConfig(mem_every=1, max_permanent_frames=1, max_long_term_elements=150),
    ],
)
def test_other_memories(memory: MemoryConfig) -> None:
    model = tiny_model()
    state, _ = _track(model, memory, 48, 64, 2, None, frames=12)
    assert _is_within(predict_state_bytes(model.config, memory, 48, 64, 2), state)


def test_objects_searched_for_in_windows_take_no_more() -> None:
    memory = replace(SMALL_MEMORY, search_window=64)
    model = tiny_model()
    state, peak = _track(model, memory, 200, 333, 3, None, frames=10)
    assert _is_within(predict_state_bytes(model.config, memory, 200, 333, 3), state)
    assert peak <= predict_workspace_bytes(model.config, memory, 200, 333, 3)


@pytest.mark.parametrize("frames", [5, 33, 40])
def test_memory_without_limit_needs_the_length(frames: int) -> None:
    memory = MemoryConfig(mem_every=2, enable_long_term=False, max_mid_term_frames=None)
    model = tiny_model()
    state, _ = _track(model, memory, 48, 64, 1, None, frames=frames)
    assert _is_within(predict_state_bytes(model.config, memory, 48, 64, 1, frames=frames), state)
    with pytest.raises(UsageError, match="max_mid_term_frames=None"):
        predict_state_bytes(model.config, memory, 48, 64, 1)


def test_a_state_that_was_stored_takes_as_much() -> None:
    model = tiny_model()
    state, _ = _track(model, SMALL_MEMORY, 48, 64, 2, None, frames=12)
    again = TrackerState.from_bytes(state.to_bytes())
    assert _is_within(predict_state_bytes(model.config, SMALL_MEMORY, 48, 64, 2), again)


def test_model_without_sensory_memory() -> None:
    config = ModelConfig.from_dict({**tiny_model().config.to_dict(), "hidden_dim": 0})
    model = XMem(config).eval()
    state, peak = _track(model, SMALL_MEMORY, 48, 64, 2, None, frames=12)
    assert _is_within(predict_state_bytes(config, SMALL_MEMORY, 48, 64, 2), state)
    assert peak <= predict_workspace_bytes(config, SMALL_MEMORY, 48, 64, 2)


@pytest.mark.parametrize("size", [None, 16, 48, 384])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (48, 64), (480, 854), (1081, 333), (17, 5000)])
def test_the_grid_is_the_segmenters(height: int, width: int, size: int | None) -> None:
    segmenter = VideoSegmenter(tiny_model(), size=size)
    state = segmenter.new_state()
    segmenter.step(state, np.zeros((height, width, 3), np.uint8))
    seen_h, seen_w, padded_h, padded_w = network_grid(height, width, size)
    assert (seen_h, seen_w) == state.network_size
    assert padded_h % 16 == padded_w % 16 == 0
    assert 0 <= padded_h - seen_h < 16
    assert 0 <= padded_w - seen_w < 16


def test_what_makes_it_more() -> None:
    lite, memory = ModelConfig.lite(), MemoryConfig()
    base = predict_workspace_bytes(lite, memory, 480, 854, 1, 384)
    assert predict_workspace_bytes(lite, memory, 480, 854, 3, 384) > base
    assert predict_workspace_bytes(lite, memory, 2160, 3840, 1, 384) > base
    assert predict_workspace_bytes(lite, memory, 480, 854, 1, 384, dtype="bfloat16") > base
    # A GPU searches the whole memory for all queries at once.
    assert predict_workspace_bytes(lite, memory, 480, 854, 1, 384, device="cuda:0") > 2 * base
    assert predict_state_bytes(lite, memory, 480, 854, 0) == 0
    assert predict_workspace_bytes(lite, memory, 480, 854, 0) == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"height": 0}, "height=0"),
        ({"width": -3}, "width=-3"),
        ({"objects": -1}, "objects=-1"),
        ({"size": 8}, "size=8"),
        ({"dtype": "float64"}, "float64"),
    ],
)
def test_bad_numbers(values: dict[str, object], named: str) -> None:
    given = {"height": 48, "width": 64, "objects": 1, **values}
    for predict in (predict_state_bytes, predict_workspace_bytes):
        with pytest.raises(UsageError, match=named):
            predict(ModelConfig.lite(), MemoryConfig(), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("objects", [1, 10])
def test_on_a_gpu_there_is_room_for_the_runs_of_labels(objects: int) -> None:
    """Per pixel a label, whether it changes, and how often up to there; a probability and its sum, twice."""
    sizes = 2160, 3840, objects, 48  # so large that nothing of the step takes more
    on_cpu, on_gpu = (
        predict_workspace_bytes(tiny_model().config, MemoryConfig(), *sizes, device=device)
        for device in ("cpu", "cuda")
    )
    assert on_gpu - on_cpu >= 2160 * 3840 * (4 + 1 + 4 + 4 + 3 * 8)
