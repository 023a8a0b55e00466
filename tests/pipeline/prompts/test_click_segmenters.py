"""An installed click segmenter replaces the bundled network, wherever clicks are made into masks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.videos import make_video

import pipeline.base.plugins
from pipeline.annotate.annotator import Annotator
from pipeline.api import clicking, models
from pipeline.base.errors import UsageError
from pipeline.prompts.click_segmenters import ENTRY_POINT_GROUP, load_click_segmenter
from pipeline.prompts.clicks import Click
from pipeline.prompts.pointing import add_clicks
from pipeline.tracks.masks import rle_to_mask


class Around:
    """A click segmenter as an installed package has it: 9 x 9 pixels around the last click."""

    def segment(
        self, frame: NDArray[np.uint8], clicks: Sequence[Click], previous: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_]:
        mask = np.zeros(frame.shape[:2], np.bool_)
        x, y = round(clicks[-1].x), round(clicks[-1].y)
        mask[y - 4 : y + 5, x - 4 : x + 5] = True
        return mask


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which it is registered."""
    registered = EntryPoints([EntryPoint("around", "test_click_segmenters:Around", ENTRY_POINT_GROUP)])
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(pipeline.base.plugins, "entry_points", lambda group: registered.select(group=group))
    return "around"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("v") / "v.mp4", 4, width=160, height=120))


def test_it_makes_the_masks_of_clicks_on_the_command_line(plugin: str, video: str) -> None:
    (entry,) = add_clicks(None, video, ["2,60,50"], segmenter=plugin).objects[2]
    assert entry.rle is not None
    mask = rle_to_mask(entry.rle[2], *entry.rle[:2])
    assert mask[46:55, 56:65].all()
    assert mask.sum() == 81


def test_it_makes_those_of_the_annotator(plugin: str, video: str, tmp_path: Path) -> None:
    with Annotator(video, str(tmp_path / "out"), "v", click_segmenter=plugin) as annotator:
        mask = annotator.click(1, [Click(100, 30)], None)
    assert mask[26:35, 96:105].all()
    assert mask.sum() == 81


@pytest.mark.filterwarnings("ignore")
def test_it_makes_those_of_a_live_streams_page(plugin: str) -> None:
    from pipeline.distributed.serve import settings_from

    api, _ = settings_from({"out": "o", "click_segmenter": plugin}, {"XMEM_API_TOKENS": "t" * 24})
    assert api.click_segmenter == plugin
    encoded, jpeg = cv2.imencode(".jpg", np.zeros((120, 160, 3), np.uint8))
    assert encoded
    given: Any = models.Clicks.model_validate({"clicks": [{"x": 20, "y": 90, "positive": True}]})
    found = clicking.outline(jpeg.tobytes(), given, api.click_segmenter)
    assert (found.area, found.bbox) == (81, [16, 86, 9, 9])


def test_a_name_that_nobody_registered_is_refused(plugin: str) -> None:
    with pytest.raises(UsageError, match="no click segmenter 'sam'; available: xmem-click, grabcut, around"):
        load_click_segmenter("sam")
