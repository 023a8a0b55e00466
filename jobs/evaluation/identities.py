"""Scores committed tracks against the true boxes of a multi-object tracking benchmark.

Definitions are those of TrackEval (its figures are in the tests), on the frames that the truth covers: MOTA,
ID switches, fragmentations, recall, precision and mostly tracked (CLEAR MOT, at a box IoU of 0.5), IDF1 (at
0.5), and HOTA (mean over IoU 0.05 to 0.95).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pipeline.base.errors import UsageError
from pipeline.base.redaction import shareable
from pipeline.detect.lifecycle.assignment import assignment
from pipeline.storage.locations import locate, read_error
from pipeline.tracks.reader import open_tracks

Boxes = Mapping[int, Mapping[int, tuple[float, float, float, float]]]
"""By frame_index and id: x, y, width, height in pixels."""

_IOU = 0.5
_ALPHAS = np.arange(0.05, 0.99, 0.05)
# Bonus of the pair that was matched before, larger than all that IoUs of a frame add up to.
_KEPT = 1000.0
_TINY = 1e-9


@dataclass(frozen=True)
class TrackingScores:
    """Scores of one stream; rates in percent.

    Args:
        frames, boxes, people: frames that the truth covers, its boxes on them, and its ids.
        tracks: ids of the tracks on these frames.
        mostly_tracked: true ids that are matched on over 80 % of their boxes.
    """

    idf1: float
    hota: float
    mota: float
    recall: float
    precision: float
    id_switches: int
    fragmentations: int
    mostly_tracked: int
    people: int
    tracks: int
    frames: int
    boxes: int

    def to_json(self) -> dict[str, float | int]:
        """The scores by name."""
        return asdict(self)

    def table(self) -> Table:
        """The scores as a table of one row for the terminal."""
        table = Table()
        values = {
            "IDF1": f"{self.idf1:.1f}", "HOTA": f"{self.hota:.1f}", "MOTA": f"{self.mota:.1f}",
            "recall": f"{self.recall:.1f}", "precision": f"{self.precision:.1f}",
            "ID switches": str(self.id_switches), "fragmentations": str(self.fragmentations),
            "mostly tracked": f"{self.mostly_tracked} of {self.people}", "tracks": str(self.tracks),
            "frames": str(self.frames), "boxes": str(self.boxes),
        }  # fmt: skip
        for name in values:
            table.add_column(name, justify="right")
        table.add_row(*values.values())
        return table


def evaluate_tracking(
    truth: str, out: str, *, stream_id: str | None = None, first: int = 0, last: int | None = None
) -> TrackingScores:
    """Score the committed tracks of a stream, the boxes of its masks, against MOT truth.

    Args:
        truth: path or URI of MOT text or CSV, `frame,id,x,y,w,h,...`, frames from 1. Where there is a seventh
            value, rows with 0 there are not scored. Only frames with rows are scored.
        out: output folder of tracking.
        stream_id: its stream; may be left out if there is one only.
        first, last: range of frame_index to score. Default: all that the truth covers.

    Raises:
        UsageError: the truth cannot be read or does not fit the video, or there is no such stream.
        StoreError: the folder cannot be read.
    """
    true = {
        frame: boxes for frame, boxes in read_truth(truth).items() if frame >= first and frame <= _end(last)
    }
    if not true:
        raise UsageError(f"{truth} has no boxes on frames {first} to {'the end' if last is None else last}")
    reader = open_tracks(truth, out, stream_id)  # the only stream, if no id is given
    if max(true) >= reader.next_frame:
        raise UsageError(
            f"{truth} has boxes on frame {max(true)}, but tracks are committed up to frame "
            f"{reader.next_frame - 1} only: track more, or give the range of frames to score"
        )
    found: dict[int, dict[int, tuple[float, float, float, float]]] = {}
    for frame_index in true:
        rows = reader.at(frame_index)
        for row in rows[:1]:
            height, width = row.frame_height, row.frame_width
            for x, y, w, h in true[frame_index].values():
                if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                    raise UsageError(
                        f"{truth} has the box {x:g},{y:g},{w:g},{h:g} outside frame {frame_index} of "
                        f"{width}x{height} pixels: it is of another video"
                    )
        found[frame_index] = {
            r.object_id: (float(r.bbox[0]), float(r.bbox[1]), float(r.bbox[2]), float(r.bbox[3]))
            for r in rows
            if r.bbox is not None
        }
    return score_boxes(true, found)


def read_truth(uri: str) -> dict[int, dict[int, tuple[float, float, float, float]]]:
    """Boxes of MOT text or CSV. Raises UsageError, naming the line that is wrong."""
    try:
        text = locate(uri).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{uri} is not a text file of boxes: {error.reason} at byte {error.start}"
        ) from error
    except Exception as error:
        raise UsageError(f"the truth cannot be read: {read_error(uri, error)}") from shareable(error)
    boxes: dict[int, dict[int, tuple[float, float, float, float]]] = {}
    for line, fields in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not any(field.strip() for field in fields) or (line == 1 and fields[0].strip() == "frame"):
            continue
        try:
            number, identity, x, y, w, h, *more = (float(field) for field in fields)
            if not all(map(math.isfinite, (number, identity, x, y, w, h))) or min(w, h) <= 0 or number < 1:
                raise ValueError("a frame below 1, a box without area or a value that is not finite")
        except ValueError as error:
            raise UsageError(
                f"{uri} line {line}: {error}; expected frame,id,x,y,w,h with frames from 1"
            ) from error
        on_frame = boxes.setdefault(int(number) - 1, {})
        if more and more[0] == 0:
            continue
        if int(identity) in on_frame:
            raise UsageError(f"{uri} line {line}: id {int(identity)} is twice on frame {int(number)}")
        on_frame[int(identity)] = (x, y, w, h)
    return boxes


def score_boxes(true: Boxes, found: Boxes) -> TrackingScores:
    """Scores of the boxes `found` on the frames of `true`."""
    true_ids = sorted({i for boxes in true.values() for i in boxes})
    track_ids = sorted({i for frame in true for i in found.get(frame, {})})
    row = {identity: at for at, identity in enumerate(true_ids)}
    column = {identity: at for at, identity in enumerate(track_ids)}
    frames = []
    for frame in sorted(true):
        ours = found.get(frame, {})
        rows = np.array([row[i] for i in true[frame]], np.intp)
        columns = np.array([column[i] for i in ours], np.intp)
        frames.append((rows, columns, _ious(list(true[frame].values()), list(ours.values()))))
    truths, tracks = sum(len(r) for r, _, _ in frames), sum(len(c) for _, c, _ in frames)
    matched, switches, breaks, share = _clear(frames, len(true_ids))
    return TrackingScores(
        idf1=100 * 2 * _identity_matches(frames, len(true_ids), len(track_ids)) / max(1, truths + tracks),
        hota=100 * _hota(frames, len(true_ids), len(track_ids)),
        mota=100 * (matched - (tracks - matched) - switches) / max(1, truths),
        recall=100 * matched / max(1, truths),
        precision=100 * matched / max(1, tracks),
        id_switches=switches,
        fragmentations=breaks,
        mostly_tracked=int((share > 0.8).sum()),
        people=len(true_ids),
        tracks=len(track_ids),
        frames=len(frames),
        boxes=truths,
    )


_Frames = list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]]


def _clear(frames: _Frames, people: int) -> tuple[int, int, int, NDArray[np.float64]]:
    """Matched boxes, ID switches, fragmentations, and each true id's share of matched boxes."""
    last = np.full(people, -1, np.intp)  # track that each true id had when it was matched last
    before = np.full(people, -1, np.intp)  # on the frame before
    present, hits, starts = np.zeros(people), np.zeros(people), np.zeros(people)
    switches = 0
    for rows, columns, ious in frames:
        present[rows] += 1
        if not ious.size:
            continue  # as in TrackEval, a frame without any track (or truth) breaks no track
        gain = ious + _KEPT * (before[rows][:, None] == columns[None, :])
        gain[ious < _IOU - _TINY] = 0
        pairs = [(r, c) for r, c in assignment(gain) if gain[r, c] > 0]
        mine = np.array([rows[r] for r, _ in pairs], np.intp)
        theirs = np.array([columns[c] for _, c in pairs], np.intp)
        switches += int(((last[mine] != -1) & (last[mine] != theirs)).sum())
        starts[mine] += before[mine] == -1
        hits[mine] += 1
        last[mine] = theirs
        before[:] = -1
        before[mine] = theirs
    fragmentations = int(np.maximum(starts - 1, 0).sum())
    return int(hits.sum()), switches, fragmentations, hits / np.maximum(present, 1)


