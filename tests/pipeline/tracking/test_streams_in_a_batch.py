"""Streams in one batch, with the bundled model on real pictures: masks are those of each stream alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.video.sources import open_source
from xmem_core import MemoryConfig, Prompt, StepResult, TrackerState, VideoSegmenter, load_model

STREET = Path(__file__).parents[4] / "shared/data/video/vtest.avi"
PEOPLE = [(252, 218, 32, 92), (499, 156, 32, 78), (638, 238, 49, 85)]
FRAMES = 12
SAME = 0.9999
# Cut out of the street: its upper left corner and size, the first frame, and the people that are followed.
STREAMS = [
    ((0, 0), (576, 768), 0, (0, 1, 2)),
    ((0, 0), (576, 768), 4, (1,)),
    ((100, 150), (400, 500), 0, (0, 1)),
    ((0, 0), (576, 768), 8, ()),
    ((0, 0), (576, 768), 12, (2, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, None], ids=["whole frames", "search windows"])
def test_labels_agree_on_nearly_all_pixels(window: int | None) -> None:
    if not STREET.exists():
        pytest.skip(f"no {STREET}")
    with open_source(str(STREET)) as source:
        frames = [frame.image for frame in itertools.islice(source.frames(), FRAMES + 12)]

    def steps(t: int, states: list[TrackerState]) -> list[tuple[TrackerState, Any, Prompt | None]]:
        found = []
        for k, ((top, left), (height, width), first, people) in enumerate(STREAMS):
            image = np.ascontiguousarray(frames[first + t][top : top + height, left : left + width])
            masks = {}
            for person in people:
                x, y, w, h = PEOPLE[person]
                masks[person + 1] = mask = np.zeros((height, width), np.bool_)
                mask[y - top : y - top + h, x - left : x - left + w] = True
            # One is prompted later than the others, and one again.
            given = masks and (t == 0 if k != 1 else t in (2, 7))
            found.append((states[k], image, Prompt(masks) if given else None))
        return found

    settings = MemoryConfig(search_window=window)
    model = load_model("xmem-lite")
    results: list[list[StepResult]] = []
    for joint in (False, True):
        segmenter = VideoSegmenter(model, settings, size=384, batch_streams=joint)
        states = [segmenter.new_state() for _ in STREAMS]
        results.append([r for t in range(FRAMES) for r in segmenter.step_many(steps(t, states))])
    same = torch.cat([(a.label_map == b.label_map).flatten() for a, b in zip(*results, strict=True)])
    assert float(same.double().mean()) >= SAME
    assert any(result.label_map.any() for result in results[0][-5:])
