"""The data sets of a stage: which files are there, checked before training, and reading them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.pictures import read_annotation, read_frame
from jobs.training.settings import Source
from pipeline.base.errors import UsageError

log = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class Item:
    """A still, or a clip with at least two frames.

    Args:
        frames: pictures, in order.
        masks: a PNG for each.
        source: the data set that it belongs to.
    """

    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    source: Source

    def read(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """One frame: RGB (H, W, 3) and labels (H, W).

        Raises UsageError if a file cannot be read, or their sizes differ.
        """
        picture, labels = read_frame(self.frames[number]), read_annotation(self.masks[number])
        if picture.shape[:2] != labels.shape:
            raise UsageError(
                f"{self.masks[number]} is {labels.shape[1]}x{labels.shape[0]}, its picture "
                f"{picture.shape[1]}x{picture.shape[0]}: they must be of one size"
            )
        if labels.max(initial=0) > 255:
            raise UsageError(f"{self.masks[number]} has the value {labels.max()}: 0 to 255 are allowed")
        if self.source.layout != "clips":  # one object, soft edges
            labels = (labels > (127 if labels.max(initial=0) > 1 else 0)).astype(np.int32)
        return picture, labels.astype(np.uint8)


def find_items(root: Path, sources: tuple[Source, ...], frames: int) -> list[Item]:
    """All items of a stage's data sets, each as often as its data set is repeated.

    Args:
        root: the data folder.
        sources: data sets below it.
        frames: clips with fewer frames are left out.

    Raises:
        UsageError: a data set is missing or laid out otherwise, or a split names clips that are not there.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is no folder: --data names the folder with the data sets")
    found: list[Item] = []
    missing = []
    for source in sources:
        place = next((root / f for f in source.folders if (root / f).is_dir()), None)
        if place is None:
            missing.append(source.folders[0])
            if not source.optional:
                raise UsageError(
                    f"{root} has no folder {' or '.join(source.folders)}, which this stage needs"
                )
            continue
        items = _clips(root, place, source, frames) if source.layout == "clips" else _stills(place, source)
        if not items:
            what = f"clip of {frames} frames" if source.layout == "clips" else "still"
            raise UsageError(
                f"{place} has no {what} of the layout {source.layout!r}: {_EXPECTED[source.layout]}"
            )
        log.info("%s: %d items, each %d times per epoch", place, len(items), source.repeat)
        found += items * source.repeat
    if not found:
        raise UsageError(f"{root} has none of the folders {', '.join(missing)}: one at least is needed")
    if missing:
        log.warning("%s has no %s: training goes on without", root, ", ".join(missing))
    return found


_EXPECTED = {
    "fss": "need a folder per class with 1.jpg and 1.png",
    "pairs": "need x.jpg and x.png",
    "clips": "need JPEGImages/<clip>/*.jpg and Annotations/<clip>/*.png",
}


def _stills(place: Path, source: Source) -> list[Item]:
    pattern = "*/*" if source.layout == "fss" else "*"
    items = []
    for picture in sorted(p for p in place.glob(pattern) if p.suffix.lower() in _SUFFIXES):
        mask = picture.with_suffix(".png")
        if not mask.exists():
            raise UsageError(f"{picture} has no mask {mask.name} beside it")
        items.append(Item((picture,), (mask,), source))
    return items


def _clips(root: Path, place: Path, source: Source, least: int) -> list[Item]:
    layers = [place / name for name in ("JPEGImages", "Annotations")]
    layers = [layer / "480p" if (layer / "480p").is_dir() else layer for layer in layers]
    for layer in layers:
        if not layer.is_dir():
            raise UsageError(f"{place} has no folder {layer.name}: {_EXPECTED['clips']}")
    images, masks = layers
    names = sorted(p.name for p in images.iterdir() if p.is_dir())
    if source.split:
        path = place / "ImageSets" / f"{source.split}.txt"
        if source.split.endswith(".txt"):
            path = root / source.split
        if not path.is_file():
            raise UsageError(f"there is no list {path}, which says what clips of {place} are for training")
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if absent := sorted(set(listed) - set(names)):
            raise UsageError(
                f"{path} names clip {absent[0]!r}, which is not in {images} ({len(absent)} missing)"
            )
        names = listed
    items = []
    for name in names:
        frames = sorted(p for p in (images / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        pairs = [(p, masks / name / f"{p.stem}.png") for p in frames]
        pairs = [pair for pair in pairs if pair[1].exists()]
        if not pairs:
            raise UsageError(f"{masks / name} has no mask of a frame of {images / name}")
        if len(pairs) >= least:
            items.append(Item(tuple(p for p, _ in pairs), tuple(m for _, m in pairs), source))
    return items
