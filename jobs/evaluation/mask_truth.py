"""Scores committed tracks against true masks: MOTS text, COCO JSON or a folder of index PNGs.

As for boxes (`jobs.evaluation.identities`), with the IoU of masks. What is mostly on a region that the truth
does not judge (class 10 of MOTS) and matches no true mask does not count. Categories are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.mot_measures import LEAST_IOU, Overlaps, TrackingScores, frames_to_score, score_overlaps
from pipeline.base.errors import UsageError
from pipeline.base.records import MaskRecord
from pipeline.detect.lifecycle.assignment import assignment
from pipeline.exchange.importing import ImportedStream, read_streams
from pipeline.tracks.mask_arrays import MaskArray
from pipeline.tracks.reader import open_tracks

_MOTS_LINE = re.compile(r"\d+ \d+ \d+ \d+ \d+ \S+")
_UNJUDGED = 0.5
"""Share of a track's mask on regions that are not judged from which it is not judged."""


def is_mask_truth(truth: str) -> bool:
    """Whether a path is that of true masks; what is not on this machine is not."""
    path = Path(truth)
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    if path.suffix.lower() == ".json":
        return True
    with path.open(encoding="ascii", errors="replace") as text:
        return any(_MOTS_LINE.fullmatch(line.strip()) for line in text.readlines(1))


def score_masks(
    truth: str, out: str, *, stream_id: str | None = None, first: int = 0, last: int | None = None
) -> TrackingScores:
    """Score the masks of a stream's committed tracks.

    Args:
        truth: path of MOTS text or COCO JSON, or a folder of MOTS texts or index PNGs. Frames with masks, or
            with regions that are not judged, are scored.
        out: output folder of tracking.
        stream_id: its stream; may be left out if there is one only. Of a truth of several streams, that of
            this name is taken.
        first, last: range of frame_index to score. Default: all that the truth covers.

    Raises:
        UsageError: the truth cannot be read or does not fit the video, or there is no such stream.
        StoreError: the folder cannot be read.
    """
    reader = open_tracks(truth, out, stream_id, option="--stream")
    true = _of_stream(truth, reader.stream_id if stream_id is None else stream_id)
    frames = frames_to_score(truth, "masks", {*true.rows, *true.unjudged}, reader, first, last)
    overlaps, unsized = [], []
    recorded = reader.recorded_size()
    known = set() if recorded is None else {recorded}
    for frame in frames:
        rows = reader.at(frame)
        if rows:
            size = rows[0].frame_width, rows[0].frame_height
            known.add(size)
            _check_size(truth, frame, true, size)
        else:
            unsized.append(frame)
        ours = [row for row in rows if row.bbox is not None]
        overlaps.append(_overlaps(true.rows.get(frame, []), ours, true.unjudged.get(frame, [])))
    if (
        len(known) == 1
    ):  # frames without rows have the size of the others; where these differ, it is not known
        for frame in unsized:
            _check_size(truth, frame, true, *known)
    return score_overlaps(overlaps, masks=True)


def _check_size(truth: str, frame: int, true: ImportedStream, size: tuple[int, int]) -> None:
    """UsageError if a true mask on a frame has another size, width and height, than the frame."""
    for mask in (*true.rows.get(frame, []), *true.unjudged.get(frame, [])):
        if (mask.frame_width, mask.frame_height) != size:
            raise UsageError(
                f"{truth} has a mask of {mask.frame_width}x{mask.frame_height} pixels on frame "
                f"{frame} of {size[0]}x{size[1]}: it is of another video"
            )


def _of_stream(truth: str, stream_id: str) -> ImportedStream:
    """The truth of a stream, by its name, or the only one."""
    path = Path(truth)
    if path.is_dir():
        texts = any((path / "instances_txt").glob("*.txt")) or any(path.glob("*.txt"))
        fmt = "mots" if texts else "davis"
    else:
        fmt = "coco" if path.suffix.lower() == ".json" else "mots"
    streams = list(read_streams(truth, fmt))
    if not streams:
        raise UsageError(f"{truth} has no masks")
    named = [s for s in streams if s.stream_id == stream_id] or streams
    if len(named) != 1:
        names = ", ".join(sorted(s.stream_id for s in streams)[:8])
        raise UsageError(f"{truth} has no masks of stream {stream_id!r}; it has those of {names}")
    return named[0]


def _overlaps(
    true: Sequence[MaskRecord], ours: Sequence[MaskRecord], unjudged: Sequence[MaskRecord]
) -> Overlaps:
    ious = _shares(true, ours, of_union=True)
    kept = np.ones(len(ours), np.bool_)
    if unjudged:
        on_regions = _shares(unjudged, ours, of_union=False).sum(0)
        matched = {c for r, c in assignment(np.where(ious >= LEAST_IOU, ious, 0)) if ious[r, c] >= LEAST_IOU}
        for at in range(len(ours)):
            kept[at] = at in matched or on_regions[at] <= _UNJUDGED
    tracks = [row.object_id for row, keep in zip(ours, kept, strict=True) if keep]
    return Overlaps([row.object_id for row in true], tracks, ious[:, kept])


def _shares(
    these: Sequence[MaskRecord], those: Sequence[MaskRecord], *, of_union: bool
) -> NDArray[np.float64]:
    """N x M, the pixels that two masks share, over those of both or over those of the second one."""
    if not these or not those:
        return np.zeros((len(these), len(those)))
    a, b = (
        MaskArray.from_counts(
            [(row.mask_rle or "").encode("ascii") for row in rows],
            np.array([row.frame_height for row in rows]),
            np.array([row.frame_width for row in rows]),
        )
        for rows in (these, those)
    )
    first = a.take(np.repeat(np.arange(len(a)), len(b)))
    second = b.take(np.tile(np.arange(len(b)), len(a)))
    shares = first.ious(second) if of_union else first.intersections(second) / np.maximum(second.areas(), 1)
    return np.asarray(shares, np.float64).reshape(len(a), len(b))
