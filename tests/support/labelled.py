"""Labelled data sets on disk, and a segmenter that gives prepared answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

HEIGHT, WIDTH = 40, 60


def square(top: int, left: int, side: int = 12, value: int = 1) -> np.ndarray:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[top : top + side, left : left + side] = value
    return labels


def write_clip(
    root: Path, name: str, annotations: Sequence[np.ndarray | bytes | None], layer: str = "480p"
) -> None:
    """Frame i is all of the colour (RGB) 10 i, 100, 200; an annotation of None is left out."""
    images, masks = root / "JPEGImages" / layer / name, root / "Annotations" / layer / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i, annotation in enumerate(annotations):
        frame = np.full((HEIGHT, WIDTH, 3), (200, 100, 10 * i), np.uint8)  # OpenCV writes BGR
        assert cv2.imwrite(str(images / f"{i:05d}.jpg"), frame)
        if isinstance(annotation, bytes):
            (masks / f"{i:05d}.png").write_bytes(annotation)
        elif annotation is not None:
            assert cv2.imwrite(str(masks / f"{i:05d}.png"), annotation)


class Replay:
    """Gives prepared label maps, clip by clip, and remembers what it was asked."""

    def __init__(self, *clips: list[np.ndarray]) -> None:
        self.clips = list(clips)
        self.states: list[dict[str, Any]] = []

    def new_state(self) -> dict[str, Any]:
        self.states.append({"labels": iter(self.clips[len(self.states)]), "frames": [], "prompts": []})
        return self.states[-1]

    def step(self, state: dict[str, Any], frame: Any, prompt: Any = None) -> Any:
        assert state is self.states[-1]
        state["frames"].append(frame)
        state["prompts"].append(prompt)
        return SimpleNamespace(label_map=next(state["labels"]).astype(np.int32))
