"""Measures of multi-object tracking on overlaps of true objects and tracks, as TrackEval defines them.

CLEAR MOT (Bernardin & Stiefelhagen 2008), IDF1 (Ristani et al. 2016), HOTA (Luiten et al. 2020), and sMOTSA
of masks (Voigtlaender et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pipeline.base.errors import UsageError
from pipeline.detect.lifecycle.assignment import assignment
from pipeline.tracks.reader import TrackReader

LEAST_IOU = 0.5
TINY = 1e-9
_ALPHAS = np.arange(0.05, 0.99, 0.05)
# Bonus of the pair that was matched before, larger than all that IoUs of a frame add up to.
_KEPT = 1000.0

Boxes = Mapping[int, Mapping[int, tuple[float, float, float, float]]]
"""By frame_index and id: x, y, width, height in pixels."""


class Overlaps(NamedTuple):
    """A frame's true objects and tracks.

    Attributes:
        true, tracks: their ids.
        ious: intersection over union of each true object with each track.
    """

    true: list[int]
    tracks: list[int]
    ious: NDArray[np.float64]


@dataclass(frozen=True)
class TrackingScores:
    """Scores of one stream; rates in percent.

    Args:
        frames, boxes, people: frames that the truth covers, its boxes (or masks) on them, and its ids.
        tracks: ids of the tracks on these frames.
        mostly_tracked: true ids that are matched on over 80 % of their boxes.
        smotsa: where masks are compared, MOTA with the matched masks' overlaps in place of their number.
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
    smotsa: float | None = None

    def to_json(self) -> dict[str, float | int]:
        """The scores by name; `smotsa` of masks only."""
        return {name: value for name, value in asdict(self).items() if value is not None}

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
        if self.smotsa is not None:
            values["sMOTSA"] = f"{self.smotsa:.1f}"
            values["masks"] = values.pop("boxes")
        for name in values:
            table.add_column(name, justify="right")
        table.add_row(*values.values())
        return table


def frames_to_score(
    truth: str, what: str, covered: Iterable[int], reader: TrackReader, first: int, last: int | None
) -> list[int]:
    """The frames of a range that the truth covers, in order.

    Args:
        truth, what: its path and what it has, boxes or masks; for the messages.

    Raises:
        UsageError: there are none, or not all of them are committed.
    """
    frames = sorted(f for f in covered if first <= f <= (math.inf if last is None else last))
    if not frames:
        raise UsageError(f"{truth} has no {what} on frames {first} to {'the end' if last is None else last}")
    if frames[-1] >= reader.next_frame:
        raise UsageError(
            f"{truth} has {what} on frame {frames[-1]}, but tracks are committed up to frame "
            f"{reader.next_frame - 1} only: track more, or give the range of frames to score"
        )
    return frames


def score_overlaps(frames: Sequence[Overlaps], *, masks: bool = False) -> TrackingScores:
    """Scores of a stream, frame after frame; `masks`: the overlaps are of masks."""
    true_ids = sorted({i for frame in frames for i in frame.true})
    track_ids = sorted({i for frame in frames for i in frame.tracks})
    row = {identity: at for at, identity in enumerate(true_ids)}
    column = {identity: at for at, identity in enumerate(track_ids)}
    placed = [
        (np.array([row[i] for i in true], np.intp), np.array([column[i] for i in tracks], np.intp), ious)
        for true, tracks, ious in frames
    ]
    truths, count = sum(len(frame.true) for frame in frames), sum(len(frame.tracks) for frame in frames)
    matched, overlap, switches, breaks, share = _clear(placed, len(true_ids))
    wrong = count - matched + switches
    return TrackingScores(
        idf1=100 * 2 * _identity_matches(placed, len(true_ids), len(track_ids)) / max(1, truths + count),
        hota=100 * _hota(placed, len(true_ids), len(track_ids)),
        mota=100 * (matched - wrong) / max(1, truths),
        recall=100 * matched / max(1, truths),
        precision=100 * matched / max(1, count),
        id_switches=switches,
        fragmentations=breaks,
        mostly_tracked=int((share > 0.8).sum()),
        people=len(true_ids),
        tracks=len(track_ids),
        frames=len(frames),
        boxes=truths,
        smotsa=100 * (overlap - wrong) / max(1, truths) if masks else None,
    )


_Frames = list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]]


def _clear(frames: _Frames, people: int) -> tuple[int, float, int, int, NDArray[np.float64]]:
    """Matches, the sum of their IoUs, ID switches, fragmentations, and each true id's share of matches."""
    last = np.full(people, -1, np.intp)  # track that each true id had when it was matched last
    before = np.full(people, -1, np.intp)  # on the frame before
    present, hits, starts = np.zeros(people), np.zeros(people), np.zeros(people)
    switches, overlap = 0, 0.0
    for rows, columns, ious in frames:
        present[rows] += 1
        if not ious.size:
            continue  # as in TrackEval, a frame without any track (or truth) breaks no track
        gain = ious + _KEPT * (before[rows][:, None] == columns[None, :])
        gain[ious < LEAST_IOU - TINY] = 0
        pairs = [(r, c) for r, c in assignment(gain) if gain[r, c] > 0]
        mine = np.array([rows[r] for r, _ in pairs], np.intp)
        theirs = np.array([columns[c] for _, c in pairs], np.intp)
        switches += int(((last[mine] != -1) & (last[mine] != theirs)).sum())
        starts[mine] += before[mine] == -1
        hits[mine] += 1
        overlap += sum(float(ious[r, c]) for r, c in pairs)
        last[mine] = theirs
        before[:] = -1
        before[mine] = theirs
    fragmentations = int(np.maximum(starts - 1, 0).sum())
    return int(hits.sum()), overlap, switches, fragmentations, hits / np.maximum(present, 1)


def _identity_matches(frames: _Frames, people: int, tracks: int) -> float:
    """Boxes matched under the best one-to-one assignment of true ids to tracks."""
    together = np.zeros((people, tracks))
    for rows, columns, ious in frames:
        together[np.ix_(rows, columns)] += ious >= LEAST_IOU - TINY
    return float(sum(together[r, c] for r, c in assignment(together)))


def _hota(frames: _Frames, people: int, tracks: int) -> float:
    """Mean over thresholds of the geometric mean of detection and association accuracy."""
    potential = np.zeros((people, tracks))
    true_count, track_count = np.zeros(people), np.zeros(tracks)
    for rows, columns, ious in frames:
        union = ious.sum(0, keepdims=True) + ious.sum(1, keepdims=True) - ious
        potential[np.ix_(rows, columns)] += ious / np.maximum(union, TINY)
        true_count[rows] += 1
        track_count[columns] += 1
    either = true_count[:, None] + track_count[None, :]
    alignment = potential / np.maximum(either - potential, TINY)
    matches = np.zeros((len(_ALPHAS), people, tracks))
    for rows, columns, ious in frames:
        for r, c in assignment(alignment[np.ix_(rows, columns)] * ious):
            matches[ious[r, c] >= _ALPHAS - TINY, rows[r], columns[c]] += 1
    total = true_count.sum() + track_count.sum()
    values = []
    for of_alpha in matches:
        count = of_alpha.sum()
        pairs = of_alpha / np.maximum(either - of_alpha, TINY)
        associated = (of_alpha * pairs).sum() / max(count, 1)
        values.append(math.sqrt(associated * count / max(total - count, 1)))
    return float(np.mean(values))
