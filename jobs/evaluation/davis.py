"""Evaluation on labelled data sets: region similarity J and boundary accuracy F.

The conventions are those of the DAVIS toolkits for semi-supervised segmentation:

- J of an object on a frame is intersection over union of its mask and the true one; 1 where both are empty.
- F compares outlines. A pixel is on an outline when it differs from its right, lower or lower right
  neighbour. Outline pixels match when one of the other outline lies within ceil(0.008 x the image's diagonal)
  pixels; F is the harmonic mean of the two matched shares: 1 where both outlines are missing, 0 where one is.
- The first frame is given and the last one is left out. An object's J and F are means over the other frames,
  a clip's over its objects, and the overall figures are means over all objects of all clips.

Layouts: DAVIS-2016 and 2017, and anything laid out alike. Where there is `ImageSets/`, the clips are those of
its validation list. Annotations that cannot give a score are refused before anything is tracked: those of
first frames only (DAVIS test-dev), and those that hold only the objects that are new on a frame
(YouTube-VOS).

DAVIS leaves open, and here: an object that first shows on a later frame is given there and scored from the
next one on. Frames without an annotation are tracked and not scored. The value 255 is object 1 in clips that
hold nothing else (DAVIS-2016), else it marks pixels that count for nobody. `max_frames` cuts a clip as if it
ended there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pipeline.base.errors import PromptError, UsageError
from pipeline.base.picture_size import MAX_PIXELS, check_size, header_size
from pipeline.prompts.index_png import decode_index_png
from pipeline.video.prefetch import Prefetch
from xmem_core import Prompt

BOUNDARY_TOLERANCE = 0.008
"""How far apart matching outline pixels may lie, as a share of the image's diagonal."""

_VOID = 255

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
    """One clip's objects, and how fast its frames were segmented (decoding and scoring not counted)."""

    name: str
    objects: tuple[ObjectScore, ...]
    frames: int
    seconds: float

    @property
    def j(self) -> float:
        """Mean J of the objects, 0 to 1."""
        return float(np.mean([o.j for o in self.objects]))

    @property
    def f(self) -> float:
        """Mean F of the objects, 0 to 1."""
        return float(np.mean([o.f for o in self.objects]))

    @property
    def frames_per_second(self) -> float:
        """Frames segmented per second of segmenting."""
        return self.frames / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The scores of a data set."""

    clips: tuple[ClipScore, ...]

    @property
    def j(self) -> float:
        """Mean J of all objects of all clips, 0 to 1."""
        return float(np.mean([o.j for clip in self.clips for o in clip.objects]))

    @property
    def f(self) -> float:
        """Mean F of all objects of all clips, 0 to 1."""
        return float(np.mean([o.f for clip in self.clips for o in clip.objects]))

    def to_json(self) -> dict[str, Any]:
        """{"overall": {"J&F", "J", "F"}, "clips": {name: ... and "frames_per_second"}}, in percent."""
        return {
            "overall": _percent(self.j, self.f),
            "clips": {
                clip.name: _percent(clip.j, clip.f) | {"frames_per_second": round(clip.frames_per_second, 3)}
                for clip in self.clips
            },
        }

    def table(self) -> Table:
        """The scores as a table for the terminal."""
        table = Table()
        for name in ("clip", "J&F", "J", "F", "objects", "frames", "frames/s"):
            table.add_column(name, justify="left" if name == "clip" else "right")
        for clip in self.clips:
            scores = _percent(clip.j, clip.f).values()
            rest = (str(len(clip.objects)), str(clip.frames), f"{clip.frames_per_second:.1f}")
            table.add_row(clip.name, *(f"{s:.1f}" for s in scores), *rest)
        frames, seconds = sum(c.frames for c in self.clips), sum(c.seconds for c in self.clips)
        objects = sum(len(c.objects) for c in self.clips)
        table.add_section()
        table.add_row(
            "overall",
            *(f"{s:.1f}" for s in _percent(self.j, self.f).values()),
            str(objects),
            str(frames),
            f"{frames / max(seconds, 1e-9):.1f}",
            style="bold",
        )
        return table


def _percent(j: float, f: float) -> dict[str, float]:
    return {"J&F": round(50 * (j + f), 3), "J": round(100 * j, 3), "F": round(100 * f, 3)}


def run(
    root: str | Path,
    segmenter: Segmenter,
    *,
    clips: Sequence[str] | None = None,
    max_frames: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Segment every clip of a data set from its first annotation on, and score the result.

    Args:
        root: folder of JPEGImages/[480p/]<clip>/*.jpg and Annotations/[480p/]<clip>/*.png; with
            ImageSets/2017/val.txt, ImageSets/2016/val.txt or ImageSets/480p/val.txt, the first of them
            that is there says which clips are evaluated.
        segmenter: follows the objects; gets a new state per clip.
        clips: only these, whatever ImageSets says; default all, or those of the list.
        max_frames: cut clips to so many frames, at least 3.
        progress: called with a line of text per clip.

    Raises:
        UsageError: the folder is laid out otherwise, its annotations do not allow a score, a clip is unknown,
            or a file in it is unusable.
    """
    if max_frames is not None and max_frames < 3:
        raise UsageError(f"{max_frames} frames per clip leave none to score: give at least 3")
    _refuse_youtube_vos(Path(root))
    listed = None if clips else _validation_list(Path(root))
    wanted = clips if listed is None else listed.clips
    found = [clip.cut(max_frames) for clip in _find_clips(Path(root), wanted)]
    kinds = [_check_scorable(clip) for clip in found]  # of all clips, before the first is tracked
    if listed is not None and progress is not None:
        progress(f"{listed.path}: {len(found)} clips")
    scores = []
    for number, (clip, binary) in enumerate(zip(found, kinds, strict=True), 1):
        score = _evaluate_clip(clip, segmenter, binary)
        scores.append(score)
        if progress is not None:
            numbers = ", ".join(f"{k} {v:.1f}" for k, v in _percent(score.j, score.f).items())
            rate = f"{score.frames} frames at {score.frames_per_second:.1f}/s"
            progress(f"{number}/{len(found)} {clip.name}: {numbers} ({rate})")
    return EvaluationReport(tuple(scores))


