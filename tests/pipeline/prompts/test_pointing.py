"""Clicks on the command line."""

from __future__ import annotations

import numpy as np
import pytest
from support.videos import make_video, shapes

from pipeline.base.errors import PromptError, UsageError
from pipeline.prompts.files import PromptObject, PromptSet
from pipeline.prompts.pointing import add_clicks, parse_click
from pipeline.tracks.masks import rle_to_mask


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("v") / "v.mp4", 8, width=160, height=120))


def test_clicks_become_masks_on_their_frames(video: str) -> None:
    (x, y), (u, v) = shapes(0, 160, 120)["square"], shapes(5, 160, 120)["disc"]
    at = [f"0,{x + 6},{y + 6}:3:box", f"0,{x + 18},{y + 18}:3", f"5,{u + 12},{v + 12}"]
    known = PromptSet({0: (PromptObject(1, box=(100, 60, 20, 20)),)})
    found = add_clicks(known, video, at, [f"0,{x + 34},{y + 12}"], segmenter="grabcut")
    assert {f: [(e.object_id, e.category) for e in es] for f, es in found.objects.items()} == {
        0: [(1, None), (3, "box")],
        5: [(2, None)],
    }
    square, disc = found.objects[0][1].rle, found.objects[5][0].rle
    assert square is not None
    assert disc is not None
    mask = rle_to_mask(square[2], *square[:2])
    wanted = np.zeros((120, 160), np.bool_)
    wanted[y : y + 24, x : x + 24] = True
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    assert not mask[y + 12, x + 34]
    assert rle_to_mask(disc[2], *disc[:2])[v + 12, u + 12]


def test_clicks_that_are_refused(video: str) -> None:
    for text in ("1,2", "0,1,2,3", "a,1,2", "0,-1,2", "0,1.5,2", "", "0,1,2:x"):
        with pytest.raises(PromptError, match="click"):
            parse_click(text)
    with pytest.raises(PromptError, match=r"object 1 on frame 0: click 900,3 lies outside"):
        add_clicks(None, video, ["0,900,3"], segmenter="grabcut")
    with pytest.raises(UsageError, match="no frame 99"):
        add_clicks(None, video, ["99,3,3"], segmenter="grabcut")
    for not_at, said in (("3,1,1", "no object"), ("0,1,1", "several objects"), ("0,1,1:9", "no object")):
        with pytest.raises(PromptError, match=said):
            add_clicks(None, video, ["0,3,3", "0,40,40"], [not_at], segmenter="grabcut")
