"""The training images on disk, with a cache of decoded ones.

`root` has `stills/{ecssd,people,coco}/*.jpg` with a PNG of the same stem (0 the background, then one value
per object) and `davis/{JPEGImages,Annotations}/<clip>/`. Each of them is optional.
"""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

log = logging.getLogger(__name__)

STILL_KINDS = ("ecssd", "people", "coco")


class Library:
    """Lists and decodes the training pictures. Pictures are RGB uint8, label images uint8 of the same size.

    `held_out_people`: this many stills of `people`, the last by name, are never used for training: evaluation
        on
    crowds composes its scenes from them. Raises FileNotFoundError if `root` has no pictures at all.
    """

    def __init__(self, root: str | Path, held_out_people: int = 100, longest: int = 384) -> None:
        self.root = Path(root)
        self.longest = longest
        self.stills: dict[str, list[Path]] = {}
        for kind in STILL_KINDS:
            pictures = sorted((self.root / "stills" / kind).glob("*.jpg"))
            if kind == "people" and held_out_people:
                pictures = pictures[:-held_out_people]
            self.stills[kind] = [p for p in pictures if p.with_suffix(".png").exists()]
        self.clips: list[list[tuple[Path, Path]]] = []
        for folder in sorted((self.root / "davis" / "JPEGImages").glob("*")):
            labels = self.root / "davis" / "Annotations" / folder.name
            pairs = [(p, labels / f"{p.stem}.png") for p in sorted(folder.glob("*.jpg"))]
            pairs = [pair for pair in pairs if pair[1].exists()]
            if len(pairs) > 1:
                self.clips.append(pairs)
        if not self.clips and not any(self.stills.values()):
            raise FileNotFoundError(
                f"no training pictures under {self.root}: "
                "expected stills/{ecssd,people,coco} or davis/JPEGImages in it"
            )
        self._pictures: dict[Path, tuple[Image, Image]] = {}
        self._emptied: dict[Path, Image] = {}
        log.info(
            "training pictures: %s, %d clips",
            ", ".join(f"{len(self.stills[k])} {k}" for k in STILL_KINDS),
            len(self.clips),
        )

    def still(self, kind: str, index: int) -> tuple[Image, Image]:
        """The index-th still of a kind: picture (H, W, 3) and labels (H, W). Treat both as read-only."""
        path = self.stills[kind][index]
        return self._read(path, path.with_suffix(".png"))

    def clip_frame(self, clip: int, frame: int) -> tuple[Image, Image]:
        """One frame of a video clip: picture (H, W, 3) and labels (H, W). Treat both as read-only."""
        return self._read(*self.clips[clip][frame])

    def emptied_still(self, kind: str, index: int) -> Image:
        """Return a still with its labelled objects inpainted; cached for the next call."""
        path = self.stills[kind][index]
        if path not in self._emptied:
            picture, labels = self.still(kind, index)
            self._emptied[path] = paint_over(picture, labels > 0)
        return self._emptied[path]

    def _read(self, picture_path: Path, label_path: Path) -> tuple[Image, Image]:
        if picture_path not in self._pictures:
            bgr = cv2.imread(str(picture_path), cv2.IMREAD_COLOR)
            labels = cv2.imread(str(label_path), cv2.IMREAD_UNCHANGED)
            if bgr is None or labels is None:
                raise OSError(f"cannot decode {picture_path} or {label_path}")
            if labels.ndim == 3:
                labels = labels[..., 0]
            scale = min(1.0, self.longest / max(bgr.shape[:2]))
            size = (max(1, round(bgr.shape[1] * scale)), max(1, round(bgr.shape[0] * scale)))
            rgb = cv2.cvtColor(cv2.resize(bgr, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
            # Label images may differ from their JPEG by a few pixels (aspect rounding): the JPEG decides.
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
            self._pictures[picture_path] = (np.asarray(rgb, np.uint8), labels.astype(np.uint8))
        return self._pictures[picture_path]


def paint_over(picture: Image, hole: NDArray[np.bool_]) -> Image:
    """Fill `hole` in a picture, cheaply: with a shifted copy of the scene beside it, and smooth inpainting.

    A shifted copy keeps texture and the height of the horizon; what the shift cannot reach is inpainted at an
    eighth of the size and is smooth.
    """
    if not hole.any():
        return picture
    grown = cv2.dilate(hole.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    result = picture.copy()
    columns = np.flatnonzero(grown.any(axis=0))
    width = int(columns[-1] - columns[0] + 1)
    for shift in (width, -width):
        source, source_hole = np.roll(picture, shift, axis=1), np.roll(grown, shift, axis=1)
        if shift > 0:
            source_hole[:, :shift] = True
        else:
            source_hole[:, shift:] = True
        use = grown & ~source_hole
        result[use] = source[use]
        grown &= ~use
    if grown.any():
        height, width = hole.shape
        small_size = (max(4, width // 8), max(4, height // 8))
        small = cv2.resize(result, small_size, interpolation=cv2.INTER_AREA)
        small_hole = cv2.resize(grown.astype(np.uint8) * 255, small_size, interpolation=cv2.INTER_AREA) > 0
        if small_hole.all():
            return np.full_like(picture, picture.mean(axis=(0, 1)).astype(np.uint8))
        filled = cv2.inpaint(small, small_hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
        result[grown] = cv2.resize(filled, (width, height), interpolation=cv2.INTER_CUBIC)[grown]
    return result
