"""A busy street: the detector has reached the limit of objects, and a user prompts another one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from starlette.testclient import TestClient
from support.live_books import Committed
from support.live_scripted import ScriptedFeed

from pipeline.api.app import create_app
from pipeline.api.service import ApiSettings
from pipeline.live.camera.ledger import Ledger
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.live.spec import LiveSpec
from pipeline.tracking.settings import TrackSettings
from xmem_core import load_model
from xmem_core.config import MemoryConfig
from xmem_core.segmenter import VideoSegmenter

pytestmark = pytest.mark.usefixtures("one_thread")

README = Path(__file__).parents[3] / "README.md"
SIZE = (368, 456)
COLOURS = [[250 * (k >> bit & 1) for bit in range(3)] for k in range(8)]
VISIBLE, GONE, LATER = 38, 50, 60


def street(index: int) -> np.ndarray:
    """Eight objects appear at frame 15, walk to the right, and vanish at frame 42."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(100, 140, (23, 29, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)).copy()
    if 15 <= index < 42:
        for k in range(8):
            top, left = 6 + 45 * k, 30 + 40 * (k % 3) + 5 * (index - 15)
            image[top : top + 32, left : left + 32] = COLOURS[k]
    return image


class Awaited:
    """A hub's methods for the API, which awaits them."""

    def __init__(self, hub: LiveHub) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        async def answer(*arguments: Any) -> Any:
            return getattr(self._hub, name)(*arguments)

        return answer


def readme_change() -> Any:
    """The body of the README's PATCH with prompts."""
    (body,) = re.findall(r"""-X PATCH \$U/street -d '(\{"prompts".*\})'""", README.read_text())
    return json.loads(body)


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return found


def test_a_users_box_is_taken_where_detected_objects_hold_every_place(tmp_path: Path) -> None:
    feeds: list[ScriptedFeed] = []

    def opened(spec: LiveSpec, ledger: Ledger) -> ScriptedFeed:
        feeds.append(ScriptedFeed(spec, ledger, street))
        return feeds[-1]

    settings = HubSettings(
        str(tmp_path / "out"),
        tracking=TrackSettings.of(size=96, threads=1),
        calibrate=False,
        secrets=str(tmp_path / "secrets"),
    )
    segmenter = VideoSegmenter(load_model("xmem-lite"), MemoryConfig(), size=96)
    hub = LiveHub(settings, segmenter=segmenter, open_feed=opened)
    api = ApiSettings(None, ("10.20.0.0/16",))
    with TestClient(create_app(Awaited(hub), api, resolver=lambda host, port: ["10.20.0.31"])) as client:
        new = {"id": "street", "url": "rtsp://10.20.0.31:8554/street", "detector": "motion"}
        assert client.post("/v1/streams", json=new).status_code == 201

        def shown(frames: int) -> list[int]:
            """Let the camera show this number of frames; returns the objects tracked then."""
            until(lambda: feeds)[0].allowed = frames
            until(lambda: hub.status("street")["ledger"]["tracked"] == frames)
            return [o["id"] for o in hub.status("street")["objects"]]

        def ask() -> list[int]:
            answer = client.patch("/v1/streams/street", json=readme_change())
            assert answer.status_code == 200, answer.text
            return shown(feeds[0].allowed + 1)

        detected = shown(VISIBLE)
        assert len(detected) == 8
        # All of them are visible: the newest one gives way.
        assert detected[-1] not in (objects := ask())
        assert len(objects) == 8
        shown(GONE)
        shown(LATER)
        for _ in range(4):
            objects = ask()
            assert len(objects) == 8
        hub.remove("street", wait=60)
    hub.close()
    committed = Committed(tmp_path / "out", "street")
    bags = [e["object_id"] for e in committed.of("object_added") if e["reason"] == "prompt"]
    assert len(bags) == 5
    assert set(bags) <= set(objects)
    gone = [e for e in committed.of("object_removed") if e["reason"] == "made_room"]
    assert [e["detail"]["for"] for e in gone] == [[bag] for bag in bags]
    unseen = [e["detail"]["unseen_frames"] for e in gone]
    assert unseen[0] == 0
    assert all(frames >= LATER - GONE for frames in unseen[1:])
    assert {e["object_id"] for e in gone} <= set(detected)
