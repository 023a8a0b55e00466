"""Detector `bright`: detects bright regions that persist for a few frames."""

import json

import numpy as np

from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection

_LEVEL = 200
_PATIENCE = 3


class Bright:
    """Its state is the number of frames for which there has been something bright."""

    def __init__(self) -> None:
        self._frames = 0

    def detect(self, frame: Frame) -> list[Detection]:
        mask = frame.image.min(axis=2) >= _LEVEL
        self._frames = self._frames + 1 if mask.any() else 0
        if self._frames < _PATIENCE:
            return []
        return [
            Detection(mask=np.asarray(mask, np.bool_), category="bright", score=float(mask.mean()) ** 0.25)
        ]

    def to_bytes(self) -> bytes:
        return json.dumps({"bright_frames": self._frames}).encode()

    def from_bytes(self, blob: bytes) -> None:
        memory = json.loads(blob)  # JSON errors are ValueErrors
        if not isinstance(memory, dict) or type(memory.get("bright_frames")) is not int:
            raise ValueError("these bytes are not a state of this detector")
        self._frames = memory["bright_frames"]
