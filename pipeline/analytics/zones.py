"""Views of zones and lines over an output folder: visits, crossings, occupancy and others.

    zones = load_zones("zones.json")
    query_zones("tracks", zones, "SELECT zone, count(*) AS visits FROM visits GROUP BY ALL")

The engine goes through the committed rows of each stream once, chunk by chunk; masks are read only for zones
that count a share of them. Rows that are committed later are seen by the next question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from pipeline.analytics.archive import Archive
from pipeline.analytics.scan.chunk_files import check_chunk_file, open_chunk_file
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.analytics.scan.stream_choice import column_names, tree_nodes
from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.chunk_file import ChunkFooter, parse_footer
from pipeline.tracks.layout import MEND, chunk_name, load_record
from pipeline.zones.config import ZoneSet, matches
from pipeline.zones.engine import ZoneEngine
from pipeline.zones.events import removals_and_losses
from pipeline.zones.features import Measurer
from pipeline.zones.occupancy import LinePeriod, Occupancy, ZonePeriod
from pipeline.zones.results import (
    CROSSINGS_SCHEMA,
    ENCOUNTERS_SCHEMA,
    MOTION_SCHEMA,
    VISITS_SCHEMA,
    Crossing,
    Encounter,
    Motion,
    Visit,
    results_table,
)
from pipeline.zones.rows import COLUMNS, Moment, Rows

_READ_AHEAD = 4
_NAMED = 10
"""Zones that a message names."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PERIOD = [
    pa.field("begin_seconds", pa.float64()),
    pa.field("begin_time", pa.timestamp("us", tz="UTC")),
    pa.field("covered_seconds", pa.float64(), nullable=False),
]
OCCUPANCY_SCHEMA = pa.schema(
    [
        pa.field("stream_id", pa.string(), nullable=False),
        pa.field("zone", pa.string(), nullable=False),
        *_PERIOD,
        pa.field("mean_objects", pa.float64()),
        pa.field("max_objects", pa.int64(), nullable=False),
        pa.field("entered", pa.int64(), nullable=False),
        pa.field("ended", pa.int64(), nullable=False),
    ]
)
FLOW_SCHEMA = pa.schema(
    [
        pa.field("stream_id", pa.string(), nullable=False),
        pa.field("line", pa.string(), nullable=False),
        *_PERIOD,
        pa.field("left_to_right", pa.int64(), nullable=False),
        pa.field("right_to_left", pa.int64(), nullable=False),
    ]
)
INSIDE_SCHEMA = pa.schema(
    [
        pa.field("stream_id", pa.string(), nullable=False),
        pa.field("zone", pa.string(), nullable=False),
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("category", pa.string()),
    ]
)

SUMMARY = """
SELECT stream_id, 'zone' AS kind, zone AS name, sum(entered)::BIGINT AS visits,
       (SELECT count(DISTINCT object_id) FROM visits v WHERE v.stream_id = o.stream_id AND v.zone = o.zone)
           AS objects,
       (SELECT round(avg(dwell_seconds), 2) FROM visits v WHERE v.stream_id = o.stream_id AND v.zone = o.zone)
           AS mean_dwell_seconds,
       round(sum(mean_objects * covered_seconds) / nullif(sum(covered_seconds), 0), 3) AS mean_objects,
       max(max_objects) AS max_objects,
       NULL::BIGINT AS left_to_right, NULL::BIGINT AS right_to_left
FROM occupancy o GROUP BY stream_id, zone
UNION ALL
SELECT stream_id, 'line', line, NULL,
       (SELECT count(DISTINCT object_id) FROM crossings c
        WHERE c.stream_id = f.stream_id AND c.line = f.line),
       NULL, NULL, NULL, sum(left_to_right)::BIGINT, sum(right_to_left)::BIGINT
FROM flow f GROUP BY stream_id, line
ORDER BY ALL
"""
"""The statement of `xmem zones` without one: a row per stream and zone or line."""


def zone_views(
    root: str | os.PathLike[str],
    zones: ZoneSet,
    *,
    streams: Sequence[str] = (),
    period_seconds: float = 60.0,
    inside: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, pa.Table]:
    """What zones and lines say of the streams of an output folder, as tables for `query(..., tables=...)`.

    Args:
        streams: ids or patterns of the streams to read; none: all that the zones are for.
        period_seconds: length of the periods of `occupancy` and `flow`.
        inside: make the table `inside`, which has a row per object, zone and frame.

    Returns:
        tables by name: `visits`, `crossings`, `encounters`, `motion` (per object), `occupancy` (zones by
        period), `flow` (lines by period) and `inside`; see docs/zones.md for their columns.

    Raises:
        UsageError: the folder is no output folder, an entry's or the given streams match none in it, or
            frames have no times. StoreError: files are missing, damaged or cannot be read.
    """
    return _views(Listing(open_files(root, storage_options)), zones, streams, period_seconds, inside)


