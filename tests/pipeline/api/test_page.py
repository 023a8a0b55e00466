"""The page in a real browser: lists the streams, and shows one live with its objects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
from support.browser import chromium, open_page
from support.live_standin import StandInHub, record
from support.local_hub import served_hub

from pipeline.api import app, clicking
from pipeline.api.guard import LOOPBACK_HOSTS
from pipeline.api.models import Clicks, Outline
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TokenSet
from pipeline.live.recent import event_json
from pipeline.live.spec import LiveSpec
from pipeline.zones.events import change_events
from pipeline.zones.results import Change, Crossing
from pipeline.zones.rows import Moment

TOKEN = "a-token-for-tests-0123456789"
HOSTILE = "<img src=x onerror=document.title='broken'>"

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium in the system: apt-get install chromium"),
    # uvicorn's own choice of a WebSocket library
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def hub() -> StandInHub:
    hub = StandInHub()
    for name, url in (("gate-3", "rtsp://root:hunter2@10.20.0.31/h264"), ("yard", "rtsp://10.20.0.32/h264")):
        asyncio.run(hub.add(LiveSpec(name, url, detector="motion")))
    hub.publish(
        "gate-3", record(0), record(0, 2, category=HOSTILE), record(0, 5, area=0, bbox=None, score=0.0)
    )
    return hub


@pytest.fixture
def address(hub: StandInHub) -> Iterator[str]:
    with served_hub(hub, ApiSettings(TokenSet([TOKEN]), hosts=LOOPBACK_HOSTS)) as found:
        yield found


def test_page(address: str, hub: StandInHub, tmp_path: Path) -> None:
    with open_page(tmp_path) as page:
        page.open(address)
        page.wait_for("!document.getElementById('login').hidden")
        page.wait_for("document.activeElement.id === 'token'")
        first = page.value("document.body.innerText")
        assert "ask" in first
        assert "--token-file" in first
        assert "not accepted" not in first
        page.screenshot(tmp_path / "login.png")
        page.value("document.getElementById('token').value = 'a-token-of-somewhere-else'")
        page.value("document.querySelector('#login button').click()")
        page.wait_for("document.body.innerText.includes('This token was not accepted')")
        page.screenshot(tmp_path / "rejected.png")
        rejected = page.value("document.body.innerText")
        for text in (first, rejected):  # what a person should do, not what a program should
            assert not any(word in text.lower() for word in ("header", "authorization", "bearer", "post "))
        assert page.value("sessionStorage.length") == 0
        time.sleep(2.5)  # longer than from one refresh to the next: nobody asks with a token that is wrong
        asked = list(page.errors)
        assert all("401" in text for text in asked), asked
        assert len(asked) == 2
        page.errors.clear()

        page.value(f"document.getElementById('token').value = '{TOKEN}'")
        page.value("document.querySelector('#login button').click()")
        page.wait_for("document.querySelectorAll('#streams li').length === 2")
        page.wait_for("document.querySelectorAll('#objects tr').length === 3")
        assert page.value("document.getElementById('login').hidden")
        assert page.value("document.getElementById('name').textContent") == "gate-3"
        page.wait_for("document.getElementById('picture').naturalWidth > 0")
        text = page.value("document.body.innerText")
        assert "5 (4 late, 1 queue full)" in text
        assert "rtsp://10.20.0.31/h264" in text
        assert "hunter2" not in text
        assert HOSTILE in text  # as text, and not as a picture
        # What can be used does not look disabled.
        colours = page.value(
            "['#name', 'tr.hidden-now button', '#category', '#target'].map("
            "each => getComputedStyle(document.querySelector(each)).color)"
        )
        assert len(set(colours)) == 1, colours

        hub.publish("gate-3", *(record(1, number) for number in (1, 2, 5, 9)))  # comes by the WebSocket
        page.wait_for("document.querySelectorAll('#objects tr').length === 4")
        page.screenshot(tmp_path / "page.png")
        at = Moment(1, 0.1, None)
        crossing = Crossing("kerb", 9, "person", "right_to_left", at, 30.0, 40.0, None, None)
        (crossed,) = change_events([Change("line_crossed", at, crossing)])
        hub.happened["gate-3"] = [event_json(crossed)]
        page.wait_for(
            "document.getElementById('events').innerText.includes('Object 9 crossed kerb to the left')"
        )

        page.value("document.getElementById('pause').click()")
        page.wait_for("document.getElementById('state').textContent === 'paused'")
        assert "gate-3" in hub.paused
        page.value("document.querySelectorAll('#streams button')[1].click()")
        page.wait_for("document.getElementById('name').textContent === 'yard'")
        assert page.value("document.title") == "xmem live"
        assert page.errors == []

    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture is not None
    assert picture.shape[1] >= 1000
    assert picture.std() > 5


def test_a_click_stays_with_its_stream(
    address: str, hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = clicking.outline

    def slow(jpeg: bytes, given: Clicks, segmenter: str | None) -> Outline:
        time.sleep(0.8)
        return quick(jpeg, given, segmenter)

    monkeypatch.setattr(app, "outline", slow)
    with open_page(tmp_path) as page:
        page.open(address)
        page.wait_for("!document.getElementById('login').hidden")
        page.value(f"document.getElementById('token').value = '{TOKEN}'")
        page.value("document.querySelector('#login button').click()")
        page.wait_for("document.getElementById('picture').naturalWidth > 0")
        page.wait_for("document.getElementById('frame').style.getPropertyValue('--aspect') !== ''")
        page.value("document.getElementById('tool-click').click()")
        page.value("document.getElementById('category').value = 'van'")
        x, y = page.value(
            "(({ left, top, width, height }) => [left + 0.28 * width, top + 0.5 * height])"
            "(document.getElementById('over').getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            page.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        page.value("document.querySelectorAll('#streams button')[1].click()")
        page.value("document.getElementById('category').value = 'of another stream'")
        page.wait_for("document.getElementById('name').textContent === 'yard'")
        page.wait_for("document.getElementById('notice').textContent === 'gate-3: The object is followed'")
    ((stream_id, content),) = hub.requests
    assert stream_id == "gate-3"
    assert content["prompts"]["objects"][0]["category"] == "van"


def test_layout_and_names(address: str, hub: StandInHub, tmp_path: Path) -> None:
    """Nothing is broken in the middle of a word or cut off on small screens, and every control has a name."""
    for number in range(4):
        name = f"loading-dock-north-entrance-{number}"
        asyncio.run(hub.add(LiveSpec(name, f"rtsp://10.20.1.{number}/h264", detector="motion")))
    one_line = (
        "[...document.querySelectorAll('.state, #streams strong, #streams .foot small, th, dd')].filter("
        "each => each.offsetHeight > 1.9 * parseFloat(getComputedStyle(each).fontSize) * 1.45)"
        ".map(each => each.outerHTML)"
    )
    with open_page(tmp_path, 1280, 720) as page:
        page.open(address)
        page.wait_for("!document.getElementById('login').hidden")
        assert page.unnamed() == []
        page.value(f"document.getElementById('token').value = '{TOKEN}'")
        page.value("document.querySelector('#login button').click()")
        page.wait_for("document.querySelectorAll('#objects tr').length === 3")
        page.wait_for("document.querySelectorAll('#streams li').length === 6")
        page.wait_for("document.getElementById('picture').naturalWidth > 0")
        for width, height in ((1280, 720), (1180, 820), (820, 1180), (390, 844)):
            page.do(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=width < 1280,
            )
            page.wait_for(f"window.innerWidth === {width}")
            assert page.value(one_line) == [], width
            assert page.value("document.documentElement.scrollWidth") <= width
            tops = page.value(
                "[...document.querySelectorAll('#streams canvas')].map("
                "each => each.getBoundingClientRect().top - each.closest('li').getBoundingClientRect().top)"
            )
            assert max(tops) - min(tops) < 1, width  # the pictures of a row are level
            stream, wall = (
                page.value(f"document.getElementById('{name}').getBoundingClientRect().top")
                for name in ("stream", "streams")
            )
            # The picture of 64 x 48 pixels takes the room there is.
            assert page.value("document.getElementById('picture').offsetWidth") > min(500, 0.8 * width)
            # The other streams are in sight, beside the large one or above it.
            assert abs(stream - wall) < 60 if width > 1000 else 100 < stream - wall < 300
        assert page.unnamed() == []
        page.value("document.getElementById('add').click()")
        page.wait_for("document.querySelectorAll('#adding [name=detector] option').length > 1")
        page.value("document.querySelector('#adding details').open = true")
        assert page.unnamed() == []
        page.screenshot(tmp_path / "layout.png")
