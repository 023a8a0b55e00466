"""Box segmenters: the protocol, the built-in ones, and plugin look-up.

A box becomes a mask once per prompt; the mask is kept as RLE in the stream record, and tracking does not use
the segmenter again. So a segmenter may be slow, but must give the same mask for the same frame and box.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError
from pipeline.base.plugins import load_plugin
from pipeline.prompts.boxes import Box, inscribed_ellipse
from xmem_core.weight_files import BUNDLED_CLICKS, WeightsError

__all__ = [
    "BUILT_IN",
    "DEFAULT",
    "ENTRY_POINT_GROUP",
    "Box",
    "BoxSegmenter",
    "GrabCut",
    "inscribed_ellipse",
    "load_box_segmenter",
    "require_box_segmenter",
]

ENTRY_POINT_GROUP = "xmem.box_segmenters"
BUILT_IN = ("xmem-click", "grabcut")
DEFAULT = BUILT_IN[0]


@runtime_checkable
class BoxSegmenter(Protocol):
    """Segments the object inside a box.

    `segment` gets an H x W x 3 uint8 RGB frame, which it must not modify, and a box inside it. It returns an
    H x W bool mask with no pixel outside the box. An empty mask means that object and background could not be
    told apart; the caller then uses `inscribed_ellipse`. Equal input must give equal masks, in any process.
    `check_box_segmenter` tests an implementation.
    """

    def segment(self, frame: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]: ...


class GrabCut:
    """OpenCV's GrabCut on a neighbourhood of the box.

    Pixels outside the box are background; inside, a central ellipse is probably the object and the rest
    probably background. Colour models of both and an edge-aware cut then refine this. The defaults were among
    the best of some forty settings on 159 objects of the training data's stills and clips: mean IoU 72, with
    the inscribed ellipse where nothing was found; that ellipse alone has 57.

    Args:
        margin: background around the box that is included, as a share of the box's sides.
        ellipse: axes of the central ellipse, as a share of the box's sides.
        iterations: rounds of model fitting and cutting.
        max_side: larger neighbourhoods are scaled down to this many pixels first.
    """

    def __init__(
        self, margin: float = 0.35, ellipse: float = 1.15, iterations: int = 6, max_side: int = 320
    ) -> None:
        self._margin = margin
        self._ellipse = ellipse
        self._iterations = iterations
        self._max_side = max_side

    def segment(self, frame: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]:
        """Return the mask of a box; empty if the cut took almost nothing or almost the whole box."""
        height, width = frame.shape[:2]
        x, y, w, h = box
        found = np.zeros((height, width), np.bool_)
        pad_x, pad_y = max(6, round(w * self._margin)), max(6, round(h * self._margin))
        left, top = max(0, x - pad_x), max(0, y - pad_y)
        right, bottom = min(width, x + w + pad_x), min(height, y + h + pad_y)
        crop = np.ascontiguousarray(frame[top:bottom, left:right])
        inner = (x - left, y - top, w, h)
        scale = min(1.0, self._max_side / max(crop.shape[:2]))
        if scale < 1:
            size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
            small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
            labels = self._cut(np.asarray(small, np.uint8), _scaled(inner, crop.shape, small.shape))
            soft = cv2.resize(labels.astype(np.float32), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            labels = np.asarray(soft) >= 0.5
        else:
            labels = self._cut(crop, inner)
        inside = labels[inner[1] : inner[1] + h, inner[0] : inner[0] + w]
        share = float(inside.mean())
        if 0.12 <= share <= 0.97:
            found[y : y + h, x : x + w] = _cleaned(inside)
        return found

    def _cut(self, image: NDArray[np.uint8], box: Box) -> NDArray[np.bool_]:
        """Run GrabCut around a box in an image; returns a mask of the image's size."""
        x, y, w, h = box
        labels = np.full(image.shape[:2], cv2.GC_BGD, np.uint8)
        labels[y : y + h, x : x + w] = cv2.GC_PR_BGD
        labels[inscribed_ellipse(image.shape[:2], box, self._ellipse)] = cv2.GC_PR_FGD
        if not (labels == cv2.GC_PR_FGD).any() or not (labels != cv2.GC_PR_FGD).any():
            return np.zeros(image.shape[:2], np.bool_)
        cv2.setRNGSeed(0)  # its k-means uses OpenCV's random generator, whose state persists between calls
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
        unused = (0, 0, 1, 1)
        cv2.grabCut(image, labels, unused, background, foreground, self._iterations, cv2.GC_INIT_WITH_MASK)
        cut: NDArray[np.bool_] = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        return cut


