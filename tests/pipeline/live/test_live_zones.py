"""Zones of live streams: the events while tracking are those found afterwards in the rows, whatever dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import BEGAN, Walk, random_walk, record

from pipeline.analytics.zones import zone_views
from pipeline.base.errors import UsageError
from pipeline.base.records import Event, Frame, MaskRecord, events_table, tracks_table
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.pending_rows import Unwritten
from pipeline.live.record import Books, LiveRecord
from pipeline.live.spec import LiveSpec
from pipeline.live.zones import LiveZones
from pipeline.tracks.store import StreamStore
from pipeline.zones.config import ZoneSet, parse_zones
from pipeline.zones.engine import ZoneEngine
from pipeline.zones.events import ZONE_EVENTS, change_events, removals_and_losses
from pipeline.zones.rows import Rows

SQUARE = {"name": "square", "polygon": [[20, 20], [60, 20], [60, 60], [20, 60]], "leave_seconds": 0.2}
DOCUMENT: dict[str, Any] = {
    "unseen_seconds": 0.3,
    "zones": [SQUARE, {"name": "low", "polygon": [[0, 50], [100, 50], [100, 100], [0, 100]], "part": "box"}],
    "lines": [{"name": "line", "from": [50, 0], "to": [50, 100]}],
    "near": [{"name": "close", "distance": 20, "min_seconds": 0.1}],
}
ZONES = parse_zones(DOCUMENT)


class Run:
    """A live stream's rows, zones and record, without camera and network."""

    def __init__(self, out: Path, zones: ZoneSet = ZONES) -> None:
        self.store = StreamStore(out, "cam")
        self.record = LiveRecord(self.store, {"source": "fake://cam"})
        self.unwritten = Unwritten(self.record.books, self.record.books.frames)
        self.zones = LiveZones(zones, self.store, self.record.zones, self.unwritten)
        self.record.begin_zones(self.zones.keep(self.record.books.frames))
        self.record.reserve(frames=1)

    def frame(self, index: int, records: list[MaskRecord], events: list[Event]) -> list[Event]:
        first = records[0] if records else None
        image = np.zeros((100, 100, 3), np.uint8)
        frame = Frame(image, index, first.pts_seconds if first else None, first.wall_time if first else BEGAN)
        self.unwritten.covered = index + 1
        for event in events:
            self.unwritten.add(event)
        self.unwritten.add_tracked(records)
        return self.zones.tracked(frame, records)

    def commit(self, *, recorded: bool = True) -> None:
        """Commit what there is; `recorded` False: killed before the record was written."""
        self.zones.settle()
        content = self.unwritten.cut()
        assert content is not None
        self.store.commit(
            content.first, content.last, tracks_table(content.records), events_table(content.events)
        )
        if recorded:
            after = content.last + 1
            books = Books(after, LedgerCounts(after, after, {}, {}), content.rows)
            self.record.committed(books, frames=after, facts={}, zones=self.zones.keep(after))


def committed(out: Path) -> tuple[Rows, list[Any], list[dict[str, Any]]]:
    """Rows, removals and zone events of the files."""
    store = StreamStore(out, "cam")
    rows, removals, events = [], [], []
    for footer in store.footers(0):
        rows += store.read_rows(footer.first).to_pylist()
        removals += removals_and_losses(footer.events)[0]
        events += [e for e in footer.events.to_pylist() if e["kind"] in ZONE_EVENTS]
    table = tracks_table([]).schema.empty_table().from_pylist(rows, schema=tracks_table([]).schema)
    return Rows.from_table(table), removals, events


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_live_answer_is_the_one_asked_afterwards(
    seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is committed when, and whoever is killed before or after which write."""
    out = tmp_path_factory.mktemp("out")
    walk: Walk = random_walk(seed, wall=True)
    run = Run(out)
    for index, records in walk.frames.items():
        run.frame(index, list(records), [e for e in walk.events if e.frame_index == index])
        step = data.draw(st.sampled_from(["", "", "", "", "commit", "kill", "kill before record"]))
        if step:
            run.commit(recorded=step != "kill before record")
        if step.startswith("kill"):
            run = Run(out)
    if run.unwritten.covered > run.unwritten.first:
        run.commit()
    rows, removals, found = committed(out)
    expected = events_table(change_events(ZoneEngine(ZONES).feed(rows, removals)))
    assert found == expected.to_pylist()
    views = zone_views(out, ZONES)
    counted = {(c["name"], d): c[d] for c in run.zones.status()["lines"] for d in list(c)[1:]}
    flow = views["flow"].to_pylist()
    assert counted == {("line", d): sum(row[d] for row in flow) for _, d in counted}


def test_rows_that_were_not_committed_are_found_in_neither(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.frame(0, [record(0, 1, (10, 10), wall=True)], [])
    run.commit()
    assert run.frame(1, [record(1, 1, (40, 40), wall=True)], [])[0].kind == "zone_entered"
    run = Run(tmp_path)  # killed before the commit
    assert run.zones.status()["zones"][0]["entered"] == 0
    (event,) = run.frame(2, [record(2, 1, (40, 40), wall=True)], [])
    assert (event.kind, event.reason, event.frame_index, event.object_id) == ("zone_entered", "square", 2, 1)
    assert run.zones.status()["zones"][0] == {"name": "square", "inside": 1, "entered": 1, "left": 0}


def test_zones_change_while_a_stream_runs_and_while_it_does_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    inside = [record(0, 1, (40, 40), wall=True)]
    run.frame(0, inside, [])
    moved = parse_zones({**DOCUMENT, "zones": [{**SQUARE, "polygon": [[0, 0], [9, 0], [9, 9]]}]})
    run.zones.change(moved)
    events = run.frame(1, [record(1, 1, (40, 40), wall=True)], [])
    assert [(e.kind, e.reason) for e in events] == [("zones_changed", None), ("zone_left", "square")]
    assert events[1].detail is not None
    assert events[1].detail["state"] == "changed"
    run.commit()
    run = Run(tmp_path, ZONES)
    kinds = [e.kind for e in run.frame(2, [record(2, 1, (40, 40), wall=True)], [])]
    assert kinds == ["zones_changed", "zone_entered"]
    run.commit()
    run = Run(tmp_path, ZoneSet())
    kinds = [e.kind for e in run.frame(3, [record(3, 1, (40, 40), wall=True)], [])]
    assert kinds == ["zones_changed", "zone_left"]
    run.commit()
    assert run.record.zones is None
    assert json.dumps(run.zones.status()) == '{"zones": [], "lines": []}'


def test_a_damaged_state_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.frame(0, [record(0, 1, (40, 40), wall=True)], [])
    run.commit()
    kept = {**(run.record.zones or {}), "state": {"version": 9}}
    zones = LiveZones(ZONES, run.store, kept, run.unwritten)
    assert "its zones begin anew" in caplog.text
    assert zones.status()["zones"][0]["entered"] == 0


def test_specs_check_their_zones() -> None:
    zones = {**DOCUMENT, "streams": "cam*"}
    assert LiveSpec("cam-1", "fake://cam", zones=zones).zones_here.names == ["square", "low", "line", "close"]
    with pytest.raises(UsageError, match=r"streams='cam\*' matches no stream: there are gate"):
        LiveSpec("gate", "fake://cam", zones=zones)
    with pytest.raises(UsageError, match="unknown key 'zonez'"):
        LiveSpec("cam-1", "fake://cam", zones={"zonez": []})