# --- the data set --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Clip:
    name: str
    frames: tuple[Path, ...]
    annotations: dict[str, Path]

    def cut(self, most: int | None) -> _Clip:
        frames = self.frames[:most]
        names = {path.stem for path in frames}
        return _Clip(self.name, frames, {n: p for n, p in self.annotations.items() if n in names})


@dataclass(frozen=True, slots=True)
class _ClipList:
    path: Path
    clips: tuple[str, ...]


def _refuse_youtube_vos(root: Path) -> None:
    """UsageError for a root of YouTube-VOS, or the folder that its parts are in."""
    parts = [name for name in ("valid", "train", "test", "all_frames") if (root / name).is_dir()]
    parts = [name for name in parts if not (root / "JPEGImages").is_dir()]
    if (root / "meta.json").is_file():
        sign = "meta.json"
    elif parts:
        sign = f"{parts[0]}/ in place of JPEGImages/"
    else:
        return
    raise UsageError(
        f"{root} is laid out as YouTube-VOS is ({sign}), which is not supported: its annotations hold new "
        "objects only and its scores come from the benchmark's server; give a folder laid out as DAVIS is"
    )


def _validation_list(root: Path) -> _ClipList | None:
    """The clips that ImageSets/ names for validation; None where there is no such folder."""
    if not (root / "ImageSets").is_dir():
        return None
    for path in (root / "ImageSets" / year / "val.txt" for year in ("2017", "2016", "480p")):
        if path.is_file():
            break
    else:
        raise UsageError(
            f"{root / 'ImageSets'} has no 2017/val.txt, 2016/val.txt or 480p/val.txt, and no other list can "
            "be scored (test-dev has masks of first frames only): name clips with --clip"
        )
    # A line is a clip's name or, in DAVIS-2016, /JPEGImages/480p/<clip>/<frame>.jpg and its annotation.
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [line.strip("/").split("/")[-2] if "/" in line.strip("/") else line for line in lines]
    if not names:
        raise UsageError(f"{path} names no clip")
    missing = [name for name in names if not (_layer(root, "JPEGImages") / name).is_dir()]
    if missing:
        raise UsageError(
            f"{path} names clip {missing[0]!r}, which is not in {_layer(root, 'JPEGImages')}: complete the "
            "data set, or name clips with --clip"
        )
    return _ClipList(path, tuple(dict.fromkeys(names)))


def _check_scorable(clip: _Clip) -> bool:
    """UsageError if a clip's annotations allow no score. Whether its value 255 is object 1."""
    values = [
        frozenset(np.unique(_read_annotation(clip.annotations[path.stem])).tolist()) - {0}
        for path in clip.frames
        if path.stem in clip.annotations
    ]
    binary = frozenset().union(*values) == {_VOID}
    shown = values if binary else [v - {_VOID} for v in values]
    given: set[int] = set()
    again = False  # whether an object is annotated on a later frame than the one it is given on
    later = False  # whether an object is given after others
    for here in shown:
        again |= bool(here & given)
        later |= bool(given and here - given)
        given |= here
    if len(values) == 1:
        raise UsageError(
            f"clip {clip.name} cannot be scored: one of its {len(clip.frames)} frames has an annotation, as "
            "in DAVIS test-dev and the validation part of other benchmarks; those of later frames are needed"
        )
    if later and not again:
        raise UsageError(
            f"clip {clip.name} cannot be scored: each annotation holds only the objects that are new on its "
            "frame, as in YouTube-VOS, which is not supported; those of all objects are needed"
        )
    return binary


