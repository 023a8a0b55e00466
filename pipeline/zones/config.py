"""ZoneSet: the zones, lines and rules of a `zones.json`, parsed strictly.

Every message is one line that names the entry, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from pipeline.base.errors import UsageError
from pipeline.base.redaction import shareable
from pipeline.storage.locations import locate, read_error
from pipeline.storage.retries import may_pass
from pipeline.zones.geometry import Point, crossing_edges, polygon_area

VERSION = 1
Units = Literal["pixels", "share"]
Part = Literal["foot", "centroid", "box", "mask"]
Distance = Literal["pixels", "metres"]
POINTS: tuple[Part, ...] = ("foot", "centroid")
"""Parts of a mask that are a point; "box" and "mask" count by the share of them that is in the zone."""

MAX_ENTRIES = 200
MAX_CORNERS = 200
MAX_NAME = 100
_MAX_PIXELS = 2.0**16
_MAX_SECONDS = 1e7
_UNITS: tuple[Units, ...] = get_args(Units)
_PARTS: tuple[Part, ...] = get_args(Part)
_DISTANCES: tuple[Distance, ...] = get_args(Distance)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Zone:
    """A polygon that objects enter and leave.

    Args:
        name: used once in a file.
        polygon: corners (x, y), at least three; it must not cross itself.
        units: "pixels", or "share": of the frame's width and height.
        streams: stream ids, or patterns with `*`, `?` and `[...]`; any of them may match.
        part: what of an object's mask counts. "foot": the middle of the box's lower edge. "centroid". "box",
            "mask": the share of it that is in the zone.
        least_share: from this share on an object is inside; with the parts "box" and "mask".
        min_seconds: shorter visits do not count.
        leave_seconds: how long an object must be seen outside before its visit ends; a return before that
            continues the visit.
        categories: only objects of these; None: all.
    """

    name: str
    polygon: tuple[Point, ...]
    units: Units = "pixels"
    streams: tuple[str, ...] = ("*",)
    part: Part = "foot"
    least_share: float = 0.5
    min_seconds: float = 0.0
    leave_seconds: float = 0.0
    categories: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A directed line that objects cross, from its left to its right or back.

    Args:
        start, end: its ends (x, y). Left and right are those of somebody who goes from `start` to `end`.
        part: "foot" or "centroid".
        margin: an object is on a side once it is further than this from the line, in pixels; larger values
            ignore objects that tremble on the line.
        name, units, streams, categories: as for `Zone`.
    """

    name: str
    start: Point
    end: Point
    units: Units = "pixels"
    streams: tuple[str, ...] = ("*",)
    part: Part = "foot"
    margin: float = 0.0
    categories: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Near:
    """A rule for pairs of objects whose foot points are close to each other.

    Args:
        distance: at most so far apart.
        units: "pixels", or "metres", for which the stream needs a homography.
        min_seconds: shorter encounters do not count.
        name, streams, categories: as for `Zone`; both objects must be of the categories.
    """

    name: str
    distance: float
    units: Distance = "pixels"
    streams: tuple[str, ...] = ("*",)
    min_seconds: float = 0.0
    categories: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Homography:
    """Maps foot points in pixels to positions on the ground in metres.

    Args:
        matrix: 3 x 3, row by row; (x, y, 1) in pixels to (X w, Y w, w) in metres.
        streams: as for `Zone`; the first homography that matches a stream is its own.
    """

    matrix: tuple[tuple[float, float, float], ...]
    streams: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class ZoneSet:
    """What a `zones.json` says.

    Args:
        zones, lines, near, homographies: its entries.
        gap_seconds: a longer time between two frames with rows is a gap in the input: nobody leaves and
            nothing is crossed in it.
        unseen_seconds: an object that is out of sight for longer has ended its visits; within it, an object
            that comes back on the other side of a line has crossed it.
        frame_rate: frames per second of streams whose frames have no times (image folders).
    """

    zones: tuple[Zone, ...] = ()
    lines: tuple[Line, ...] = ()
    near: tuple[Near, ...] = ()
    homographies: tuple[Homography, ...] = ()
    gap_seconds: float = 2.0
    unseen_seconds: float = 5.0
    frame_rate: float | None = None

    @property
    def names(self) -> list[str]:
        """Names of all zones, lines and rules."""
        return [*(e.name for e in self.zones), *(e.name for e in self.lines), *(e.name for e in self.near)]

    @property
    def needs_masks(self) -> bool:
        """Whether run lengths are needed, not only boxes and centroids."""
        return any(zone.part == "mask" for zone in self.zones)

    def of_stream(self, stream_id: str) -> ZoneSet:
        """The entries for one stream."""
        return replace(
            self,
            zones=tuple(e for e in self.zones if matches(stream_id, e.streams)),
            lines=tuple(e for e in self.lines if matches(stream_id, e.streams)),
            near=tuple(e for e in self.near if matches(stream_id, e.streams)),
            homographies=tuple(e for e in self.homographies if matches(stream_id, e.streams))[:1],
        )

    def __bool__(self) -> bool:
        return bool(self.zones or self.lines or self.near or self.homographies)

    def check_streams(self, stream_ids: Iterable[str]) -> None:
        """Raises UsageError for an entry whose streams match none of these."""
        known = list(stream_ids)
        entries = [(f"zone {e.name!r}", e.streams) for e in self.zones]
        entries += [(f"line {e.name!r}", e.streams) for e in self.lines]
        entries += [(f"near {e.name!r}", e.streams) for e in self.near]
        entries += [(f"homography {k}", e.streams) for k, e in enumerate(self.homographies)]
        for what, patterns in entries:
            for pattern in patterns:
                if not any(fnmatchcase(stream_id, pattern) for stream_id in known):
                    there = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
                    raise UsageError(f"{what}: streams={pattern!r} matches no stream: there are {there}")

    def to_json(self) -> dict[str, Any]:
        """As the content of a zones file; `parse_zones` gives the same set back."""

        def entry(value: Any, renamed: Mapping[str, str] | None = None) -> dict[str, Any]:
            found = {name: getattr(value, name) for name in value.__slots__}
            if found.get("part") in POINTS:
                found.pop("least_share", None)
            listed = {k: _lists(v) for k, v in found.items() if v is not None}
            return {(renamed or {}).get(k, k): v for k, v in listed.items()}

        document: dict[str, Any] = {
            "version": VERSION,
            "gap_seconds": self.gap_seconds,
            "unseen_seconds": self.unseen_seconds,
            "zones": [entry(e) for e in self.zones],
            "lines": [entry(e, {"start": "from", "end": "to"}) for e in self.lines],
            "near": [entry(e) for e in self.near],
            "homographies": [entry(e) for e in self.homographies],
        }
        if self.frame_rate is not None:
            document["frame_rate"] = self.frame_rate
        return document


