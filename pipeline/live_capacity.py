"""Whether another live stream fits: device memory by prediction, time by measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.errors import UsageError
from pipeline.live_spec import LiveSpec
from pipeline.memory_plan import predict_state_bytes, predict_workspace_bytes
from pipeline.settings import DTYPES, dtype_name
from pipeline.worker import device_bytes
from xmem_core import Prompt, VideoSegmenter

_SHARE = 0.8  # of the device's memory
_TRIALS = 4
_MIB = 1 << 20

Load = Sequence[tuple[LiveSpec, tuple[int, int] | None, float | None]]
"""Of each stream: what it is asked to be, (height, width) if known, and measured milliseconds per frame."""


class Capacity:
    """What a device can do.

    Args:
        segmenter: that all streams share.
        memory_bytes: that may be used; None: most of what the device has.
        load: share of the time that frame rates asked for may take together.
    """

    def __init__(self, segmenter: VideoSegmenter, memory_bytes: int | None, load: float) -> None:
        self._segmenter = segmenter
        self._most = load
        self._all = device_bytes(segmenter.device)
        self._budget = memory_bytes or int(self._all * _SHARE)
        self._measured_ms: float | None = None

    def calibrate(self) -> float:
        """Measure one object on one stream at the size that the network sees; milliseconds per frame."""
        side = self._segmenter.size or 480
        height, width = side, -(-side * 16 // 9)
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.bool_)
        mask[height // 4 : height // 2, width // 4 : width // 2] = True
        state = self._segmenter.new_state()
        times = []
        for trial in range(_TRIALS):
            begun = time.perf_counter()
            result = self._segmenter.step(state, image, None if trial else Prompt({1: mask}))
            result.label_map.cpu()
            times.append(time.perf_counter() - begun)
        self._measured_ms = 1000 * float(np.median(times[1:]))
        return self._measured_ms

    def admit(self, spec: LiveSpec, there: Load) -> None:
        """Raises UsageError, with the numbers, if a stream does not fit beside those that are there."""
        self.check_memory(spec.stream_id, [*there, (spec, None, None)])
        if spec.settings.fps is None:
            return
        ms = self._ms(there)
        if ms is None:
            return
        used = self._time(there)
        asked = spec.settings.fps * ms / 1000
        if used + asked > self._most:
            raise UsageError(
                f"stream {spec.stream_id} does not fit the device's time: {spec.settings.fps:g} frames/s at "
                f"{ms:.1f} ms each take {100 * asked:.0f} %, {100 * used:.0f} % are promised, of "
                f"{100 * self._most:.0f} %: ask for at most {max(0.0, self._most - used) * 1000 / ms:.1f} "
                "frames/s, a smaller size, or remove a stream"
            )

    def check_memory(self, stream_id: str, there: Load) -> None:
        """Raises UsageError, with the numbers, if these streams do not fit; it is said of one of them."""
        others = [entry for entry in there if entry[0].stream_id != stream_id]
        now, then = self._memory(others), self._memory(there)
        if then > self._budget:
            raise UsageError(
                f"stream {stream_id} does not fit the device's memory: {then // _MIB} MiB would be "
                f"used ({now // _MIB} MiB without it), {self._budget // _MIB} MiB may be: ask for a "
                "smaller size or fewer max_objects, or remove a stream"
            )

    def report(self, there: Load) -> dict[str, Any]:
        """The numbers."""
        return {
            "device": str(self._segmenter.device),
            "device_bytes": self._all,
            "budget_bytes": self._budget,
            "predicted_bytes": self._memory(there),
            "weights_bytes": self._segmenter.weights_bytes,
            "ms_per_frame": self._ms(there),
            "calibrated_ms_per_frame": self._measured_ms,
            "promised_load": self._time(there),
            "most_load": self._most,
        }

    def _memory(self, there: Load) -> int:
        """Weights, all states, and the largest workspace: streams take turns."""
        chosen = self._segmenter
        dtype = dtype_name(chosen)
        dtype = dtype if dtype in DTYPES else "float32"
        states, work = 0, 0
        for spec, size, _ in there:
            asked = spec.settings
            height, width = size or (asked.expected_height, asked.expected_width)
            side = asked.size or chosen.size
            sizes = (height, width, asked.max_objects, side, dtype)
            states += predict_state_bytes(chosen.config, chosen.memory_config, *sizes)
            work = max(
                work,
                predict_workspace_bytes(
                    chosen.config, chosen.memory_config, *sizes, device=torch.device(chosen.device).type
                ),
            )
        return int(chosen.weights_bytes + states + work)

    def _ms(self, there: Load) -> float | None:
        """A frame's time: the slowest that was measured on streams that are there, else the trial's."""
        known = [ms for _, _, ms in there if ms is not None]
        return max([*known, self._measured_ms or 0.0]) or None if known else self._measured_ms

    def _time(self, there: Load) -> float:
        """Share of the time that was promised."""
        usual = self._measured_ms or 0.0
        return sum((spec.settings.fps or 0.0) * (ms or usual) / 1000 for spec, _, ms in there)
