"""Kills the process that loads it at moments chosen by a test: put this folder on PYTHONPATH.

The folder named by XMEM_KILLS has files `<number>.<phase>`. The lowest number is the next kill: the first
process to reach its phase removes the file, so that no other process dies of it, and kills itself with
SIGKILL. Phases of a tracker process: decode (the decoder returned a frame), track (before a step), snapshot
(before one is stored), stored (after that), commit (before a chunk's files are written), between (after the
events file, before the tracks file) and committed. The phase driver is reached by the process that drives the
batch, some time after the kill's turn has come.
"""

import os
import random
import signal
import sys
import threading
import time
from typing import Any

FOLDER = os.environ.get("XMEM_KILLS", "")


def _due() -> str | None:
    try:
        names = sorted(os.listdir(FOLDER))
    except OSError:
        return None
    return names[0] if names else None


def _reach(phase: str) -> None:
    name = _due()
    if name is None or not name.endswith("." + phase):
        return
    # Usually not at once: kills should hit any position in a video.
    if random.random() > 0.15:
        return
    try:
        os.unlink(os.path.join(FOLDER, name))
    except FileNotFoundError:
        return  # another process has died of it
    os.kill(os.getpid(), signal.SIGKILL)


def _around(owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            _reach(before)
        result = inner(*args, **kwargs)
        if after:
            _reach(after)
        return result

    setattr(owner, name, wrapped)


def _patch_tracker() -> None:
    while getattr(sys.modules.get("pipeline.distributed.worker"), "Worker", None) is None:
        time.sleep(0.002)
    from pipeline.tracks.store import StreamStore
    from pipeline.video.prefetch import Prefetch
    from xmem_core import VideoSegmenter

    _around(Prefetch, "_put", before="decode")
    _around(VideoSegmenter, "step_many", before="track")
    _around(StreamStore, "save_snapshot", before="snapshot", after="stored")
    _around(StreamStore, "commit", before="commit", after="committed")
    _around(StreamStore, "_create_tracks", before="between")


def _watch_driver() -> None:
    while True:
        time.sleep(0.3)
        name = _due()
        if name is not None and name.endswith(".driver"):
            time.sleep(random.uniform(0.0, 3.0))
            try:
                os.unlink(os.path.join(FOLDER, name))
            except FileNotFoundError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)


if FOLDER:
    if os.environ.get("XMEM_KILLS_DRIVER") == str(os.getpid()):
        threading.Thread(target=_watch_driver, daemon=True).start()
    elif any("default_worker.py" in word for word in sys.orig_argv):
        threading.Thread(target=_patch_tracker, daemon=True).start()
