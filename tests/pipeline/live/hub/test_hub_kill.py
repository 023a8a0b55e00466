"""Killed processes with live streams: objects, frame numbers and requests survive."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from support.forked import Forked
from support.live_books import Committed
from test_hub import PATIENCE, QUICK, mask_of, prompts

WORKER = Path(__file__).parents[3] / "support" / "live_hub_worker.py"


class Process:
    """A hub in a separate process."""

    def __init__(self, out: Path) -> None:
        self.process = Forked(WORKER, [str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=True)
        assert self.process.stdout.readline() == "ready\n"

    def call(self, *request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def until(self, what: Any, name: str = "cam") -> Any:
        end = time.monotonic() + PATIENCE
        while not what(status := self.call("status", name)):
            assert time.monotonic() < end, status
            time.sleep(0.02)
        return status

    def more(self, count: int, name: str = "cam") -> dict[str, Any]:
        goal = self.call("status", name)["ledger"]["tracked"] + count
        status: dict[str, Any] = self.until(lambda s: s["ledger"]["tracked"] >= goal, name)
        return status

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self._end()

    def _end(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def added(**more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"stream_id": "cam", "url": "fake://cam?fps=30", "prompts": prompts(1)}
    return values | {"settings": QUICK} | more


def test_killed_again_and_again(tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(4)
    seen: list[range] = []
    asked: list[int] = []
    for life in range(3):
        hub = Process(out)
        if life == 0:
            hub.call("add", added())
        start = hub.until(lambda s: s["next_frame"] and s["objects"])
        first = hub.call("tracks", "cam")[0]["frame_index"]
        assert {o["id"] for o in start["objects"]} >= {1}
        if life:
            hub.until(lambda s, ids=frozenset({1, *asked}): {o["id"] for o in s["objects"]} == ids)
            assert first >= seen[-1].stop, "a frame number that was seen is used again"
        if life < 2:
            # Acknowledged, and killed before much of it can have been kept elsewhere.
            answer = hub.call("request", "cam", {"prompts": {"objects": [mask_of(left=6 + 30 * life)]}})
            assert answer["ids"][0] not in {1, *asked}
            asked += answer["ids"]
        else:
            hub.more(chance.randrange(5, 40))
        newest = max(r["frame_index"] for r in hub.call("tracks", "cam"))
        seen.append(range(first, newest + 1))
        hub.kill()
    hub = Process(out)
    hub.more(5)
    last = hub.call("remove", "cam", PATIENCE)
    hub.close()
    committed = Committed(out, "cam")
    ledger = dict(last["ledger"])
    assert ledger.pop("in_flight") == 0
    assert committed.ledger() == ledger
    assert committed.ids == {1, *asked}
    restarts = committed.of("restart")
    # A life that ended before anything of it was committed has left nothing but its reserved numbers.
    assert 1 <= len(restarts) <= 3
    assert sum(e["detail"]["frames"] for e in restarts) == committed.sums("dropped")["restart"]
    assert all(e["detail"]["seconds"] > 0 for e in restarts if e["detail"]["seconds"] is not None)


def test_requests_that_were_acknowledged_are_done_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub = Process(out)
    hub.call("add", added(prompts=prompts(1, 2)))
    hub.until(lambda s: len(s["objects"]) == 2)
    hub.call("request", "cam", {"pause": True})
    assert hub.call("request", "cam", {"remove": [2]})["seq"] == 3
    assert hub.call("request", "cam", {"prompts": prompts(9)})["seq"] == 4
    hub.kill()
    hub = Process(out)
    hub.until(lambda s: s["state"] == "paused")
    assert hub.call("status", "cam")["requests"]["last"] == 4
    hub.call("request", "cam", {"pause": False})
    hub.until(lambda s: [o["id"] for o in s["objects"]] == [1, 9])
    hub.call("remove", "cam", PATIENCE)
    hub.close()
    assert [e["object_id"] for e in Committed(out, "cam").of("object_removed")] == [2]


def test_a_stream_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    hub = Process(tmp_path / "out")
    hub.call("add", added())
    hub.call("add", added(stream_id="other"))
    hub.call("remove", "cam")
    hub.kill()
    hub = Process(tmp_path / "out")
    assert [s["id"] for s in hub.call("list")] == ["other"]
    hub.close()


def test_what_a_detector_found_keeps_its_id_over_kills(tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: set[int] = set()
    url, settings = "fake://door?fps=40&scene=walk", {**QUICK, "max_objects": 2, "out_of_sight_frames": 60}
    for life in range(2):
        hub = Process(out)
        if not life:
            hub.call("add", added(url=url, prompts=None, detector="motion", settings=settings))
        hub.until(lambda s, known=frozenset(seen): {o["id"] for o in s["objects"]} - known)
        seen |= {o["id"] for o in hub.call("status", "cam")["objects"]}
        hub.more(10)
        hub.kill()
    hub = Process(out)
    hub.more(20)
    hub.call("remove", "cam", PATIENCE)
    hub.close()
    committed = Committed(out, "cam")
    assert len({e["object_id"] for e in committed.of("object_added")}) >= 1
