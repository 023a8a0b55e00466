"""OpenMP wait policy: idle threads sleep instead of spinning, unless the user sets it otherwise.

By default OpenMP's threads spin between two parallel regions: GNU's runtime (libgomp, in torch's wheels for
Linux) for some milliseconds, LLVM's (libomp, in those for macOS) and Intel's for 200 ms. If other processes
use the same cores, or a process has more threads than cores, spinning threads take CPU time from those that
have work: tracking with two threads on two busy cores took three to five times as long.

All three runtimes understand `OMP_WAIT_POLICY=PASSIVE`: by it libgomp sets `GOMP_SPINCOUNT` to 0, the others
`KMP_BLOCKTIME`. A runtime reads its settings once, when it is loaded, which `import torch` does. So
`xmem_core`, `pipeline` and `jobs` call `wait_passively` before they import anything else.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)

WAIT_POLICY = "OMP_WAIT_POLICY"
_SETTINGS = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables with which a user says how OpenMP's threads wait; with any of them set, nothing is changed."""


def wait_passively() -> bool:
    """Let the OpenMP threads of this process, and of those that it starts, sleep while they wait.

    Call it before torch is imported. Where the user has set one of `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`,
    `KMP_BLOCKTIME` and `KMP_LIBRARY`, nothing is changed.

    Returns:
        Whether a passive or user-defined setting is in effect. False: torch was imported before, so its
        threads spin, and a warning is logged. Child processes get the setting in either case.
    """
    if any(name in os.environ for name in _SETTINGS):
        return True
    os.environ[WAIT_POLICY] = "PASSIVE"
    if "torch" not in sys.modules:
        return True
    logger.warning(
        "torch was imported before xmem_core: its OpenMP threads spin while they wait, which slows tracking "
        "down where other processes use the CPU; import xmem_core or pipeline first, or set %s=PASSIVE",
        WAIT_POLICY,
    )
    return False


def passive_environment() -> dict[str, str]:
    """Environment variables that give a child process this process's OpenMP wait policy."""
    given = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    return given or {WAIT_POLICY: "PASSIVE"}
