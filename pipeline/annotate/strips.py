"""Strips: where an object is seen, doubtful or out of sight, as runs of frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.base.records import MaskRecord
from pipeline.storage.files import Files
from pipeline.tracks.layout import chunk_name

DOUBTFUL_PRESENCE = 0.5
"""Masks with a presence below it are doubtful."""
DOUBTFUL_SCORE = 0.7
"""Without a presence, masks with a score below it are."""

KINDS = ("out", "doubtful", "seen")
Run = tuple[int, int, str]
"""First frame, last frame, and one of `KINDS`."""
Strips = dict[int, list[Run]]
"""Runs by object id, in the order of frames."""


def kind_of(record: MaskRecord) -> str:
    """The kind of one row."""
    if record.area == 0:
        return "out"
    doubtful = (
        record.score < DOUBTFUL_SCORE if record.presence is None else record.presence < DOUBTFUL_PRESENCE
    )
    return "doubtful" if doubtful else "seen"


def strips_of_chunk(files: Files, stream_id: str, first: int) -> Strips:
    """The strips of one chunk file; only the columns that they need are decoded."""
    data = files.read(chunk_name("tracks", stream_id, first))
    columns = ["frame_index", "object_id", "area", "score", "presence"]
    table = pq.read_table(pa.BufferReader(data), columns=columns)
    frames = table["frame_index"].to_numpy()
    ids = table["object_id"].to_numpy()
    area, score = table["area"].to_numpy(), table["score"].to_numpy()
    presence = pc.fill_null(table["presence"], -1.0).to_numpy()
    doubtful = np.where(presence < 0, score < DOUBTFUL_SCORE, presence < DOUBTFUL_PRESENCE)
    kinds = np.where(area == 0, 0, np.where(doubtful, 1, 2))
    found: Strips = {}
    for object_id in np.unique(ids).tolist():
        own = ids == object_id
        numbers, kind = frames[own], kinds[own]
        cuts = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(kind) != 0)) + 1
        starts, ends = [0, *cuts.tolist()], [*cuts.tolist(), len(numbers)]
        found[object_id] = [
            (int(numbers[a]), int(numbers[b - 1]), KINDS[int(kind[a])])
            for a, b in zip(starts, ends, strict=True)
        ]
    return found


def strips_of_rows(rows: Mapping[int, Iterable[MaskRecord]]) -> Strips:
    """The strips of rows by frame."""
    found: Strips = {}
    for frame in sorted(rows):
        for record in rows[frame]:
            _append(found.setdefault(record.object_id, []), (frame, frame, kind_of(record)))
    return found


def joined(parts: Iterable[Strips], first: int, stop: int) -> Strips:
    """Strips one after another, cut to the frames `first` up to, not including, `stop`."""
    found: Strips = {}
    for part in parts:
        for object_id, runs in part.items():
            for a, b, kind in runs:
                if a < stop and b >= first:
                    _append(found.setdefault(object_id, []), (max(a, first), min(b, stop - 1), kind))
    return found


def _append(runs: list[Run], run: Run) -> None:
    if runs and runs[-1][1] == run[0] - 1 and runs[-1][2] == run[2]:
        runs[-1] = (runs[-1][0], run[1], run[2])
    else:
        runs.append(run)
