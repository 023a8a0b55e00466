"""Conversion between events and the zone engine: removals and losses in, zone events out."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pyarrow as pa

from pipeline.base.records import Event
from pipeline.zones.engine import Lost, Removal
from pipeline.zones.results import Change, Encounter
from pipeline.zones.rows import Moment

ZONE_EVENTS = ("zone_entered", "zone_left", "line_crossed", "near_began", "near_ended")
"""Kinds of the events that zones, lines and rules of a live stream make."""


def removals_and_losses(events: pa.Table) -> tuple[list[Removal], list[Lost]]:
    """What `ZoneEngine.feed` needs of a table of `EVENTS_SCHEMA`, in its order."""
    removals, lost = [], []
    for event in events.to_pylist():
        moment = Moment(event["frame_index"], event["pts_seconds"], event["wall_time"])
        if event["kind"] == "object_removed" and event["object_id"] is not None:
            removals.append(Removal(moment, event["object_id"]))
        elif event["kind"] in ("gap", "restart"):
            seconds = json.loads(event["detail"] or "{}").get("seconds")
            if isinstance(seconds, int | float) and seconds > 0:
                lost.append(Lost(moment, float(seconds)))
    return removals, lost


def removal_of(event: Event) -> Removal | None:
    """The removal that an event is; None for others."""
    if event.kind != "object_removed" or event.object_id is None:
        return None
    return Removal(Moment(event.frame_index, event.pts_seconds, event.wall_time), event.object_id)


def change_events(changes: Iterable[Change]) -> list[Event]:
    """A row of `events` for each change: `reason` is the name of the zone, line or rule."""
    found = []
    for change in changes:
        about = change.about
        category = None if isinstance(about, Encounter) else about.category
        detail = change.detail() | ({} if category is None else {"category": category})
        moment = change.moment
        found.append(
            Event(
                moment.frame_index,
                change.kind,
                change.name,
                pts_seconds=moment.pts_seconds,
                wall_time=moment.wall_time,
                object_id=about.object_id,
                detail=detail,
            )
        )
    return found
