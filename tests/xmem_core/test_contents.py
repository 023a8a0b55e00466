"""The listing of a memory: every element is in it once, with its frame, readers and prompts."""

from __future__ import annotations

import pytest
from support.small_net import MODELS, SMALL_MEMORY, frame_at, square

from xmem_core import Prompt, TrackerState, VideoSegmenter
from xmem_core.contents import contents


def tracked(kind: str, frames: int = 20) -> TrackerState:
    """Object 1 from frame 0, object 2 from frame 3, object 1 corrected on frame 10."""
    segmenter = VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None)
    state = segmenter.new_state()
    prompts = {
        0: Prompt({1: square(48, 64, 0, 4, 14)}),
        3: Prompt({2: square(48, 64, 8, 21, 12)}),
        10: Prompt({1: square(48, 64, 10, 4, 14)}),
    }
    for index in range(frames):
        segmenter.step(state, frame_at(index), prompts.get(index))
    return state


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_every_element_is_listed_once(kind: str) -> None:
    state = tracked(kind)
    entries = contents(state.memory)
    assert state.memory is not None
    working, long_term = state.memory.sizes
    assert sum(e.elements for e in entries if e.kind != "long_term") == working
    assert sum(e.elements for e in entries if e.kind == "long_term") == long_term > 0
    assert [e.time for e in entries] == sorted(e.time for e in entries)
    assert all(0 <= e.time <= state.time and e.use >= 0 for e in entries)
    assert {e.kind for e in entries} == {"working", "permanent", "long_term"}
    prompted = {(e.time, i) for e in entries for i in e.given}
    assert {(0, 1), (3, 2), (10, 1)} <= prompted
    assert all(2 not in e.objects for e in entries if e.time < 3)
    assert any(e.objects == (1, 2) for e in entries) or kind == "cutie"


@pytest.mark.usefixtures("one_thread")
def test_listing_changes_nothing_and_outlives_storage() -> None:
    state = tracked("xmem")
    before = state.to_bytes()
    listed = contents(state.memory)
    assert state.to_bytes() == before
    assert contents(TrackerState.from_bytes(before).memory) == listed


@pytest.mark.usefixtures("one_thread")
def test_removed_objects_and_spans_that_are_barred_are_not_readers() -> None:
    state = tracked("xmem")
    state.remove_objects([1])
    entries = contents(state.memory)
    assert entries
    assert all(e.objects == (2,) and 1 not in e.given and e.time >= 3 for e in entries)
    assert state.memory is not None
    state.memory.doubt(2, after=5)
    barred = {e.time for e in contents(state.memory) if e.objects == ()}
    assert barred == {e.time for e in entries if e.time > 5} != set()
    state.remove_objects([2])
    assert contents(state.memory) == []
    assert contents(None) == []
