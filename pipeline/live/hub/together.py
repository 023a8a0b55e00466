"""Streams of a hub that are tracked together: their frames go through the network in one batch.

On a GPU a step of one stream leaves most of the device idle. Streams whose frames are there are therefore
advanced at once, see `VideoSegmenter.step_each`. On a CPU each is advanced by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.live.hub.stream import HubStream
from pipeline.live.tracker import LiveTracker
from pipeline.tracking.files.executor import step_inputs
from pipeline.tracking.files.stream_tracker import StepInput
from xmem_core import StepResult

MOST_TOGETHER = 8
"""Streams in one batch at most. A frame waits for the whole batch, and with so many the device is busy."""

WAIT_SECONDS = 0.003
"""How long a frame waits for those of other streams: less than a step of one stream takes on most GPUs, so
that waiting costs less than it saves, and a tenth of a frame of a camera."""

EXPECTED_SECONDS = 1.0
"""Streams tracked so recently are waited for: not those that are paused, or whose camera is silent."""


@dataclass(frozen=True)
class Ready:
    """A stream whose next frame is to be tracked.

    Args:
        seconds: time that it took to prepare the frame, with the detector.
    """

    stream: HubStream
    tracker: LiveTracker
    step: StepInput
    seconds: float


Batch = list[Ready]


def stepped(batch: Sequence[Ready]) -> list[tuple[StepResult | Exception, float]]:
    """Step the streams, those of one segmenter together.

    Returns:
        of each stream its result or its error, and its share of the time, in seconds.
    """
    groups: dict[int, list[int]] = {}
    for i, ready in enumerate(batch):
        groups.setdefault(id(ready.stream.segmenter), []).append(i)
    found: dict[int, tuple[StepResult | Exception, float]] = {}
    for members in groups.values():
        segmenter = batch[members[0]].stream.segmenter
        begun = time.perf_counter()
        outcomes = step_inputs(segmenter, [batch[i].step for i in members])
        share = (time.perf_counter() - begun) / len(members)
        found |= {i: (outcome, share) for i, outcome in zip(members, outcomes, strict=True)}
    return [found[i] for i in range(len(batch))]
