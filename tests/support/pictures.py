"""Synthetic training pictures in the layout of the real ones: flat shapes with identifying colours."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

CLIP_LENGTH = 30


def write_pictures(root: Path, people: int = 6, clips: int = 2) -> Path:
    """stills/{ecssd,people,coco} and davis/ under root, small. Frame i of a clip has the gray level 4 i."""
    rng = np.random.default_rng(5)
    for kind, count in (("ecssd", 4), ("people", people), ("coco", 3)):
        folder = root / "stills" / kind
        folder.mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(90, 130, (80, 64, 3), dtype=np.uint8)
            labels = np.zeros((80, 64), np.uint8)
            labels[14:74, 22:42] = 1
            if kind == "coco":
                labels[20:50, 44:60] = 2
            picture[labels == 1] = (40, 40, 200 + i)
            picture[labels == 2] = (30, 200, 40)
            cv2.imwrite(str(folder / f"{i:04d}.jpg"), picture)
            cv2.imwrite(str(folder / f"{i:04d}.png"), labels)
    for clip in range(clips):
        pictures = root / "davis" / "JPEGImages" / f"clip{clip}"
        annotations = root / "davis" / "Annotations" / f"clip{clip}"
        pictures.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for i in range(CLIP_LENGTH):
            picture = np.full((64, 96, 3), 4 * i, np.uint8)
            mask = np.zeros((64, 96), np.uint8)
            mask[20:50, 10 + i : 40 + i] = 1
            picture[mask > 0] = (20, 220, 220)
            cv2.imwrite(str(pictures / f"{i:05d}.jpg"), picture)
            cv2.imwrite(str(annotations / f"{i:05d}.png"), mask)
    return root


def flat(height: int, width: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def flat_sprite(height: int, width: int, colour: tuple[int, int, int], edge: int = 0) -> NDArray[np.uint8]:
    """An RGBA rectangle of one colour, opaque but for an edge of so many pixels."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[edge : height - edge, edge : width - edge] = 255
    return np.dstack([flat(height, width, colour), alpha])
