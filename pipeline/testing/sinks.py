"""Conformance check for sinks: made-up streams committed by runs that are killed and start over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from pipeline.base.errors import one_line
from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracks.sinks import Sink

Rows = Iterable[Mapping[str, Any]]
ReadBack = Callable[[str], tuple[Rows, Rows]]


def _need(condition: bool, message: str) -> None:
    """An assertion that `python -O` does not remove."""
    if not condition:
        raise AssertionError(message)


def check_sink(make: Callable[[], Sink], read: ReadBack | None = None) -> None:
    """Conformance test for authors of sinks.

    Commits ranges of made-up streams as runs do that are killed, resume and start over; a new sink is made
    where there would be a new process. With `read`, the sink's content is compared after every step: nothing
    may be lost, doubled, mixed up between streams, or left over from a stream that was started over.

    Args:
        make: returns a new sink that writes to the same place as the others.
        read: returns the rows stored for a stream: tracks and events, as tables or as dicts by column, in any
            order. Columns may be missing or added. By default the sink's own method of that name, if it has
            one; without either, only the calls are made.

    Raises:
        AssertionError: a check fails; the message says which, and after which call.
    """
    trial = _Trial(make, read)
    trial.commit("a", 0, 4)
    trial.commit("a", 5, 9, events=False)
    trial.commit("b", 0, 9)
    trial.commit("a", 10, 14, rows=False)
    trial.commit("a", 15, 19, rows=False, events=False)
    trial.again("the same range again, with the same rows", "a", 15, 19, rows=False, events=False)
    trial.restart()
    trial.again("the same range again, by another process", "a", 10, 14, rows=False)
    trial.commit("a", 20, 24)
    trial.restart()
    trial.again("the same range again, by another process", "a", 20, 24)
    # On a GPU the last digits may differ between runs, and Parquet has those of the last call.
    trial.again("the same range again, with other rows", "a", 20, 24, salt=1)
    trial.again("the same range again, with fewer rows", "a", 20, 24, rows=False, events=False)
    trial.commit("a", 25, 25)
    trial.commit("b", 10, 12)
    trial.restart()
    trial.start_over("a")
    trial.commit("a", 0, 6, salt=2)
    trial.commit("a", 7, 9, salt=2)


class _Trial:
    """A sink and its expected content."""

    def __init__(self, make: Callable[[], Sink], read: ReadBack | None) -> None:
        self._make = make
        self._own_read = read is None
        self._read = read
        self._held: dict[str, dict[int, tuple[list[Any], list[Any]]]] = {"a": {}, "b": {}}
        self.restart()

    def restart(self) -> None:
        """Make a new sink, as after the death of the process."""
        self._sink: Any = self._make()
        _need(isinstance(self._sink, Sink), "there is no commit(stream_id, first, last, tracks, events)")
        if self._own_read:
            self._read = getattr(self._sink, "read", None)

    def start_over(self, stream: str) -> None:
        """Forget a stream, as a call with first = 0 implies."""
        self._held[stream].clear()

    def commit(
        self,
        stream: str,
        first: int,
        last: int,
        *,
        rows: bool = True,
        events: bool = True,
        salt: int = 0,
        what: str = "",
    ) -> None:
        tracks = tracks_table(_records(first, last, salt) if rows else [])
        happened = events_table(_events(first, salt) if events else [])
        stream_id = f"conformance-{stream}"
        what = f"{what or 'a range'} ({stream_id}, frames {first}..{last}, {tracks.num_rows} rows)"
        try:
            answer = self._sink.commit(stream_id, first, last, tracks, happened)
        except Exception as error:
            raise AssertionError(
                f"{what}: commit raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if hasattr(answer, "close") and hasattr(answer, "send"):
            answer.close()
            raise AssertionError(
                f"{what}: commit is a coroutine or generator and did nothing: make it a function"
            )
        self._held[stream][first] = (tracks.to_pylist(), happened.to_pylist())
        self._compare(what)

    def again(self, what: str, stream: str, first: int, last: int, **how: Any) -> None:
        self.commit(stream, first, last, what=what, **how)

    def _compare(self, what: str) -> None:
        if self._read is None:
            return
        for stream, ranges in self._held.items():
            stream_id = f"conformance-{stream}"
            kinds = zip(("tracks", "events"), self._read(stream_id), strict=True)
            for position, (kind, held) in enumerate(kinds):
                expected = [row for first in sorted(ranges) for row in ranges[first][position]]
                found = held.to_pylist() if isinstance(held, pa.Table) else [dict(row) for row in held]
                _compare_rows(f"after {what}: the {kind} of {stream_id}", expected, found)


def _compare_rows(where: str, expected: list[Any], found: list[Any]) -> None:
    columns = set(expected[0]) if expected else set()
    for row in found:
        columns &= set(row)
    _need(
        not expected or not found or "frame_index" in columns,
        f"{where}: rows that are read back need at least the column frame_index",
    )
    left = sorted((_plain(row, columns) for row in expected), key=repr)
    right = sorted((_plain(row, columns) for row in found), key=repr)
    frames = [[row.get("frame_index") for row in rows] for rows in (expected, found)]
    missing, more = sorted({*frames[0]} - {*frames[1]}), sorted({*frames[1]} - {*frames[0]})
    _need(not missing, f"{where} are missing for frames {missing}")
    _need(not more, f"{where} should be gone for frames {more}")
    _need(
        len(right) == len(left), f"{where} are {len(right)} rows, not {len(left)}: some are doubled or lost"
    )
    for one, other in zip(left, right, strict=True):
        _need(one == other, f"{where} differ: {other} instead of {one}")


def _plain(row: Mapping[str, Any], columns: set[str]) -> dict[str, Any]:
    """A row's values in the columns that both sides have.

    Databases return times in time zones of their own.
    """
    return {
        name: value.astimezone(UTC) if isinstance(value := row[name], datetime) else value
        for name in sorted(columns)
    }


def _records(first: int, last: int, salt: int) -> list[MaskRecord]:
    """Two objects per frame, every fourth out of sight; values depend on `salt`."""
    made = []
    for frame in range(first, last + 1):
        for object_id in (1, 70_000):
            size: dict[str, Any] = {"frame_height": 48, "frame_width": 64, "pts_seconds": frame / 25}
            if (frame + object_id) % 4 == 0:
                made.append(MaskRecord(frame, object_id, area=0, score=0.0, **size))
                continue
            made.append(
                MaskRecord(
                    frame,
                    object_id,
                    area=12 + salt,
                    score=0.5,
                    category="größe 'o'" if object_id == 1 else None,
                    bbox=(frame % 30, 2, 4, 3),
                    centroid=(frame % 30 + 1.5, 3.0),
                    mask_rle=f'{frame}\\`0"{salt}',
                    wall_time=datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC) + timedelta(seconds=frame),
                    **size,
                )
            )
    return made


def _events(first: int, salt: int) -> list[Event]:
    detail = {"by": "prompt", "n": [1, 2.5, salt]}
    return [
        Event(first, "object_added", object_id=1, pts_seconds=first / 25, detail=detail),
        Event(first, "corrupt", "damaged picture", 2 + salt),
    ]
