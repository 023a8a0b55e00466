"""Watches a local Ray's processes: its driver does not notice when they die."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from typing import Any

import ray
from ray._private import ray_constants

from pipeline.base.errors import XmemError

_LOOK_SECONDS = 0.5
_INTERRUPT_SECONDS = 3.0
_END_SECONDS = 4.0
# Processes without which Ray stops working; agents and monitors are restarted or not essential.
_NEEDED = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)


class RayWatch(threading.Thread):
    """Watches the processes of the Ray that this process has started.

    Once one has died, `check` raises. If `check` is not called, the main thread is interrupted; if it stays
    blocked in Ray, the process exits with code 1, so that a supervisor can restart it.
    """

    def __init__(self) -> None:
        super().__init__(name="xmem-ray-watch", daemon=True)
        self._node: Any = ray._private.worker._global_node
        self._left, self._closed, self._noticed = threading.Event(), threading.Event(), threading.Event()
        self._interrupts = threading.current_thread() is threading.main_thread()
        self.lost: str | None = None
        """What has happened, in one line."""

    def run(self) -> None:
        """Body of the thread."""
        while self.lost is None:
            if self._left.wait(_LOOK_SECONDS):
                return
            for kind, process in self._node.dead_processes():
                if kind in _NEEDED and not self._left.is_set():
                    self.lost = (
                        f"Ray's {kind} has died (exit code {process.returncode}): run the command again"
                    )
        if not self._interrupts:
            return
        if not self._noticed.wait(_INTERRUPT_SECONDS):
            _thread.interrupt_main()
        if not self._closed.wait(_END_SECONDS):
            sys.stderr.write(f"xmem: error: {self.lost}\n")
            sys.stderr.flush()
            os._exit(1)

    def check(self) -> None:
        """Raise XmemError if the Ray has died."""
        if self.lost is not None:
            self._noticed.set()
            raise XmemError(self.lost)

    def leave(self) -> None:
        """Stop watching, before Ray is shut down. If Ray has died, it is shut down here."""
        self._left.set()
        self._noticed.set()
        if self.lost is not None:
            ray.shutdown()  # might not return
        self._closed.set()
