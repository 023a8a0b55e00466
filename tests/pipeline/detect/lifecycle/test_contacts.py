"""Contacts: which of the objects that met is which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.detect.lifecycle.appearance import Colours, similarity
from pipeline.detect.lifecycle.association import shown_in
from pipeline.detect.lifecycle.contacts import (
    after_meeting,
    after_view,
    lost_before,
    meetings,
    moved_to,
    parted,
    settled,
)
from pipeline.detect.lifecycle.found_object import FoundObject
from pipeline.prompts.box_segmenters import Box

RED: Colours = (1.0, 0.0, 1.0, 0.0)
BLUE: Colours = (0.0, 1.0, 0.0, 1.0)
MIXED: Colours = (0.8, 0.6, 0.8, 0.6)
BOX: Box = (20, 40, 20, 60)


def known(colours: Colours, views: int = 3, **values: object) -> FoundObject:
    return FoundObject(BOX, 0, 0, "person", portrait=colours, views=views, **values)  # type: ignore[arg-type]


def after(found: FoundObject, colours: Colours, other: int, views: int = 3) -> FoundObject:
    """An object that met another one, and was seen alone since."""
    found = after_meeting(found, other)
    for _ in range(views):
        found = after_view(found, colours)
    return found


def test_objects_meet_when_the_boxes_of_their_masks_overlap() -> None:
    labels = np.zeros((120, 240), np.int32)
    for object_id, x in ((1, 24), (2, 60), (3, 10)):
        labels[40:80, x : x + 20] = object_id
    labels[70:80, 24:30] = 1  # its feet are in front of 3
    assert list(meetings(shown_in(labels, [1, 2, 3]))) == [(1, 3)]


def test_colours_before_and_after_a_meeting_are_kept_apart() -> None:
    found = after_view(after_view(known(RED, 0), RED), BLUE)
    assert (found.views, found.since) == (2, None)
    assert found.portrait is not None
    assert similarity(found.portrait, RED) == pytest.approx(similarity(found.portrait, BLUE), abs=1e-3)
    met = after(found, BLUE, 7, views=2)
    assert (met.met, met.since, met.since_views, met.before) == ((7,), BLUE, 2, (BOX, 0))
    assert met.portrait == found.portrait
    # Another meeting before that one is settled: views start anew, the place is that of the first one.
    again = after_meeting(replace(met, box=(90, 40, 20, 60), frame=9), 5)
    assert (again.met, again.since, again.since_views, again.before) == ((5, 7), None, 0, (BOX, 0))
    done = settled(met)
    assert (done.met, done.since, done.since_views, done.before, done.views) == ((), None, 0, None, 4)
    assert done.portrait is not None
    assert similarity(done.portrait, BLUE) > similarity(done.portrait, RED)


@pytest.mark.parametrize(
    ("seen", "pairs", "unchanged"),
    [
        ((RED, BLUE), [], [1, 2]),
        ((BLUE, RED), [(1, 2)], []),
        ((MIXED, MIXED), [], [1, 2]),  # can't be told
    ],
)
def test_two_that_were_exchanged(
    seen: tuple[Colours, Colours], pairs: list[tuple[int, int]], unchanged: list[int]
) -> None:
    objects = {1: after(known(RED), seen[0], 2), 2: after(known(BLUE), seen[1], 1)}
    assert parted(objects, [1, 2], [1, 2]) == (pairs, unchanged)


def test_what_was_seen_too_little_decides_nothing() -> None:
    one, other = after(known(RED), BLUE, 2), after(known(BLUE), RED, 1)
    few = after(known(BLUE), RED, 1, views=2)
    assert parted({1: one, 2: few}, [1, 2], [1, 2]) == ([], [])  # waits for views of 2
    assert parted({1: one, 2: other}, [1, 2], [1]) == ([], [])  # 2 is not where its mask is
    young = after(known(BLUE, views=2), RED, 1)
    assert parted({1: one, 2: young}, [1, 2], [1, 2]) == ([], [1, 2])  # nobody knows what 2 looked like
    patient = after(known(RED), BLUE, 2, views=8)
    assert parted({1: patient, 2: few}, [1, 2], [1, 2]) == ([], [1])  # does not wait for ever


def test_a_mask_that_went_over_to_one_that_is_lost_now() -> None:
    objects = {1: after(known(RED), BLUE, 2), 2: after_meeting(known(BLUE), 1)}
    assert parted(objects, [1], [1]) == ([(1, 2)], [])
    assert parted({**objects, 1: after(known(RED), RED, 2)}, [1], [1]) == ([], [1])
    # With a mask that shows it too seldom, it is no proof.
    assert parted(objects, [1, 2], [1]) == ([], [])


def test_of_three_those_that_fit_best_are_exchanged() -> None:
    objects = {
        1: replace(after(known(RED), BLUE, 2), met=(2, 3)),
        2: replace(after(known(BLUE), RED, 1), met=(1, 3)),
        3: replace(after(known(MIXED), MIXED, 1), met=(1, 2)),
    }
    assert parted(objects, [1, 2, 3], [1, 2, 3]) == ([(1, 2)], [3])


def test_what_is_exchanged_is_the_place_and_not_the_look() -> None:
    there = replace(after(known(BLUE), RED, 1), box=(90, 40, 20, 60), frame=8, hits=2, velocity=(1.0, 0.0))
    moved = moved_to(after(known(RED, hits=9), BLUE, 2), there, visible=True)
    assert (moved.box, moved.frame, moved.velocity, moved.hits) == ((90, 40, 20, 60), 8, (1.0, 0.0), 9)
    assert (moved.portrait, moved.views, moved.met) == (RED, 6, ())
    # Views of a place where nothing is now are of whoever was there.
    hidden = moved_to(known(RED), replace(there, since=BLUE), visible=False)
    assert (hidden.portrait, hidden.views) == (RED, 3)


def test_a_new_object_is_the_lost_one_that_looks_like_it() -> None:
    new = known(RED, born=((40, 40, 20, 60), 20))
    lost = known(RED)
    assert lost_before({1: lost, 2: new}, [1], [2], [], 30, 50) == [(2, 1)]
    for other in (
        known(BLUE),
        known(RED, views=2),
        replace(lost, category="car"),
        replace(lost, frame=20),  # it was there when the new one started
        replace(lost, frame=-31, seen=-31),  # too long ago
        replace(lost, box=(180, 40, 20, 60)),  # too far away
    ):
        assert lost_before({1: other, 2: new}, [1], [2], [], 30, 50) == []
    for started in (
        replace(new, met=(5,)),
        replace(new, born=None),
        replace(new, views=9),
        replace(new, views=2),
    ):
        assert lost_before({1: lost, 2: started}, [1], [2], [], 30, 50) == []
    # It was exchanged with another one, whose mask was seen lately: since when it is lost is not known.
    assert lost_before({1: replace(lost, frame=-31), 2: new}, [1], [2], [], 30, 50) == [(2, 1)]
    # Which of two it is, or which of two is it, can't be told.
    assert lost_before({1: lost, 2: lost, 3: new}, [1, 2], [3], [], 30, 50) == []
    assert lost_before({1: lost, 2: new, 3: new}, [1], [2, 3], [], 30, 50) == []


def test_who_was_not_seen_well_yet_may_be_the_lost_one() -> None:
    lost, new = known(RED), known((0.96, 0.28, 0.96, 0.28), born=((40, 40, 20, 60), 20))
    assert lost_before({1: lost, 2: new}, [1], [2], [], 30, 50) == [(2, 1)]
    assert lost_before({1: lost, 2: new}, [1], [2], [BOX], 30, 50) == []
    newer = replace(new, born=((60, 40, 20, 60), 28), views=2)
    objects = {1: lost, 2: new, 3: newer}
    assert lost_before(objects, [1], [2, 3], [], 30, 50) == []
    objects[3] = replace(newer, portrait=RED, views=3)
    assert lost_before(objects, [1], [2, 3], [], 35, 50) == [(3, 1)]
    # It does not wait for ever.
    objects[2], objects[3] = replace(objects[2], views=6), newer
    assert lost_before(objects, [1], [2, 3], [], 70, 50) == [(2, 1)]
    # What is far away is no reason to wait.
    assert lost_before({1: lost, 2: objects[2]}, [1], [2], [(400, 40, 20, 60)], 30, 50) == [(2, 1)]


def test_they_are_stored() -> None:
    found = replace(after(known(RED), BLUE, 2), born=(BOX, 3))
    assert FoundObject.from_json(found.to_json()) == found
    old = {
        name: value
        for name, value in FoundObject(BOX, 0, 0).to_json().items()
        if name not in ("portrait", "views", "met", "since", "since_views", "before", "born")
    }
    assert FoundObject.from_json(old) == FoundObject(BOX, 0, 0)
