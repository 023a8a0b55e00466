"""What tests share of a process (`support.opened`): only what is the same as if it were made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import opened
from support.tiny import CAPPED_MEMORY, SHORT_MEMORY, tiny_weights
from support.videos import scene

from pipeline.base.errors import UsageError
from pipeline.prompts.box_segmenters import DEFAULT, load_box_segmenter
from pipeline.tracking import frame_prompts, segmenters
from pipeline.tracking.settings import ModelSettings
from xmem_core import VideoSegmenter, load_model


@pytest.fixture(autouse=True)
def _shared() -> None:
    opened.share()


def test_a_network_is_shared_by_equal_content_and_settings_only(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    one, copy = tiny_weights(tmp_path), tiny_weights(tmp_path / "copy")
    first = segmenters.open_segmenter(ModelSettings(one), SHORT_MEMORY)
    again = segmenters.open_segmenter(ModelSettings(copy), SHORT_MEMORY)
    assert again is not first
    assert again._network is first._network
    first.aside = object()  # type: ignore[assignment]
    assert segmenters.open_segmenter(ModelSettings(one), SHORT_MEMORY).aside is None
    others = [
        segmenters.open_segmenter(ModelSettings(one), CAPPED_MEMORY),
        segmenters.open_segmenter(ModelSettings(one, size=64), SHORT_MEMORY),
        segmenters.open_segmenter(ModelSettings(one, dtype="bfloat16"), SHORT_MEMORY),
        segmenters.open_segmenter(ModelSettings(tiny_weights(tmp_path, seed=1)), SHORT_MEMORY),
    ]
    assert len({id(s._network) for s in (first, *others)}) == 5
    for found, size in zip((first, *others), (48, 48, 64, 48, 48), strict=True):
        assert found.size == size
    assert others[0].memory_config.max_long_term_elements == CAPPED_MEMORY.max_long_term_elements
    assert others[3].fingerprint != first.fingerprint
    made = VideoSegmenter(load_model(one), SHORT_MEMORY, size=48)
    assert made.fingerprint == first.fingerprint


def test_a_file_that_changes_under_its_name_is_read_again(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path)
    first = segmenters.open_segmenter(ModelSettings(path))
    Path(path).write_bytes(Path(tiny_weights(tmp_path, seed=1)).read_bytes())
    assert segmenters.open_segmenter(ModelSettings(path)).fingerprint != first.fingerprint
    Path(path).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="cannot be read as weights"):
        segmenters.open_segmenter(ModelSettings(path))


def test_masks_of_boxes_are_those_of_the_box_segmenter() -> None:
    boxes, frames = load_box_segmenter(), [scene(i) for i in (0, 20)]
    shared = frame_prompts.FramePrompts(DEFAULT, None, []).boxes()
    assert type(shared) is not type(boxes)
    cases = [(frame, box) for frame in frames for box in ((20, 20, 40, 40), (60, 30, 50, 60))]
    for _ in range(2):
        for frame, box in cases:
            mask = shared.segment(frame, box)
            assert np.array_equal(mask, boxes.segment(frame, box))
            mask[:] = False  # the caller's own
    assert type(frame_prompts.FramePrompts("grabcut", None, []).boxes()).__name__ == "GrabCut"
