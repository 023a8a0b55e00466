"""Results folder of an evaluation: masks for benchmark servers, scores of finished clips, a zip file.

DIR/<clip>/<frame>.png            or DIR/Annotations/<clip>/... for YouTube-VOS and LVOS
DIR/scores/<clip>/<frame>.npz     with --save-scores: `probabilities` (O + 1, H, W) uint8, `object_ids`
DIR/.evaluation/settings.json     what the run was, so that another one is not mixed into it
DIR/.evaluation/<clip>.json       the clip is finished; an interrupted run goes on with the next one
DIR/predictions.json              for BURST: its annotation file with these masks
DIR.zip                           with --zip: the masks
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.burst import predictions
from jobs.evaluation.data_sets import VOID, DataSet
from jobs.evaluation.pictures import grey_png, palette_png, read_annotation
from pipeline.base.errors import UsageError
from pipeline.tracks.masks import mask_to_rle

_OWN = ".evaluation"
_SETTINGS = "settings.json"
# A fixed time stamp, so that equal masks make equal zip files.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class MaskFolder:
    """Where a run writes its masks.

    Args:
        folder: made if it is not there. One with results of the same settings is continued.
        data: the data set, which says how its server wants masks.
        settings: what decides about the results, JSON-ready.
        scores: write probabilities too.

    Raises:
        UsageError: the folder holds results of other settings or other files, or cannot be written.
    """

    def __init__(
        self, folder: str | Path, data: DataSet, settings: Mapping[str, Any], *, scores: bool = False
    ) -> None:
        self.folder = Path(folder)
        self._data = data
        self._scores = scores
        self._masks = self.folder / "Annotations" if data.wrapped else self.folder
        self._own = self.folder / _OWN
        wanted = dict(settings) | {"data_set": data.name, "origin": str(data.origin), "save_scores": scores}
        wanted = json.loads(json.dumps(wanted))
        try:
            found = self._own / _SETTINGS
            if found.is_file():
                self._compare(json.loads(found.read_text(encoding="utf-8")), wanted)
            elif self.folder.is_dir() and any(self.folder.iterdir()):
                raise UsageError(f"--masks-out {self.folder} holds other files: give a new folder")
            else:
                self._own.mkdir(parents=True)
                _write(found, json.dumps(wanted, indent=2, sort_keys=True).encode())
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"--masks-out {self.folder} cannot be used: {error}") from error

    def _compare(self, found: Any, wanted: Mapping[str, Any]) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{_OWN}/{_SETTINGS} holds no settings")
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                raise UsageError(
                    f"--masks-out {self.folder} holds results of other settings ({name} was "
                    f"{found.get(name)!r}, now {wanted.get(name)!r}): give another folder"
                )

    def finished(self, clip: str) -> dict[str, Any] | None:
        """What `finish` was given for a clip; None if the clip is not finished."""
        path = self._own / f"{clip}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def write(self, clip: str, frame: str, labels: NDArray[Any], result: object) -> None:
        """Write a frame's masks, (H, W) object ids, and its probabilities if the result has them.

        Raises:
            UsageError: an object's id is above 254 and does not fit a palette, or the disk is full.
        """
        most = int(labels.max(initial=0))
        if most >= VOID:
            raise UsageError(f"clip {clip}: object {most} does not fit a palette PNG, which has 1 to 254")
        # DAVIS-2016 has one object, which is white.
        data = grey_png((labels > 0) * VOID) if self._data.merged else palette_png(labels)
        try:
            self._put(self._masks / clip / f"{frame}.png", data)
            if self._scores:
                planes = getattr(result, "probabilities", None)
                if planes is None:
                    raise UsageError("--save-scores: this segmenter gives no probabilities")
                path = self.folder / "scores" / clip / f"{frame}.npz"
                path.parent.mkdir(parents=True, exist_ok=True)
                levels = (planes * 255).round().to("cpu").numpy().astype(np.uint8)
                ids = np.array(getattr(result, "object_ids", ()), np.int32)
                np.savez_compressed(path, probabilities=levels, object_ids=ids)
        except OSError as error:
            raise UsageError(f"--masks-out {self.folder} cannot be written: {error}") from error

    def finish(self, clip: str, facts: Mapping[str, Any]) -> None:
        """Mark a clip as finished, with what `finished` is to give back."""
        path = self._own / f"{clip}.json"
        path.parent.mkdir(parents=True, exist_ok=True)  # names of BURST have two parts
        _write(path, json.dumps(facts).encode())

    def write_predictions(self, annotations: Path, clips: Sequence[str]) -> None:
        """Write all masks of these clips as BURST's evaluation wants them: `annotations` with other masks."""
        masks: dict[str, dict[str, dict[int, str]]] = {}
        for clip in clips:
            frames = masks.setdefault(clip, {})
            for path in sorted((self._masks / clip).glob("*.png")):
                labels = read_annotation(path)
                frames[path.stem] = {int(i): mask_to_rle(labels == i) for i in np.unique(labels) if i}
        content = json.dumps(predictions(annotations, masks)).encode()
        _write(self.folder / "predictions.json", content)

    def zip(self) -> Path:
        """Pack all masks into `<folder>.zip`, as the data set's server wants them."""
        folder = self.folder.resolve()  # it may be given as `.`
        target = folder.with_name(f"{folder.name}.zip")
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(self._masks.rglob("*.png")):
                name = path.relative_to(self.folder).as_posix()
                archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), path.read_bytes())
        os.replace(part, target)
        return target

    def _put(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write(path: Path, data: bytes) -> None:
    """Write a small file at once, or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)
