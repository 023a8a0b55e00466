"""Outputs of a stage beside its checkpoints: CSV logs, TensorBoard events and pictures of samples."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.training.tensorboard import EventFile
from xmem_core.training.clips import Batch

_COLUMNS = {
    "log.csv": ("step", "loss", "ce", "dice", "iou", "grad_norm", "lr", "s_per_step"),
    "validation.csv": ("step", "J&F", "J", "F"),
}
_COLOURS = np.array([[0, 0, 0], [230, 40, 40], [40, 200, 60], [60, 90, 240], [230, 200, 40]], np.float32)
_SHOWN = 4
"""Clips per picture."""


class Outputs:
    """Logs of a run's folder, from step `first` on; lines of later steps, before a restart, are dropped."""

    def __init__(self, out: Path, first: int) -> None:
        self.out = out
        for name, columns in _COLUMNS.items():
            _trim(out / name, columns, first)
        self._events = EventFile(out / "tensorboard", first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line to log.csv."""
        self._add("log.csv", "train", step, values)

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line to validation.csv: J&F, J and F in percent."""
        self._add("validation.csv", "validation", step, values)

    def _add(self, name: str, group: str, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **{k: f"{v:.6g}" for k, v in values.items()}}
        with (self.out / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([line.get(column, "") for column in _COLUMNS[name]])
        self._events.scalars(step, {f"{group}/{k}": v for k, v in values.items()})

    def picture(self, step: int, batch: Batch, predicted: NDArray[np.uint8]) -> None:
        """Write pictures/<step>.jpg: per clip a row of frames with true masks, and one with predicted masks.

        Args:
            step: number of finished steps.
            batch: the clips.
            predicted: (B, T, H, W) labels; those of the first frame are the given ones.
        """
        rows = []
        for clip, labels, found in zip(batch.frames, batch.labels, predicted, strict=True):
            rows += [
                np.hstack([_overlay(f, m) for f, m in zip(clip, each, strict=True)])
                for each in (labels, found)
            ]
        sheet = np.vstack(rows[: 2 * _SHOWN])
        _, encoded = cv2.imencode(
            ".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85]
        )
        (self.out / "pictures").mkdir(exist_ok=True)
        (self.out / "pictures" / f"{step:08d}.jpg").write_bytes(encoded.tobytes())
        self._events.picture(step, "samples", encoded.tobytes(), *sheet.shape[:2])

    def close(self) -> None:
        """Close the event file."""
        self._events.close()


def _overlay(frame: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame at half size with coloured masks."""
    colours = _COLOURS[np.minimum(labels, len(_COLOURS) - 1)]
    mixed = np.where(labels[..., None] > 0, 0.5 * frame + 0.5 * colours, frame).astype(np.uint8)
    size = (max(1, mixed.shape[1] // 2), max(1, mixed.shape[0] // 2))
    return np.asarray(cv2.resize(mixed, size, interpolation=cv2.INTER_AREA), np.uint8)


def _trim(path: Path, columns: tuple[str, ...], step: int) -> None:
    """Keep a log's lines up to a step, and its header; an incomplete last line is dropped."""
    kept = [list(columns)]
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if len(line) == len(columns) and line[0].isdecimal()]
        kept += [line for line in lines if int(line[0]) <= step]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(kept)
