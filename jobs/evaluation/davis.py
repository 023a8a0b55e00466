"""Evaluation on labelled data sets: region similarity J and boundary accuracy F.

The conventions are those of the DAVIS toolkits for semi-supervised segmentation:

- J of an object on a frame is intersection over union of its mask and the true one; 1 where both are empty.
- F compares outlines. A pixel is on an outline when it differs from its right, lower or lower right
  neighbour. Outline pixels match when one of the other outline lies within ceil(0.008 x the image's diagonal)
  pixels; F is the harmonic mean of the two matched shares: 1 where both outlines are missing, 0 where one is.
- The first frame is given and the last one is left out. An object's J and F are means over the other frames,
  a clip's over its objects, and the overall figures are means over all objects of all clips.

`jobs.evaluation.data_sets` has the layouts, and where their conventions differ: in YouTube-VOS an object is
scored only where it is labelled, and there and in Long-time Video the last frame counts.

DAVIS leaves open, and here: an object that first shows on a later frame is given there and scored from the
next one on. Frames without an annotation are tracked and not scored. The value 255 is object 1 in clips that
hold nothing else (DAVIS-2016), else it marks pixels that count for nobody. `max_frames` cuts a clip as if it
ended there.

Annotations that cannot give a score (of first frames only, or of new objects only) are refused before
anything is tracked, unless masks are written: the clip's score is then None, a dash in tables, and no number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from jobs.evaluation.data_sets import (
    VOID,
    Clip,
    DataSet,
    Truth,
    find_data_set,
    read_labels,
    read_truth,
    scored_objects,
)
from jobs.evaluation.mask_files import MaskFolder
from jobs.evaluation.peak_memory import PeakMemory
from jobs.evaluation.pictures import read_frame
from pipeline.base.errors import UsageError
from pipeline.video.prefetch import Prefetch
from xmem_core import Prompt

BOUNDARY_TOLERANCE = 0.008
"""How far apart matching outline pixels may lie, as a share of the image's diagonal."""

Mask = NDArray[np.bool_]


class StepResult(Protocol):
    """A segmenter's label map of a frame: H x W integers, 0 the background, otherwise object ids.

    An array or a tensor, on any device.
    """

    @property
    def label_map(self) -> Any: ...


class Segmenter(Protocol):
    """The part of `xmem_core.VideoSegmenter` that evaluation needs."""

    def new_state(self) -> Any: ...

    def step(self, state: Any, frame: NDArray[np.uint8], prompt: Prompt | None = None) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """One object's means over its scored frames, 0 to 1."""

    object_id: int
    j: float
    f: float
    frames: int