def _views(
    listing: Listing, zones: ZoneSet, streams: Sequence[str], period_seconds: float, inside: bool
) -> dict[str, pa.Table]:
    if not period_seconds > 0:
        raise UsageError(f"period of {period_seconds} s is not allowed: more than 0")
    files, ids = listing.files, listing.tracked
    if not ids:
        raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/")
    zones.check_streams(ids)
    for pattern in streams:
        if not any(matches(stream_id, [pattern]) for stream_id in ids):
            raise UsageError(f"stream {pattern!r} matches no stream in {files.root}: it has {_some(ids)}")
    parts: dict[str, list[pa.Table]] = {name: [schema.empty_table()] for name, schema in _SCHEMAS.items()}
    for stream_id in ids:
        mine = zones.of_stream(stream_id)
        if (mine.zones or mine.lines or mine.near) and (not streams or matches(stream_id, streams)):
            for name, table in _stream_views(listing, stream_id, mine, period_seconds, inside).items():
                parts[name].append(table)
    return {name: pa.concat_tables(tables) for name, tables in parts.items()}


def query_zones(
    root: str | os.PathLike[str],
    zones: ZoneSet,
    sql: str = SUMMARY,
    *,
    streams: Sequence[str] = (),
    period_seconds: float = 60.0,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.Table:
    """The result of one SQL statement over the views of `zone_views` beside those of `query`.

    Raises:
        UsageError: the statement compares a zone, line or rule with a name that `zones` does not have.
        UsageError, StoreError: as for `zone_views` and `query`.
    """
    with Archive(root, storage_options) as archive:
        _check_names(archive.tree(sql), zones)
        inside = re.search(r"\binside\b", sql, re.IGNORECASE) is not None
        archive.add_tables(_views(archive.listing, zones, streams, period_seconds, inside))
        return archive.arrow(sql)


def _check_names(tree: Mapping[str, Any], zones: ZoneSet) -> None:
    """UsageError if a statement compares a zone, line or rule with a name that no row can have."""
    known = {"zone": [z.name for z in zones.zones], "line": [n.name for n in zones.lines]}
    known["rule"] = [rule.name for rule in zones.near]
    for node in tree_nodes(tree):
        if node.get("type") in ("COMPARE_EQUAL", "COMPARE_NOTEQUAL"):
            compared = [node["left"], node["right"]]
        elif node.get("type") in ("COMPARE_IN", "COMPARE_NOT_IN"):
            compared = list(node.get("children", ()))
        else:
            continue
        columns = {names[-1] for names in map(column_names, compared) if names} & {*known}
        for column in columns:
            for name in filter(None, map(_text, compared)):
                if name not in known[column]:
                    some = ", ".join(known[column][:_NAMED]) or f"no {column}"
                    more = ", ..." if len(known[column]) > _NAMED else ""
                    raise UsageError(f"{column} {name!r} is not in the zones file, which has {some}{more}")


def _text(node: dict[str, Any]) -> str | None:
    """A string that a statement has as a constant; None for all else."""
    if node.get("class") != "CONSTANT":
        return None
    found = node["literal"].get("text") if "literal" in node else node.get("value", {}).get("value")
    return found if isinstance(found, str) else None


_SCHEMAS = {
    "visits": VISITS_SCHEMA,
    "crossings": CROSSINGS_SCHEMA,
    "encounters": ENCOUNTERS_SCHEMA,
    "motion": MOTION_SCHEMA,
    "occupancy": OCCUPANCY_SCHEMA,
    "flow": FLOW_SCHEMA,
    "inside": INSIDE_SCHEMA,
}
VIEWS = tuple(_SCHEMAS)


def _stream_views(
    listing: Listing, stream_id: str, zones: ZoneSet, period_seconds: float, inside: bool
) -> dict[str, pa.Table]:
    occupancy = Occupancy(period_seconds)
    engine = ZoneEngine(zones, occupancy=occupancy, keep_motion=True)
    measure = Measurer(zones)
    visits: list[Visit] = []
    crossings: list[Crossing] = []
    encounters: list[Encounter] = []
    present: list[dict[str, Any]] = []
    rate = _rate(listing.files, stream_id)
    last: Moment | None = None
    next_frame, live = 0, False
    for footer, table in _chunks(listing, stream_id, zones.needs_masks):
        rows = Rows.from_table(table)
        if len(rows) and last is None:
            live = rows.moments[0].wall_time is not None
            _lead_in(occupancy, rows.moments[0], zones, rate)
        changes = engine.feed(rows, *removals_and_losses(footer.events))
        for change in changes:
            about = change.about
            if isinstance(about, Crossing):
                crossings.append(about)
            elif isinstance(about, Visit) and change.kind == "zone_left":
                visits.append(about)
            elif isinstance(about, Encounter) and change.kind == "near_ended":
                encounters.append(about)
        if inside:
            present += _present(stream_id, zones, rows, measure)
        if len(rows):
            last = rows.moments[-1]
        next_frame = footer.last + 1
    if last is not None and not live:
        _lead_out(occupancy, last, next_frame, zones, rate)
    visits += engine.open_visits()
    encounters += engine.open_encounters()
    return {
        "visits": results_table(
            ((stream_id, v) for v in sorted(visits, key=lambda v: (v.entered.frame_index, v.object_id))),
            VISITS_SCHEMA,
        ),
        "crossings": results_table(((stream_id, c) for c in crossings), CROSSINGS_SCHEMA),
        "encounters": results_table(
            ((stream_id, e) for e in sorted(encounters, key=lambda e: (e.began.frame_index, e.object_id))),
            ENCOUNTERS_SCHEMA,
        ),
        "motion": _motion(stream_id, engine.motion()),
        "inside": pa.Table.from_pylist(present, schema=INSIDE_SCHEMA),
        **_periods(stream_id, zones, occupancy, live),
    }


def _chunks(listing: Listing, stream_id: str, with_masks: bool) -> Iterator[tuple[ChunkFooter, pa.Table]]:
    """Footers and rows of a stream's tracks files in order. StoreError if one is missing or damaged."""
    columns = [*COLUMNS, *(["mask_rle"] if with_masks else [])]
    files = listing.files

    def read(chunk: Chunk) -> tuple[ChunkFooter, pa.Table]:
        uri = files.uri(chunk_name("tracks", chunk.stream_id, chunk.first))
        try:
            file = open_chunk_file(files, "tracks", chunk)
            check_chunk_file(file.metadata, "tracks", chunk, files)
            return parse_footer(file.metadata, uri), file.read(columns)
        except FileNotFoundError:
            raise StoreError(f"{uri} has vanished: is another run starting over?") from None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{uri} is damaged ({reason}): {MEND}") from error

    chunks = listing.chunks([stream_id]).get(stream_id, [])
    listing.check_begins(chunks)
    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="xmem-zones") as pool:
        waiting = [pool.submit(read, chunk) for chunk in chunks[:_READ_AHEAD]]
        rest = iter(chunks[_READ_AHEAD:])
        try:
            while waiting:
                found = waiting.pop(0).result()
                waiting += [pool.submit(read, chunk) for chunk in [next(rest, None)] if chunk is not None]
                yield found
        finally:
            for future in waiting:
                future.cancel()


