"""Runs the trackers of the PyPI package `trackers` in their own environment, for tests/benchmarks/rivals.py.

Reads {"rate": frames per second, "trackers": names, "frames": [[[x, y, w, h, score], ...], ...]} as JSON from
stdin and prints {tracker: [{id: [x, y, w, h]}, ...]}, one entry a frame.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def tracked(tracker: Any, frames: list[list[list[float]]]) -> list[dict[int, list[float]]]:
    """The tracks on each frame. Those that the tracker has not confirmed yet have the id -1."""
    import supervision  # type: ignore[import-not-found]

    found = []
    for detections in frames:
        values = np.array(detections, np.float32).reshape(-1, 5)
        corners = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:4]], 1)
        given = supervision.Detections(
            xyxy=corners, confidence=values[:, 4], class_id=np.zeros(len(values), int)
        )
        result = tracker.update(given)
        ids = [] if result.tracker_id is None else result.tracker_id
        found.append(
            {
                int(track): [float(x), float(y), float(right - x), float(below - y)]
                for track, (x, y, right, below) in zip(ids, result.xyxy, strict=True)
                if track >= 0
            }
        )
    return found


def main() -> None:
    import trackers  # type: ignore[import-not-found]

    asked = json.load(sys.stdin)
    known = {
        "SORT": trackers.SORTTracker,
        "ByteTrack": trackers.ByteTrackTracker,
        "OC-SORT": trackers.OCSORTTracker,
    }
    results = {
        name: tracked(known[name](frame_rate=asked["rate"]), asked["frames"]) for name in asked["trackers"]
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
