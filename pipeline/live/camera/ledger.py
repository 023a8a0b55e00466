"""Frame ledger of a live stream: counts every received frame as tracked, dropped or corrupt.

    received = tracked + dropped (by reason) + corrupt + in flight

A frame is received when the camera's packets gave a picture, or should have given one. A frame is in flight
between the source and the tracker; a closed stream has none in flight. Events, the API and the metrics read
the same ledger, so they cannot differ.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# Reasons for dropping frames: they would exceed the allowed lag, or there is no room for them to wait.
TOO_OLD, QUEUE_FULL = "too old", "queue full"


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """The ledger at one moment, as plain data.

    Args:
        dropped: intact frames that were not tracked, by reason.
        corrupt: frames that could not be decoded, or only with damage, by reason.
    """

    received: int = 0
    tracked: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    corrupt: Mapping[str, int] = field(default_factory=dict)

    @property
    def dropped_total(self) -> int:
        return sum(self.dropped.values())

    @property
    def corrupt_total(self) -> int:
        return sum(self.corrupt.values())

    @property
    def late(self) -> int:
        """Number of frames dropped because tracking took too long."""
        return sum(self.dropped.get(reason, 0) for reason in (TOO_OLD, QUEUE_FULL))

    @property
    def in_flight(self) -> int:
        """Number of received frames that are not tracked, dropped or corrupt yet."""
        return self.received - self.tracked - self.dropped_total - self.corrupt_total

    @property
    def settled(self) -> bool:
        """Whether received = tracked + dropped + corrupt."""
        return self.in_flight == 0

    def to_json(self) -> dict[str, Any]:
        """For JSON: snapshots, the stream record, the API."""
        return {
            "received": self.received,
            "tracked": self.tracked,
            "dropped": dict(sorted(self.dropped.items())),
            "corrupt": dict(sorted(self.corrupt.items())),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LedgerCounts:
        """Restore from the output of `to_json`; ValueError for anything else."""
        try:
            counts = cls(
                _count(values["received"]),
                _count(values["tracked"]),
                {str(reason): _count(n) for reason, n in values["dropped"].items()},
                {str(reason): _count(n) for reason, n in values["corrupt"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{values!r} is no ledger: received, tracked, dropped and corrupt are needed"
            ) from error
        if counts.in_flight < 0:
            raise ValueError(f"{values!r} is no ledger: more became of frames than were received")
        return counts


class Ledger:
    """Counts one stream's frames. Thread-safe.

    Args:
        counts: initial counts, after a restart.
    """

    def __init__(self, counts: LedgerCounts | None = None) -> None:
        counts = counts or LedgerCounts()
        self._lock = threading.Lock()
        self._received = counts.received
        self._tracked = counts.tracked
        self._dropped = dict(counts.dropped)
        self._corrupt = dict(counts.corrupt)

    @classmethod
    def resumed(cls, counts: LedgerCounts, next_frame: int, reason: str = "restart") -> Ledger:
        """A ledger that continues at frame `next_frame` after a restart.

        Frames in flight in `counts`, and frames received after it was taken, count as dropped for `reason`.
        """
        if next_frame < counts.received:
            raise ValueError(
                f"a ledger of {counts.received} frames cannot go on at frame {next_frame}: "
                "numbers are never used twice"
            )
        ledger = cls(counts)
        lost = counts.in_flight + next_frame - counts.received
        ledger.received(next_frame - counts.received)
        if lost:
            ledger.dropped(reason, lost)
        return ledger

    def received(self, count: int = 1) -> None:
        """Count received frames."""
        self._check("received", count)
        with self._lock:
            self._received += count

    def tracked(self, count: int = 1) -> None:
        """Count received frames as tracked."""
        self._settle("tracked", count)

    def dropped(self, reason: str, count: int = 1) -> None:
        """Count received frames as dropped."""
        self._settle("dropped", count, reason)

    def corrupt(self, reason: str, count: int = 1) -> None:
        """Count received frames as corrupt."""
        self._settle("corrupt", count, reason)

    def counts(self) -> LedgerCounts:
        """An immutable copy of the current counts."""
        with self._lock:
            return LedgerCounts(
                self._received,
                self._tracked,
                MappingProxyType(dict(self._dropped)),
                MappingProxyType(dict(self._corrupt)),
            )

    def __repr__(self) -> str:
        counts = self.counts()
        return (
            f"Ledger({counts.received} received = {counts.tracked} tracked + {counts.dropped_total} dropped "
            f"+ {counts.corrupt_total} corrupt + {counts.in_flight} in flight)"
        )

    def _settle(self, what: str, count: int, reason: str | None = None) -> None:
        self._check(what, count)
        with self._lock:
            settled = self._tracked + sum(self._dropped.values()) + sum(self._corrupt.values())
            if settled + count > self._received:
                raise ValueError(
                    f"{count} {what}, but only {self._received - settled} of {self._received} frames "
                    "received are in flight: a frame is settled once"
                )
            if what == "tracked":
                self._tracked += count
            else:
                book = self._dropped if what == "dropped" else self._corrupt
                book[str(reason)] = book.get(str(reason), 0) + count

    @staticmethod
    def _check(what: str, count: int) -> None:
        if count < 0:
            raise ValueError(f"{count} {what}: a ledger only counts upwards")


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value
