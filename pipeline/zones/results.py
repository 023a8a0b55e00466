"""Results of the zone engine: visits, crossings, encounters and motion, as values and as Arrow tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa

from pipeline.zones.rows import Moment

VisitState = Literal["open", "left", "unseen", "removed", "gap", "changed"]
Direction = Literal["left_to_right", "right_to_left"]


@dataclass(frozen=True, slots=True)
class Visit:
    """An object's stay in a zone, from the first frame that it was inside to the last.

    Args:
        number: of this object's visits of the zone, from 1.
        entered, last: first and last frame on which it was seen inside.
        left: the first frame on which it was seen outside again; None unless the state is "left" or "gap".
        state: "open": it has not ended. "left": seen outside. "unseen": out of sight for longer than
            `unseen_seconds`. "removed": no longer tracked. "gap": seen outside after a gap in the input.
            "changed": the zone was changed or removed.
        dwell_seconds: from `entered` to `last`; `unseen_seconds` and `gap_seconds` are the parts of it in
            which the object was out of sight and in which there was no input.
        frames: on which it was inside.
        path_pixels, path_metres: length of the foot point's way inside; metres with a homography.
    """

    zone: str
    object_id: int
    category: str | None
    number: int
    entered: Moment
    last: Moment
    left: Moment | None
    state: VisitState
    dwell_seconds: float
    unseen_seconds: float
    gap_seconds: float
    frames: int
    path_pixels: float
    path_metres: float | None


@dataclass(frozen=True, slots=True)
class Crossing:
    """An object's crossing of a line.

    Args:
        direction: "left_to_right" or "right_to_left", as seen by somebody who goes from the line's start to
            its end.
        moment: the first frame on which it was seen on the other side.
        x, y: its foot point there, in pixels.
        speed_pixels, speed_metres: per second, since it was last seen before.
    """

    line: str
    object_id: int
    category: str | None
    direction: Direction
    moment: Moment
    x: float
    y: float
    speed_pixels: float | None
    speed_metres: float | None


@dataclass(frozen=True, slots=True)
class Encounter:
    """Two objects near each other.

    Args:
        rule: name of the `Near` rule.
        object_id, other_id: the smaller id first.
        began, last: first and last frame on which they were near.
        ended: the first frame on which they were seen apart; None unless the state is "left" or "gap".
        state: as for `Visit`.
        seconds: from `began` to `last`.
        least_distance: in the rule's units.
    """

    rule: str
    object_id: int
    other_id: int
    began: Moment
    last: Moment
    ended: Moment | None
    state: VisitState
    seconds: float
    frames: int
    least_distance: float


@dataclass(frozen=True, slots=True)
class Motion:
    """An object's way through the picture, by its foot point; steps over gaps and out of sight are left out.

    Args:
        seconds: time of all steps. max_*: of the fastest step.
        *_metres: with a homography.
    """

    object_id: int
    category: str | None
    first: Moment
    last: Moment
    frames: int
    seconds: float
    path_pixels: float
    path_metres: float | None
    max_speed_pixels: float | None
    max_speed_metres: float | None


Kind = Literal["zone_entered", "zone_left", "line_crossed", "near_began", "near_ended"]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that became known on a frame.

    Args:
        kind: "zone_entered": a visit has lasted `min_seconds`; "zone_left": such a visit has ended;
            "line_crossed"; "near_began", "near_ended": as for visits.
        moment: the frame on which it became known.
        about: what it is about, as far as it is known then.
    """

    kind: Kind
    moment: Moment
    about: Visit | Crossing | Encounter

    @property
    def name(self) -> str:
        """Name of the zone, line or rule."""
        about = self.about
        if isinstance(about, Visit):
            return about.zone
        return about.line if isinstance(about, Crossing) else about.rule

    def detail(self) -> dict[str, Any]:
        """For the event's `detail`, JSON-ready: frame numbers, seconds and positions."""
        found: dict[str, Any] = {}
        for field in fields(self.about):
            value = getattr(self.about, field.name)
            if field.name in ("zone", "line", "rule", "object_id", "category", "moment") or value is None:
                continue
            if isinstance(value, Moment):
                found[f"{field.name}_frame"] = value.frame_index
            else:
                found[field.name] = round(value, 3) if isinstance(value, float) else value
        return found


def _times(name: str) -> list[pa.Field]:
    return [
        pa.field(f"{name}_frame", pa.int64()),
        pa.field(f"{name}_seconds", pa.float64()),
        pa.field(f"{name}_time", pa.timestamp("us", tz="UTC")),
    ]


_STREAM = pa.field("stream_id", pa.string(), nullable=False)

VISITS_SCHEMA = pa.schema(
    [
        _STREAM,
        pa.field("zone", pa.string(), nullable=False),
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        *_times("entered"),
        *_times("last"),
        *_times("left"),
        pa.field("dwell_seconds", pa.float64(), nullable=False),
        pa.field("unseen_seconds", pa.float64(), nullable=False),
        pa.field("gap_seconds", pa.float64(), nullable=False),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("path_pixels", pa.float64(), nullable=False),
        pa.field("path_metres", pa.float64()),
        pa.field("speed_pixels", pa.float64()),
        pa.field("speed_metres", pa.float64()),
    ]
)
CROSSINGS_SCHEMA = pa.schema(
    [
        _STREAM,
        pa.field("line", pa.string(), nullable=False),
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("direction", pa.string(), nullable=False),
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
        pa.field("x", pa.float64(), nullable=False),
        pa.field("y", pa.float64(), nullable=False),
        pa.field("speed_pixels", pa.float64()),
        pa.field("speed_metres", pa.float64()),
    ]
)
ENCOUNTERS_SCHEMA = pa.schema(
    [
        _STREAM,
        pa.field("rule", pa.string(), nullable=False),
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("other_id", pa.int32(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        *_times("began"),
        *_times("last"),
        *_times("ended"),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("least_distance", pa.float64(), nullable=False),
    ]
)
MOTION_SCHEMA = pa.schema(
    [
        _STREAM,
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("category", pa.string()),
        *_times("first"),
        *_times("last"),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("path_pixels", pa.float64(), nullable=False),
        pa.field("path_metres", pa.float64()),
        pa.field("speed_pixels", pa.float64()),
        pa.field("speed_metres", pa.float64()),
        pa.field("max_speed_pixels", pa.float64()),
        pa.field("max_speed_metres", pa.float64()),
    ]
)

Result = Visit | Crossing | Encounter | Motion


def results_table(results: Iterable[tuple[str, Result]], schema: pa.Schema) -> pa.Table:
    """(stream id, result) pairs of one kind as a table with one of the schemas above."""
    return pa.Table.from_pylist([_row(stream_id, result) for stream_id, result in results], schema=schema)


def _row(stream_id: str, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"stream_id": stream_id}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Moment) and field.name == "moment":
            row |= {
                "frame_index": value.frame_index,
                "pts_seconds": value.pts_seconds,
                "wall_time": value.wall_time,
            }
        elif isinstance(value, Moment):
            row |= {
                f"{field.name}_frame": value.frame_index,
                f"{field.name}_seconds": value.pts_seconds,
                f"{field.name}_time": value.wall_time,
            }
        else:
            row[field.name] = value
    if isinstance(result, Visit | Motion):
        # Time in sight: nothing is known of the way in between.
        moving = (
            result.seconds
            if isinstance(result, Motion)
            else result.dwell_seconds - result.unseen_seconds - result.gap_seconds
        )
        if moving > 0:
            row["speed_pixels"] = result.path_pixels / moving
            metres = result.path_metres
            row["speed_metres"] = None if metres is None else metres / moving
    return row
