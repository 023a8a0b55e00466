"""ZoneEngine: turns the rows of one stream, frame by frame, into visits, crossings and encounters.

One engine serves files and live streams. It gets the rows in the order of their frames, in pieces of any
size, and the removals of objects; the pieces do not change the answer. Three rules:

* A time of more than `gap_seconds` between two frames with rows, or one that goes backwards, is a gap in the
  input. Whoever was inside before it and is inside after it never left, and no line is crossed in it.
* An object out of sight for up to `unseen_seconds` (not counting gaps) is where it was. After that its visits
  have ended when it was last seen, and the side of a line on which it comes back counts for nothing.
* An object that is removed ends its visits where it was last seen. Frames without rows change nothing, since
  every tracked object has a row on every tracked frame.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Self

from pipeline.base.errors import UsageError
from pipeline.zones.config import Line, Near, Zone, ZoneSet
from pipeline.zones.features import Features, Measurer
from pipeline.zones.occupancy import Occupancy
from pipeline.zones.results import Change, Crossing, Direction, Encounter, Motion, Visit, VisitState
from pipeline.zones.rows import Moment, Rows

_STATE_VERSION = 1
_ROUNDING = 1e-6  # seconds; differences of times are not exact


@dataclass(frozen=True, slots=True)
class Removal:
    """An object is tracked no longer from a frame on."""

    moment: Moment
    object_id: int


@dataclass(slots=True)
class _Stay:
    """A visit or encounter that goes on.

    Args:
        digest: of the zone or rule, to notice that it was changed.
        told: whether it has lasted `min_seconds`.
        outside: the first frame outside, while the object may still come back in `leave_seconds`.
        outside_seconds: input seconds since then. outside_gap: whether it came after a gap.
        gap_open, unseen_open: seconds in gaps and out of sight since `last`.
    """

    digest: str
    number: int
    category: str | None
    entered: Moment
    last: Moment
    entered_at: float
    last_at: float
    frames: int = 0
    told: bool = False
    outside: Moment | None = None
    outside_seconds: float = 0.0
    outside_gap: bool = False
    gap_seconds: float = 0.0
    unseen_seconds: float = 0.0
    gap_open: float = 0.0
    unseen_open: float = 0.0
    path_pixels: float = 0.0
    path_metres: float = 0.0
    least: float = math.inf

    def seen(self, moment: Moment, at: float) -> None:
        """The object was seen inside."""
        self.last, self.last_at = moment, at
        self.frames += 1
        self.gap_seconds += self.gap_open
        self.unseen_seconds += self.unseen_open
        self.gap_open = self.unseen_open = 0.0
        self.outside, self.outside_seconds, self.outside_gap = None, 0.0, False

    @property
    def seconds(self) -> float:
        return max(0.0, self.last_at - self.entered_at)


@dataclass(slots=True)
class _Side:
    """Where an object is relative to a line: distance and position along it when last seen, the side that
    counts (-1 left, 1 right, 0 none yet), and where it last met the line since it was on that side."""

    digest: str
    distance: float
    along: float
    side: int
    met: float | None = None


@dataclass(slots=True)
class _Object:
    """An object that is tracked.

    Args:
        at: when it was last seen. fresh: no gap since then, and out of sight for at most `unseen_seconds`.
        steady: it was seen on the frame with rows before, without a gap.
    """

    first: Moment
    last: Moment
    at: float
    foot: tuple[float, float]
    ground: tuple[float, float] | None
    category: str | None = None
    unseen: float = 0.0
    over_gap: bool = False
    frames: int = 0
    seconds: float = 0.0
    path_pixels: float = 0.0
    path_metres: float = 0.0
    max_pixels: float = 0.0
    max_metres: float = 0.0


@dataclass(slots=True)
class _Step:
    """An object's way from where it was last seen: seconds, pixels and metres; known: whether it counts."""

    known: bool = False
    steady: bool = False
    seconds: float = 0.0
    pixels: float = 0.0
    metres: float | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """Seconds without input just before a frame, as `gap` and `restart` events report them."""

    moment: Moment
    seconds: float


