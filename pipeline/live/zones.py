"""LiveZones: the zones and lines of one live stream, which make events while it is tracked.

The engine is that of `pipeline.zones`, fed with the same rows and removals that are committed, so what it
finds is what `xmem zones` finds in the rows afterwards. Its state is kept in the stream record, with the
number of the next frame; a restart feeds it the rows of files that were committed later, whose events are
committed with them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.base.errors import UsageError
from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.live.pending_rows import Unwritten
from pipeline.tracks.store import StreamStore
from pipeline.zones.config import ZoneSet, parse_zones
from pipeline.zones.engine import ZoneEngine
from pipeline.zones.events import change_events, removals_and_losses
from pipeline.zones.results import Change
from pipeline.zones.rows import Moment, Rows

logger = logging.getLogger(__name__)

NOTHING = ZoneSet()


class LiveZones:
    """Zones of one live stream. The thread that steps the stream uses it; others `change` and `status` only.

    Args:
        zones: entries for the stream; none: nothing is looked for.
        store: the stream's files, for rows that are newer than the kept state.
        kept: what `keep` returned at the last commit; None: the stream had no zones.
        unwritten: gives the removals of objects, and takes the events.
    """

    def __init__(
        self, zones: ZoneSet, store: StreamStore, kept: Mapping[str, Any] | None, unwritten: Unwritten
    ) -> None:
        self._unwritten = unwritten
        self._lock = threading.Lock()
        self._wanted: ZoneSet | None = None
        self._engine, ended = _restored(zones, store, kept)
        self._ended: list[Change] = ended
        self._changed = kept is not None and _document(zones) != kept.get("zones")

    def change(self, zones: ZoneSet) -> None:
        """Use other zones from the next tracked frame on. Thread-safe."""
        with self._lock:
            self._wanted = zones

    def tracked(self, frame: Frame, records: Sequence[MaskRecord]) -> list[Event]:
        """Take a tracked frame; its events go to the unwritten ones.

        Returns:
            the events, for those who watch.
        """
        moment = Moment(frame.frame_index, frame.pts_seconds, frame.wall_time)
        events = self._adopt(moment)
        changes = self._engine.feed(Rows.from_records(records), self._unwritten.take_removals())
        events += change_events(changes)
        for event in events:
            self._unwritten.add(event)
        return events

    def settle(self) -> None:
        """Take the removals of frames that were not tracked, before the rows so far are committed."""
        removals = self._unwritten.take_removals()
        if removals:
            for event in change_events(self._engine.feed(Rows.from_records([]), removals)):
                self._unwritten.add(event)

    def keep(self, next_frame: int) -> dict[str, Any] | None:
        """The state after the frames before `next_frame`, for the stream record; None without zones."""
        if not self._engine.zones:
            return None
        return {
            "next_frame": next_frame,
            "zones": _document(self._engine.zones),
            "state": self._engine.to_state(),
        }

    def status(self) -> dict[str, Any]:
        """Counts, JSON-ready: by zone how many are inside, entered and left; by line the crossings.

        Thread-safe, but the numbers may be of two successive frames.
        """
        engine = self._engine
        counts = dict(engine.counts)
        inside = engine.occupants()
        return {
            "zones": [
                {
                    "name": zone.name,
                    "inside": inside.get(zone.name, 0),
                    "entered": counts.get(("zone_entered", zone.name, ""), 0),
                    "left": counts.get(("zone_left", zone.name, ""), 0),
                }
                for zone in engine.zones.zones
            ],
            "lines": [
                {
                    "name": line.name,
                    "left_to_right": counts.get(("line_crossed", line.name, "left_to_right"), 0),
                    "right_to_left": counts.get(("line_crossed", line.name, "right_to_left"), 0),
                }
                for line in engine.zones.lines
            ],
        }

    def _adopt(self, moment: Moment) -> list[Event]:
        """Change the zones if that is asked for; the events of it."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted != self._engine.zones:
            self._engine, ended = ZoneEngine.from_state(wanted, self._engine.to_state())
            self._ended += ended
            self._changed = True
        if not self._changed:
            return []
        ended, self._ended, self._changed = self._ended, [], False
        told = Event(
            moment.frame_index,
            "zones_changed",
            pts_seconds=moment.pts_seconds,
            wall_time=moment.wall_time,
            detail={"names": self._engine.zones.names},
        )
        return [told, *change_events(Change(c.kind, moment, c.about) for c in ended)]


def _restored(
    zones: ZoneSet, store: StreamStore, kept: Mapping[str, Any] | None
) -> tuple[ZoneEngine, list[Change]]:
    if kept is None:
        return ZoneEngine(zones), []
    try:
        before = parse_zones(kept["zones"])
        engine, _ = ZoneEngine.from_state(before, kept["state"])
        for footer in store.footers(int(kept["next_frame"])):
            rows = Rows.from_table(store.read_rows(footer.first))
            engine.feed(rows, removals_and_losses(footer.events)[0])  # its events are committed
        if zones == before:
            return engine, []
        return ZoneEngine.from_state(zones, engine.to_state())
    except (LookupError, TypeError, ValueError, UsageError) as error:
        logger.warning("stream %s: its zones begin anew: %s", store.stream_id, error)
        return ZoneEngine(zones), []


def _document(zones: ZoneSet) -> Any:
    """As it is read back from JSON."""
    return json.loads(json.dumps(zones.to_json())) if zones else None
