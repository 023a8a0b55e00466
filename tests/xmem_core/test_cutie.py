"""Cutie's parts that differ from XMem's: settings, padding, schedule, groups of objects, summaries."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.small_net import SMALL_CUTIE, SMALL_MEMORY, frame_at, small_cutie, square

from xmem_core import CutieConfig, MemoryConfig, Prompt, TrackerState, VideoSegmenter
from xmem_core.cutie import ObjectTransformer, PositionalEncoding
from xmem_core.cutie_steps import CutieSteps, staggered
from xmem_core.grouped_memory import GroupedMemory

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 48, 64
MASK, OTHER = square(HEIGHT, WIDTH, 4, 6, 14), square(HEIGHT, WIDTH, 24, 30, 16)


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_cutie(), SMALL_MEMORY)


def memory_of(state: TrackerState) -> GroupedMemory:
    assert isinstance(state.memory, GroupedMemory)
    return state.memory


# --- settings ------------------------------------------------------------------------------------------


def test_the_published_defaults_are_filled_in() -> None:
    resolved = CutieSteps.resolve(MemoryConfig(), CutieConfig(), torch.device("cpu"))
    assert (resolved.stagger_updates, resolved.buffer_tokens) == (5, 2000)
    assert replace(resolved, stagger_updates=None, buffer_tokens=None) == MemoryConfig()
    small = CutieSteps.resolve(MemoryConfig(max_long_term_elements=1000), CutieConfig(), torch.device("cpu"))
    assert small.buffer_tokens == 200


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"search_window": 192}, "search_window=192 is not allowed: Cutie's object transformer reads"),
        ({"deep_update_every": 4}, "deep_update_every=4 is not allowed"),
        ({"buffer_tokens": 9873}, r"buffer_tokens=9873 is not allowed: 0 \.\. 9872"),
        ({"stagger_updates": 0}, "stagger_updates=0 is not allowed: at least 1"),
    ],
)
def test_settings_that_cutie_does_not_have_are_refused(setting: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VideoSegmenter(small_cutie(), MemoryConfig(**setting))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pixel_backbone": "vit"}, "choose one of resnet50, resnet18"),
        ({"dim": 18}, "a multiple of 4"),
        ({"heads": 3}, "a divisor of dim=256"),
        ({"queries": 5}, "an even number"),
        ({"mask_widths": (1, 2)}, "3 numbers of at least 1"),
    ],
)
def test_widths_that_do_not_fit_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CutieConfig(**values)
    assert CutieConfig.from_dict(SMALL_CUTIE.to_dict()) == SMALL_CUTIE


@pytest.mark.parametrize(
    ("every", "updates", "frames"),
    [(5, 5, {1, 2, 3, 4, 5}), (3, 7, {1, 2, 3}), (3, 2, {1, 3}), (10, 5, {1, 3, 6, 8, 10}), (4, 1, {1})],
)
def test_updates_are_spread_over_the_frames_between_two_memory_frames(
    every: int, updates: int, frames: set[int]
) -> None:
    assert staggered(every, updates) == frames


# --- the network ---------------------------------------------------------------------------------------


def test_the_padding_is_black(segmenter: VideoSegmenter) -> None:
    image = segmenter._prepare(np.full((45, 61, 3), 255, np.uint8), (45, 61))
    black = segmenter._prepare(np.zeros((48, 64, 3), np.uint8), (48, 64))
    assert image.shape == (1, 3, 48, 64)
    padded = (image == black)[0].all(0)
    assert not padded[1:46, 1:62].any()
    assert padded.sum() == 48 * 64 - 45 * 61


def test_the_positional_encoding_is_the_published_one() -> None:
    encoded = PositionalEncoding(8)((2, 3)).view(2, 3, 8)
    y, x = 32 * 1 / (1 + 1e-6), 32 * 2 / (2 + 1e-6)
    second = 128**-0.5
    expected = [f(v * w) for v in (x, y) for w in (1, second) for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoded[1, 2], torch.tensor(expected), rtol=0, atol=1e-4)


def test_queries_that_would_read_nothing_read_everything() -> None:
    """Object 1 everywhere: its second half of queries has nothing left. Object 2 nowhere: its first."""
    transformer = ObjectTransformer(SMALL_CUTIE)
    logits = torch.stack([torch.full((2, 2), 5.0), torch.full((2, 2), -5.0)]).unsqueeze(0)
    barred = transformer._barred(logits, 4).view(2, 2, 4, 4)  # objects, heads, queries, pixels
    assert not barred.any()
    logits[0, 0, 0, 0] = -5
    barred = transformer._barred(logits, 4).view(2, 2, 4, 4)
    assert barred[0, 0].tolist() == [[True, False, False, False]] * 2 + [[False, True, True, True]] * 2
    assert torch.equal(barred[0, 0], barred[0, 1])
    assert not barred[1].any()


# --- groups and summaries ------------------------------------------------------------------------------


def test_objects_are_grouped_by_arrival_and_a_group_goes_with_its_last_object(
    segmenter: VideoSegmenter,
) -> None:
    state = segmenter.new_state()
    prompts = {0: Prompt({1: MASK, 2: OTHER}), 3: Prompt({5: square(HEIGHT, WIDTH, 0, 50, 8)})}
    for t in range(8):
        segmenter.step(state, frame_at(t), prompts.get(t))
    memory = memory_of(state)
    assert {t: list(m.first_time) for t, m in memory.groups.items()} == {0: [1, 2], 3: [5]}
    assert memory.groups[3].frames[0].time == 3
    # Object 5 was prompted on a frame that is an ordinary one to the others.
    assert [f.given for f in memory.groups[0].frames if f.time == 3] in ([()], [])
    assert state.masks is not None
    assert state.masks.shape == (3, 3, 4)
    state.remove_objects([1])
    assert list(memory.groups) == [0, 3]
    assert len(state.masks) == 2
    state.remove_objects([2])
    assert list(memory.groups) == [3]
    assert state.object_ids == (5,)
    result = segmenter.step(state, frame_at(8), Prompt({1: MASK}))
    assert result.object_ids == (5, 1)
    # An id that is given again starts anew: its summaries are of this frame alone.
    assert list(memory.summaries) == [5, 1]
    assert list(memory.groups) == [3, 8]


def test_a_group_is_as_if_alone_where_the_transformer_does_not_meet_the_others(
    segmenter: VideoSegmenter,
) -> None:
    """Keys, usage and eviction of a late group are those of a stream that begins with it."""
    late, alone = segmenter.new_state(), segmenter.new_state()
    for t in range(30):
        segmenter.step(late, frame_at(t), {0: Prompt({1: MASK}), 4: Prompt({2: OTHER})}.get(t))
        if t >= 4:
            segmenter.step(alone, frame_at(t), Prompt({2: OTHER}) if t == 4 else None)
    own, other = memory_of(late).groups[4], memory_of(alone).groups[0]
    assert own.sizes == other.sizes
    assert other.sizes[1] > 0
    keys, others = own.export()[0]["key"], other.export()[0]["key"]
    assert torch.equal(keys[-own.working.size :], others[-other.working.size :])


def test_summaries_accumulate_and_the_area_is_theirs(segmenter: VideoSegmenter) -> None:
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0), Prompt({1: MASK}))
    first = memory_of(state).summaries[1].clone()
    for t in range(1, 5):
        segmenter.step(state, frame_at(t))
    later = memory_of(state).summaries[1]
    assert first.shape == (4, 17)
    assert bool((later[:, -1] > first[:, -1]).all())  # two memory frames more
    again = TrackerState.from_bytes(state.to_bytes())
    assert torch.equal(memory_of(again).summaries[1], later)
    assert again.masks is not None
    assert state.masks is not None
    assert torch.equal(again.masks, state.masks)


def test_what_a_prompt_contradicts_leaves_summaries_too(segmenter: VideoSegmenter) -> None:
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0), Prompt({1: MASK}))
    memory = memory_of(state)
    first = memory.summaries[1].clone()
    for t in range(1, 5):
        segmenter.step(state, frame_at(t))
    assert not torch.equal(memory.summaries[1], first)
    memory.doubt(1, 0)
    assert torch.equal(memory.summaries[1], first)
    assert list(memory.doubted) == [1]
    assert TrackerState.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()


def test_an_object_that_is_given_with_all_others_is_predicted_first(
    segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: the sensory memory is updated where a new object comes along, not where none does."""
    decoded: list[Any] = []
    decode: Any = segmenter._network.decode

    def spy(*args: Any, **options: Any) -> Any:
        decoded.append(options)
        return decode(*args, **options)

    monkeypatch.setattr(segmenter._network, "decode", spy)
    state = VideoSegmenter.new_state(segmenter)
    segmenter.step(state, frame_at(0), Prompt({1: MASK}))
    assert decoded == []
    segmenter.step(state, frame_at(1), Prompt({1: MASK, 2: OTHER}))
    assert decoded[0] == {"update_hidden": True}


def test_damaged_summaries_are_a_damaged_state(segmenter: VideoSegmenter) -> None:
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0), Prompt({1: MASK}))
    memory = memory_of(state)
    tensors, facts = memory.export()
    facts["summarised"] = []
    with pytest.raises(ValueError, match=r"summaries of objects \[\], memory of \[1\]"):
        GroupedMemory.restore(tensors, facts, memory.config)


def test_bfloat16_leaves_memory_and_results_in_float32() -> None:
    segmenter = VideoSegmenter(small_cutie(), SMALL_MEMORY, dtype=torch.bfloat16)
    state = segmenter.new_state()
    for t in range(4):
        result = segmenter.step(state, frame_at(t), Prompt({1: MASK, 2: OTHER}) if t == 0 else None)
    assert result.probabilities.dtype == torch.float32
    assert torch.isfinite(result.probabilities).all()
    assert state.hidden is not None
    assert state.hidden.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in memory_of(state).summaries.values())