class ZoneEngine:
    """Finds visits, crossings and encounters of one stream. To be used by one thread.

    Args:
        zones: entries for the stream, see `ZoneSet.of_stream`.
        occupancy: counts by time; None: they are not needed.
        keep_motion: keep the motion of objects that were removed for `motion`.

    Attributes:
        counts: how often each kind of change happened, by (kind, name, direction); direction is "" but for
            crossings.
    """

    def __init__(
        self, zones: ZoneSet, *, occupancy: Occupancy | None = None, keep_motion: bool = False
    ) -> None:
        self.zones = zones
        self.counts: dict[tuple[str, str, str], int] = {}
        self._measure = Measurer(zones)
        self._occupancy, self._keep_motion = occupancy, keep_motion
        self._zones = [(zone, _digest(zone)) for zone in zones.zones]
        self._lines = [(line, _digest(line)) for line in zones.lines]
        self._near = [(rule, _digest(rule)) for rule in zones.near]
        self._objects: dict[int, _Object] = {}
        self._visits: dict[tuple[str, int], _Stay] = {}
        self._numbers: dict[tuple[str, int], int] = {}
        self._sides: dict[tuple[str, int], _Side] = {}
        self._pairs: dict[tuple[str, int, int], _Stay] = {}
        self._at: float | None = None
        self._frame = -1
        self._lost_seconds = 0.0
        self._motion: list[Motion] = []
        self._out: list[Change] = []

    # --- feeding ---------------------------------------------------------------------------------

    def feed(self, rows: Rows, removals: Sequence[Removal] = (), lost: Sequence[Lost] = ()) -> list[Change]:
        """Take the rows of the next frames, and the removals of objects up to the last of them.

        Args:
            rows: whole frames, after those of earlier calls.
            removals: in the order of their frames.
            lost: likewise; only occupancies need them, to tell time without objects from time without input.

        Returns:
            what became known, in order.

        Raises:
            UsageError: a frame has no time and the zones give no `frame_rate`. StoreError: a mask that is
                needed is damaged.
        """
        self._out = []
        waiting, missing = list(removals), list(lost)
        features = self._measure(rows)
        start = 0
        for index, group in groupby(range(len(rows)), lambda k: rows.moments[k].frame_index):
            stop = start + sum(1 for _ in group)
            while waiting and waiting[0].moment.frame_index < index:
                self._removed(waiting.pop(0))
            while missing and missing[0].moment.frame_index <= index:
                self._lost_seconds += missing.pop(0).seconds
            self._frame_fed(rows, features, range(start, stop))
            while waiting and waiting[0].moment.frame_index <= index:
                self._removed(waiting.pop(0))
            start = stop
        for removal in waiting:
            self._removed(removal)
        self._lost_seconds += sum(entry.seconds for entry in missing)
        return self._counted()

    def _counted(self) -> list[Change]:
        for change in self._out:
            direction = change.about.direction if isinstance(change.about, Crossing) else ""
            key = change.kind, change.name, direction
            self.counts[key] = self.counts.get(key, 0) + 1
        return self._out

    def _frame_fed(self, rows: Rows, features: Features, chosen: range) -> None:
        moment = rows.moments[chosen.start]
        if moment.frame_index <= self._frame:
            raise ValueError(f"frame {moment.frame_index} comes after frame {self._frame}")
        at = moment.seconds(self.zones.frame_rate)
        if at is None:
            raise UsageError(
                f"frame {moment.frame_index} has no time: give the zones file the frame_rate of its streams"
            )
        since = 0.0 if self._at is None else at - self._at
        gap = since < 0 or since > self.zones.gap_seconds + _ROUNDING
        if self._occupancy is not None:
            empty = not self._objects
            covered = self._at is not None and since >= 0 and (empty or not gap)
            self._occupancy.advance(at, covered=covered, lost_seconds=self._lost_seconds if empty else 0.0)
            self._lost_seconds = 0.0
        if gap:
            self._gap(since)
        visible = {rows.object_ids[k]: k for k in chosen if rows.visible[k]}
        for object_id in [i for i in self._objects if i not in visible]:
            self._unseen(object_id, 0.0 if gap else since, moment)
        steps: dict[int, _Step] = {}
        for object_id, k in visible.items():
            steps[object_id] = self._moved(object_id, k, rows, features, at, gap, since)
        present: dict[str, list[int]] = {}
        for position, (zone, digest) in enumerate(self._zones):
            inside = features.inside[position]
            for object_id, k in visible.items():
                now = inside[k] and _counts(zone.categories, rows.categories[k])
                if now:
                    present.setdefault(zone.name, []).append(object_id)
                self._zone(zone, digest, object_id, now, moment, at, since, steps[object_id])
        for position, (line, digest) in enumerate(self._lines):
            distances, alongs = features.lines[position]
            for object_id, k in visible.items():
                if _counts(line.categories, rows.categories[k]):
                    self._line(line, digest, object_id, distances[k], alongs[k], moment, steps[object_id])
                else:
                    self._sides.pop((line.name, object_id), None)
        for rule, digest in self._near:
            ids = [i for i, k in visible.items() if _counts(rule.categories, rows.categories[k])]
            self._encounters(rule, digest, ids, set(visible), moment, at, since)
        for object_id in visible:
            state = self._objects[object_id]
            state.over_gap, state.unseen = False, 0.0
        if self._occupancy is not None:
            self._occupancy.inside(at, present)
        self._at, self._frame = at, moment.frame_index

    def _gap(self, since: float) -> None:
        lost = max(0.0, since)
        for state in self._objects.values():
            state.over_gap = True
        for stay in (*self._visits.values(), *self._pairs.values()):
            stay.gap_open += lost
        self._sides.clear()

    def _unseen(self, object_id: int, since: float, moment: Moment) -> None:
        state = self._objects[object_id]
        state.unseen += since
        mine = [stay for (_, i), stay in self._visits.items() if i == object_id]
        pairs = [stay for key, stay in self._pairs.items() if object_id in key[1:]]
        for stay in (*mine, *pairs):
            stay.unseen_open += since
        if state.unseen > self.zones.unseen_seconds + _ROUNDING:
            self._end(object_id, "unseen", moment)
            for key in [k for k in self._sides if k[1] == object_id]:
                del self._sides[key]

    def _removed(self, removal: Removal) -> None:
        state = self._objects.pop(removal.object_id, None)
        if state is None:
            return
        self._end(removal.object_id, "removed", removal.moment)
        if self._occupancy is not None and not self._objects:
            self._nobody(self._occupancy, removal.moment)
        for table in (self._sides, self._numbers):
            for key in [k for k in table if k[1] == removal.object_id]:
                del table[key]
        if self._keep_motion:
            self._motion.append(self._motion_of(removal.object_id, state))

    def _nobody(self, occupancy: Occupancy, moment: Moment) -> None:
        """The last object was removed: until then the zones held what they held."""
        at = moment.seconds(self.zones.frame_rate)
        if at is not None and self._at is not None and at >= self._at:
            occupancy.advance(at, covered=at - self._at <= self.zones.gap_seconds)
        occupancy.empty()

    def _end(self, object_id: int, why: VisitState, moment: Moment) -> None:
        """End an object's visits and encounters where it was last seen inside."""
        for key in [k for k in self._visits if k[1] == object_id]:
            self._end_visit(key, why, moment)
        for pair in [k for k in self._pairs if object_id in k[1:]]:
            self._end_pair(pair, why, moment)

    # --- one object on one frame -----------------------------------------------------------------

    def _moved(
        self, object_id: int, k: int, rows: Rows, features: Features, at: float, gap: bool, since: float
    ) -> _Step:
        foot = features.foot[0][k], features.foot[1][k]
        ground = None
        if features.ground is not None:
            ground = features.ground[0][k], features.ground[1][k]
            ground = None if math.isnan(ground[0]) or math.isnan(ground[1]) else ground
        moment = rows.moments[k]
        state = self._objects.get(object_id)
        if state is None:
            state = self._objects[object_id] = _Object(moment, moment, at, foot, ground)
            step = _Step()
        else:
            known = not state.over_gap and state.unseen <= self.zones.unseen_seconds + _ROUNDING
            seconds = at - state.at
            step = _Step(known, known and state.unseen == 0.0 and not gap, seconds)
            step.pixels = math.hypot(foot[0] - state.foot[0], foot[1] - state.foot[1])
            if ground is not None and state.ground is not None:
                step.metres = math.hypot(ground[0] - state.ground[0], ground[1] - state.ground[1])
            if step.steady and seconds > 0:
                state.seconds += seconds
                state.path_pixels += step.pixels
                state.max_pixels = max(state.max_pixels, step.pixels / seconds)
                if step.metres is not None:
                    state.path_metres += step.metres
                    state.max_metres = max(state.max_metres, step.metres / seconds)
        state.last, state.at, state.foot, state.ground = moment, at, foot, ground
        state.category = rows.categories[k]
        state.frames += 1
        return step

    def _zone(
        self,
        zone: Zone,
        digest: str,
        object_id: int,
        inside: bool,
        moment: Moment,
        at: float,
        since: float,
        step: _Step,
    ) -> None:
        key = zone.name, object_id
        stay = self._visits.get(key)
        state = self._objects[object_id]
        if stay is None and not inside:
            return
        if inside:
            if stay is None:
                number = self._numbers[key] = self._numbers.get(key, 0) + 1
                stay = _Stay(digest, number, state.category, moment, moment, at, at)
                self._visits[key] = stay
            elif step.steady and stay.outside is None:
                stay.path_pixels += step.pixels
                stay.path_metres += step.metres or 0.0
            stay.category = state.category
            stay.seen(moment, at)
            if not stay.told and stay.seconds >= zone.min_seconds - _ROUNDING:
                stay.told = True
                visit = self._visit(zone.name, object_id, stay, "open", None)
                self._out.append(Change("zone_entered", moment, visit))
                if self._occupancy is not None:
                    self._occupancy.entered(stay.entered_at, zone.name)
            return
        assert stay is not None
        if stay.outside is None:
            stay.outside, stay.outside_gap = moment, state.over_gap
        elif not state.over_gap:
            stay.outside_seconds += state.unseen + max(0.0, since)
        if stay.outside_seconds >= zone.leave_seconds - _ROUNDING:
            self._end_visit(key, "left", moment)

    def _end_visit(self, key: tuple[str, int], why: VisitState, moment: Moment) -> None:
        stay = self._visits.pop(key)
        if not stay.told:
            self._numbers[key] -= 1
            return
        if stay.outside is not None:
            why = "gap" if stay.outside_gap else "left"
        visit = self._visit(key[0], key[1], stay, why, stay.outside)
        self._out.append(Change("zone_left", moment, visit))
        if self._occupancy is not None:
            self._occupancy.left(stay.last_at, key[0])

    def _line(
        self,
        line: Line,
        digest: str,
        object_id: int,
        distance: float,
        along: float,
        moment: Moment,
        step: _Step,
    ) -> None:
        side = (distance > line.margin) - (distance < -line.margin)
        key = line.name, object_id
        before = self._sides.get(key)
        if before is None or not step.known:
            self._sides[key] = _Side(digest, distance, along, side)
            return
        if distance == 0.0:
            before.met = along
        elif before.distance * distance < 0:
            part = abs(before.distance) / (abs(before.distance) + abs(distance))
            before.met = before.along + part * (along - before.along)
        before.distance, before.along = distance, along
        if side == 0:
            return
        was, met = before.side, before.met
        before.side, before.met = side, None
        if was in (0, side) or met is None or not 0.0 <= met <= 1.0:
            return
        state = self._objects[object_id]
        direction: Direction = "left_to_right" if side > 0 else "right_to_left"
        moving = step.seconds > 0
        crossing = Crossing(
            line.name,
            object_id,
            state.category,
            direction,
            moment,
            *state.foot,
            step.pixels / step.seconds if moving else None,
            step.metres / step.seconds if moving and step.metres is not None else None,
        )
        self._out.append(Change("line_crossed", moment, crossing))
        if self._occupancy is not None:
            self._occupancy.crossed(self._objects[object_id].at, line.name, direction)

    # --- pairs -----------------------------------------------------------------------------------

    def _encounters(
        self,
        rule: Near,
        digest: str,
        ids: list[int],
        visible: set[int],
        moment: Moment,
        at: float,
        since: float,
    ) -> None:
        near: dict[tuple[int, int], float] = {}
        places = []
        for object_id in sorted(ids):
            state = self._objects[object_id]
            place = state.foot if rule.units == "pixels" else state.ground
            if place is not None:
                places.append((object_id, *place))
        for position, (one, x, y) in enumerate(places):
            for other, other_x, other_y in places[position + 1 :]:
                distance = math.hypot(x - other_x, y - other_y)
                if distance <= rule.distance:
                    near[one, other] = distance
        for key in [k for k in self._pairs if k[0] == rule.name]:
            if key[1:] in near or not visible.issuperset(key[1:]):
                continue
            stay = self._pairs[key]
            over_gap = stay.gap_open > 0
            stay.outside, stay.outside_gap = moment, over_gap
            self._end_pair(key, "left", moment)
        for (one, other), distance in near.items():
            key = rule.name, one, other
            found = self._pairs.get(key)
            if found is None:
                found = self._pairs[key] = _Stay(digest, 1, None, moment, moment, at, at)
            found.seen(moment, at)
            found.least = min(found.least, distance)
            if not found.told and found.seconds >= rule.min_seconds - _ROUNDING:
                found.told = True
                self._out.append(Change("near_began", moment, self._encounter(key, found, "open", None)))

    def _end_pair(self, key: tuple[str, int, int], why: VisitState, moment: Moment) -> None:
        stay = self._pairs.pop(key)
        if not stay.told:
            return
        if stay.outside is not None:
            why = "gap" if stay.outside_gap else "left"
        self._out.append(Change("near_ended", moment, self._encounter(key, stay, why, stay.outside)))

    # --- results ---------------------------------------------------------------------------------

    def _visit(self, zone: str, object_id: int, stay: _Stay, state: VisitState, left: Moment | None) -> Visit:
        return Visit(
            zone,
            object_id,
            stay.category,
            stay.number,
            stay.entered,
            stay.last,
            left,
            state,
            stay.seconds,
            stay.unseen_seconds,
            stay.gap_seconds,
            stay.frames,
            stay.path_pixels,
            stay.path_metres if self.zones.homographies else None,
        )

    def _encounter(
        self, key: tuple[str, int, int], stay: _Stay, state: VisitState, ended: Moment | None
    ) -> Encounter:
        return Encounter(*key, stay.entered, stay.last, ended, state, stay.seconds, stay.frames, stay.least)

    def _motion_of(self, object_id: int, state: _Object) -> Motion:
        metres = bool(self.zones.homographies)
        moved = state.seconds > 0
        return Motion(
            object_id,
            state.category,
            state.first,
            state.last,
            state.frames,
            state.seconds,
            state.path_pixels,
            state.path_metres if metres else None,
            state.max_pixels if moved else None,
            state.max_metres if moved and metres else None,
        )

    def open_visits(self) -> list[Visit]:
        """The visits that have not ended and have lasted `min_seconds`."""
        return [
            self._visit(zone, object_id, stay, "open", None)
            for (zone, object_id), stay in self._visits.items()
            if stay.told
        ]

    def open_encounters(self) -> list[Encounter]:
        """The encounters that have not ended and have lasted `min_seconds`."""
        return [self._encounter(key, stay, "open", None) for key, stay in self._pairs.items() if stay.told]

    def motion(self) -> list[Motion]:
        """The motion of all objects, those that were removed first; needs `keep_motion`."""
        return [*self._motion, *(self._motion_of(i, state) for i, state in self._objects.items())]

    def occupants(self) -> dict[str, int]:
        """How many objects each zone holds: visits that have lasted `min_seconds` and have not ended."""
        held = {zone.name: 0 for zone, _ in self._zones}
        for (zone, _), stay in list(self._visits.items()):  # others may ask while it is fed
            held[zone] += stay.told
        return held

    # --- state as JSON ---------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """The state after the frames so far, JSON-ready; `from_state` goes on from it."""
        return {
            "version": _STATE_VERSION,
            "at": self._at,
            "frame": self._frame,
            "objects": [[i, _pack(s)] for i, s in self._objects.items()],
            "visits": [[*key, _pack(stay)] for key, stay in self._visits.items()],
            "numbers": [[*key, number] for key, number in self._numbers.items()],
            "sides": [[*key, _pack(side)] for key, side in self._sides.items()],
            "pairs": [[*key, _pack(stay)] for key, stay in self._pairs.items()],
            "counts": [[*key, count] for key, count in self.counts.items()],
        }

    @classmethod
    def from_state(cls, zones: ZoneSet, state: Mapping[str, Any]) -> tuple[Self, list[Change]]:
        """An engine that goes on from a state, perhaps with other zones.

        Returns:
            the engine, and the ends of visits and encounters whose zone or rule is gone or changed.

        Raises:
            ValueError: the state is damaged or of another version.
        """
        engine = cls(zones)
        try:
            if state["version"] != _STATE_VERSION:
                raise ValueError(f"version {state['version']!r}")
            engine._at, engine._frame = state["at"], int(state["frame"])
            engine._objects = {int(i): _unpack(_Object, s) for i, s in state["objects"]}
            engine._visits = {(z, int(i)): _unpack(_Stay, s) for z, i, s in state["visits"]}
            engine._numbers = {(z, int(i)): int(n) for z, i, n in state["numbers"]}
            engine._sides = {(n, int(i)): _unpack(_Side, s) for n, i, s in state["sides"]}
            engine._pairs = {(n, int(a), int(b)): _unpack(_Stay, s) for n, a, b, s in state["pairs"]}
            engine.counts = {(k, n, d): int(c) for k, n, d, c in state["counts"]}
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged state of zones: {error}") from error
        return engine, engine._drop_changed()

    def _drop_changed(self) -> list[Change]:
        known = {zone.name: digest for zone, digest in self._zones}
        known |= {line.name: digest for line, digest in self._lines}
        known |= {rule.name: digest for rule, digest in self._near}
        now = [s.last for s in self._objects.values()]
        moment = max(now, key=lambda m: m.frame_index, default=Moment(max(0, self._frame)))
        self._out = []
        for key in [k for k, stay in self._visits.items() if known.get(k[0]) != stay.digest]:
            self._visits[key].outside = None
            self._end_visit(key, "changed", moment)
            self._numbers.pop(key, None)
        for pair in [k for k, stay in self._pairs.items() if known.get(k[0]) != stay.digest]:
            self._end_pair(pair, "changed", moment)
        for side in [k for k, s in self._sides.items() if known.get(k[0]) != s.digest]:
            del self._sides[side]
        self._numbers = {k: n for k, n in self._numbers.items() if k[0] in known}
        self._counted()
        self.counts = {k: c for k, c in self.counts.items() if k[1] in known}
        return self._out


def _counts(categories: tuple[str, ...] | None, category: str | None) -> bool:
    return categories is None or category in categories


def _digest(entry: Zone | Line | Near) -> str:
    """Identifies what an entry says, apart from the streams that it is for."""
    values = {name: getattr(entry, name) for name in entry.__slots__ if name != "streams"}
    text = json.dumps([type(entry).__name__, values], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _pack(value: Any) -> list[Any]:
    return [_packed(getattr(value, name)) for name in value.__slots__]


def _packed(value: Any) -> Any:
    if isinstance(value, Moment):
        wall = value.wall_time
        return {"m": [value.frame_index, value.pts_seconds, None if wall is None else wall.isoformat()]}
    if isinstance(value, tuple):
        return list(value)
    return None if value == math.inf else value


def _unpack(kind: type[Any], values: Iterable[Any]) -> Any:
    found = dict(zip(kind.__slots__, values, strict=True))
    for name, value in found.items():
        if isinstance(value, dict):
            frame, pts, wall = value["m"]
            found[name] = Moment(frame, pts, None if wall is None else datetime.fromisoformat(wall))
        elif isinstance(value, list):
            found[name] = tuple(value)
        elif name == "least" and value is None:
            found[name] = math.inf
    return kind(**found)
