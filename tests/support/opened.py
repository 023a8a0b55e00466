"""Segmenters and masks of boxes that a process makes once, for tests of what tracking does with them.

A tracked clip of thirty frames takes 0.3 s of CPU time. A quarter of it went into reading the tiny network,
hashing it and preparing it for inference, and a tenth into the click network's look at the boxes, each time
with the same result. After `share`, `open_segmenter` reads a file of other content, or takes other settings,
as ever. What it has made before it gives out again: a copy of the segmenter, which shares the network, as the
streams of a process do. Tests of models, of fused layers and of `pipeline.prompts` make their own.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.prompts.box_segmenters import BoxSegmenter, load_box_segmenter
from pipeline.prompts.boxes import Box
from pipeline.prompts.click_network import BoxNetwork
from pipeline.tracking import segmenters
from xmem_core import MemoryConfig, VideoSegmenter, load_model
from xmem_core.config import AnyModelConfig
from xmem_core.fingerprint import file_identity
from xmem_core.weight_files import find_weights

T = TypeVar("T")

_MOST = 100
_SEGMENT_BOXES = ("pipeline.annotate.annotator", "pipeline.live.tracker", "pipeline.tracking.frame_prompts")
_made: OrderedDict[Hashable, Any] = OrderedDict()
_digests: dict[str, str] = {}


def share() -> None:
    """Have `open_segmenter` and the box prompts of modules imported so far make everything once."""
    module: Any = segmenters
    module.load_model, module.VideoSegmenter = _known_model, _shared_segmenter
    for name in _SEGMENT_BOXES:
        if user := sys.modules.get(name):
            user.load_box_segmenter = _boxes_once  # type: ignore[attr-defined]


class _Known:
    """A model's file, in place of the model: what `open_segmenter` asks of it."""

    def __init__(self, path: Path, device: str, digest: str) -> None:
        self.path, self.device, self.digest = path, device, digest

    @property
    def config(self) -> AnyModelConfig:
        return _once(("config", self.digest), lambda: load_model(self.path).config)

    def opened(self, memory: MemoryConfig | None, **settings: Any) -> VideoSegmenter:
        return VideoSegmenter(load_model(self.path, self.device), memory, **settings)


def _known_model(name: str, device: str = "cpu") -> _Known:
    path = find_weights(name)
    identity = file_identity(path)
    if identity not in _digests:
        _digests[identity] = hashlib.blake2b(path.read_bytes()).hexdigest()
    found = _Known(path, device, _digests[identity])
    assert found.config  # or the error of a damaged file
    return found


def _shared_segmenter(model: _Known, memory: MemoryConfig | None, **settings: Any) -> VideoSegmenter:
    if settings["compile"]:
        return model.opened(memory, **settings)
    key = (model.digest, model.device, memory, *sorted(settings.items()))
    made = _once(key, partial(model.opened, memory, **settings))
    given = copy.copy(made)
    given._most_rows = {}
    return given


class _BoxesOnce:
    """`BoxNetwork` with the masks kept that it has made with as many threads."""

    concurrent = True

    def __init__(self, boxes: BoxNetwork) -> None:
        self._boxes = boxes

    def segment(self, frame: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]:
        content = hashlib.blake2b(np.ascontiguousarray(frame).data).digest()
        key = ("box", content, frame.shape, tuple(box), torch.get_num_threads())
        return _once(key, lambda: self._boxes.segment(frame, box)).copy()


def _boxes_once(*name: str) -> BoxSegmenter:
    found = load_box_segmenter(*name)
    return _BoxesOnce(found) if type(found) is BoxNetwork else found


def _once(key: Hashable, make: Callable[[], T]) -> T:
    found: T
    if key in _made:
        found = _made[key]
    else:
        found = _made[key] = make()
        if len(_made) > _MOST:
            _made.popitem(last=False)
    return found