def require_box_segmenter(name: str) -> None:
    """Check that a box segmenter is installed. The bundled one's network is not loaded, nor torch.

    Raises:
        UsageError: as `load_box_segmenter` does.
    """
    if name != DEFAULT:
        load_box_segmenter(name)
    elif not BUNDLED_CLICKS.is_file():
        raise UsageError(
            f"box segmenter {name!r}: its weights are not at {BUNDLED_CLICKS}: reinstall the package"
        )


def load_box_segmenter(name: str = DEFAULT) -> BoxSegmenter:
    """Create a box segmenter by name: built in, or an entry point of the group `xmem.box_segmenters`.

    The entry point is a class or function that returns a segmenter when called without arguments.

    Raises:
        UsageError: no such segmenter is installed, it cannot be loaded, or it has no `segment`.
    """
    if name == "grabcut":
        return GrabCut()
    if name == DEFAULT:
        # Imported here: whoever names another segmenter needs no torch.
        from pipeline.prompts.click_network import BoxNetwork

        try:
            return BoxNetwork()
        except WeightsError as error:
            raise UsageError(f"box segmenter {name!r}: {error}; or choose 'grabcut'") from error
    segmenter: BoxSegmenter = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="box segmenter",
        protocol=BoxSegmenter,
        lacking="has no method segment(frame, box)",
        built_in=BUILT_IN,
    )
    return segmenter


def _scaled(box: Box, old: tuple[int, ...], new: tuple[int, ...]) -> Box:
    """Scale a box to an image that was resized from `old` to `new` (height, width, ...)."""
    fy, fx = new[0] / old[0], new[1] / old[1]
    x, y, w, h = box
    left, top = min(new[1] - 1, round(x * fx)), min(new[0] - 1, round(y * fy))
    right, bottom = max(left + 1, round((x + w) * fx)), max(top + 1, round((y + h) * fy))
    return left, top, min(right, new[1]) - left, min(bottom, new[0]) - top


def _cleaned(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove speckle from the mask of a box's inside, and close narrow gaps and small holes.

    Measured: dropping components below 2 % of the largest, closing gaps of 2 % of the box, and filling holes
    below 5 % of the mask each help a little; larger values harm. A head is often cut off from its body by a
    neck lighter than both, hence closing by at least two pixels.
    """
    pieces = _without_small(mask, 0.02)
    radius = min(max(2, round(0.02 * min(mask.shape))), min(mask.shape) // 8)
    if radius:
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        padded = np.pad(pieces.astype(np.uint8), radius)
        closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disk)
        pieces = np.asarray(closed[radius:-radius, radius:-radius]) != 0
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~pieces).astype(np.uint8), connectivity=4)
    small = np.asarray(stats[:, cv2.CC_STAT_AREA]) < max(4, 0.05 * pieces.sum())
    small[np.unique(np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1])))] = False
    small[0] = False
    filled: NDArray[np.bool_] = pieces | small[labels]
    return filled


def _without_small(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Keep the connected components with at least `share` of the largest one's pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = np.asarray(stats[:, cv2.CC_STAT_AREA]).copy()
    areas[0] = 0
    keep = areas >= max(1, share * int(areas.max()))
    kept: NDArray[np.bool_] = keep[labels]
    return kept