def _find_clips(root: Path, wanted: Sequence[str] | None) -> list[_Clip]:
    images, annotations = (_layer(root, name) for name in ("JPEGImages", "Annotations"))
    names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    if not names:
        raise UsageError(f"{images} holds no clip: need a folder of .jpg files per clip")
    for name in wanted or ():
        if name not in names:
            raise UsageError(f"no clip {name!r} in {images}; there are: {', '.join(names)}")
    return [_clip(images / n, annotations / n) for n in names if not wanted or n in wanted]


def _layer(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise UsageError(f"{root} is not laid out as DAVIS is: it has no folder {name}")
    return folder / "480p" if (folder / "480p").is_dir() else folder


def _clip(images: Path, annotations: Path) -> _Clip:
    frames = tuple(sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg")))
    if len(frames) < 3:
        raise UsageError(f"{images} has {len(frames)} .jpg files; a clip needs at least 3 frames")
    masks = {p.stem: p for p in sorted(annotations.glob("*.png"))}
    if not masks:
        raise UsageError(f"{annotations} has no .png file: clip {images.name} has no annotation")
    strays = sorted(set(masks) - {p.stem for p in frames})
    if strays:
        raise UsageError(f"{masks[strays[0]]} has no frame of that name in {images}")
    return _Clip(images.name, frames, masks)


def _read_frame(path: Path) -> NDArray[np.uint8]:
    data = path.read_bytes()
    size = header_size(data)
    if size is not None:
        check_size(str(path), *size, MAX_PIXELS)
    picture = None if size is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise UsageError(f"{path} cannot be decoded as a picture")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def _read_annotation(path: Path) -> NDArray[np.int32]:
    try:
        return decode_index_png(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except PromptError as error:
        raise UsageError(str(error)) from None


# --- one clip ------------------------------------------------------------------------------------


def _evaluate_clip(clip: _Clip, segmenter: Segmenter, binary: bool) -> ClipScore:
    frames = clip.frames
    sums: dict[int, list[tuple[float, float]]] = {}
    state = segmenter.new_state()
    seconds = 0.0
    decoded: Prefetch[tuple[Path, NDArray[np.uint8]]] = Prefetch(_decode(frames), depth=4)
    try:
        for number, (path, frame) in enumerate(decoded):
            truth, void = _truth(clip, path, frame.shape[:2], binary)
            new = [] if truth is None else [int(i) for i in np.unique(truth) if i and int(i) not in sums]
            prompt = Prompt({i: truth == i for i in new}) if new and truth is not None else None
            started = time.perf_counter()
            labels = segmenter.step(state, frame, prompt).label_map
            if not isinstance(labels, np.ndarray):
                labels = labels.cpu().numpy()  # within the measured time: on a GPU this waits for the step
            seconds += time.perf_counter() - started
            if labels.shape != frame.shape[:2]:
                raise UsageError(
                    f"the segmenter gave labels of {labels.shape} for a frame of {frame.shape[:2]}"
                )
            if truth is not None and 0 < number < len(frames) - 1:
                for object_id, scores in sums.items():
                    scores.append(_score(labels == object_id, truth == object_id, void))
            sums.update({i: [] for i in new})
    finally:
        decoded.close()
    means = [(i, len(s), *np.mean(s, axis=0).tolist()) for i, s in sorted(sums.items()) if s]
    if not means:
        raise UsageError(f"clip {clip.name}: no annotated object is left to score after its first frame")
    objects = tuple(ObjectScore(i, j, f, count) for i, count, j, f in means)
    return ClipScore(clip.name, objects, len(frames), seconds)


def _decode(frames: Sequence[Path]) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    for path in frames:
        yield path, _read_frame(path)


def _truth(
    clip: _Clip, path: Path, size: tuple[int, ...], binary: bool
) -> tuple[NDArray[np.int32] | None, Mask | None]:
    """The true label map of a frame, and the pixels that are not scored; None where there is none."""
    if path.stem not in clip.annotations:
        return None, None
    annotation = clip.annotations[path.stem]
    truth = _read_annotation(annotation)
    if truth.shape != size:
        raise UsageError(
            f"{annotation} is {truth.shape[1]}x{truth.shape[0]}, its frame {size[1]}x{size[0]}: "
            "they must be of one size"
        )
    marked = truth == _VOID
    if not marked.any():
        return truth, None
    return np.where(marked, np.int32(1 if binary else 0), truth), None if binary else marked


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
