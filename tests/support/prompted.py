"""Prompts for tests of resumed streams: one object starts late, one is removed, one is corrected."""

from __future__ import annotations

from typing import Any


def three_objects(correct_at: int) -> dict[str, Any]:
    """A prompts file's content for the first 25 frames or more of `videos.scene` with 158 x 122 pixels.

    Args:
        correct_at: the frame on which object 1 is corrected.
    """
    return {
        "version": 1,
        "objects": [
            {"frame": 0, "id": 1, "category": "square", "polygons": [[2, 28, 34, 28, 34, 55, 2, 55]]},
            {"frame": 0, "id": 2, "box": [90, 70, 30, 30]},
            {"frame": 9, "id": 70000, "category": "late", "polygons": [[60, 10, 90, 10, 90, 40, 60, 40]]},
            {"frame": correct_at, "id": 1, "polygons": [[20, 28, 54, 28, 54, 55, 20, 55]]},
        ],
        "remove": [{"frame": 15, "id": 2}],
    }
