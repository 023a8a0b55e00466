"""Looks: how masks are shown over a picture."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PictureTooLargeError, UsageError
from pipeline.base.picture_size import MAX_PIXELS, check_size, header_size
from pipeline.base.redaction import shareable
from pipeline.storage.locations import locate, read_error

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

OVERLAYS = ("davis", "fade", "light", "popup", "layered")
"""davis: masks tinted. fade: as davis, the rest darker. light: a faint tint. popup: all but the objects is
grey. layered: a picture with an alpha channel lies behind the objects, or before them."""
PLACES = ("behind", "before")

_OPACITY = {"davis": 0.5, "fade": 0.5, "light": 0.1, "popup": 1.0, "layered": 1.0}
_MARKED = frozenset({"davis", "fade", "light"})
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


class Layer:
    """A picture that is laid over frames, scaled to their size. Thread-safe.

    Args:
        pixels: H x W x 4 uint8, RGBA.
    """

    def __init__(self, pixels: Image) -> None:
        self._pixels = pixels
        self._lock = threading.Lock()
        self._scaled: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    @classmethod
    def decode(cls, data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Layer:
        """A layer from the bytes of a picture; one without an alpha channel is opaque.

        Raises:
            UsageError: it is no picture with 8 bits per channel, or too large.
        """
        try:
            check_size(name, *(header_size(data) or (0, 0)), max_pixels)
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except PictureTooLargeError as error:
            raise UsageError(str(error)) from error
        except cv2.error:
            decoded = None
        if decoded is None or decoded.dtype != np.uint8:
            raise UsageError(f"{name} cannot be used as a layer: give a PNG with 8 bits per channel")
        if decoded.ndim == 2:
            rgba = cv2.cvtColor(decoded, cv2.COLOR_GRAY2RGBA)
        else:
            rgba = cv2.cvtColor(decoded, cv2.COLOR_BGRA2RGBA if decoded.shape[2] == 4 else cv2.COLOR_BGR2RGBA)
        return cls(np.asarray(rgba, np.uint8))

    @classmethod
    def read(cls, uri: str, storage_options: Mapping[str, Any] | None = None) -> Layer:
        """A layer from a file, see `decode`; SourceError if it cannot be read."""
        try:
            data = locate(uri, storage_options).read_bytes()
        except Exception as error:  # every store behind fsspec has its own errors
            raise read_error(uri, error) from shareable(error)
        return cls.decode(data, uri)

    def scaled(self, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colours multiplied by alpha (H x W x 3, 0 to 255), and alpha (H x W, 0 to 1)."""
        with self._lock:
            if self._scaled is None or self._scaled[1].shape != (height, width):
                alpha = self._pixels[..., 3].astype(np.float32) / 255
                colours = self._pixels[..., :3] * alpha[..., None]
                down = height < alpha.shape[0]
                how = cv2.INTER_AREA if down else cv2.INTER_LINEAR
                self._scaled = (
                    np.asarray(cv2.resize(colours, (width, height), interpolation=how), np.float32),
                    np.asarray(cv2.resize(alpha, (width, height), interpolation=how), np.float32),
                )
            return self._scaled


@dataclass(frozen=True)
class Look:
    """How masks are shown over a picture.

    Args:
        overlay: one of `OVERLAYS`.
        opacity: of the tint; of the grey (popup); of the layer (layered); 0 to 1. None: 0.5 for davis and
            fade, 0.1 for light, 1 for popup and layered.
        outlines, ids: whether to draw outlines, and ids with categories. None: except with popup and layered.
        objects: ids of the objects to show; None: all.
        colours: RGB by id, where it is not the one of the id.
        layer: for layered.
        layer_place: behind the objects, or before them.

    Raises:
        UsageError: a value is not allowed, or layered has no layer.
    """

    overlay: str = "davis"
    opacity: float | None = None
    outlines: bool | None = None
    ids: bool | None = None
    objects: Collection[int] | None = None
    colours: Mapping[int, Colour] = field(default_factory=dict)
    layer: Layer | None = None
    layer_place: str = "behind"

    def __post_init__(self) -> None:
        if self.overlay not in OVERLAYS:
            raise UsageError(f"overlay {self.overlay!r} is not known: use {', '.join(OVERLAYS)}")
        if self.opacity is not None and not 0 <= self.opacity <= 1:
            raise UsageError(f"opacity {self.opacity} is not allowed: from 0 to 1")
        if self.layer_place not in PLACES:
            raise UsageError(f"layer place {self.layer_place!r} is not known: use {' or '.join(PLACES)}")
        if (self.layer is not None) != (self.overlay == "layered"):
            missing = "needs a layer" if self.layer is None else "takes no layer: use layered"
            raise UsageError(f"overlay {self.overlay} {missing}")

    @property
    def strength(self) -> float:
        """The opacity, or the overlay's own."""
        return _OPACITY[self.overlay] if self.opacity is None else self.opacity

    @property
    def has_outlines(self) -> bool:
        return self.overlay in _MARKED if self.outlines is None else self.outlines

    @property
    def has_ids(self) -> bool:
        return self.overlay in _MARKED if self.ids is None else self.ids

    def shows(self, object_id: int) -> bool:
        return self.objects is None or object_id in self.objects


def parse_colour(text: str) -> Colour:
    """The RGB of `#rrggbb`; UsageError for anything else."""
    if not _COLOUR.fullmatch(text):
        raise UsageError(f"colour {text!r} is not allowed: of the form #rrggbb")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
