"""Photographs from which the suites cut actors: held-out people, objects, and backgrounds.

`root` has the layout of the training data: `stills/{people,ecssd,coco}/*.jpg`, each with a PNG of the same
stem, 0 the background. Its parent folder, with a `train/` in it, is accepted, too.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.suites.stage import Image, Rng, walk_phases
from pipeline.base.errors import UsageError
from xmem_core.training.compose import cut_out

HELD_OUT_PEOPLE = 100
"""Number of people, the last by file name, that are never trained on (`Library` of xmem_core.training)."""

# Largest object in a background, as a share of the picture: places, not portraits.
_LARGEST_OBJECT = 0.25


class Pictures:
    """Decoded stills, kept in memory.

    Args:
        root: see the module docstring.
        held_out: people from the stills that training never uses; False: from those that it uses, to fit
            something that is later measured on the others.

    Raises:
        UsageError: the folder has no people or no backgrounds.
    """

    def __init__(self, root: str | Path, held_out: bool = True) -> None:
        base = Path(root)
        if not (base / "stills").is_dir() and (base / "train" / "stills").is_dir():
            base = base / "train"
        # Counted as in `Library`: by picture name, whether or not there is a mask.
        people = sorted((base / "stills" / "people").glob("*.jpg"))
        people = people[-HELD_OUT_PEOPLE:] if held_out else people[:-HELD_OUT_PEOPLE]
        self.people = [p for p in people if p.with_suffix(".png").exists()]
        self.objects = _stills(base / "stills" / "ecssd")
        self.scenery = _stills(base / "stills" / "coco") or self.objects
        if not self.people or not self.scenery:
            raise UsageError(
                f"{root} has no pictures to compose scenes from: it must have stills/people and stills/coco, "
                "JPEG files, each with a PNG mask"
            )
        self._cut: dict[Path, Image | None] = {}

    def person(self, index: int) -> Image:
        """Cut-out of the index-th person: RGBA."""
        piece = self._piece(self.people[index % len(self.people)])
        return self.person(index + 1) if piece is None else piece

    def walker(self, index: int) -> tuple[Image, ...]:
        """The phases of the index-th person's gait, RGBA."""
        return walk_phases(self.person(index))

    def objects_like(self, rng: Rng, tall: float = 0.9) -> Image:
        """Choose an object that is not a person and lies within its picture, as an RGBA cut-out.

        Objects come from pictures that are trained on: scenes with them measure the effect of a camera fault
        or a kind of motion, not generalisation to new objects.
        """
        for index in rng.permutation(len(self.objects)):
            piece = self._piece(self.objects[index], whole=True)
            if piece is not None and min(piece.shape[:2]) > 0.35 * max(piece.shape[:2]):
                return piece
        return self.person(int(rng.integers(len(self.people))))

    def background(self, rng: Rng, size: tuple[int, int]) -> Image:
        """A real picture cropped to (height, width): a place without a very large object."""
        height, width = size
        for index in rng.permutation(len(self.scenery)):
            path = self.scenery[index]
            picture, labels = _read(path)
            if max(np.bincount(labels.ravel())[1:], default=0) > _LARGEST_OBJECT * labels.size:
                continue
            if picture.shape[1] < picture.shape[0]:
                continue
            break
        else:
            picture, _ = _read(self.scenery[int(rng.integers(len(self.scenery)))])
        scale = max(height / picture.shape[0], width / picture.shape[1]) * rng.uniform(1.0, 1.2)
        large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        large = cv2.copyMakeBorder(
            large, 0, max(0, height - large.shape[0]), 0, max(0, width - large.shape[1]), cv2.BORDER_REFLECT
        )
        top = int(rng.integers(large.shape[0] - height + 1))
        left = int(rng.integers(large.shape[1] - width + 1))
        return np.ascontiguousarray(large[top : top + height, left : left + width], np.uint8)

    def _piece(self, path: Path, whole: bool = False) -> Image | None:
        if path not in self._cut:
            picture, labels = _read(path)
            mask = labels > 0
            border = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
            self._cut[path] = None if whole and border else cut_out(picture, mask)
        return self._cut[path]


def look(picture: Image) -> NDArray[np.float64]:
    """Rough appearance of a person: mean Lab colour of the upper, middle and lower third, (9,)."""
    lab = cv2.cvtColor(np.ascontiguousarray(picture[..., :3]), cv2.COLOR_RGB2LAB).astype(np.float64)
    means = []
    for part, alpha in zip(np.array_split(lab, 3), np.array_split(picture[..., 3], 3), strict=True):
        solid = alpha > 127
        means.append(part[solid].mean(axis=0) if solid.any() else np.zeros(3))
    return np.concatenate(means)


def _stills(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("*.jpg")) if p.with_suffix(".png").exists()]


def _read(path: Path) -> tuple[Image, Image]:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    labels = cv2.imread(str(path.with_suffix(".png")), cv2.IMREAD_UNCHANGED)
    if bgr is None or labels is None:
        raise UsageError(f"{path} or its mask cannot be decoded as a picture")
    if labels.ndim == 3:
        labels = labels[..., 0]
    size = (bgr.shape[1], bgr.shape[0])
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8), np.asarray(labels, np.uint8)
