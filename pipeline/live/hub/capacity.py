"""Admission control for live streams: predicted device memory and measured frame time.

The time of a frame is modelled as growing with the pixels that the network sees and with the number of
objects. The device's speed is measured before the first stream is admitted, and again on the running streams:
if their median is slower than predicted, all predictions are scaled by the same factor.

A promised rate (`fps`) is kept as follows. All promised rates together take at most a fixed share of the
device's time, computed with the maximum number of objects of each stream. Streams without a promise take
turns in the remaining time (see `pipeline.live.hub.turns`), so they do not affect promises. A frame is never
interrupted: a stream is therefore refused if a single frame of it delays a promised stream by more than that
stream can catch up with, or delays all others for seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.base.errors import UsageError
from pipeline.live.pacing import CATCH_UP_SECONDS
from pipeline.live.spec import LiveSpec
from pipeline.tracking.memory_plan import device_bytes, predict_state_bytes, predict_workspace_bytes
from pipeline.tracking.settings import DTYPES, dtype_name
from xmem_core import Prompt, VideoSegmenter
from xmem_core.object_copy import MOST_ELEMENTS

_SHARE = 0.8  # share of the device's memory to use by default
_TRIALS = 4
_MANY = 4  # objects in the second trial
_USUAL_OBJECT = 0.15  # cost of an object as a share of the time without objects, if not measured
_MIB = 1 << 20
_FRAMES_HELD_UP = 2  # frames a promised stream can catch up with, or the frames of CATCH_UP_SECONDS
_MOST_FRAME_SECONDS = 5.0  # longest delay of streams without a promise by a frame of another stream


@dataclass(frozen=True)
class Load:
    """The load of one stream on its device.

    Args:
        spec: the stream's spec.
        size: (height, width) of its frames, once known.
        ms: measured milliseconds per frame.
        objects: number of objects during the measurement.
        copied: elements of memory that are copied from other streams.
    """

    spec: LiveSpec
    size: tuple[int, int] | None = None
    ms: float | None = None
    objects: int = 0
    copied: int = 0


class Capacity:
    """Capacity of a device, and the admission checks.

    Args:
        segmenter: the segmenter that all streams share.
        memory_bytes: device memory that may be used; None: 80 % of the device's memory.
        load: share of the time that all promised rates may take together.
    """

    def __init__(self, segmenter: VideoSegmenter, memory_bytes: int | None, load: float) -> None:
        self._segmenter = segmenter
        self._most = load
        self._all = device_bytes(segmenter.device)
        self._budget = memory_bytes or int(self._all * _SHARE)
        self._measured_ms: float | None = None
        self._object = _USUAL_OBJECT
        self._ms_per_unit: float | None = None

    def calibrate(self) -> float:
        """Measure the frame time with one object and with several at the size that the network sees.

        Returns:
            Milliseconds per frame with one object.
        """
        side = self._segmenter.size or 480
        height, width = side, -(-side * 16 // 9)
        one, many = self._trial(height, width, 1), self._trial(height, width, _MANY)
        each = max(0.0, many - one) / (_MANY - 1)
        self._object = each / max(1e-6, one - each)
        if not 0 <= self._object <= 1:  # noise: an object never costs more than the frame itself
            self._object = min(1.0, max(0.0, self._object))
        self._measured_ms = one
        self._ms_per_unit = one / (height * width * (1 + self._object))
        return one

    def _trial(self, height: int, width: int, objects: int) -> float:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        masks = {}
        for number in range(objects):
            masks[number + 1] = mask = np.zeros((height, width), np.bool_)
            left = width * number // objects
            mask[height // 4 : height // 2, left : left + max(1, width // (2 * objects))] = True
        state = self._segmenter.new_state()
        times = []
        for trial in range(_TRIALS):
            begun = time.perf_counter()
            result = self._segmenter.step(state, image, None if trial else Prompt(masks))
            result.label_map.cpu()
            times.append(time.perf_counter() - begun)
        return 1000 * float(np.median(times[1:]))

    def prepare(self, spec: LiveSpec) -> None:
        """Compute and cache what `admit` needs to know of the network; slow on the first call."""
        self._memory([Load(spec)])

    def admit(self, spec: LiveSpec, there: Sequence[Load]) -> None:
        """Raises UsageError, with the numbers, if a stream does not fit beside the existing ones."""
        self.check(spec.stream_id, [*there, Load(spec)])

    def recheck(self, stream_id: str, there: Sequence[Load]) -> None:
        """Raises UsageError if an admitted stream does not fit, now that its frame size is known.

        A device that has become slower is no reason: admitted streams stay.
        """
        self._check_memory(stream_id, there)
        chosen = next((entry for entry in there if entry.spec.stream_id == stream_id), None)
        if chosen is not None and self._units(chosen, 0) > self._units(Load(chosen.spec), 0):
            self._check_time(chosen, there)

    def check_copy(self, stream_id: str, there: Sequence[Load]) -> None:
        """Raises UsageError if there is no memory for one more copied object in a stream."""
        most = self._segmenter.memory_config.max_long_term_elements
        more = [
            replace(load, copied=min(most, load.copied + MOST_ELEMENTS))
            if load.spec.stream_id == stream_id
            else load
            for load in there
        ]
        self._check_memory(stream_id, more)

    def check(self, stream_id: str, there: Sequence[Load]) -> None:
        """Raises UsageError, with the numbers, if these streams do not fit; the message names `stream_id`."""
        self._check_memory(stream_id, there)
        self._check_time(next(entry for entry in there if entry.spec.stream_id == stream_id), there)

    def _check_time(self, chosen: Load, there: Sequence[Load]) -> None:
        stream_id = chosen.spec.stream_id
        others = [entry for entry in there if entry.spec.stream_id != stream_id]
        speed = self._speed(there)
        if speed is None:
            return
        ms = self._frame_ms(chosen, speed)
        fps = chosen.spec.settings.fps
        if fps is not None:
            used, asked = self._promised(others, speed), fps * ms / 1000
            if used + asked > self._most:
                left = max(0.0, self._most - used)
                most = chosen.spec.settings.finder.max_objects
                raise UsageError(
                    f"stream {stream_id} does not fit the device's time: {fps:g} frames/s at {ms:.1f} ms "
                    f"each (with {most} objects) take {100 * asked:.0f} %, "
                    f"{100 * used:.0f} % are promised, of {100 * self._most:.0f} %: ask for at most "
                    f"{left * 1000 / ms:.2g} frames/s, a smaller size or fewer max_objects, or remove a "
                    "stream"
                )
        for slow, kept in [(chosen, other) for other in others] + [(other, chosen) for other in others]:
            self._check_wait(stream_id, slow, kept, speed)

    def _check_wait(self, stream_id: str, slow: Load, kept: Load, speed: float) -> None:
        """Raises UsageError if one stream cannot wait while a frame of another is tracked."""
        fps = kept.spec.settings.fps
        if fps is None:
            ms, most = self._frame_ms(slow, speed, objects=1), _MOST_FRAME_SECONDS
            why = "others would be held up by it"
        else:
            ms, most = self._frame_ms(slow, speed), max(CATCH_UP_SECONDS, _FRAMES_HELD_UP / fps)
            why = f"stream {kept.spec.stream_id} is promised {fps:g} frames/s"
        if ms > 1000 * most:
            raise UsageError(
                f"stream {stream_id} does not fit the device's time: a frame of stream "
                f"{slow.spec.stream_id} takes {ms / 1000:.1f} s, at most {most:g} s are allowed because "
                f"{why}: ask for a smaller size or fewer max_objects, or remove a stream"
            )

    def _check_memory(self, stream_id: str, there: Sequence[Load]) -> None:
        others = [entry for entry in there if entry.spec.stream_id != stream_id]
        now, then = self._memory(others), self._memory(there)
        if then > self._budget:
            raise UsageError(
                f"stream {stream_id} does not fit the device's memory: {then // _MIB} MiB would be "
                f"used ({now // _MIB} MiB without it), {self._budget // _MIB} MiB may be: ask for a "
                "smaller size or fewer max_objects, or remove a stream"
            )

    def report(self, there: Sequence[Load]) -> dict[str, Any]:
        """The numbers. `ms_per_frame` is measured on the slowest stream, or in the trial without streams."""
        known = [entry.ms for entry in there if entry.ms is not None]
        return {
            "device": str(self._segmenter.device),
            "device_bytes": self._all,
            "budget_bytes": self._budget,
            "predicted_bytes": self._memory(there),
            "weights_bytes": self._segmenter.weights_bytes,
            "ms_per_frame": max(known, default=self._measured_ms),
            "calibrated_ms_per_frame": self._measured_ms,
            "promised_load": self._promised(there, self._speed(there)),
            "most_load": self._most,
        }

    # --- memory ----------------------------------------------------------------------------------

    def _memory(self, there: Sequence[Load]) -> int:
        """Bytes of the weights, all states, and the largest workspace, since streams take turns."""
        chosen = self._segmenter
        dtype = dtype_name(chosen)
        dtype = dtype if dtype in DTYPES else "float32"
        states, work = 0, 0
        for entry in there:
            asked = entry.spec.settings
            height, width = entry.size or (asked.expected_height, asked.expected_width)
            side = asked.size or chosen.size
            sizes = (height, width, asked.finder.max_objects, side, dtype)
            states += predict_state_bytes(chosen.config, chosen.memory_config, *sizes, copied=entry.copied)
            work = max(
                work,
                predict_workspace_bytes(
                    chosen.config,
                    chosen.memory_config,
                    *sizes,
                    device=torch.device(chosen.device).type,
                    copied=entry.copied,
                ),
            )
        return int(chosen.weights_bytes + states + work)

    # --- time ------------------------------------------------------------------------------------

    def _units(self, entry: Load, objects: int) -> float:
        """Cost of a frame: pixels that the network sees, plus a share of that per object."""
        asked = entry.spec.settings
        height, width = entry.size or (asked.expected_height, asked.expected_width)
        side = asked.size or self._segmenter.size
        shrunk = 1.0 if side is None else min(1.0, side / min(height, width))
        return height * width * shrunk * shrunk * (1 + self._object * objects)

    def _speed(self, there: Sequence[Load]) -> float | None:
        """Milliseconds per unit: the larger of trial and running streams; None without either."""
        known = [entry.ms / self._units(entry, entry.objects) for entry in there if entry.ms is not None]
        found = [self._ms_per_unit] if self._ms_per_unit is not None else []
        return max([*found, *([statistics.median(known)] if known else [])], default=None)

    def _frame_ms(self, entry: Load, speed: float, objects: int | None = None) -> float:
        """Milliseconds of a frame, by default with the stream's maximum number of objects."""
        count = entry.spec.settings.finder.max_objects if objects is None else objects
        return speed * self._units(entry, count)

    def _promised(self, there: Sequence[Load], speed: float | None) -> float:
        """Share of the time taken by promised rates."""
        if speed is None:
            return 0.0
        return sum((entry.spec.settings.fps or 0.0) * self._frame_ms(entry, speed) / 1000 for entry in there)
