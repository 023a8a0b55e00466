"""Ensembles: several sizes and mirrored frames, tracked side by side, with averaged probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from xmem_core import Prompt, StepResult, TrackerState, VideoSegmenter


@dataclass(frozen=True, slots=True)
class _Member:
    segmenter: VideoSegmenter
    mirrored: bool


class Ensemble:
    """Tracks with each segmenter, and averages their probabilities at the frame's size.

    Args:
        segmenters: for example of one model at several sizes; at least one.
        flip: each also tracks the frames mirrored left to right, with a state of its own.
    """

    def __init__(self, segmenters: Sequence[VideoSegmenter], *, flip: bool = False) -> None:
        if not segmenters:
            raise ValueError("an ensemble without segmenters: give at least one")
        self._members = [_Member(s, m) for s in segmenters for m in ((False, True) if flip else (False,))]

    @property
    def device(self) -> torch.device:
        """The first segmenter's device."""
        return self._members[0].segmenter.device

    def new_state(self) -> list[TrackerState]:
        """A state for each member."""
        return [member.segmenter.new_state() for member in self._members]

    def step(
        self, state: list[TrackerState], frame: NDArray[np.uint8], prompt: Prompt | None = None
    ) -> StepResult:
        """One frame: the objects of the members, which are the same, and the mean of their probabilities."""
        mirrored_prompt = None
        if prompt is not None and any(member.mirrored for member in self._members):
            mirrored_prompt = Prompt({i: mask.flip(1) for i, mask in prompt.masks.items()})
        total: torch.Tensor | None = None
        first: StepResult | None = None
        for member, own in zip(self._members, state, strict=True):
            image = np.ascontiguousarray(frame[:, ::-1]) if member.mirrored else frame
            result = member.segmenter.step(own, image, mirrored_prompt if member.mirrored else prompt)
            planes = result.probabilities.flip(2) if member.mirrored else result.probabilities
            total = planes.clone() if total is None else total.add_(planes)
            first = first or result
        assert total is not None
        assert first is not None
        return StepResult(first.object_ids, first.frame_size, total.div_(len(self._members)))
