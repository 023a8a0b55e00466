"""Association: which detection each object has."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.lifecycle.appearance import Colours
from pipeline.detect.lifecycle.association import distance, matches, moved_on, reach, share_inside, shown_in
from pipeline.detect.lifecycle.found_object import FoundObject
from pipeline.detect.protocol import Detection
from pipeline.prompts.box_segmenters import Box

LONG = 50
RED: Colours = (1.0, 0.0, 1.0, 0.0)
BLUE: Colours = (0.0, 1.0, 0.0, 1.0)


def matched(
    objects: dict[int, FoundObject],
    masks: dict[int, Box],
    boxes: list[Box],
    *,
    colours: list[Colours] | None = None,
    score: float = 0.9,
    certain: list[int] | None = None,
    frame_index: int = 10,
) -> dict[int, int]:
    labels = np.zeros((200, 400), np.int32)
    for object_id, (x, y, w, h) in masks.items():
        labels[y : y + h, x : x + w] = object_id
    every = [Detection(box=box, category="person", score=score) for box in boxes]
    return matches(
        objects,
        shown_in(labels, list(masks)),
        labels,
        dict(enumerate(every)),
        list(range(len(every))) if certain is None else certain,
        lambda k: RED if colours is None else colours[k],
        frame_index,
        LONG,
    )


def known(box: Box, frame: int = 9, colours: Colours = RED, **values: object) -> FoundObject:
    return FoundObject(box, frame, frame, "person", colours, **values)  # type: ignore[arg-type]


def test_each_object_has_the_detection_where_its_mask_is() -> None:
    objects = {1: known((20, 40, 20, 60)), 2: known((60, 40, 20, 60))}
    masks = {1: (20, 40, 20, 60), 2: (60, 40, 20, 60)}
    assert matched(objects, masks, [(62, 42, 20, 58), (18, 40, 22, 60)]) == {1: 1, 2: 0}


def test_a_lost_object_takes_no_detection_from_a_visible_one() -> None:
    objects = {1: known((20, 40, 20, 60), frame=0), 2: known((24, 40, 20, 60))}
    assert matched(objects, {2: (24, 40, 20, 60)}, [(24, 40, 20, 60)]) == {2: 0}


def test_a_mask_on_another_object_does_not_take_that_ones_detection() -> None:
    # Object 1 lost its mask just now; the mask of 2 slid onto it, though 2 is expected where it is detected.
    objects = {1: known((100, 40, 20, 60)), 2: known((60, 40, 20, 60))}
    assert matched(objects, {2: (92, 44, 16, 56)}, [(100, 40, 20, 60), (60, 40, 20, 60)]) == {1: 0, 2: 1}


def test_what_was_lost_for_long_has_what_the_others_leave() -> None:
    # 2 is where its mask is; that it is expected at the other detection must not let 1 take its own.
    objects = {1: known((20, 40, 20, 60), frame=-LONG), 2: known((56, 40, 20, 60))}
    masks, boxes = {2: (26, 40, 20, 60)}, [(25, 40, 20, 60), (56, 40, 20, 60)]
    assert matched(objects, masks, boxes)[2] == 0
    # Lost just now, it may be the one that the mask of 2 slid onto.
    lately = {1: known((24, 40, 20, 60)), 2: known((56, 40, 20, 60))}
    assert matched(lately, masks, boxes) == {1: 0, 2: 1}


def test_a_mask_that_was_not_confirmed_takes_no_detection_far_from_the_object() -> None:
    objects = {1: known((20, 40, 20, 60), misses=1)}
    mask, there = {1: (200, 40, 20, 60)}, [(200, 40, 20, 60)]
    assert matched(objects, mask, there, colours=[BLUE]) == {}
    # It may have moved so far if it looks like the object, or as long as nothing says otherwise.
    assert matched(objects, mask, there, colours=[RED]) == {1: 0}
    objects = {1: known((20, 40, 20, 60))}
    assert matched(objects, mask, there, colours=[BLUE]) == {1: 0}


@pytest.mark.parametrize(
    ("frame", "box", "colours", "found"),
    [
        (9, (24, 40, 20, 60), RED, True),
        (9, (24, 40, 20, 60), BLUE, False),  # of other colours
        (9, (44, 40, 20, 60), RED, True),
        (9, (64, 40, 20, 60), RED, False),  # further than it can be by now
        (-40, (64, 40, 20, 60), RED, True),  # but not later
        (9, (24, 40, 40, 80), RED, False),  # of another size
    ],
)
def test_where_an_object_without_a_mask_is_found(frame: int, box: Box, colours: Colours, found: bool) -> None:
    objects = {1: known((20, 40, 20, 60), frame=frame)}
    assert matched(objects, {}, [box], colours=[colours]) == ({1: 0} if found else {})


def test_an_uncertain_detection_is_only_of_an_object_whose_mask_is_there() -> None:
    there, box = known((20, 40, 20, 60)), (22, 40, 20, 60)
    assert matched({1: there}, {1: (20, 40, 20, 60)}, [box], certain=[]) == {1: 0}
    assert matched({1: there}, {1: (38, 40, 20, 60)}, [box], certain=[]) == {}
    assert matched({1: there}, {}, [box], certain=[]) == {}
    assert matched({1: there}, {}, [box]) == {1: 0}


def test_a_detection_of_another_class_is_not_of_an_object() -> None:
    car = FoundObject((20, 40, 20, 60), 9, 9, "car", RED)
    assert matched({1: car}, {1: (20, 40, 20, 60)}, [(20, 40, 20, 60)]) == {}


def test_of_two_equal_objects_the_older_one_wins() -> None:
    same = known((20, 40, 20, 60))
    assert matched({7: same, 3: same}, {}, [(20, 40, 20, 60)]) == {3: 0}


def test_masks_as_boxes_and_pixels() -> None:
    labels = np.zeros((50, 80), np.int32)
    labels[10:30, 20:30] = 5
    shown = shown_in(labels, [5, 6])
    assert set(shown) == {5}
    assert (shown[5].box, shown[5].area) == ((20, 10, 10, 20), 200)
    half = Detection(box=(25, 0, 30, 50), category=None, score=1.0)
    assert share_inside(labels, 5, shown[5], half) == 0.5
    assert share_inside(labels, 5, shown[5], Detection(box=(60, 0, 5, 5), category=None, score=1.0)) == 0


def test_distances_are_in_sizes_of_the_boxes() -> None:
    assert distance((0, 0, 20, 60), (40, 0, 20, 60)) == 1.0
    assert reach(0, LONG) < reach(LONG // 2, LONG) < reach(LONG, LONG) == reach(10 * LONG, LONG)


def test_masks_move_on_as_their_objects_do() -> None:
    labels = np.zeros((60, 100), np.int32)
    for object_id, x in ((1, 10), (2, 80), (3, 40), (4, 60)):
        labels[20:40, x : x + 10] = object_id
    objects = {
        1: known((10, 20, 10, 20), velocity=(3.0, -1.0)),
        2: known((80, 20, 10, 20), velocity=(4.0, 0.0)),
        3: known((40, 20, 10, 20), velocity=(-100.0, 0.0)),
    }
    moved = moved_on(labels, objects, 4)
    boxes = {i: shown.box for i, shown in shown_in(moved, [1, 2, 3, 4]).items()}
    # The second is partly outside; the third is not expected further away than one and a half of its sizes;
    # the fourth was not started by a detection.
    assert boxes == {1: (22, 16, 10, 20), 2: (96, 20, 4, 20), 3: (18, 20, 10, 20), 4: (60, 20, 10, 20)}
    assert (moved_on(labels, {}, 4) == labels).all()
    # Less than a quarter of its size is no more than its velocity is wrong.
    slow = {1: objects[1]}
    assert (moved_on(labels, slow, 1) == labels).all()
    gone = {2: known((80, 20, 10, 20), velocity=(15.0, 0.0))}
    assert 2 not in moved_on(np.where(labels == 2, 2, 0).astype(np.int32), gone, 9)
