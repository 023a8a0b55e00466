"""Frames whose images are in a device's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Event, Frame

if TYPE_CHECKING:
    from torch import Tensor


class DeviceFrame(Frame):
    """A frame whose image is a tensor, (H, W, 3) uint8; `image` is a copy of it on the host.

    The copy is made when `image` is first read, so that an image on a GPU stays there if only the tracker
    reads it (`picture`). On a CPU both are the same memory.
    """

    __slots__ = ("_host", "_tensor")
    _host: NDArray[np.uint8] | None
    _tensor: Tensor

    def __init__(
        self,
        tensor: Tensor,
        frame_index: int,
        pts_seconds: float | None,
        losses: tuple[Event, ...] = (),
    ) -> None:
        for name, value in (
            ("_tensor", tensor),
            ("_host", None),
            ("frame_index", frame_index),
            ("pts_seconds", pts_seconds),
            ("wall_time", None),
            ("losses", losses),
        ):
            object.__setattr__(self, name, value)  # frames cannot be changed otherwise

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 on the host."""
        if self._host is None:
            object.__setattr__(self, "_host", self._tensor.cpu().numpy())
        assert self._host is not None
        return self._host

    @property
    def picture(self) -> Tensor:
        """(H, W, 3) uint8 on its device."""
        return self._tensor

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self._tensor.shape[0]), int(self._tensor.shape[1])

    def renumbered(
        self, frame_index: int, pts_seconds: float | None, losses: tuple[Event, ...]
    ) -> DeviceFrame:
        """As `Frame.renumbered`; the image stays where it is."""
        return DeviceFrame(self._tensor, frame_index, pts_seconds, losses)

    def on_host(self) -> Frame:
        """The frame with its image on the host only."""
        return Frame(self.image, self.frame_index, self.pts_seconds, self.wall_time, self.losses)
