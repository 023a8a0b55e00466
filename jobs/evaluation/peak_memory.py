"""Peak memory over a span of time, of a GPU or of this process."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak resident set size to the current one


class PeakMemory:
    """Starts measuring when it is made.

    Args:
        device: a CUDA device, whose allocator's peak is read; else the process's peak resident set size.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._known = True
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # another system than Linux, or a container that does not allow it
            self._known = False

    def bytes(self) -> int | None:
        """The peak since it was made; None where this system does not tell."""
        if self._device is not None:
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._known:
            return None
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