def matches(stream_id: str, patterns: Iterable[str]) -> bool:
    """Whether a stream id is one of these or matches one of these patterns."""
    return any(fnmatchcase(stream_id, pattern) for pattern in patterns)


def zones_schema() -> dict[str, Any]:
    """The JSON Schema of a zones file."""
    text = resource_files("pipeline.zones").joinpath("schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def load_zones(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> ZoneSet:
    """Read a zones file from a path or fsspec URI.

    Raises:
        UsageError: it is not there, or something in it is wrong. SourceError: its store does not answer now.
    """
    name = os.fspath(path)
    try:
        # A pipe, as of the shell's <(...), has no size, which fsspec asks for.
        data = Path(name).read_bytes() if Path(name).is_fifo() else locate(name, storage_options).read_bytes()
    except Exception as error:  # every store behind fsspec has errors of its own
        if may_pass(error):
            raise read_error(name, error) from shareable(error)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{name} cannot be read: {' '.join(reason.split())}") from shareable(error)
    return read_zones(data, name)


def read_zones(data: bytes, name: str) -> ZoneSet:
    """The bytes of a zones file, parsed. UsageError if something in it is wrong.

    Args:
        name: where they are from, for messages.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is no zones file: it is not text in UTF-8") from None
    return parse_zones(_json(text, name), name)


def parse_zones(document: Any, name: str = "zones") -> ZoneSet:
    """A zones file's content, parsed.

    Args:
        name: where it is from, for messages.

    Raises:
        UsageError: something in it is wrong or unknown.
    """
    top = _Entry(document, name)
    version = top.get("version", lambda value: value, VERSION)
    if version != VERSION or isinstance(version, bool):
        raise UsageError(f"{name}: version={version!r} is not allowed: this xmem reads version {VERSION}")
    everywhere: tuple[str, ...] = ("*",)
    defaults: dict[str, Any] = {
        "units": top.get("units", _choice(_UNITS), "pixels"),
        "streams": top.get("streams", _patterns, everywhere),
    }
    names: dict[str, str] = {}

    def listed(key: str, kind: str, parse: Callable[[_Entry], T]) -> tuple[T, ...]:
        nothing: list[Any] = []
        found = top.get(key, _list, nothing)
        if len(found) > MAX_ENTRIES:
            raise UsageError(f"{name}: {len(found)} {key} are too many: at most {MAX_ENTRIES}")
        parsed = []
        for position, value in enumerate(found):
            entry = _Entry(value, f"{name}: {kind} {position}")
            if kind != "homography":
                called = entry.get("name", _name)
                entry.where = f"{name}: {kind} {called!r}"
                if called in names:
                    raise UsageError(f"{entry.where}: there is a {names[called]} of that name: use each once")
                names[called] = kind
            parsed.append(parse(entry))
            entry.done()
        return tuple(parsed)

    result = ZoneSet(
        zones=listed("zones", "zone", lambda e: _zone(e, defaults)),
        lines=listed("lines", "line", lambda e: _line(e, defaults)),
        near=listed("near", "near", lambda e: _near(e, defaults)),
        homographies=listed("homographies", "homography", lambda e: _homography(e, defaults)),
        gap_seconds=top.get("gap_seconds", _number(above=0, most=_MAX_SECONDS), 2.0),
        unseen_seconds=top.get("unseen_seconds", _number(least=0, most=_MAX_SECONDS), 5.0),
        frame_rate=top.get("frame_rate", _number(above=0, most=10_000), None),
    )
    top.done()
    if not (result.zones or result.lines or result.near or result.homographies):
        raise UsageError(f"{name} has no zones, lines, near or homographies: give at least one")
    for near in result.near:
        if near.units == "metres" and not result.homographies:
            raise UsageError(f"{name}: near {near.name!r}: units='metres' needs homographies")
    return result


def _zone(entry: _Entry, defaults: Mapping[str, Any]) -> Zone:
    units: Units = entry.get("units", _choice(_UNITS), defaults["units"])
    part: Part = entry.get("part", _choice(_PARTS), "foot")
    given = "least_share" in entry.values
    share = entry.get("least_share", _number(above=0, most=1), 0.5)
    if given and part in POINTS:
        raise UsageError(f"{entry.where}: least_share goes with part 'box' or 'mask', not with {part!r}")
    return Zone(
        entry.get("name", _name),
        entry.get("polygon", lambda value: _polygon(value, units)),
        units,
        entry.get("streams", _patterns, defaults["streams"]),
        part,
        share,
        entry.get("min_seconds", _number(least=0, most=_MAX_SECONDS), 0.0),
        entry.get("leave_seconds", _number(least=0, most=_MAX_SECONDS), 0.0),
        entry.get("categories", _categories, None),
    )


def _line(entry: _Entry, defaults: Mapping[str, Any]) -> Line:
    units: Units = entry.get("units", _choice(_UNITS), defaults["units"])
    start = entry.get("from", lambda value: _point(value, units))
    end = entry.get("to", lambda value: _point(value, units))
    if start == end:
        raise UsageError(f"{entry.where}: from and to are the same point {list(start)}")
    return Line(
        entry.get("name", _name),
        start,
        end,
        units,
        entry.get("streams", _patterns, defaults["streams"]),
        entry.get("part", _choice(POINTS), "foot"),
        entry.get("margin", _number(least=0, most=_MAX_PIXELS), 0.0),
        entry.get("categories", _categories, None),
    )


def _near(entry: _Entry, defaults: Mapping[str, Any]) -> Near:
    return Near(
        entry.get("name", _name),
        entry.get("distance", _number(above=0, most=_MAX_PIXELS)),
        entry.get("units", _choice(_DISTANCES), "pixels"),
        entry.get("streams", _patterns, defaults["streams"]),
        entry.get("min_seconds", _number(least=0, most=_MAX_SECONDS), 0.0),
        entry.get("categories", _categories, None),
    )


def _homography(entry: _Entry, defaults: Mapping[str, Any]) -> Homography:
    return Homography(entry.get("matrix", _matrix), entry.get("streams", _patterns, defaults["streams"]))


class _Entry:
    """A JSON object that is read key by key; `done` refuses the keys that nobody asked for."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise UsageError(f"{where} is {_shown(values)}: a JSON object is needed")
        self.values, self.where = values, where
        self._asked: dict[str, None] = {}

    def get(self, key: str, parse: Callable[[Any], T], *default: T) -> T:
        """The parsed value of a key; UsageError if it is missing without a default."""
        self._asked[key] = None
        if key not in self.values:
            if default:
                return default[0]
            others = [str(other) for other in self.values if other not in self._asked]
            meant = get_close_matches(key, others, 1)
            hint = f" (there is {meant[0]!r})" if meant else ""
            raise UsageError(f"{self.where}: {key!r} is missing{hint}")
        try:
            return parse(self.values[key])
        except ValueError as error:
            raise UsageError(f"{self.where}: {key}={_shown(self.values[key])}: {error}") from None

    def done(self) -> None:
        unknown = [str(key) for key in self.values if key not in self._asked]
        if unknown:
            known = ", ".join(self._asked)
            raise UsageError(f"{self.where}: unknown key {unknown[0][:40]!r}: there are {known}")


def _choice(choices: Sequence[T]) -> Callable[[Any], T]:
    def parse(value: Any) -> T:
        for choice in choices:
            if isinstance(value, str) and value == choice:
                return choice
        raise ValueError(f"not allowed: use {', '.join(map(str, choices))}")

    return parse


def _number(
    *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        fits = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= most
            and value > above
        )
        if not fits:
            low = f"above {above:g}" if math.isfinite(above) else f"at least {least:g}"
            raise ValueError(f"not allowed: a number {low} and at most {most:g}")
        return float(value)

    return parse


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("not allowed: a list is needed")
    return list(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ValueError(f"not allowed: 1 to {MAX_NAME} printable characters")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    good = isinstance(found, list | tuple) and found and all(isinstance(t, str) and t for t in found)
    if not good or len(found) > 1000 or any(len(t) > 200 for t in found):
        raise ValueError(f"not allowed: {what}, or a list of them")
    return tuple(found)


def _patterns(value: Any) -> tuple[str, ...]:
    return _texts(value, "a stream id or pattern such as gate-*")


def _categories(value: Any) -> tuple[str, ...] | None:
    return None if value is None else _texts(value, "a category")


def _point(value: Any, units: str) -> Point:
    numbers = _list(value)
    if len(numbers) != 2:
        raise ValueError("not allowed: a point is [x, y]")
    low, high = (0.0, 1.0) if units == "share" else (-_MAX_PIXELS, _MAX_PIXELS)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError(f"{_shown(number)} is not allowed: numbers from {low:g} to {high:g} ({units})")
    return float(numbers[0]), float(numbers[1])


def _polygon(value: Any, units: str) -> tuple[Point, ...]:
    corners = [_point(point, units) for point in _list(value)]
    if len(corners) > 1 and corners[0] == corners[-1]:
        corners.pop()  # closed explicitly
    if not 3 <= len(corners) <= MAX_CORNERS:
        raise ValueError(f"{len(corners)} corners are not allowed: 3 to {MAX_CORNERS}")
    for k, corner in enumerate(corners):
        if corner == corners[k - 1]:
            raise ValueError(f"corners {(k - 1) % len(corners)} and {k} are the same point")
    crossed = crossing_edges(corners)
    if crossed is not None:
        one, other = ([k, (k + 1) % len(corners)] for k in crossed)
        raise ValueError(
            f"the polygon crosses itself: the edge of corners {one[0]} and {one[1]} meets that of "
            f"{other[0]} and {other[1]}"
        )
    if polygon_area(corners) == 0:
        raise ValueError("the polygon has no area")
    return tuple(corners)


def _matrix(value: Any) -> tuple[tuple[float, float, float], ...]:
    number = _number(least=-1e12, most=1e12)
    rows = [_list(row) for row in _list(value)]
    if len(rows) != 3 or any(len(row) != 3 for row in rows):
        raise ValueError("not allowed: three rows of three numbers")
    matrix = [[number(v) for v in row] for row in rows]
    if abs(float(np.linalg.det(np.array(matrix)))) < 1e-18:
        raise ValueError("the matrix cannot be inverted: its rows depend on each other")
    return tuple((row[0], row[1], row[2]) for row in matrix)


def _json(text: str, name: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UsageError(f"{name}: the key {key[:40]!r} is there twice in one object")
            found[key] = value
        return found

    def constant(word: str) -> Any:
        raise UsageError(f"{name}: {word} is no number in JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except ValueError as error:
        raise UsageError(f"{name} is no JSON: {error}") from None
    except RecursionError:
        raise UsageError(f"{name} is no zones file: it is nested too deeply") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
