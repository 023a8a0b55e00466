"""Copies of an object's memory in other states: found again without a mask, stored, bounded, and apart."""

from __future__ import annotations

import pytest
import torch
from support.small_net import MODELS, SMALL_MEMORY, frame_at, square

from xmem_core import Prompt, TrackerState, VideoSegmenter
from xmem_core.contents import contents
from xmem_core.object_copy import ObjectCopy

FRAME = (48, 64)


def segmenter_of(kind: str) -> VideoSegmenter:
    return VideoSegmenter(MODELS[kind](), SMALL_MEMORY, size=None)


def source(segmenter: VideoSegmenter) -> ObjectCopy:
    """What is remembered of object 1 after eight frames, at most 16 elements."""
    state = segmenter.new_state()
    for index in range(8):
        prompt = Prompt({1: square(*FRAME, 0, 4, 14), 2: square(*FRAME, 8, 27, 12)}) if index == 0 else None
        segmenter.step(state, frame_at(index), prompt)
    return state.copy_object(1, 16)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_a_copy_starts_a_stream_and_survives_every_cut(kind: str) -> None:
    segmenter = segmenter_of(kind)
    copy = source(segmenter)
    restored = ObjectCopy.from_bytes(copy.to_bytes())
    assert restored.to_bytes() == copy.to_bytes()
    whole, cut = segmenter.new_state(), segmenter.new_state()
    for state in (whole, cut):
        segmenter.adopt(state, 5, restored, FRAME)
        assert state.object_ids == (5,)
        assert state.sought == {5}
    for index in range(24):
        cut = TrackerState.from_bytes(cut.to_bytes())
        a, b = (segmenter.step(state, frame_at(index)) for state in (whole, cut))
        assert a.object_ids == (5,)
        assert torch.equal(a.probabilities, b.probabilities)
    assert whole.to_bytes() == cut.to_bytes()
    # Frames were consolidated meanwhile, and the copy stayed; edits of earlier frames don't reach it.
    whole.forget(-5, 3)
    kept = [(e.kind, e.time, e.elements, e.objects) for e in contents(whole.memory) if e.kind == "copied"]
    assert kept == [("copied", -1, len(copy.key), (5,))]
    assert any(e.kind == "long_term" for e in contents(whole.memory))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_a_sought_object_reads_its_copy_only_until_it_is_prompted(kind: str) -> None:
    segmenter = segmenter_of(kind)
    state = segmenter.new_state()
    for index in range(3):
        segmenter.step(state, frame_at(index), Prompt({2: square(*FRAME, 8, 27, 12)}) if index == 0 else None)
    segmenter.adopt(state, 1, source(segmenter), FRAME)
    assert [e.kind for e in contents(state.memory) if 1 in e.objects] == ["copied"]
    assert not any(2 in e.objects for e in contents(state.memory) if e.kind == "copied")
    (share,) = segmenter.reads(state, frame_at(3))[1]
    assert (share.kind, share.time) == ("copied", None)
    assert share.share == pytest.approx(1)
    segmenter.step(state, frame_at(3), Prompt({1: square(*FRAME, 3, 4, 14)}))
    assert state.sought == set()
    assert {e.kind for e in contents(state.memory) if 1 in e.objects} >= {"copied", "working"}
    state.remove_objects([1])
    assert state.memory is not None
    assert state.memory.copied_elements == 0
    segmenter.step(state, frame_at(4))


@pytest.mark.usefixtures("one_thread")
def test_other_objects_are_tracked_as_without_the_copy() -> None:
    segmenter = segmenter_of("xmem")
    copy = source(segmenter)
    plain, other = segmenter.new_state(), segmenter.new_state()
    for state in (plain, other):
        segmenter.step(state, frame_at(0), Prompt({2: square(*FRAME, 8, 27, 12)}))
    segmenter.adopt(other, 1, copy, FRAME)
    assert plain.memory is not None
    assert other.memory is not None
    query, selection = torch.randn(2, copy.key.shape[1], 12, generator=torch.Generator().manual_seed(0))
    read = [memory.read(query, selection.abs())[0] for memory in (plain.memory, other.memory)]  # type: ignore[union-attr]
    torch.testing.assert_close(read[0], read[1])
    for region in ("working", "long_term"):
        usages = [memory.usage(region) for memory in (plain.memory, other.memory)]  # type: ignore[union-attr]
        torch.testing.assert_close(usages[0], usages[1])


@pytest.mark.usefixtures("one_thread")
def test_copies_that_do_not_fit_are_refused_and_change_nothing() -> None:
    segmenter = segmenter_of("xmem")
    copy = source(segmenter)
    state = segmenter.new_state()
    segmenter.adopt(state, 1, copy, FRAME)
    before = state.to_bytes()
    with pytest.raises(ValueError, match="object 1 is tracked already: give the copy another id"):
        segmenter.adopt(state, 1, copy, FRAME)
    with pytest.raises(ValueError, match="there would be 32 copied elements, max_long_term_elements=20 are"):
        segmenter.adopt(state, 2, copy, FRAME)
    with pytest.raises(ValueError, match="the copy is of a model with other weights"):
        segmenter_of("cutie").new_state().adopt(1, copy, FRAME)
    with pytest.raises(ValueError, match=r"no object 9 is tracked: there are \[1\]"):
        state.copy_object(9)
    with pytest.raises(ValueError, match="damaged or foreign copy of an object"):
        ObjectCopy.from_bytes(copy.to_bytes()[:-4])
    assert state.to_bytes() == before
