"""Invariants of a live stream's committed files."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.tracks.store import StreamStore


class Committed:
    """All rows and events of a stream, checked while they are read."""

    def __init__(self, out: Path | str, stream_id: str) -> None:
        store = StreamStore(str(out), stream_id)
        self.footers = store.footers(0)
        assert self.footers, f"nothing of {stream_id} is committed"
        assert self.footers[0].first == 0
        assert all(b.first == a.last + 1 for a, b in pairwise(self.footers))
        self.received = self.footers[-1].last + 1
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        for footer in self.footers:
            name = f"stream_id={stream_id}/frames-{footer.first:012d}.parquet"
            events = pq.read_table(Path(out) / "events" / name, partitioning=None).to_pylist()
            assert events == footer.events.to_pylist()
            assert all(footer.first <= e["frame_index"] <= footer.last for e in events)
            self.events += events
            self.rows += pq.read_table(Path(out) / "tracks" / name, partitioning=None).to_pylist()
        keys = [(r["frame_index"], r["object_id"]) for r in self.rows]
        assert len(set(keys)) == len(keys), "a row is there twice"
        times = {r["frame_index"]: r["pts_seconds"] for r in self.rows}
        assert all(b > a for a, b in pairwise(times[i] for i in sorted(times)))
        added = Counter(e["object_id"] for e in self.events if e["kind"] == "object_added")
        gone = Counter(e["object_id"] for e in self.events if e["kind"] == "object_removed")
        assert all(n <= 1 + gone[i] for i, n in added.items()), f"an id was given twice: {added}"
        found = Counter(e["object_id"] for e in self.events if e["reason"] == "detector")
        assert all(n == 1 for n in found.values()), f"the detector gave an id twice: {found}"
        record = store.read_record()
        assert record is not None
        self.record = record
        assert all(i < record["live"]["ids_reserved"] for i in added)

    def sums(self, kind: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for event in self.events:
            if event["kind"] == kind:
                found[str(event["reason"])] = found.get(str(event["reason"]), 0) + event["count"]
        return found

    @property
    def tracked(self) -> int:
        return self.received - sum(self.sums("dropped").values()) - sum(self.sums("corrupt").values())

    @property
    def frames(self) -> set[int]:
        return {r["frame_index"] for r in self.rows}

    @property
    def ids(self) -> set[int]:
        return {r["object_id"] for r in self.rows}

    def of(self, kind: str) -> list[dict[str, Any]]:
        found = [e for e in self.events if e["kind"] == kind]
        return [{**e, "detail": json.loads(e["detail"]) if e["detail"] else None} for e in found]

    def ledger(self) -> dict[str, Any]:
        return {
            "received": self.received,
            "tracked": self.tracked,
            "dropped": dict(sorted(self.sums("dropped").items())),
            "corrupt": dict(sorted(self.sums("corrupt").items())),
        }
