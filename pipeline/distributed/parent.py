"""Ends a Ray worker process whose raylet has died.

Ray leaves such a worker running. It can no longer be reached, and its actor may be restarted on another node,
but it would continue to track and write.
"""

from __future__ import annotations

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


def end_with_parent() -> None:
    """End this process, without cleaning up, when its parent process is gone. For Ray workers."""
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="xmem-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    logger.error("the raylet that started this process has died: ending")
    os._exit(1)
