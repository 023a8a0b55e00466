"""glibc's allocator: memory that a step frees is kept for the next one.

Each frame allocates and frees the same large maps. By default glibc takes blocks of more than 32 MiB from the
system each time, gives free memory at the end of its heap back, and has a heap for every thread, whose blocks
the other threads cannot use. All of these mean fresh pages, which the system has to provide and to clear:
tracking three people at 384 pixels had three times as many page faults, took 3 to 8 % more CPU time (most
on a busy machine) and more memory (692 against 650 MB).
"""

from __future__ import annotations

import ctypes
import logging
import os

logger = logging.getLogger(__name__)

# Parameters of glibc's `mallopt`, see malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# Bytes of free memory at the end of the heap from which on it is given back, and of a block that is always
# taken from the system. With only one of them set, glibc no longer adapts the other, which is far worse.
_KEPT = 512 << 20
_LARGEST = 512 << 20

_TUNABLES = "GLIBC_TUNABLES"


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, in one heap for all threads. It holds for the whole process.

    Where the user has set one of glibc's `MALLOC_...` variables, or a `glibc.malloc` tunable, nothing is
    changed.

    Returns:
        whether it was set. False also where the C library is another one.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get(_TUNABLES, "") or not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_TRIM_THRESHOLD, _KEPT), (_MMAP_THRESHOLD, _LARGEST), (_ARENA_MAX, 1))
    done = [bool(mallopt(name, value)) for name, value in settings]
    if not all(done):
        logger.debug("glibc refused some settings of its allocator: %s", done)
    return all(done)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False
