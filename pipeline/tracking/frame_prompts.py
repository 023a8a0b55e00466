"""FramePrompts: resolves a video's prompts to masks when their frame arrives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from pipeline.base.records import Frame
from pipeline.prompts.box_segmenters import BoxSegmenter, load_box_segmenter
from pipeline.prompts.resolving import PromptObject, PromptSet, ResolvedPrompt, resolve
from pipeline.tracking.stream_record import ResolvedPrompts
from pipeline.video.sources import VideoSource


class FramePrompts:
    """Resolves the prompts of one video.

    Args:
        name: name of the box segmenter, which is loaded when one is needed.
        box_segmenter: used instead of the one named `name`.
        warnings: list that warnings about prompts are appended to.
        aside: a thread that may segment some of the boxes, see `resolve`.

    Attributes:
        name: name of the box segmenter.
        resolved: masks that were made from boxes. Each box is segmented once; a resumed run reuses the mask.
    """

    def __init__(
        self,
        name: str,
        box_segmenter: BoxSegmenter | None,
        warnings: list[str],
        aside: Executor | None = None,
    ) -> None:
        self.resolved = ResolvedPrompts()
        self.name, self._boxes, self._warnings = name, box_segmenter, warnings
        self._aside = aside
        self._tried: tuple[int, ResolvedPrompt] | None = None

    def boxes(self) -> BoxSegmenter:
        """The box segmenter, loaded on first use."""
        if self._boxes is None:
            self._boxes = load_box_segmenter(self.name)
        return self._boxes

    def try_first(self, source: VideoSource, prompts: PromptSet) -> None:
        """Resolve the prompts of a video's first frame before tracking starts, and keep the result.

        Raises:
            PromptError: the prompts do not fit the frame. SourceError: the video cannot be read.
        """
        frame = next(source.frames(), None)
        if frame is not None and _shown(prompts, frame.frame_index):
            self._tried = (frame.frame_index, self._resolve(frame, prompts))

    def at(self, frame: Frame, prompts: PromptSet, keep: Callable[[], None]) -> ResolvedPrompt | None:
        """The masks of a frame's prompts; None if it has none. Objects of other streams' states have none.

        Args:
            keep: makes `resolved` durable; called if it has changed, before any row that depends on it.

        Raises:
            PromptError: the prompts do not fit the frame.
        """
        if not _shown(prompts, frame.frame_index):
            return None
        known = self.resolved.get(frame.frame_index)
        if known is not None:
            return known
        if self._tried is not None and self._tried[0] == frame.frame_index:
            found, self._tried = self._tried[1], None
        else:
            found = self._resolve(frame, prompts)
        if self.resolved.has(frame.frame_index):
            keep()
        return found

    def _resolve(self, frame: Frame, prompts: PromptSet) -> ResolvedPrompt:
        objects = _shown(prompts, frame.frame_index)
        found = resolve(objects, frame, self.boxes(), self._aside)
        self._warnings.extend(w for w in found.warnings if w not in self._warnings)
        if any(entry.box is not None for entry in objects):
            self.resolved.put(frame.frame_index, found)
        return found


def _shown(prompts: PromptSet, frame_index: int) -> list[PromptObject]:
    """The objects of a frame that are given in it."""
    return [entry for entry in prompts.at(frame_index) if entry.state is None]
