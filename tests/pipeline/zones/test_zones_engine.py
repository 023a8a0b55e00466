"""The zone engine: visits, crossings, encounters, gaps; pieces and restarts that change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import Place, Walk, random_walk, record

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord, tracks_table
from pipeline.zones.config import ZoneSet, parse_zones
from pipeline.zones.engine import Lost, Removal, ZoneEngine
from pipeline.zones.occupancy import Occupancy
from pipeline.zones.results import Change, Crossing, Encounter, Visit
from pipeline.zones.rows import Moment, Rows

SQUARE = {"name": "square", "polygon": [[20, 20], [60, 20], [60, 60], [20, 60]]}
LINE = {
    "name": "line",
    "from": [50, 0],
    "to": [50, 100],
}  # downwards: its right is on the left of the picture


def zones(*entries: dict[str, Any], **more: Any) -> ZoneSet:
    """Zones, lines and rules, told apart by their keys."""
    found: dict[str, list[Any]] = {"zones": [], "lines": [], "near": []}
    for entry in entries:
        kind = "zones" if "polygon" in entry else "lines" if "from" in entry else "near"
        found[kind].append(entry)
    return parse_zones({**found, **more})


def walk(*places: Place, start: int = 0, object_id: int = 1, **more: Any) -> list[MaskRecord]:
    """One object, a place for each frame."""
    return [record(start + k, object_id, place, **more) for k, place in enumerate(places)]


def changes(
    zone_set: ZoneSet, records: Sequence[MaskRecord], removals: Sequence[Removal] = ()
) -> list[Change]:
    return ZoneEngine(zone_set).feed(Rows.from_records(records), removals)


def visits(found: Sequence[Change]) -> list[Visit]:
    return [c.about for c in found if c.kind == "zone_left" and isinstance(c.about, Visit)]


def crossings(found: Sequence[Change]) -> list[tuple[str, int]]:
    return [(c.about.direction, c.moment.frame_index) for c in found if isinstance(c.about, Crossing)]


IN, OUT = (40.0, 40.0), (80.0, 40.0)


def test_a_visit_from_enter_to_leave() -> None:
    found = changes(zones(SQUARE), walk(OUT, IN, (43, 44), (43, 44), OUT, OUT))
    assert [(c.kind, c.moment.frame_index) for c in found] == [("zone_entered", 1), ("zone_left", 4)]
    (visit,) = visits(found)
    assert (visit.entered.frame_index, visit.last.frame_index) == (1, 3)
    assert visit.left is not None
    assert visit.left.frame_index == 4
    assert (visit.state, visit.frames, visit.number) == ("left", 3, 1)
    assert visit.dwell_seconds == pytest.approx(0.2)
    assert visit.path_pixels == pytest.approx(5.0)
    assert visit.path_metres is None


def test_several_visits_are_numbered_and_open_ones_stay_open() -> None:
    engine = ZoneEngine(zones(SQUARE))
    found = engine.feed(Rows.from_records(walk(IN, OUT, IN, OUT, IN)))
    assert [v.number for v in visits(found)] == [1, 2]
    (visit,) = engine.open_visits()
    assert (visit.number, visit.state, visit.left) == (3, "open", None)
    assert engine.occupants() == {"square": 1}
    assert engine.counts == {("zone_entered", "square", ""): 3, ("zone_left", "square", ""): 2}


def test_short_visits_do_not_count_and_short_absences_do_not_end_one() -> None:
    stay = [IN] * 11
    found = changes(zones({**SQUARE, "min_seconds": 1.0}), walk(IN, IN, OUT, *stay, OUT))
    assert [(c.kind, c.moment.frame_index) for c in found] == [("zone_entered", 13), ("zone_left", 14)]
    assert visits(found)[0].entered.frame_index == 3
    assert visits(found)[0].number == 1
    patient = zones({**SQUARE, "leave_seconds": 0.3})
    found = changes(patient, walk(IN, OUT, OUT, IN, OUT, OUT, OUT, OUT))
    (visit,) = visits(found)
    assert (visit.entered.frame_index, visit.last.frame_index) == (0, 3)
    assert visit.left is not None
    assert (visit.left.frame_index, found[-1].moment.frame_index) == (4, 7)


def test_out_of_sight_for_a_while_is_no_leaving() -> None:
    hidden: list[Place] = [None] * 10
    found = changes(zones(SQUARE, unseen_seconds=2), walk(IN, *hidden, IN, OUT))
    (visit,) = visits(found)
    assert (visit.state, visit.frames) == ("left", 2)
    assert visit.dwell_seconds == pytest.approx(1.1)
    assert visit.unseen_seconds == pytest.approx(1.0)
    found = changes(zones(SQUARE, unseen_seconds=0.5), walk(IN, *hidden, IN))
    (visit,) = visits(found)
    assert (visit.state, visit.last.frame_index, visit.left) == ("unseen", 0, None)
    assert [c.kind for c in found] == ["zone_entered", "zone_left", "zone_entered"]


def test_a_gap_is_no_leaving() -> None:
    found = changes(zones(SQUARE), [*walk(IN, IN), *walk(IN, OUT, start=600)])
    (visit,) = visits(found)
    assert (visit.state, visit.last.frame_index) == ("left", 600)
    assert visit.gap_seconds == pytest.approx(59.9)
    # Out of sight before and after the gap: only the time with input counts.
    found = changes(zones(SQUARE), [*walk(IN, None), *walk(None, IN, start=600)])
    assert [c.kind for c in found] == ["zone_entered"]
    # Outside after it: when it left is not known.
    found = changes(zones(SQUARE), [*walk(IN, IN), *walk(OUT, start=600)])
    (visit,) = visits(found)
    assert (visit.state, visit.last.frame_index, visit.gap_seconds) == ("gap", 1, 0.0)


def test_removed_objects_end_their_visits_where_they_were_seen() -> None:
    records = [*walk(IN, IN, IN), *walk(OUT, OUT, OUT, OUT, OUT, object_id=2)]
    found = changes(zones(SQUARE), records, [Removal(Moment(3, 0.3), 1)])
    (visit,) = visits(found)
    assert (visit.state, visit.last.frame_index, found[-1].moment.frame_index) == ("removed", 2, 3)


def test_crossings_have_a_direction() -> None:
    path: list[Place] = [(40, 50), (45, 50), (55, 50), (60, 50), (48, 50)]
    assert crossings(changes(zones(LINE), walk(*path))) == [("right_to_left", 2), ("left_to_right", 4)]


def test_crossings_beside_the_line_on_it_and_around_its_end() -> None:
    short = zones({"name": "short", "from": [50, 40], "to": [50, 60]})
    assert crossings(changes(short, walk((40, 30), (60, 30)))) == []
    assert crossings(changes(short, walk((40, 50), (50, 50), (60, 50)))) == [("right_to_left", 2)]
    assert crossings(changes(short, walk((40, 50), (50, 50), (40, 50)))) == []
    # Onto the line, along it past its end, and off to the other side.
    assert crossings(changes(short, walk((40, 50), (50, 50), (50, 80), (60, 80)))) == []
    # It begins on the line: on which side it was is not known.
    assert crossings(changes(short, walk((50, 50), (60, 50)))) == []


def test_a_margin_ignores_trembling() -> None:
    trembling: list[Place] = [(40, 50), *[(49, 50), (51, 50)] * 5, (60, 50), (40, 50)]
    assert len(crossings(changes(zones(LINE), walk(*trembling)))) == 10
    steady = changes(zones({**LINE, "margin": 3}), walk(*trembling))
    assert crossings(steady) == [("right_to_left", 11), ("left_to_right", 12)]


def test_no_crossing_over_a_gap_but_behind_a_pole() -> None:
    left, right = (40.0, 50.0), (60.0, 50.0)
    assert crossings(changes(zones(LINE), [*walk(left), *walk(right, start=100)])) == []
    behind: list[Place] = [left, None, None, right]
    assert crossings(changes(zones(LINE), walk(*behind))) == [("right_to_left", 3)]
    assert crossings(changes(zones(LINE, unseen_seconds=0.1), walk(*behind))) == []
    # Hidden when the gap began.
    assert crossings(changes(zones(LINE), [*walk(left, None), *walk(None, right, start=100)])) == []
    # After the gap it crosses as usual.
    again = [*walk(left), *walk(right, left, start=100)]
    assert crossings(changes(zones(LINE), again)) == [("left_to_right", 101)]


def test_a_clock_that_goes_back_is_a_gap() -> None:
    records = [record(0, 1, (40, 50), seconds=100.0), record(1, 1, (60, 50), seconds=3.0)]
    assert crossings(changes(zones(LINE), records)) == []


def test_speeds_in_pixels_and_metres() -> None:
    metres = zones(LINE, SQUARE, homographies=[{"matrix": [[0.1, 0, 0], [0, 0.2, 0], [0, 0, 1]]}])
    engine = ZoneEngine(metres, keep_motion=True)
    found = engine.feed(Rows.from_records(walk((30, 30), (40, 30), (52, 30), None, (58, 30))))
    (crossing,) = [c.about for c in found if isinstance(c.about, Crossing)]
    assert crossing.speed_pixels == pytest.approx(120)
    assert crossing.speed_metres == pytest.approx(12)
    (motion,) = engine.motion()
    assert (motion.frames, motion.path_pixels) == (4, 22)
    assert motion.path_metres == pytest.approx(2.2)
    assert motion.seconds == pytest.approx(0.2)  # the step out of sight is left out
    assert motion.max_speed_pixels == pytest.approx(120)
    (visit,) = engine.open_visits()
    assert visit.path_metres == pytest.approx(2.2)


def test_who_was_near_whom() -> None:
    rule = {"name": "close", "distance": 12, "min_seconds": 0.2}
    first = walk(*[(50.0, 50.0)] * 8)
    second = walk((90, 50), (60, 50), (58, 50), (60, 50), (61, 50), (90, 50), (90, 50), (55, 50), object_id=2)
    found = changes(zones(rule), [*first, *second])
    assert [(c.kind, c.moment.frame_index) for c in found] == [("near_began", 3), ("near_ended", 5)]
    encounter = found[-1].about
    assert isinstance(encounter, Encounter)
    assert (encounter.object_id, encounter.other_id, encounter.frames) == (1, 2, 4)
    assert (encounter.began.frame_index, encounter.last.frame_index) == (1, 4)
    assert encounter.least_distance == 8
    assert encounter.seconds == pytest.approx(0.3)


def test_parts_of_the_mask() -> None:
    # Box and mask of 4 x 8 pixels standing on (40, 64): its lower half is below the square.
    on_edge = walk((40, 64), with_mask=True)

    def inside(**changed: Any) -> bool:
        return bool(changes(zones({**SQUARE, **changed}), on_edge))

    assert not inside(part="foot")
    assert inside(part="centroid")
    for part in ("box", "mask"):
        assert inside(part=part, least_share=0.5)
        assert not inside(part=part, least_share=0.51)
    share = {"polygon": [[0.2, 0.2], [0.6, 0.2], [0.6, 0.6], [0.2, 0.6]], "units": "share"}
    assert inside(part="mask", least_share=0.5, **share)
    assert not inside(part="mask", least_share=0.51, **share)


def test_shares_follow_the_size_of_the_frame() -> None:
    share = {"name": "half", "units": "share", "polygon": [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}
    records = [record(0, 1, (60, 50)), record(1, 1, (60, 50), size=(200, 200))]
    assert [(c.kind, c.moment.frame_index) for c in changes(zones(share), records)] == [("zone_entered", 1)]


def test_categories() -> None:
    records = [*walk(IN, category="dog"), *walk(IN, object_id=2)]
    found = changes(zones({**SQUARE, "categories": ["person"]}), records)
    assert [c.about.object_id for c in found if isinstance(c.about, Visit)] == [2]


def test_damaged_masks_and_frames_without_times() -> None:
    broken = MaskRecord(3, 9, 100, 100, 5, 0.5, 0.3, bbox=(1, 1, 2, 2), centroid=(1, 1), mask_rle="~")
    with pytest.raises(StoreError, match="mask of object 9 on frame 3 is damaged"):
        changes(zones({**SQUARE, "part": "mask"}), [broken])
    with pytest.raises(UsageError, match="frame 3 has no time: give the zones file the frame_rate"):
        changes(zones(SQUARE), [broken])
    assert changes(zones(SQUARE, frame_rate=10), [broken]) == []


def test_occupancy_counts_time_without_objects_and_no_gaps() -> None:
    occupancy = Occupancy(10.0)
    engine = ZoneEngine(zones(SQUARE, LINE), occupancy=occupancy)
    two = [*walk(*[IN] * 11), *walk(*[IN] * 6, *[OUT] * 5, object_id=2)]  # 1 s: 2 inside for 0.6 s, then 1
    engine.feed(Rows.from_records(two), [Removal(Moment(11, 1.1), 1), Removal(Moment(11, 1.1), 2)])
    engine.feed(Rows.from_records(walk(IN, OUT, start=50, object_id=3)))  # nobody from 1.1 s to 5 s
    engine.feed(Rows.from_records(walk(OUT, start=290, object_id=3)))  # a gap of 23.9 s
    (begin, period), (later, empty) = occupancy.periods()
    assert (begin, later) == (0.0, 20.0)
    assert period.covered_seconds == pytest.approx(5.1)
    held = period.zones["square"]
    assert held.object_seconds == pytest.approx(0.6 * 2 + 0.5 + 0.1)
    assert (held.most, held.entered, held.left) == (2, 3, 3)
    assert period.lines["line"].right_to_left == 2
    assert empty.covered_seconds == 0


def test_lost_input_while_nobody_is_tracked_is_not_covered() -> None:
    occupancy = Occupancy(100.0)
    engine = ZoneEngine(zones(SQUARE), occupancy=occupancy)
    engine.feed(Rows.from_records(walk(IN)), [Removal(Moment(1, 0.1), 1)])
    engine.feed(Rows.from_records(walk(IN, start=500, object_id=2)), lost=[Lost(Moment(500, 50.0), 40.0)])
    ((_, period),) = occupancy.periods()
    assert period.covered_seconds == pytest.approx(10.0)


EVERYTHING = zones(
    {**SQUARE, "min_seconds": 0.2, "leave_seconds": 0.15},
    {"name": "box", "polygon": [[50, 30], [95, 40], [70, 90]], "part": "box"},
    {
        "name": "mask",
        "polygon": [[0, 50], [100, 50], [100, 100], [0, 100]],
        "part": "mask",
        "least_share": 0.3,
    },
    LINE,
    {"name": "margin", "from": [0, 0.5], "to": [1, 0.6], "units": "share", "part": "centroid", "margin": 4},
    {"name": "close", "distance": 20, "min_seconds": 0.1},
    {"name": "metres", "distance": 2, "units": "metres"},
    homographies=[{"matrix": [[0.1, 0.01, 0], [0, 0.1, 0], [0, 0.001, 1]]}],
    unseen_seconds=0.3,
)


def answer(engine: ZoneEngine) -> Any:
    return engine.open_visits(), engine.open_encounters(), engine.counts, engine.occupants()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_neither_pieces_nor_restarts_change_the_answer(seed: int, pieces: list[int]) -> None:
    walked: Walk = random_walk(seed, with_mask=True)
    whole = ZoneEngine(EVERYTHING)
    expected = whole.feed(Rows.from_table(tracks_table(walked.records)), walked.removals)
    engine, found = ZoneEngine(EVERYTHING), []
    frames, removals = list(walked.frames), list(walked.removals)
    while frames:
        size = pieces.pop(0) if pieces else 7
        piece, frames = frames[:size], frames[size:]
        records = [r for f in piece for r in walked.frames[f]]
        due = [r for r in removals if r.moment.frame_index <= piece[-1]]
        removals = removals[len(due) :]
        found += engine.feed(Rows.from_records(records), due)
        engine, ended = ZoneEngine.from_state(EVERYTHING, json.loads(json.dumps(engine.to_state())))
        assert ended == []
    assert found == expected
    assert answer(engine) == answer(whole)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_visits_agree_with_the_frames(seed: int) -> None:
    """Without patience, each frame inside belongs to exactly one visit, and none outside to any."""
    walked = random_walk(seed)
    plain = zones(SQUARE, unseen_seconds=0)
    engine = ZoneEngine(plain)
    found = engine.feed(Rows.from_records(walked.records), walked.removals)
    stays = [*visits(found), *engine.open_visits()]
    inside: dict[int, list[int]] = {}
    for r in walked.records:
        if r.bbox is not None:
            x, y = r.bbox[0] + r.bbox[2] / 2, r.bbox[1] + r.bbox[3]
            if 20 <= x <= 60 and 20 <= y <= 60:
                inside.setdefault(r.object_id, []).append(r.frame_index)
    for object_id, frames in inside.items():
        mine = sorted((v for v in stays if v.object_id == object_id), key=lambda v: v.entered.frame_index)
        assert sum(v.frames for v in mine) == len(frames)
        covered = [f for v in mine for f in frames if v.entered.frame_index <= f <= v.last.frame_index]
        assert covered == frames
        assert [v.number for v in mine] == list(range(1, len(mine) + 1))
    assert {v.object_id for v in stays} == set(inside)


def test_changed_zones_end_their_visits_only() -> None:
    both = zones(SQUARE, {**SQUARE, "name": "other"})
    engine = ZoneEngine(both)
    engine.feed(Rows.from_records(walk(IN)))
    moved = zones(SQUARE, {"name": "other", "polygon": [[0, 0], [9, 0], [9, 9]]})
    again, ended = ZoneEngine.from_state(moved, engine.to_state())
    assert [(c.kind, c.name, c.about.state) for c in ended if isinstance(c.about, Visit)] == [
        ("zone_left", "other", "changed")
    ]
    assert [v.zone for v in again.open_visits()] == ["square"]
    assert again.feed(Rows.from_records(walk(OUT, start=1)))[0].name == "square"


@pytest.mark.parametrize("state", [{}, {"version": 99}, {"version": 1, "at": 1, "frame": "x"}])
def test_damaged_states_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="damaged state of zones"):
        ZoneEngine.from_state(EVERYTHING, state)


def test_rows_of_tables_and_of_records_are_the_same() -> None:
    walked = random_walk(3, wall=True, with_mask=True)
    one, other = Rows.from_table(tracks_table(walked.records)), Rows.from_records(walked.records)
    assert (one.moments, one.object_ids, one.categories) == (
        other.moments,
        other.object_ids,
        other.categories,
    )
    for name in ("size", "visible", "box", "centroid", "area"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.masks == other.masks
