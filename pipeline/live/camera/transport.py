"""Choice of the RTSP media transport (TCP or UDP) when it is `auto`."""

from __future__ import annotations

from typing import Literal

from pipeline.live.camera.connection import ConnectionLost
from pipeline.live.camera.options import Transport
from pipeline.storage.locations import scheme_of

_OTHER: dict[str, Literal["tcp", "udp"]] = {"tcp": "udp", "udp": "tcp"}
_PATIENCE = 3  # consecutive connections without a picture over the transport that worked before


class TransportChoice:
    """Chooses the transport of the next connection. With "auto" that is TCP first, then what worked last.

    The other transport is tried at once if the camera does not offer this one, and next if it connects but
    gives no picture. A camera that cannot be reached at all tells nothing about transports.

    Args:
        asked: "auto", "tcp" or "udp"; the latter two are never changed.
        url: URL of the stream; schemes other than RTSP have no choice of transport.

    Attributes:
        current: transport of the next connection.
    """

    def __init__(self, asked: Transport, url: str) -> None:
        self._free = asked == "auto" and scheme_of(url) in ("rtsp", "rtsps")
        self.current: Transport = "tcp" if self._free else asked
        self._worked: Transport | None = None
        self._silent = 0  # connections in a row without a picture
        self._failures: dict[Transport, str] = {}  # failures since the last picture

    def worked(self) -> None:
        """Note that the connection gave a picture."""
        self._worked = self.current
        self._silent = 0
        self._failures.clear()

    def lost(self, lost: ConnectionLost, *, pictures: bool) -> bool:
        """Note that a connection failed or ended, with or without pictures, and choose the next transport.

        Returns:
            Whether to connect again at once.
        """
        if not self._free or pictures or lost.transport is None:
            return False
        self._failures[self.current] = lost.detail
        self._silent += 1
        refused = lost.transport == "refused"
        if refused or self.current != self._worked or self._silent >= _PATIENCE:
            self.current = _OTHER[self.current]
            self._silent = 0
        return refused and self.current not in self._failures

    def failure(self, lost: ConnectionLost) -> str:
        """Return reason and detail of a failed connection, for each transport if both were tried."""
        if lost.transport is None or len(set(self._failures.values())) < 2:
            return f"{lost.reason}: {lost.detail}"
        told = "; ".join(f"over {name.upper()}: {self._failures[name]}" for name in sorted(self._failures))
        return f"{lost.reason}: {told}"
