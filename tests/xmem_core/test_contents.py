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


def held(state: TrackerState) -> dict[int, list[str]]:
    """Kinds of the entries by time."""
    found: dict[int, list[str]] = {}
    for entry in contents(state.memory):
        found.setdefault(entry.time, []).append(entry.kind)
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_a_pinned_frame_stays_whole_until_it_is_unpinned(kind: str) -> None:
    segmenter = VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None)
    plain = tracked(kind)
    newest = max(e.time for e in contents(plain.memory) if e.kind == "working")
    state = TrackerState.from_bytes(plain.to_bytes())
    state.pin(newest)
    assert all(e.pinned == (e.time == newest) for e in contents(state.memory))
    for index in range(20, 50):
        segmenter.step(plain, frame_at(index))
        segmenter.step(state, frame_at(index))
        if index == 31:  # a cut
            state = TrackerState.from_bytes(state.to_bytes())
    assert "permanent" not in held(plain).get(newest, [])
    assert set(held(state)[newest]) == {"permanent"}
    # Unpinned, it gives way to the next frame with a prompt.
    state.unpin(newest)
    for index in range(50, 76):
        masks = {1: square(48, 64, index % 24, 4, 14), 2: square(48, 64, 8, 40, 12)}
        segmenter.step(state, frame_at(index), Prompt(masks) if index in (50, 56, 62) else None)
    assert "permanent" not in held(state).get(newest, [])


@pytest.mark.usefixtures("one_thread")
def test_a_cut_changes_nothing_of_a_pinned_state() -> None:
    segmenter = VideoSegmenter(MODELS["xmem"](), SMALL_MEMORY, size=None)
    one = tracked("xmem")
    one.pin(18)
    other = TrackerState.from_bytes(one.to_bytes())
    for index in range(20, 40):
        segmenter.step(one, frame_at(index))
        segmenter.step(other, frame_at(index))
        other = TrackerState.from_bytes(other.to_bytes())
    assert one.to_bytes() == other.to_bytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_a_span_that_is_forgotten_is_gone_and_tracking_goes_on(kind: str) -> None:
    segmenter = VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None)
    state = tracked(kind)
    before = held(state)
    state.forget(5, 12)
    after = held(state)
    assert {time for time in before if not 5 <= time <= 12} == set(after) != set(before)
    assert all(after[time] == before[time] for time in after)
    restored = TrackerState.from_bytes(state.to_bytes())
    for index in range(20, 44):
        results = [segmenter.step(each, frame_at(index)) for each in (state, restored)]
        assert bool((results[0].label_map == results[1].label_map).all())
        assert results[0].object_ids == (1, 2)
    assert not any(5 <= time <= 12 for time in held(state))
    assert state.to_bytes() == restored.to_bytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_one_object_forgets_and_the_others_go_on_reading(kind: str) -> None:
    state = tracked(kind)

    def read_by(object_id: int) -> set[int]:
        return {entry.time for entry in contents(state.memory) if object_id in entry.objects}

    before = {i: read_by(i) for i in (1, 2)}
    state.forget(5, 12, object_id=1)
    assert read_by(1) == {time for time in before[1] if not 5 <= time <= 12} < before[1]
    assert read_by(2) == before[2]
    state.forget(10, 14, 1)  # overlapping spans
    assert read_by(1) == {time for time in before[1] if not 5 <= time <= 14}
    restored = TrackerState.from_bytes(state.to_bytes())
    segmenter = VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None)
    for index in range(20, 30):
        for each in (state, restored):
            segmenter.step(each, frame_at(index))
    assert state.to_bytes() == restored.to_bytes()
    assert max(read_by(1)) == max(read_by(2)) > 20  # later frames are read
    unchanged = state.to_bytes()
    with pytest.raises(ValueError, match=r"object 1 would remember nothing any more"):
        state.forget(0, 100, 1)
    with pytest.raises(ValueError, match=r"no object 9 is tracked: there are \[1, 2\]"):
        state.forget(0, 1, 9)
    assert state.to_bytes() == unchanged


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_edits_that_cannot_be_made_change_nothing(kind: str) -> None:
    state = tracked(kind)
    before = state.to_bytes()
    with pytest.raises(ValueError, match=r"object [12] would remember nothing any more: forget less"):
        state.forget(3, 19)
    with pytest.raises(ValueError, match="times 7 to 6: the first must not be after the last"):
        state.forget(7, 6)
    consolidated = min(time for time, kinds in held(state).items() if set(kinds) == {"long_term"})
    for time in (consolidated, 1000):
        with pytest.raises(ValueError, match=f"no whole frame of time {time} is in memory: there are"):
            state.pin(time)
    assert state.to_bytes() == before
    whole = sorted({e.time for e in contents(state.memory) if e.kind != "long_term" and e.objects == (1, 2)})
    if kind == "xmem":
        for time in whole[:2]:
            state.pin(time)
        with pytest.raises(
            ValueError, match="2 frames are pinned, and max_permanent_frames=3 leaves no room"
        ):
            state.pin(whole[2])
    fresh = VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None).new_state()
    fresh.forget(0, 9)
    with pytest.raises(ValueError, match="nothing is remembered"):
        fresh.pin(0)


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
