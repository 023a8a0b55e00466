"""Allocator settings (glibc malloc) for processes that only track."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

# From malloc.h, and what they are set to, in bytes.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {
    _M_MMAP_THRESHOLD: 32 << 20,  # the most that glibc takes
    _M_TRIM_THRESHOLD: 256 << 20,
    _M_TOP_PAD: 16 << 20,
}


def keep_freed_memory() -> bool:
    """Have glibc keep up to 256 MiB of freed memory for the next frame, which needs the same sizes again.

    By default it gives large blocks back to the system at once, and every frame's first look at some thousand
    pages of new ones then is a page fault: a tenth of a step of xmem-lite on a virtual machine. For processes
    of our own only: whoever calls `track` in theirs decides about it themselves.

    Returns:
        whether it does now. Not without glibc, nor where the environment's MALLOC_ or GLIBC_TUNABLES say
        how memory is to be allocated.
    """
    if not sys.platform.startswith("linux"):
        return False
    if told := [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        logger.debug("memory is allocated as %s say", ", ".join(sorted(told)))
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
