"""Allocator settings (glibc malloc) for processes that only track."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

# Parameters from malloc.h, and their values here, bytes but for the last one.
_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = 1, -1, -2, -3, -8
_SETTINGS = {
    _M_MXFAST: 0,
    _M_TRIM_THRESHOLD: 512 << 20,
    _M_TOP_PAD: 16 << 20,
    _M_ARENA_MAX: 1,
}
# Blocks of at least so many bytes come from the system each time: the first value that glibc accepts counts,
# which is the second one in older versions.
_FROM_SYSTEM = (512 << 20, 32 << 20)


def keep_freed_memory() -> bool:
    """Make glibc keep up to 512 MiB of freed memory for the next frame, which needs the same sizes again.

    By default glibc returns large blocks to the system at once, and has a heap for every thread, whose blocks
    the other threads cannot use. Every frame then takes thousands of page faults on fresh pages: a tenth of
    a step of xmem-lite on a virtual machine. It also keeps lists of small freed blocks (fastbins), and goes
    through them whenever a tensor is allocated: 3 % of such a step. Only for the pipeline's own
    processes: a process that calls `track` chooses its allocator settings itself.

    Returns:
        Whether the settings are in effect. They are not without glibc, nor if the environment's MALLOC_ or
        GLIBC_TUNABLES variables configure the allocator.
    """
    if not sys.platform.startswith("linux"):
        return False
    if told := [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        logger.debug("allocator settings are left as %s set them", ", ".join(sorted(told)))
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(name, value) == 1 for name, value in _SETTINGS.items()]
    return all(done) and any(mallopt(_M_MMAP_THRESHOLD, value) == 1 for value in _FROM_SYSTEM)
