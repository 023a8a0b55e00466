"""Which detections become objects, and which objects are given up, with a scripted detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UsageError, XmemError
from pipeline.base.records import Frame
from pipeline.detect.lifecycle.decisions import NewObject
from pipeline.detect.lifecycle.object_finder import ObjectFinder
from pipeline.detect.protocol import Detection
from pipeline.detect.settings import FinderSettings
from pipeline.prompts.box_segmenters import Box

SIZE = (80, 120)
EACH = FinderSettings(every=1, confirmations=3, max_objects=4, out_of_sight=10, give_up_looks=1000, span=1)


class Scripted:
    """Returns scripted detections on each frame; counts its calls."""

    def __init__(self, script: Mapping[int, list[Detection]]) -> None:
        self.script = script
        self.asked: list[int] = []

    def detect(self, frame: Frame) -> list[Detection]:
        self.asked.append(frame.frame_index)
        return self.script.get(frame.frame_index, [])

    def to_bytes(self) -> bytes:
        return ",".join(map(str, self.asked)).encode()

    def from_bytes(self, blob: bytes) -> None:
        self.asked = [int(n) for n in blob.split(b",") if n]


class LeftHalf:
    """A box segmenter."""

    def segment(self, frame: np.ndarray, box: Box) -> np.ndarray:
        x, y, w, h = box
        mask = np.zeros(frame.shape[:2], np.bool_)
        mask[y : y + h, x : x + w // 2] = True
        return mask


def thing(x: int, y: int, w: int = 10, h: int = 20, **values: Any) -> Detection:
    mask = np.zeros(SIZE, np.bool_)
    mask[y : y + h, x : x + w] = True
    return Detection(mask, **values)


def blank(index: int, size: tuple[int, int] = SIZE) -> Frame:
    return Frame(np.zeros((*size, 3), np.uint8), index, index / 10)


def labels_of(masks: Mapping[int, np.ndarray], size: tuple[int, int] = SIZE) -> np.ndarray:
    labels = np.zeros(size, np.int32)
    for object_id, mask in masks.items():
        labels[mask] = object_id
    return labels


class Stream:
    """Drives a finder as a stream does; tracked objects stay where they were started unless moved."""

    def __init__(
        self,
        script: Mapping[int, list[Detection]],
        settings: FinderSettings = EACH,
        used: tuple[int, ...] = (),
    ) -> None:
        self.detector = Scripted(script)
        self.settings = settings
        self.used = used
        self.finder = ObjectFinder(self.detector, settings, LeftHalf(), used)
        self.masks: dict[int, np.ndarray] = {}
        self.started: list[tuple[int, NewObject]] = []
        self.gone: list[tuple[int, int]] = []

    def step(self, index: int, prompts: Mapping[int, np.ndarray] | None = None) -> list[int]:
        decided = self.finder.look(blank(index), list(self.masks), prompts or {})
        for object_id in decided.gone:
            self.gone.append((index, object_id))
            del self.masks[object_id]
        new = decided.masks
        self.masks.update(prompts or {})
        self.masks.update({n.object_id: n.mask for n in new})
        self.started.extend((index, n) for n in new)
        self.finder.saw(index, labels_of(self.masks), list(self.masks))
        return [n.object_id for n in new]

    def restored(self) -> None:
        blob = self.finder.to_bytes()
        self.detector = Scripted(self.detector.script)
        self.finder = ObjectFinder(self.detector, self.settings, LeftHalf(), self.used)
        self.finder.from_bytes(blob)
        assert self.finder.to_bytes() == blob


def test_only_wanted_classes_start_objects() -> None:
    dog, cat, unknown = thing(5, 5, category="dog"), thing(50, 5, category="cat"), thing(90, 5)
    script = {i: [dog, cat, unknown] for i in range(4)}
    stream = Stream(script, replace(EACH, classes="cat, bird"))
    assert [stream.step(i) for i in range(4)] == [[], [], [1], []]
    assert [new.category for _, new in stream.started] == ["cat"]
    stream = Stream(script)
    assert [len(stream.step(i)) for i in range(4)] == [0, 0, 3, 0]


def test_a_thing_is_an_object_once_it_was_found_often_enough() -> None:
    detections = [thing(20 + 3 * i, 30, category="dog", score=0.5 + i / 10) for i in range(4)]
    stream = Stream({i: [d] for i, d in enumerate(detections)})
    assert [stream.step(i) for i in range(4)] == [[], [], [1], []]
    _, new = stream.started[0]
    assert np.array_equal(new.mask, detections[2].mask)  # type: ignore[arg-type]
    assert (new.category, new.score) == ("dog", 0.7)


def test_a_look_that_may_not_be_is_made_up_for_on_the_next_frame_that_may() -> None:
    stream = Stream({}, FinderSettings(every=5, out_of_sight=3))
    asked = []
    for index in range(12):
        stream.finder.look(blank(index), [], {}, may_detect=index not in (5, 6, 7))
        asked.append(stream.finder.looked)
    assert stream.detector.asked == [0, 8, 10]
    assert asked == [0] * 8 + [8, 8, 10, 10]


def test_what_is_seen_over_a_long_pause_is_confirmed_by_fewer_looks() -> None:
    def started(frames: Sequence[int], *skipped: int) -> list[int]:
        script = {i: [thing(20, 30)] for i in range(40) if i not in skipped}
        stream = Stream(script, FinderSettings(every=5, confirmations=3))
        for index in frames:
            stream.step(index)
        return [index for index, _ in stream.started]

    assert started(range(40)) == [4]
    assert started(range(0, 40, 5)) == [10]
    assert started(range(0, 40, 6)) == [6]  # five frames are between two looks
    assert started(range(0, 40, 8), 8) == [16]  # missed once, seen twice


def test_the_detector_is_asked_every_few_frames_whichever_frames_come() -> None:
    stream = Stream({}, FinderSettings(every=5))
    for index in (0, 1, 4, 5, 6, 13, 14, 15, 16, 21):
        stream.step(index)
    assert stream.detector.asked == [0, 5, 13, 15, 21]


def test_one_miss_is_forgiven_two_are_not() -> None:
    found = thing(40, 30)
    stream = Stream({0: [found], 2: [found], 3: [found]})
    assert [stream.step(i) for i in range(4)] == [[], [], [], [1]]
    stream = Stream({0: [found], 3: [found], 4: [found], 5: [found]})
    assert [stream.step(i) for i in range(6)] == [[], [], [], [], [], [1]]


def test_a_candidate_is_awaited_where_it_was_going() -> None:
    """Steps larger than its width: from the second run on its position is predicted."""
    fast = Stream({i: [thing(5 + 9 * i + 2 * i * i, 30)] for i in range(6)})
    assert [fast.step(i) for i in range(6)] == [[], [], [1], [], [], []]
    # Things that flash up here and there are none.
    places = [(5, 5), (100, 50), (30, 50), (90, 5), (50, 30), (5, 50)]
    flashes = Stream({i: [thing(x, y)] for i, (x, y) in enumerate(places)})
    assert not any(flashes.step(i) for i in range(6))


def test_something_much_larger_is_not_the_same_thing() -> None:
    sizes = [(6, 10), (20, 30), (6, 10), (20, 30), (6, 10)]
    stream = Stream({i: [thing(40, 30, w, h)] for i, (w, h) in enumerate(sizes)})
    # Two candidates in one place, each missed every other time, neither twice in a row.
    assert [stream.step(i) for i in range(5)] == [[], [], [], [], [1]]


def test_what_is_tracked_is_not_found_again() -> None:
    stream = Stream({i: [thing(20, 30)] for i in range(20)})
    for i in range(20):
        stream.step(i)
    assert [i for i, _ in stream.started] == [2]


@pytest.mark.parametrize(
    ("detection", "tracked"),
    [
        (thing(20, 30), True),
        (thing(27, 30), True),  # 30 % of it
        (thing(29, 30), False),  # 10 %
        (thing(5, 10, 60, 60), True),  # a sixteenth of it; but the object is wholly within ...
        (thing(1, 1, 110, 75), False),  # ... and here too, only next to nothing of what was found
        (thing(60, 30), False),
        (Detection(box=(21, 31, 12, 20)), True),
        (Detection(box=(60, 31, 12, 20)), False),
    ],
)
def test_by_how_much_a_detection_is_a_tracked_object(detection: Detection, tracked: bool) -> None:
    sizes = {thing(5, 10, 60, 60).bounds: thing(20, 30, 30, 20)}
    own = sizes.get(detection.bounds, thing(20, 30)).mask
    stream = Stream({i: [detection] for i in range(1, 9)})
    assert own is not None
    stream.step(0, {5: own})
    assert any(stream.step(i) for i in range(1, 9)) is not tracked


def test_a_new_objects_mask_leaves_others_their_pixels() -> None:
    stream = Stream({i: [thing(28, 30)] for i in range(1, 4)})
    own = thing(20, 30).mask
    assert own is not None
    for i in range(4):
        stream.step(i, {5: own} if i == 0 else None)
    _, new = stream.started[0]
    assert not (new.mask & own).any()
    assert new.mask.sum() == 8 * 20


def test_a_prompt_on_the_same_frame_comes_first() -> None:
    found = thing(40, 30)
    stream = Stream({i: [found] for i in range(8)})
    assert found.mask is not None
    for i in range(8):
        stream.step(i, {9: found.mask} if i == 2 else None)
    assert not stream.started


def test_a_newcomer_that_was_taken_for_another_object_is_found_and_taken_away_from_it() -> None:
    first, second = thing(5, 30), thing(80, 30)
    stream = Stream({i: [first] if i < 6 else [first, second] for i in range(12)})
    assert first.mask is not None
    assert second.mask is not None
    for i in range(6):
        stream.step(i)
    assert list(stream.masks) == [1]
    for i in range(6, 12):
        # The tracker gives both to object 1 until there is another one.
        stream.masks[1] = first.mask if 2 in stream.masks else first.mask | second.mask
        if i == 8:
            stream.restored()
        stream.step(i)
    assert [(i, n.object_id) for i, n in stream.started] == [(2, 1), (8, 2)]
    assert np.array_equal(stream.started[1][1].mask, second.mask)


def test_what_users_ask_for_may_be_anywhere() -> None:
    first, second = thing(5, 30), thing(80, 30)
    stream = Stream({i: [first, second] for i in range(1, 9)})
    assert first.mask is not None
    assert second.mask is not None
    for i in range(9):
        stream.step(i, {9: first.mask | second.mask} if i == 0 else None)
    assert not stream.started


def test_ids_are_above_all_of_the_prompts_and_never_those_of_removed_objects() -> None:
    found = thing(40, 30)
    stream = Stream({i: [found] for i in range(80)}, used=(3, 41))
    for i in range(80):
        stream.step(i)
        if stream.masks:  # a user removes it at once, again and again
            stream.finder.release(stream.masks)
            stream.masks.clear()
            stream.finder.saw(i, labels_of(stream.masks), [])
    ids = [n.object_id for _, n in stream.started]
    assert ids == list(range(42, 42 + len(ids)))
    assert len(ids) > 5


def test_an_object_that_was_removed_is_no_object_there_any_more() -> None:
    """Removed by a user after the previous frame: a detection there may start an object at once."""
    found = thing(40, 30)
    stream = Stream({i: [found] for i in range(5, 9)}, used=(9,))
    assert found.mask is not None
    for i in range(6):
        stream.step(i, {9: found.mask} if i == 0 else None)
    del stream.masks[9]
    assert [stream.step(i) for i in range(6, 9)] == [[], [], [10]]


def test_reserved_ids_are_left_out() -> None:
    stream = Stream({i: [thing(40, 30)] for i in range(9)})
    stream.finder.reserve([7, 1000])
    stream.finder.reserve([3])
    assert [stream.step(i) for i in range(3)] == [[], [], [1001]]


def test_no_more_objects_than_allowed() -> None:
    things = [thing(2 + 20 * i, 30) for i in range(5)]
    stream = Stream(dict.fromkeys(range(30), things), FinderSettings(1, 3, max_objects=3))
    own = thing(2, 2, 8, 8).mask
    assert own is not None
    for i in range(10):
        stream.step(i, {50: own} if i == 0 else None)
    assert len(stream.started) == 2
    # One leaves: there is room, and what waits is taken at once.
    del stream.masks[50]
    stream.finder.saw(9, labels_of(stream.masks), list(stream.masks))
    assert len(stream.step(10)) == 1


def test_who_is_unseen_for_longest_makes_room_for_who_waits() -> None:
    things = [thing(2, 30), thing(22, 30), thing(105, 30)]
    script = {i: things[:2] if i < 4 else things[1:2] if i < 6 else [] for i in range(8)}
    script |= {i: [things[2]] for i in range(8, 60)}
    stream = Stream(script, FinderSettings(1, 3, max_objects=2, out_of_sight=40, give_up_looks=1000, span=1))
    for i in range(30):
        if i == 4:
            stream.masks[1] = np.zeros(SIZE, np.bool_)
        if i == 6:
            stream.masks[2] = np.zeros(SIZE, np.bool_)
        if i == 12:
            stream.restored()
        stream.step(i)
    # The third one waits from frame 10 on; 1 is last seen on 3, and unseen for more than 8 frames on 12.
    assert stream.gone == [(12, 1)]
    assert [(i, n.object_id) for i, n in stream.started] == [(2, 1), (2, 2), (12, 3)]


def filled() -> Stream:
    """Objects 1 to 4 are detected; 1 is out of sight since frame 7, 3 since frame 5."""
    things = [thing(2 + 20 * i, 30) for i in range(4)]
    stream = Stream(
        dict.fromkeys(range(6), things),
        FinderSettings(1, 3, max_objects=4, out_of_sight=40, give_up_looks=1000, span=1),
    )
    for i in range(10):
        for object_id in {5: [3], 7: [1]}.get(i, []):
            stream.masks[object_id] = np.zeros(SIZE, np.bool_)
        stream.step(i)
    assert stream.finder.started == [1, 2, 3, 4]
    return stream


@pytest.mark.parametrize("cut", [False, True])
def test_prompts_take_the_place_of_what_is_out_of_sight_then_of_what_began_last(cut: bool) -> None:
    stream = filled()
    if cut:
        stream.restored()
    chosen = stream.finder.make_room(10, 3, [1, 2, 3, 4])
    assert list(chosen.items()) == [(3, 5), (1, 3), (4, 0)]
    assert stream.finder.started == [2]
    assert stream.finder.make_room(10, 3, [2]) == {2: 0}
    assert stream.finder.make_room(10, 3, [2]) == {}


def test_only_what_may_go_makes_room() -> None:
    assert list(filled().finder.make_room(10, 2, [2, 4, 77])) == [4, 2]
    assert filled().finder.make_room(10, 0, [1, 2, 3, 4]) == {}


def test_what_is_released_is_never_given_up() -> None:
    stream = filled()
    stream.finder.release([1, 99])
    stream.restored()
    for i in range(10, 60):
        stream.step(i)
    # 1 and 3 are out of sight for more than 40 frames, and 1 is a user's now.
    assert stream.gone == [(45, 3)]


def test_at_the_edge_it_waits_for_the_whole_thing() -> None:
    whole = Stream({i: [thing(40, 30)] for i in range(9)})
    entering = Stream({i: [thing(0, 30, 4 + i, 20)] for i in range(9)})
    assert next(i for i in range(9) if whole.step(i)) == 2
    assert next(i for i in range(9) if entering.step(i)) == 5
    inside = Stream({i: [thing(max(0, 3 * i - 10), 30)] for i in range(9)})
    assert next(i for i in range(9) if inside.step(i)) == 4


def test_what_the_detector_began_is_given_up_when_it_is_out_of_sight_for_long() -> None:
    stream = Stream({i: [thing(40, 30)] for i in range(3)})
    own = thing(5, 5).mask
    assert own is not None
    stream.step(0, {1000: own})
    for i in range(1, 6):
        stream.step(i)
    stream.masks = {i: np.zeros(SIZE, np.bool_) for i in stream.masks}
    for i in range(6, 40):
        stream.step(i)
    # Seen last on frame 5; the 11th frame without it is 16. The user's object is never given up.
    assert stream.gone == [(16, 1)]
    assert list(stream.masks) == [1000]


def test_an_object_that_is_seen_again_in_time_stays() -> None:
    stream = Stream({i: [thing(40, 30)] for i in range(3)})
    for i in range(60):
        if i in (5, 14, 23):
            stream.masks = {1: np.zeros(SIZE, np.bool_)}
        if i in (12, 21, 30):
            mask = thing(70, 30).mask
            assert mask is not None
            stream.masks = {1: mask}
        stream.step(i)
    assert stream.gone == []


def test_a_box_becomes_a_mask_by_the_box_segmenter_or_an_ellipse() -> None:
    stream = Stream({i: [Detection(box=(40, 30, 20, 10)), Detection(box=(90, 30, 1, 1))] for i in range(3)})
    for i in range(3):
        stream.step(i)
    first, second = (new.mask for _, new in stream.started)
    assert first.sum() == 100
    assert first[30:40, 40:50].all()
    assert second.sum() == 1


def test_another_frame_size() -> None:
    stream = Stream({i: [thing(40, 30)] for i in range(3)})
    for i in range(3):
        stream.step(i)
    half = (SIZE[0] // 2, SIZE[1] // 2)
    small = np.zeros(half, np.bool_)
    small[15:25, 20:25] = True
    stream.detector.script = {i: [Detection(small)] for i in range(3, 9)}
    for i in range(3, 9):
        assert stream.finder.look(blank(i, half), list(stream.masks), {}).masks == []


class Failing(Scripted):
    def detect(self, frame: Frame) -> list[Detection]:
        raise RuntimeError("out of\nluck")


def test_a_detector_that_fails_is_one_clear_error() -> None:
    finder = ObjectFinder(Failing({}), EACH, LeftHalf())
    with pytest.raises(
        XmemError, match=r"^the detector Failing failed on frame 7: RuntimeError: out of luck; "
    ):
        finder.look(blank(7), [], {})
    finder = ObjectFinder(Scripted({0: [Detection(np.ones((3, 3), np.bool_))]}), EACH, LeftHalf())
    with pytest.raises(XmemError, match=r"has shape \(3, 3\), the frame \(80, 120\)"):
        finder.look(blank(0), [], {})


@pytest.mark.parametrize("wrong", ["every", "confirmations", "max_objects", "out_of_sight"])
def test_settings_out_of_range(wrong: str) -> None:
    with pytest.raises(UsageError, match=f"{wrong}[a-z_]*=0 is not allowed"):
        replace(EACH, **{wrong: 0})  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    walks=st.lists(
        st.tuples(st.integers(0, 100), st.integers(0, 55), st.integers(-4, 4), st.integers(0, 15)), max_size=4
    ),
    every=st.integers(1, 3),
    cuts=st.sets(st.integers(0, 29), max_size=6),
    lost=st.sets(st.integers(0, 29), max_size=10),
)
def test_cut_anywhere_it_decides_the_same(
    walks: list[tuple[int, int, int, int]], every: int, cuts: set[int], lost: set[int]
) -> None:
    script: dict[int, list[Detection]] = {i: [] for i in range(30)}
    for x, y, speed, begin in walks:
        for i in range(begin, 30):
            if 0 <= x + speed * (i - begin) <= 109:
                script[i].append(thing(x + speed * (i - begin), y))
    chosen = FinderSettings(every, 2, 3, out_of_sight=4)
    straight, cut = Stream(script, chosen, (2,)), Stream(script, chosen, (2,))
    for i in range(30):
        if i in cuts:
            cut.restored()
        for stream in (straight, cut):
            if i in lost and stream.masks:
                stream.masks[min(stream.masks)] = np.zeros(SIZE, np.bool_)
            stream.step(i)
    assert straight.gone == cut.gone
    assert [(i, n.object_id) for i, n in straight.started] == [(i, n.object_id) for i, n in cut.started]
    for (_, a), (_, b) in zip(straight.started, cut.started, strict=True):
        assert np.array_equal(a.mask, b.mask)
    assert straight.finder.to_bytes() == cut.finder.to_bytes()


def test_damaged_and_foreign_bytes_are_refused_and_change_nothing() -> None:
    stream = Stream({i: [thing(40, 30)] for i in range(5)})
    for i in range(4):
        stream.step(i)
    blob = stream.finder.to_bytes()
    other = ObjectFinder(Scripted({}), EACH, LeftHalf())
    before = other.to_bytes()
    for bad in (b"", b"xmem", blob[:40], blob[:-1], blob + b"1", blob.replace(b'"next_id"', b'"next_is"')):
        with pytest.raises(ValueError, match="object finder"):
            other.from_bytes(bad)
    assert other.to_bytes() == before
