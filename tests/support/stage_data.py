"""Made-up data sets of the published training stages, in their layouts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.pictures import grey_png, palette_png


def square(shift: int, height: int = 64, width: int = 80) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture with a red and a green square that move in x, and its labels."""
    picture = np.random.default_rng(3).integers(90, 130, (height, width, 3), dtype=np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[8:44, 6 + shift : 38 + shift] = 1
    labels[20:60, 42 + shift : 70 + shift] = 2
    picture[labels == 1] = (230, 40, 40)
    picture[labels == 2] = (40, 220, 40)
    return picture, labels


def write_stage_data(root: Path, clips: int = 2, frames: int = 4) -> Path:
    """`static` (FSS style and pairs), `BL30K`, `DAVIS` (with a clip that is not for training), `YouTube`."""
    for folder, names in (("fss/cup", ("1", "2")), ("DUTS-TR", ("a", "b"))):
        place = root / "static" / folder
        place.mkdir(parents=True)
        for shift, name in enumerate(names):
            picture, labels = square(shift)
            _write(place / f"{name}.jpg", picture)
            (place / f"{name}.png").write_bytes(grey_png(np.where(labels == 1, 255, 0)))
    for folder, between in (("BL30K", ""), ("DAVIS", "480p"), ("YouTube/train", "")):
        for clip in range(clips):
            for frame in range(frames):
                picture, labels = square(2 * frame)
                for layer in ("JPEGImages", "Annotations"):
                    (root / folder / layer / between / f"clip{clip}").mkdir(parents=True, exist_ok=True)
                place = root / folder / "JPEGImages" / between / f"clip{clip}"
                _write(place / f"{frame:05d}.jpg", picture)
                place = root / folder / "Annotations" / between / f"clip{clip}"
                (place / f"{frame:05d}.png").write_bytes(palette_png(labels))
    lists = root / "DAVIS" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("clip0\n")
    (lists / "val.txt").write_text("clip1\n")
    return root


def _write(path: Path, picture: NDArray[np.uint8]) -> None:
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
