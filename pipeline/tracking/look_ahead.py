"""Encoding frames ahead: a thread runs the part of the next steps that needs neither memory nor masks.

With two threads of torch on a CPU, many operations of a step are too small to be divided, so that the second
core idles. Encoding the next frame while the objects are read and decoded on the one before keeps it busy.
`SideEncoder` does it for a live stream, if the next frame is there already; else it encodes a frame while the
detector looks at the same one.

Rows do not depend on which frames are encoded ahead: both threads compute with equally many threads of torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.base.closeable import Closing
from pipeline.base.records import Frame
from pipeline.video.prefetch import Prefetch
from xmem_core import EncodedFrame, TrackerState, VideoSegmenter
from xmem_core.segmenter import Frame as Image

logger = logging.getLogger(__name__)

Arrived = tuple[Frame, Image | EncodedFrame]
"""A frame, and what `VideoSegmenter.step` takes of it."""

_DEPTH = 1
AHEAD = _DEPTH + 1
"""Maximum number of frames that are held encoded besides the one being tracked: queued, and just finished."""


def looks_ahead(segmenter: VideoSegmenter, threads: int) -> bool:
    """Whether frames are encoded ahead: on a CPU with at least two threads.

    A GPU gets its work without waiting for it, so there is nothing to overlap.
    """
    return segmenter.device.type == "cpu" and threads > 1


def threads_of_step(segmenter: VideoSegmenter, threads: int) -> int:
    """How many threads of torch a step has, of those that its stream may use.

    Half of them where frames are encoded ahead: the other half encodes. Two threads that each compute alone
    are faster than two that share every operation, because on a CPU most operations of a step are short, and
    the threads that share one must be woken for it.
    """
    return (threads + 1) // 2 if looks_ahead(segmenter, threads) else threads


def thread_aside(segmenter: VideoSegmenter, threads: int, name: str) -> ThreadPoolExecutor:
    """A thread for work beside the steps of a stream that may use so many threads.

    It computes with as many threads of torch as they do, which torch sets by thread.
    """
    return ThreadPoolExecutor(1, name, torch.set_num_threads, (threads_of_step(segmenter, threads),))


def help_steps(segmenter: VideoSegmenter, threads: int) -> None:
    """Let a thread do parts of the segmenter's steps, if its streams may use so many threads.

    Encoding ahead seldom takes as long as the steps: with many objects, or while a detector looks, the thread
    that encodes has nothing to do.
    """
    if looks_ahead(segmenter, threads) and segmenter.aside is None:
        segmenter.aside = thread_aside(segmenter, threads, "xmem-step")


def arriving(
    frames: Prefetch[Arrived],
    segmenter: VideoSegmenter,
    state: TrackerState,
    threads: int,
    begins: Callable[[int], bool] = lambda _: False,
) -> Prefetch[Arrived]:
    """The frames in order, encoded in a thread. Closing the result closes `frames`.

    Args:
        state: state of the stream, read only: frames are encoded while it has objects, at its network size.
        threads: threads that the stream may use, see `threads_of_step`.
        begins: whether objects begin on the frame of an index, as far as it is known: then this frame and
            those after it are encoded while their masks are made.
    """
    encoded = _Encoded(frames, segmenter, state, threads_of_step(segmenter, threads), begins)
    return Prefetch(encoded, _DEPTH, name="xmem-encode")


class _Encoded(Iterator[Arrived]):
    """Encodes each frame when it is asked for. To be used by one thread."""

    def __init__(
        self,
        frames: Prefetch[Arrived],
        segmenter: VideoSegmenter,
        state: TrackerState,
        threads: int,
        begins: Callable[[int], bool],
    ) -> None:
        self._frames, self._segmenter, self._state, self._threads = frames, segmenter, state, threads
        self._begins = begins
        self._begun = self._expected = False

    def __next__(self) -> Arrived:
        frame, image = next(self._frames)
        if self._state.object_ids:
            self._expected = False
        elif self._begins(frame.frame_index):
            self._expected = True  # until they are there
        elif not self._expected:
            return frame, image
        if not self._begun:  # the setting is the thread's
            torch.set_num_threads(self._threads)
            self._begun = True
        try:
            return frame, self._segmenter.encode(frame.image, self._state.network_size)
        except Exception as error:
            # The step repeats it and fails at its own place, after the frames before it.
            logger.debug("frame %d could not be encoded ahead: %s", frame.frame_index, error)
            return frame, image

    def close(self) -> None:
        """Stop decoding."""
        self._frames.close()


class SideEncoder(Closing):
    """Encodes a frame in a thread while the caller does something else. To be used by one thread.

    Args:
        state: state of the stream, read only: frames are encoded while it has objects, at its network size.
        threads: threads that the stream may use, see `threads_of_step`.
    """

    def __init__(self, segmenter: VideoSegmenter, state: TrackerState, threads: int) -> None:
        self._segmenter, self._state = segmenter, state
        self._pool = thread_aside(segmenter, threads, "xmem-encode")
        self._encoded: Future[EncodedFrame] | None = None

    def begin(self, image: Image) -> None:
        """Start encoding a frame, if the stream has objects."""
        self._encoded = None
        if self._state.object_ids:
            self._encoded = self._pool.submit(self._segmenter.encode, image, self._state.network_size)

    def take(self, image: Image) -> Image | EncodedFrame:
        """What `VideoSegmenter.step` takes of the frame that was begun: waits until it is encoded."""
        if self._encoded is None:
            return image
        try:
            return self._encoded.result()
        except Exception as error:
            # The step repeats it and fails.
            logger.debug("a frame could not be encoded aside: %s", error)
            return image
        finally:
            self._encoded = None

    def close(self) -> None:
        """Wait for the thread and stop it."""
        self._pool.shutdown(cancel_futures=True)
