"""A real camera for an hour: as many objects are found as people come, and a user's box is always taken.

XMEM_SOAK_SECONDS says for how long; 3,600 by default. The hub has the defaults of `xmem serve`. A machine
that cannot track the clip's 10 frames a second drops the others; XMEM_SOAK_FPS tracks fewer on purpose.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

import pytest
from support.live_books import Committed
from support.live_camera_hub import PATIENCE, REAL, hub_at, the_clip
from support.rtsp_camera import camera

from jobs.evaluation.identities import read_truth

SECONDS = float(os.environ.get("XMEM_SOAK_SECONDS", "3600"))
TRUTH = Path("/work/shared/data/mot/PETS09-S2L1/gt-every10.csv")
CLIP_SECONDS = 79.5  # 795 frames, 10 a second
FPS = float(os.environ.get("XMEM_SOAK_FPS", "0"))
EVERY = 60.0  # seconds between two boxes of a user
STAYS = 20.0
BIN = [445.0, 222.0, 40.0, 55.0]  # x, y, width, height: the foot of the lamp post with its sign


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
@pytest.mark.skipif(not (REAL.exists() and TRUTH.exists()), reason="vtest.avi or its truth is not there")
def test_as_many_people_are_found_as_come_and_a_box_is_always_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    people = {i for boxes in read_truth(str(TRUTH)).values() for i in boxes}
    given: list[int] = []
    resident: list[int] = []
    with camera(the_clip(tmp_path)) as made, hub_at(out, tmp_path / "hub.log") as hub:
        settings = {"expected_height": 576, "expected_width": 768, **({"fps": FPS} if FPS else {})}
        hub.call(
            "add", {"stream_id": "square", "url": made.url(), "detector": "people", "settings": settings}
        )
        while not hub.call("status", "square")["ledger"]["tracked"]:
            time.sleep(0.5)
        begun = time.monotonic()
        while (elapsed := time.monotonic() - begun) < SECONDS:
            time.sleep(max(0.0, EVERY * (len(given) + 0.5) - elapsed))
            before = hub.call("status", "square")
            answer = hub.call(
                "request", "square", {"prompts": {"objects": [{"category": "post", "box": BIN}]}}
            )
            (post,) = answer["ids"]
            given.append(post)
            time.sleep(STAYS)
            status = hub.call("status", "square")
            ledger = status["ledger"]
            resident.append(hub.resident())
            say(
                f"{time.monotonic() - begun:6.0f} s, {resident[-1] / 2**20:.0f} MiB, "
                f"received {ledger['received']}, tracked {ledger['tracked']}, "
                f"objects before the box {len(before['objects'])}, "
                f"after {[o['id'] for o in status['objects']]}, lag {status['lag_seconds']}"
            )
            assert post in {o["id"] for o in status["objects"]}
            hub.call("request", "square", {"remove": [post]})
        made.tell("pause")
        last = hub.call("remove", "square", PATIENCE)
        seconds = time.monotonic() - begun
    committed = Committed(out, "square")
    assert committed.ledger() == {k: v for k, v in last["ledger"].items() if k != "in_flight"}
    added = committed.of("object_added")
    assert {e["object_id"] for e in added if e["reason"] == "prompt"} == set(given)
    assert set(given) <= committed.ids
    found = sum(e["reason"] == "detector" for e in added)
    due = len(people) / CLIP_SECONDS * seconds
    third = max(1, len(resident) // 3)
    ratio = median(resident[-third:]) / median(resident[third : 2 * third] or resident)
    say(
        f"{seconds:.0f} s: {last['ledger']}; {found} objects found, {due:.0f} people came "
        f"({found / due:.2f}); {len(given)} boxes of the user taken; "
        f"last third over second third, resident: {ratio:.3f}"
    )
    assert ratio < 1.1
    assert 0.8 <= found / due <= 1.2
