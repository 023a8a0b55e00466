"""Decoding with torchcodec: on an NVIDIA GPU by its decoder (NVDEC), on a CPU by FFmpeg.

Numbers and times of frames are those of the packet index, which PyAV reads; torchcodec provides the images.
It conceals damage without saying so. What it returns is therefore compared: the number of frames, the time of
each, and the first image with PyAV's.
"""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError, one_line

if TYPE_CHECKING:
    from torch import Tensor

AV, TORCHCODEC = "av", "torchcodec"
DECODERS = (AV, TORCHCODEC)
_FARTHEST = 3.0
"""Mean difference, of 255, between the first image and PyAV's above which more than rounding differs: other
colours, or a rotation that was not applied. NVDEC and FFmpeg interpolate chroma differently."""


class DifferenceError(Exception):
    """torchcodec cannot decode the file, or does not return the frames of the packet index."""


def check_torchcodec() -> None:
    """Raise UsageError if torchcodec cannot be used in this environment."""
    remedy = "install xmem-pipeline[nvdec] and FFmpeg's shared libraries, or use decoder av"
    try:
        import_module("torchcodec.decoders")
    except ImportError as error:
        raise UsageError(f"decoder torchcodec cannot be used here: {one_line(error)}; {remedy}") from error
    except (RuntimeError, OSError) as error:  # a library that it links to is missing, or another torch's
        raise UsageError(
            f"decoder torchcodec cannot be used here: its libraries, FFmpeg's or those of CUDA cannot be "
            f"loaded; {remedy}"
        ) from error


class Pictures:
    """The images of one video stream by frame number. To be used by one thread.

    Args:
        source: path of a file, or an opened binary file.
        stream_index: number of the video stream in its container.
        device: device that decodes, and holds the images: cpu, cuda, cuda:1, ...
        threads: decoding threads on a CPU; 0: FFmpeg's choice.
        time_base: unit of the stream's times, in seconds.

    Raises:
        DifferenceError: torchcodec cannot read the file.
    """

    def __init__(
        self, source: Any, stream_index: int, *, device: str, threads: int, time_base: Fraction
    ) -> None:
        decoders = import_module("torchcodec.decoders")  # optional, and it loads torch
        self._time_base = time_base
        try:
            self._decoder: Any = decoders.VideoDecoder(
                source,
                stream_index=stream_index,
                dimension_order="NHWC",
                num_ffmpeg_threads=threads,
                device=device,
                seek_mode="exact",
            )
        except Exception as error:  # torchcodec has no exceptions of its own
            raise DifferenceError(f"not readable: {one_line(error)}") from error

    def __len__(self) -> int:
        return len(self._decoder)

    @property
    def fallback(self) -> str | None:
        """Why the CPU decodes though a GPU was asked for, once an image is decoded; None if it does not."""
        said = getattr(self._decoder, "cpu_fallback", None)
        return str(said) if said else None

    def at(self, number: int, pts: int) -> Tensor:
        """Image of a frame, (H, W, 3) uint8 RGB on the device.

        Args:
            number: its number.
            pts: its time according to the index, in the stream's time base.

        Raises:
            DifferenceError: it cannot be decoded, or has another time.
        """
        try:
            found = self._decoder.get_frame_at(number)
        except Exception as error:
            raise DifferenceError(f"frame {number}: {one_line(error)}") from error
        shown = round(found.pts_seconds / self._time_base)
        if shown != pts:
            raise DifferenceError(f"frame {number} has pts {shown}, not {pts}")
        image: Tensor = found.data
        return image


def check_alike(image: Tensor, expected: NDArray[np.uint8]) -> None:
    """Raise DifferenceError if an image differs from PyAV's by more than rounding and interpolation."""
    own = image.cpu().numpy()
    if own.shape != expected.shape:
        raise DifferenceError(f"frame 0 has shape {own.shape}, not {expected.shape}")
    mean = float(np.abs(own.astype(np.int16) - expected).mean())
    if mean > _FARTHEST:
        raise DifferenceError(f"frame 0 differs from PyAV's by {mean:.1f} levels on average")
