"""BURST: annotations in JSON files with COCO RLE, on some frames of each video (Athar et al., WACV 2023).

ROOT/val/all_classes.json                            or ROOT/annotations/val/..., or the part's folder as ROOT
ROOT/frames/val/<dataset>/<sequence>/<frame>.jpg     or images/, or without val/

An object is scored on the annotated frames after its first, where it has no mask as one that is out of sight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError
from pipeline.tracks.masks import label_map_from_rles, run_lengths

PARTS = ("val", "test", "train")
"""In the order in which they are tried."""

_FILES = ("all_classes", "common_classes", "uncommon_classes", "first_frame_annotations")
_IMAGES = ("frames", "images", "JPEGImages")


@dataclass(frozen=True)
class RleAnnotation:
    """A frame's masks.

    Args:
        where: the file and frame, for messages.
        rles: COCO compressed counts by object.
        height, width: of the frame.
    """

    where: str
    rles: Mapping[int, str]
    height: int
    width: int

    def __str__(self) -> str:
        return self.where

    def labels(self) -> NDArray[np.int32]:
        """(H, W) label map; where masks overlap, the smaller one is on top. UsageError if one is damaged."""
        try:
            areas = {
                i: int(run_lengths(c, self.height, self.width)[1::2].sum()) for i, c in self.rles.items()
            }
            ordered = {i: self.rles[i] for i in sorted(self.rles, key=lambda i: (-areas[i], i))}
            return label_map_from_rles(ordered, self.height, self.width)
        except ValueError as error:
            raise UsageError(f"{self.where}: {error}") from None


@dataclass(frozen=True)
class Video:
    """A sequence of the file.

    Args:
        name: `<dataset>/<sequence>`.
        frames: pictures to track, in order.
        annotations: masks of annotated frames, by the frame's name.
        annotated: names of the annotated frames, also of those whose masks the file leaves out.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: Mapping[str, RleAnnotation]
    annotated: frozenset[str]


class BurstFile:
    """A JSON file of annotations, and where its pictures are.

    Args:
        path: the file.
        root: the data set's folder.

    Raises:
        UsageError: the file has another format.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self._root = path, root
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            self._sequences = {f"{s['dataset']}/{s['seq_name']}": s for s in values["sequences"]}
            self.part = str(values.get("split", path.parent.name))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path} is no annotation file of BURST: {what}") from None
        for name in self._sequences:
            if ".." in name or name.startswith("/") or "\\" in name:
                raise UsageError(
                    f"{path}: the name {name!r} of a sequence is not allowed: it leaves the folder"
                )
        if not self.names:
            raise UsageError(f"{path} has no sequence with masks")

    @property
    def names(self) -> list[str]:
        """`<dataset>/<sequence>` of each that has masks, in the file's order."""
        return [name for name, sequence in self._sequences.items() if any(sequence.get("segmentations", ()))]

    @cached_property
    def _first_only(self) -> bool:
        """Whether no object has a second mask, as in `first_frame_annotations.json`."""
        for sequence in self._sequences.values():
            seen: set[str] = set()
            for shown in sequence["segmentations"]:
                if seen & set(shown):
                    return False
                seen |= set(shown)
        return True

    def video(self, name: str) -> Video:
        """A sequence. UsageError if it is damaged or its pictures are missing."""
        sequence = self._sequences[name]
        try:
            every = [str(n) for n in sequence["all_image_paths"]]
            annotated = [str(n) for n in sequence["annotated_image_paths"]]
            size = int(sequence["height"]), int(sequence["width"])
            shown = [
                {int(i): str(entry["rle"]) for i, entry in each.items()} for each in sequence["segmentations"]
            ]
            first_only = self._first_only
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"{self.path}: sequence {name} is damaged: {what}") from None
        if len(shown) != len(annotated) or not set(annotated) <= set(every):
            raise UsageError(f"{self.path}: sequence {name} is damaged: masks and frames do not fit together")
        folder = self._pictures(name)
        frames = [folder / n for n in every if (folder / n).is_file()]
        if len(frames) < len(every):
            missing = [n for n in annotated if not (folder / n).is_file()]
            frames = [folder / n for n in annotated]  # a download of the annotated frames only
            if missing or len(frames) < sum((folder / n).is_file() for n in every):
                lost = next(n for n in (missing or every) if not (folder / n).is_file())
                raise UsageError(
                    f"{folder} has no frame {lost}, which {self.path} names: complete the images"
                )
        annotations = {
            Path(n).stem: RleAnnotation(f"{self.path}, {name}, {n}", each, *size)
            for n, each in zip(annotated, shown, strict=True)
            if each or not first_only
        }
        return Video(name, tuple(frames), annotations, frozenset(Path(n).stem for n in annotated))

    def _pictures(self, name: str) -> Path:
        tops = [self._root / layer for layer in _IMAGES] + [self._root.parent / layer for layer in _IMAGES]
        places = [top / between / name for top in tops for between in (self.part, "")]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise UsageError(f"there is no folder {places[0]} with the frames of {name}")
        return found


def find_burst(root: Path, split: str | None) -> BurstFile | None:
    """The annotations below `root` that a split names (`val`, `val/common_classes`, a JSON file).

    Default: `all_classes.json` of the first part. None if `root` is not laid out as BURST.

    Raises:
        UsageError: the split is not there, or its file is not of BURST.
    """
    if split is not None and split.endswith(".json") and Path(split).is_file():
        return BurstFile(Path(split), root)
    for top in (root, root / "annotations", root.parent):
        parts = PARTS if top != root.parent else tuple(p for p in PARTS if p == root.name)
        there = {
            f"{part}/{file}": top / part / f"{file}.json"
            for file in _FILES
            for part in parts
            if (top / part / f"{file}.json").is_file()
        }
        if not there:
            continue
        wanted: Sequence[str] = list(there)
        if split is not None:
            wanted = [n for n in there if n == split or n.partition("/")[0] == split]
            if not wanted:
                raise UsageError(f"{top} has no part {split!r}; it has {', '.join(sorted(there))}")
        base = top if top != root / "annotations" else root
        return BurstFile(there[wanted[0]], base)
    return None


def predictions(path: Path, masks: Mapping[str, Mapping[str, Mapping[int, str]]]) -> dict[str, Any]:
    """The content of a file for BURST's evaluation: that of the annotations, with other masks.

    Args:
        path: the annotations.
        masks: COCO counts by sequence, frame's name and object; sequences that it lacks are left out.
    """
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = []
    for sequence in values["sequences"]:
        found = masks.get(f"{sequence['dataset']}/{sequence['seq_name']}")
        if found is None:
            continue
        sequence["segmentations"] = [
            {str(i): {"rle": rle} for i, rle in found.get(Path(name).stem, {}).items()}
            for name in sequence["annotated_image_paths"]
        ]
        kept.append(sequence)
    return values | {"sequences": kept}