def _rate(files: Files, stream_id: str) -> float | None:
    try:
        rate = (load_record(files, stream_id) or {}).get("rate")
    except StoreError:
        return None  # only the time before the first and after the last row depends on it
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def _lead_in(occupancy: Occupancy, first: Moment, zones: ZoneSet, rate: float | None) -> None:
    """Frames of a file before the first object."""
    at = first.seconds(zones.frame_rate)
    rate = rate or zones.frame_rate
    if at is not None and first.wall_time is None and rate is not None:
        occupancy.advance(max(0.0, at - first.frame_index / rate), covered=False)
        occupancy.advance(at, covered=True)


def _lead_out(
    occupancy: Occupancy, last: Moment, next_frame: int, zones: ZoneSet, rate: float | None
) -> None:
    """Frames of a file from its last rows to its end."""
    at = last.seconds(zones.frame_rate)
    rate = rate or zones.frame_rate
    if at is not None and rate is not None:
        occupancy.advance(at + (next_frame - last.frame_index) / rate, covered=True)


def _present(stream_id: str, zones: ZoneSet, rows: Rows, measure: Measurer) -> Iterator[dict[str, Any]]:
    features = measure(rows)
    for k, (moment, object_id, category) in enumerate(
        zip(rows.moments, rows.object_ids, rows.categories, strict=True)
    ):
        for zone, inside in zip(zones.zones, features.inside, strict=True):
            if inside[k] and (zone.categories is None or category in zone.categories):
                yield {
                    "stream_id": stream_id,
                    "zone": zone.name,
                    "frame_index": moment.frame_index,
                    "pts_seconds": moment.pts_seconds,
                    "wall_time": moment.wall_time,
                    "object_id": object_id,
                    "category": category,
                }


def _motion(stream_id: str, motion: Sequence[Motion]) -> pa.Table:
    rows = sorted(motion, key=lambda m: m.object_id)
    return results_table(((stream_id, m) for m in rows), MOTION_SCHEMA)


def _periods(stream_id: str, zones: ZoneSet, occupancy: Occupancy, live: bool) -> dict[str, pa.Table]:
    held, flows = [], []
    for begin, period in occupancy.periods():
        common = {
            "stream_id": stream_id,
            "begin_seconds": None if live else begin,
            "begin_time": _EPOCH + timedelta(seconds=begin) if live else None,
            "covered_seconds": period.covered_seconds,
        }
        for zone in zones.zones:
            found = period.zones.get(zone.name, ZonePeriod())
            covered = period.covered_seconds
            held.append(
                {
                    **common,
                    "zone": zone.name,
                    "mean_objects": found.object_seconds / covered if covered > 0 else None,
                    "max_objects": found.most,
                    "entered": found.entered,
                    "ended": found.left,
                }
            )
        for line in zones.lines:
            counts = period.lines.get(line.name, LinePeriod())
            flows.append(
                {
                    **common,
                    "line": line.name,
                    "left_to_right": counts.left_to_right,
                    "right_to_left": counts.right_to_left,
                }
            )
    return {
        "occupancy": pa.Table.from_pylist(held, schema=OCCUPANCY_SCHEMA),
        "flow": pa.Table.from_pylist(flows, schema=FLOW_SCHEMA),
    }


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