@dataclass(frozen=True, slots=True)
class ClipScore:
    """One clip's objects, and how fast its frames were segmented (decoding and scoring not counted).

    Args:
        name: the clip.
        objects: the scored ones; none where its annotations allow no score.
        frames: number of frames tracked.
        seconds: time that this took.
        peak_bytes: highest memory meanwhile: the GPU's, or this process's; None if it is not known.
    """

    name: str
    objects: tuple[ObjectScore, ...]
    frames: int
    seconds: float
    peak_bytes: int | None = None

    @property
    def j(self) -> float | None:
        """Mean J of the objects, 0 to 1; None without a scored object."""
        return _mean([o.j for o in self.objects])

    @property
    def f(self) -> float | None:
        """Mean F of the objects, 0 to 1; None without a scored object."""
        return _mean([o.f for o in self.objects])

    @property
    def frames_per_second(self) -> float:
        """Frames segmented per second of segmenting."""
        return self.frames / max(self.seconds, 1e-9)

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dict for `from_record`."""
        objects = [[o.object_id, o.j, o.f, o.frames] for o in self.objects]
        return {
            "name": self.name,
            "objects": objects,
            "frames": self.frames,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> ClipScore:
        """Build from `to_record`'s output."""
        objects = tuple(ObjectScore(int(i), float(j), float(f), int(n)) for i, j, f, n in values["objects"])
        return cls(
            values["name"], objects, int(values["frames"]), float(values["seconds"]), values["peak_bytes"]
        )


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The scores of a data set."""

    clips: tuple[ClipScore, ...]

    @property
    def j(self) -> float | None:
        """Mean J of all objects of all clips, 0 to 1; None without a scored object."""
        return _mean([o.j for clip in self.clips for o in clip.objects])

    @property
    def f(self) -> float | None:
        """Mean F of all objects of all clips, 0 to 1; None without a scored object."""
        return _mean([o.f for clip in self.clips for o in clip.objects])

    def to_json(self) -> dict[str, Any]:
        """{"overall": {"J&F", "J", "F"}, "clips": {name: ... and "frames_per_second", "peak_mb"}}.

        Scores are in percent, null where there is none.
        """
        return {
            "overall": _percent(self.j, self.f),
            "clips": {
                clip.name: _percent(clip.j, clip.f)
                | {
                    "frames_per_second": round(clip.frames_per_second, 3),
                    "peak_mb": None if clip.peak_bytes is None else round(clip.peak_bytes / 1e6),
                }
                for clip in self.clips
            },
        }

    def table(self) -> Table:
        """The scores as a table for the terminal; a dash where there is no score."""
        table = Table()
        for name in ("clip", "J&F", "J", "F", "objects", "frames", "frames/s", "peak MB"):
            table.add_column(name, justify="left" if name == "clip" else "right")
        for clip in self.clips:
            table.add_row(
                clip.name,
                *_shown(clip.j, clip.f),
                str(len(clip.objects)),
                str(clip.frames),
                f"{clip.frames_per_second:.1f}",
                _megabytes(clip.peak_bytes),
            )
        frames, seconds = sum(c.frames for c in self.clips), sum(c.seconds for c in self.clips)
        scored = sum(bool(c.objects) for c in self.clips)
        table.add_section()
        table.add_row(
            "overall" if scored in (0, len(self.clips)) else f"overall ({scored} of {len(self.clips)} clips)",
            *_shown(self.j, self.f),
            str(sum(len(c.objects) for c in self.clips)),
            str(frames),
            f"{frames / max(seconds, 1e-9):.1f}",
            _megabytes(max((c.peak_bytes for c in self.clips if c.peak_bytes is not None), default=None)),
            style="bold",
        )
        return table


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percent(j: float | None, f: float | None) -> dict[str, float | None]:
    if j is None or f is None:
        return {"J&F": None, "J": None, "F": None}
    return {"J&F": round(50 * (j + f), 3), "J": round(100 * j, 3), "F": round(100 * f, 3)}


def _shown(j: float | None, f: float | None) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in _percent(j, f).values()]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def run(
    root: str | Path,
    segmenter: Segmenter,
    *,
    clips: Sequence[str] | None = None,
    max_frames: int | None = None,
    split: str | None = None,
    resolution: str | None = None,
    all_frames: bool = False,
    masks_out: str | Path | None = None,
    save_scores: bool = False,
    zipped: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Segment every clip of a data set from its first annotation on, and score the result.

    Args:
        root: folder in a layout of `jobs.evaluation.data_sets`.
        segmenter: follows the objects; gets a new state per clip.
        clips: only these, whatever a list says; default all, or those of the list.
        max_frames: cut clips to so many frames, at least 3.
        split, resolution, all_frames: as for `find_data_set`.
        masks_out: folder for the masks; finished clips that it holds already are not tracked again.
        save_scores: write probabilities there too.
        zipped: pack the masks for a server at the end.
        settings: what else decides about the masks: a folder with masks of others is refused.
        progress: called with a line of text on what is to be scored, and per clip.

    Raises:
        UsageError: the folder is laid out otherwise, its annotations do not allow a score and no masks are
            written, a clip or split is unknown, or a file in it is unusable.
    """
    if max_frames is not None and max_frames < 3:
        raise UsageError(f"{max_frames} frames per clip leave none to score: give at least 3")
    if masks_out is None and (save_scores or zipped):
        raise UsageError(
            f"{'--save-scores' if save_scores else '--zip'} needs --masks-out, the folder to write to"
        )
    data = find_data_set(root, split=split, clips=clips, resolution=resolution, all_frames=all_frames)
    found = [clip.cut(max_frames) for clip in data.clips]
    truths = [read_truth(clip, data) for clip in found]  # of all clips, before the first is tracked
    plans = [scored_objects(clip, data, truth) for clip, truth in zip(found, truths, strict=True)]
    for clip, truth, plan in zip(found, truths, plans, strict=True):
        why = truth.unscorable
        if why is None and not plan:
            why = f"clip {clip.name}: no annotated object is left to score after its first frame"
        if why is not None and masks_out is None:
            raise UsageError(f"{why}; --masks-out DIR writes the masks without a score")
    folder = None
    if masks_out is not None:
        facts = dict(settings or {}) | {"max_frames": max_frames, "all_frames": all_frames}
        folder = MaskFolder(masks_out, data, facts, scores=save_scores)
    if progress is not None:
        progress(_announcement(data, found, plans))
    scores = []
    for number, (clip, truth, plan) in enumerate(zip(found, truths, plans, strict=True), 1):
        before = None if folder is None else _finished(folder, clip.name)
        if before is not None:
            score = before
        else:
            score = _evaluate_clip(clip, segmenter, data, truth, plan, folder)
            if folder is not None:
                folder.finish(clip.name, score.to_record())
        scores.append(score)
        if progress is not None:
            numbers = ", ".join(
                f"{k} {v:.1f}" if v is not None else f"{k} -" for k, v in _percent(score.j, score.f).items()
            )
            rate = f"{score.frames} frames at {score.frames_per_second:.1f}/s"
            done = ", finished before" if before is not None else ""
            progress(f"{number}/{len(found)} {clip.name}: {numbers} ({rate}{done})")
    if folder is not None and data.burst is not None:
        folder.write_predictions(data.burst, [clip.name for clip in found])
    if folder is not None and zipped:
        target = folder.zip()
        if progress is not None:
            progress(f"{target}: the masks, packed")
    return EvaluationReport(tuple(scores))