def _identity_matches(frames: _Frames, people: int, tracks: int) -> float:
    """Boxes matched under the best one-to-one assignment of true ids to tracks."""
    together = np.zeros((people, tracks))
    for rows, columns, ious in frames:
        together[np.ix_(rows, columns)] += ious >= _IOU - _TINY
    return float(sum(together[r, c] for r, c in assignment(together)))


def _hota(frames: _Frames, people: int, tracks: int) -> float:
    """Mean over thresholds of the geometric mean of detection and association accuracy."""
    potential = np.zeros((people, tracks))
    true_count, track_count = np.zeros(people), np.zeros(tracks)
    for rows, columns, ious in frames:
        union = ious.sum(0, keepdims=True) + ious.sum(1, keepdims=True) - ious
        potential[np.ix_(rows, columns)] += ious / np.maximum(union, _TINY)
        true_count[rows] += 1
        track_count[columns] += 1
    either = true_count[:, None] + track_count[None, :]
    alignment = potential / np.maximum(either - potential, _TINY)
    matches = np.zeros((len(_ALPHAS), people, tracks))
    for rows, columns, ious in frames:
        for r, c in assignment(alignment[np.ix_(rows, columns)] * ious):
            matches[ious[r, c] >= _ALPHAS - _TINY, rows[r], columns[c]] += 1
    total = true_count.sum() + track_count.sum()
    values = []
    for of_alpha in matches:
        count = of_alpha.sum()
        pairs = of_alpha / np.maximum(either - of_alpha, _TINY)
        associated = (of_alpha * pairs).sum() / max(count, 1)
        values.append(math.sqrt(associated * count / max(total - count, 1)))
    return float(np.mean(values))


def _ious(
    these: list[tuple[float, float, float, float]], those: list[tuple[float, float, float, float]]
) -> NDArray[np.float64]:
    a, b = np.array(these, float).reshape(-1, 1, 4), np.array(those, float).reshape(1, -1, 4)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    result: NDArray[np.float64] = shared / np.maximum(
        a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared, _TINY
    )
    return result


def _end(last: int | None) -> float:
    return math.inf if last is None else last
