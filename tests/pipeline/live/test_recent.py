"""Pictures of what a live stream remembers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.draw.pictures import THUMBNAIL_SIDE
from pipeline.live.recent import LiveView


def picture(grey: int) -> NDArray[np.uint8]:
    return np.full((240, 640, 3), grey, np.uint8)


def listing(*times: int) -> dict[str, Any]:
    copied = {"time": -3, "age": None}
    return {"frames": [*({"time": t, "age": 1} for t in times), copied]}


def grey_of(view: LiveView, moment: int) -> int | None:
    data = view.thumbnail(moment)
    if data is None:
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    assert image.shape == (120, THUMBNAIL_SIDE, 3)
    return round(float(np.asarray(image).mean()))


def test_there_is_a_picture_of_each_remembered_frame_as_long_as_it_is_remembered() -> None:
    view = LiveView()
    # Time stands still until the first prompt: the frame of the prompt is the last one of time 0.
    for moment, grey in ((0, 10), (0, 40), (1, 50), (2, 60), (3, 70)):
        view.seen_at(moment, picture(grey))
    view.remember(listing(0, 2), now=1.0)
    assert [grey_of(view, moment) for moment in range(4)] == [40, None, 60, None]
    view.seen_at(4, picture(80))
    view.remember(listing(0, 4), now=2.0)
    assert [grey_of(view, moment) for moment in range(5)] == [40, None, None, None, 80]
    assert grey_of(view, -3) is None
    for moment in range(5, 500):
        view.seen_at(moment, picture(90))
    view.remember(listing(0, 4, 5, 499), now=3.0)
    assert [grey_of(view, moment) for moment in (0, 4, 5, 499)] == [40, 80, None, 90]