def _finished(folder: MaskFolder, clip: str) -> ClipScore | None:
    """The score of a clip that an earlier run finished; None if there is none that can be read."""
    record = folder.finished(clip)
    try:
        return None if record is None else ClipScore.from_record(record)
    except (LookupError, TypeError, ValueError):
        return None


def _announcement(data: DataSet, clips: Sequence[Clip], plans: Sequence[Mapping[str, frozenset[int]]]) -> str:
    """What is going to be scored."""
    frames = sum(len(clip.frames) for clip in clips)
    scored = [plan for plan in plans if plan]
    objects = sum(len(frozenset().union(*plan.values())) for plan in scored)
    what = f"{objects} objects are scored on {sum(len(plan) for plan in scored)} annotated frames"
    if len(scored) < len(plans):
        what += f"; {len(plans) - len(scored)} clips have no truth and no score"
    return (
        f"{data.name} ({data.origin}): {len(clips)} clips, {frames} frames; {what if scored else 'no score'}"
    )


# --- one clip ------------------------------------------------------------------------------------


def _evaluate_clip(
    clip: Clip,
    segmenter: Segmenter,
    data: DataSet,
    truth: Truth,
    plan: Mapping[str, frozenset[int]],
    folder: MaskFolder | None,
) -> ClipScore:
    sums: dict[int, list[tuple[float, float]]] = {}
    given: set[int] = set()
    state = segmenter.new_state()
    seconds = 0.0
    memory = PeakMemory(getattr(segmenter, "device", None))
    decoded: Prefetch[tuple[Path, NDArray[np.uint8]]] = Prefetch(_decode(clip.frames), depth=4)
    try:
        for path, frame in decoded:
            true, void = _truth(clip, path, frame.shape[:2], data, truth)
            new = [] if true is None else [int(i) for i in np.unique(true) if i and int(i) not in given]
            prompt = Prompt({i: true == i for i in new}) if new and true is not None else None
            started = time.perf_counter()
            result = segmenter.step(state, frame, prompt)
            labels = result.label_map
            if not isinstance(labels, np.ndarray):
                labels = labels.cpu().numpy()  # within the measured time: on a GPU this waits for the step
            seconds += time.perf_counter() - started
            if labels.shape != frame.shape[:2]:
                raise UsageError(
                    f"the segmenter gave labels of {labels.shape} for a frame of {frame.shape[:2]}"
                )
            if true is not None:
                for object_id in sorted(plan.get(path.stem, ())):
                    score = _score(labels == object_id, true == object_id, void)
                    sums.setdefault(object_id, []).append(score)
            given.update(new)
            if folder is not None and given and (clip.asked is None or path.stem in clip.asked):
                folder.write(clip.name, path.stem, labels, result)
    finally:
        decoded.close()
    means = [(i, len(s), *np.mean(s, axis=0).tolist()) for i, s in sorted(sums.items())]
    objects = tuple(ObjectScore(i, j, f, count) for i, count, j, f in means)
    return ClipScore(clip.name, objects, len(clip.frames), seconds, memory.bytes())


