"""A real clip looped over RTSP for minutes with detection: memory stays flat, counts add up.

XMEM_SOAK_SECONDS says for how long; 600 by default.
"""

from __future__ import annotations

import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from support.live_books import Committed
from support.live_camera_hub import PATIENCE, REAL, hub_at, the_clip
from support.rtsp_camera import camera

from pipeline.analytics.query import query

SECONDS = float(os.environ.get("XMEM_SOAK_SECONDS", "600"))
WARM = min(180.0, 0.4 * SECONDS)  # until memory is full and everything has been done once
LONG = 300.0  # shorter runs are for trying the test out: they prove little
EVERY = 5.0
LATEST = 10.0  # seconds after its frame that a row must be found by a query
SIZE = 128  # of xmem-lite: small, so that a busy machine tracks some of the clip's 10 frames a second


def counted(exposition: str) -> dict[str, Any]:
    """The ledger from the Prometheus metrics."""
    book: dict[str, Any] = {"dropped": {}, "corrupt": {}}
    for line in exposition.splitlines():
        if found := re.fullmatch(r"xmem_frames_(\w+)\{([^}]*)\} (\S+)", line):
            name, value = found[1].removesuffix("_total"), int(float(found[3]))
            reason = re.search(r'reason="([^"]*)"', found[2])
            if reason is None:
                book[name] = value
            else:
                book[name][reason[1]] = value
    return book


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def as_time(value: str) -> datetime:
    return datetime.fromisoformat(value).astimezone(UTC)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
def test_people_are_followed_for_minutes_in_the_same_memory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    resident: list[tuple[float, int]] = []
    published: list[datetime] = []  # of rows that were seen in the API
    latest = 0.0
    seen: set[int] = set()
    with camera(the_clip(tmp_path)) as made, hub_at(out, tmp_path / "hub.log", SIZE) as hub:
        settings = {"expected_height": 576, "expected_width": 768, "max_objects": 8}
        added = {"stream_id": "square", "url": made.url(), "detector": "motion", "settings": settings}
        hub.call("add", added)
        begun = time.monotonic()
        while (elapsed := time.monotonic() - begun) < SECONDS:
            time.sleep(max(0.0, EVERY * (len(resident) + 1) - elapsed))
            resident.append((time.monotonic() - begun, hub.resident()))
            status = hub.call("status", "square")
            seen |= {o["id"] for o in status["objects"]}
            rows = hub.call("tracks", "square", None, 1)
            answer = query(
                str(out), "SELECT max(wall_time) AS newest, count(*) AS rows FROM tracks"
            ).to_pylist()
            now, newest = datetime.now(UTC), answer[0]["newest"]
            due = [t for t in published if (now - t).total_seconds() > LATEST]
            if due:
                assert newest is not None, "nothing is to be found"
                assert max(due) <= newest, f"a row of {max(due)} is not to be found at {now}"
            age = (now - newest).total_seconds() if newest is not None else -1.0
            latest = max(latest, age)
            if rows:
                published.append(as_time(rows[-1]["wall_time"]))
            ledger = status["ledger"]
            settled = ledger["tracked"] + sum(ledger["dropped"].values()) + sum(ledger["corrupt"].values())
            assert ledger["received"] == settled + ledger["in_flight"]
            say(
                f"{resident[-1][0]:6.1f} s {resident[-1][1] / 2**20:7.1f} MiB, got {ledger['received']}, "
                f"tracked {ledger['tracked']}, {ledger['dropped']}, objects {len(status['objects'])} "
                f"of {len(seen)}, {status['ms_per_frame'] or 0:.0f} ms, lag {status['lag_seconds']}, "
                f"{answer[0]['rows']} rows to be found, the newest {age:.1f} s old"
            )
        # The camera rests, so that all who count can be asked about the same frames.
        made.tell("pause")
        end = time.monotonic() + PATIENCE
        while True:
            before = hub.call("status", "square")["ledger"]
            time.sleep(1.0)
            book = hub.call("status", "square")["ledger"]
            if book == before and not book["in_flight"]:
                break
            assert time.monotonic() < end, book
        told = counted(hub.call("exposition"))
        last = hub.call("remove", "square", PATIENCE)
    committed = Committed(out, "square")
    assert book.pop("in_flight") == last["ledger"].pop("in_flight") == told.pop("in_flight") == 0
    assert committed.ledger() == last["ledger"] == book
    assert told == book
    found = committed.of("object_added")
    assert {e["reason"] for e in found} == {"detector"}
    assert committed.ids
    assert committed.ids <= {e["object_id"] for e in found}
    assert len(committed.of("restart")) == 0
    warm = [size for at, size in resident if at > WARM]
    third = max(1, len(warm) // 3)
    early, late = median(warm[:third]), median(warm[-third:])
    ratio = late / early
    say(
        f"{SECONDS:.0f} s, {'vtest.avi' if REAL.exists() else 'a made clip'} at {SIZE} px: {book}, "
        f"{len(found)} objects found, {len(committed.rows)} rows; "
        f"{early / 2**20:.1f} MiB after {WARM:.0f} s, {late / 2**20:.1f} MiB at the end ({ratio:.3f}), "
        f"at most {max(warm) / 2**20:.1f}; the newest row to be found was up to {latest:.1f} s old"
    )
    assert len(found) >= (5 if REAL.exists() else 1)
    assert ratio < (1.03 if SECONDS >= LONG else 1.3)
    assert max(warm) < (1.1 if SECONDS >= LONG else 1.5) * early
