"""Gauges: how full the memory of a stream is, and how much memory the device has left. JSON-ready."""

from __future__ import annotations

import os
import resource
from dataclasses import asdict
from typing import Any

import torch

from xmem_core import TrackerState
from xmem_core.contents import occupancy


def gauges(state: TrackerState) -> dict[str, Any]:
    """How full each region of a memory is, and the bytes that it is allocated for."""
    regions = [asdict(region) for region in occupancy(state.memory)]
    return {"regions": regions, "bytes": 0 if state.memory is None else state.memory.nbytes}


def device_memory(device: str) -> dict[str, Any]:
    """Bytes in use and their limit: of the GPU, or of this process and the machine on a CPU."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"name": torch.cuda.get_device_name(device), "bytes": total - free, "limit": total}
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": "cpu", "bytes": resident_bytes(), "limit": total}


def resident_bytes() -> int:
    """Resident memory of this process; its largest so far where the system does not tell the present one."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