def _decode(frames: Sequence[Path]) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    for path in frames:
        yield path, read_frame(path)


def _truth(
    clip: Clip, path: Path, size: tuple[int, ...], data: DataSet, truth: Truth
) -> tuple[NDArray[np.int32] | None, Mask | None]:
    """The true label map of a frame, and the pixels that are not scored; None where there is none."""
    if path.stem not in clip.annotations:
        return None, None
    annotation = clip.annotations[path.stem]
    true = read_labels(annotation)
    if true.shape != size:
        raise UsageError(
            f"{annotation} is {true.shape[1]}x{true.shape[0]}, its frame {size[1]}x{size[0]}: "
            "they must be of one size"
        )
    if truth.binary:
        return (true > 0).astype(np.int32), None
    marked = true == VOID
    if data.burst is not None or not marked.any():
        return true, None
    return np.where(marked, np.int32(0), true), marked


# --- the measures --------------------------------------------------------------------------------


def _score(mask: Mask, truth: Mask, void: Mask | None) -> tuple[float, float]:
    if void is not None:
        mask, truth = mask & ~void, truth & ~void
    return region_similarity(mask, truth), boundary_accuracy(mask, truth)


def region_similarity(mask: Mask, truth: Mask) -> float:
    """J, 0 to 1, of two H x W bool masks: intersection over union; 1 where both are empty."""
    union = int(np.count_nonzero(mask | truth))
    return int(np.count_nonzero(mask & truth)) / union if union else 1.0


def boundary_accuracy(mask: Mask, truth: Mask, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """F, 0 to 1, of two H x W bool masks: how well their outlines match.

    Args:
        mask: what is measured.
        truth: against what.
        tolerance: how far apart matching pixels may be: a share of the diagonal, or pixels from 1 on.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*mask.shape))
    found, expected = outline(mask), outline(truth)
    found_count, expected_count = int(found.sum()), int(expected.sum())
    if not found_count or not expected_count:
        return 1.0 if found_count == expected_count else 0.0
    # Only where outlines are, plus the reach of a match: on most frames a small part of the picture.
    rows, columns = np.nonzero(found | expected)
    window = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    found, expected = found[window], expected[window]
    precision = int((found & _grown(expected, int(radius))).sum()) / found_count
    recall = int((expected & _grown(found, int(radius))).sum()) / expected_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Mask) -> Mask:
    """H x W outline of a mask: pixels that differ from their right, lower or lower right neighbour.

    In the last row and column only the neighbour that exists counts, so the lower right corner never does.
    """
    lines = np.zeros_like(mask)
    lines[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    lines[:-1] |= mask[:-1] != mask[1:]
    lines[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return lines


def _grown(lines: Mask, radius: int) -> Mask:
    """All pixels within `radius` of one that is set; beyond the picture nothing is."""
    reach = np.arange(-radius, radius + 1) ** 2
    disk = (reach[:, None] + reach[None, :] <= radius**2).astype(np.uint8)
    grown = cv2.dilate(lines.astype(np.uint8), disk, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(grown, np.bool_)
