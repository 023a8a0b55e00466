"""The dashboard in a real browser, with a real hub and a real RTSP camera: what is drawn becomes rows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.annotating import until
from support.browser import Page, chromium, open_page
from support.live_books import Committed
from support.live_reader import options
from support.local_hub import LocalHub, served_hub
from support.rtsp_camera import camera
from support.small_net import SMALL_MEMORY
from support.videos import make_video, scene, shapes

from pipeline.api.guard import LOOPBACK_HOSTS
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TokenSet
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.live.spec import LiveSettings
from pipeline.tracking.settings import TrackSettings
from xmem_core import VideoSegmenter, load_model

TOKEN = "a-token-for-tests-0123456789"
WIDTH, HEIGHT = 160, 120
SCENE = 30
"""The picture of `scene` that the camera shows: its shapes are apart, and stay where they are. So do the
objects, however many frames a busy machine drops."""
SIZE = 96
SOCKETS = """
    window.sockets = [];
    WebSocket = class extends WebSocket { constructor(...how) { super(...how); sockets.push(this); } };
"""
HOSTILE = "<img src=x onerror=document.title='broken'>"

pytestmark = [
    pytest.mark.rtsp,
    pytest.mark.skipif(chromium() is None, reason="no Chromium in the system: apt-get install chromium"),
    # uvicorn's own choice of a WebSocket library
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Hand:
    """Mouse and forms of the dashboard; positions are pixels of the camera's frames."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def press(self, selector: str) -> None:
        self.page.value(f"document.querySelector({selector!r}).click()")

    def fill(self, selector: str, text: str) -> None:
        self.page.value(
            f"(field => {{ field.value = {text!r}; field.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({selector!r}))"
        )

    def text(self, selector: str) -> str:
        return str(self.page.value(f"document.querySelector({selector!r}).innerText"))

    def mouse(self, kind: str, x: float, y: float) -> None:
        box = self.page.value(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('over').getBoundingClientRect())"
        )
        self.page.do(
            "Input.dispatchMouseEvent",
            type=kind,
            x=box[0] + x * box[2] / WIDTH,
            y=box[1] + y * box[3] / HEIGHT,
            button="left",
            clickCount=1,
            buttons=0 if kind == "mouseReleased" else 1,
        )

    def tap(self, *way: tuple[float, float]) -> None:
        """A finger goes down at the first place, and up at the last one."""
        box = self.page.value(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('over').getBoundingClientRect())"
        )
        for number, (x, y) in enumerate(way):
            place = {"x": box[0] + x * box[2] / WIDTH, "y": box[1] + y * box[3] / HEIGHT, "id": 0}
            kind = "touchMove" if number else "touchStart"
            self.page.do("Input.dispatchTouchEvent", type=kind, touchPoints=[place])
        self.page.do("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drag(self, *way: tuple[float, float]) -> None:
        self.mouse("mousePressed", *way[0])
        for point in way[1:]:
            self.mouse("mouseMoved", *point)
        self.mouse("mouseReleased", *way[-1])

    def key(self, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            self.page.do("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    def says(self, text: str) -> None:
        self.page.wait_for(f"document.getElementById('notice').textContent.includes({text!r})")


def test_point_name_draw_zones_and_remove(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", [scene(SCENE, WIDTH, HEIGHT)] * 50, gop=10)
    at = shapes(SCENE, WIDTH, HEIGHT)
    (left, top), side = at["square"], HEIGHT // 5
    settings = HubSettings(
        str(tmp_path / "out"),
        tracking=TrackSettings.of(memory=SMALL_MEMORY, size=SIZE, threads=1),
        options=options(),
        calibrate=False,
        secrets=str(tmp_path / "secrets"),
    )
    # Trained weights: with others, masks do not stay on their objects.
    segmenter = VideoSegmenter(load_model("xmem-lite"), SMALL_MEMORY, size=SIZE)
    with camera(clip) as made, LiveHub(settings, segmenter=segmenter) as hub:
        api = ApiSettings(
            TokenSet([TOKEN]),
            ("127.0.0.0/8",),
            ports=(made.port,),
            hosts=LOOPBACK_HOSTS,
            streams=LiveSettings.from_dict({"rotate_seconds": 0.3}),
        )
        with served_hub(LocalHub(hub), api) as address, open_page(tmp_path) as page:
            hand = Hand(page)

            def in_force(name: str) -> None:
                """Wait until the page shows a count of the zone or line: a frame was tracked with it.

                Changes that come between two tracked frames would be one `zones_changed`.
                """
                counted = f"/{name} \\d+ (inside|to the right)/"
                page.wait_for(f"{counted}.test(document.querySelector('#zones').innerText)")

            page.do("Page.addScriptToEvaluateOnNewDocument", source=SOCKETS)
            page.open(address)
            page.wait_for("!document.getElementById('login').hidden")
            hand.fill("#token", TOKEN)
            hand.press("#login button")
            page.wait_for("!document.getElementById('none').hidden")
            page.errors.clear()  # the refusal of the first request, without a token

            # What the guard refuses is told where it was typed.
            hand.press("#add")
            page.wait_for("document.querySelectorAll('#adding [name=detector] option').length > 2")
            assert f"127.0.0.0/8, on port {made.port}" in hand.text("#allowed")
            for url, said in (
                ("http://camera/", "must begin with rtsp://"),
                ("rtsp://root:hunter2@10.1.2.3/live", "10.1.2.3 is not in a network"),
            ):
                hand.fill("#adding [name=url]", url)
                hand.press("#add-send")
                page.wait_for(f"document.getElementById('add-problem').textContent.includes({said!r})")
            assert "hunter2" not in hand.text("#add-problem")
            page.screenshot(tmp_path / "refused.png")
            assert all("422" in text for text in page.errors), page.errors
            page.errors.clear()
            hand.fill("#adding [name=url]", made.url())
            hand.fill("#adding [name=name]", "yard")
            hand.fill("#adding [name=detector]", "")
            hand.press("#add-send")
            page.wait_for("document.querySelector('#state').textContent === 'running'")
            page.wait_for("document.getElementById('picture').naturalWidth > 0")
            page.wait_for("document.querySelector('#adding [name=url]').value === ''")
            hand.says("yard is followed")  # still there when its picture is
            page.errors.clear()  # there was no picture yet

            # A box, a click, a name.
            hand.press("#tool-box")
            hand.fill("#category", "square")
            hand.drag((left - 4, top - 4), (left + side + 4, top + side + 4))
            page.wait_for("document.querySelectorAll('#objects tr').length === 1")
            hand.fill("#category", HOSTILE)
            hand.key("c")
            hand.drag(at["disc"])
            page.wait_for("document.querySelectorAll('#objects tr').length === 2")
            (first, second) = hub.status("yard")["objects"]
            assert (first["category"], second["category"]) == ("square", HOSTILE)
            hand.fill("#objects tr:nth-child(2) input", "spot")
            page.wait_for("document.querySelector('#streams .counts').textContent.includes('spot')")
            named = f"Object {second['id']} named spot"
            page.wait_for(f"document.querySelector('#events').innerText.includes({named!r})")

            hand.fill("#category", "")
            hand.press(f"[aria-label='Correct object {first['id']}']")
            hand.drag((left - 6, top - 2), (left + side + 2, top + side + 6))
            hand.says(f"Object {first['id']} is corrected")
            connections = page.value("sockets.length")
            page.value("sockets.at(-1).close()")  # a connection that breaks takes no message away
            page.wait_for(f"sockets.length > {connections} && sockets.at(-1).readyState === WebSocket.OPEN")
            hand.says(f"Object {first['id']} is corrected")

            # Zones and lines.
            hand.key("z")
            hand.fill("#zone-name", "door")
            for corner in ((10, 10), (150, 10), (150, 70), (10, 70)):
                hand.drag(corner)
            hand.key("Enter")
            page.wait_for("document.querySelector('#zones li')?.innerText.includes('door')")
            page.wait_for("document.querySelector('#zones').innerText.includes('1 inside')")
            hand.key("l")
            hand.drag((80, 5), (80, 115))
            in_force("line 1")
            assert [zone["name"] for zone in hub.status("yard")["zones_file"]["zones"]] == ["door"]
            page.screenshot(tmp_path / "dashboard.png")

            # With a finger, which has no Enter key; and with keys only.
            page.do("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=1)
            page.wait_for("matchMedia('(pointer: coarse)').matches")  # the controls are larger then
            hand.press("#tool-zone")
            hand.fill("#zone-name", "pad")
            above = page.value("document.getElementById('over').getBoundingClientRect().top")
            for corner in ((20, 20), (60, 20), (60, 60)):
                hand.tap(corner)
            assert page.value("document.getElementById('over').getBoundingClientRect().top") == above
            page.screenshot(tmp_path / "corners.png")
            assert hub.status("yard")["zones_file"]["zones"][-1]["name"] == "door"
            hand.press("#zone-close")
            in_force("pad")
            hand.press("#tool-line")
            hand.fill("#zone-name", "kerb")
            hand.tap((20, 100), (60, 100), (140, 100))
            in_force("kerb")
            page.do("Emulation.setTouchEmulationEnabled", enabled=False)
            hand.key("z")
            page.value("document.getElementById('over').focus()")
            for key in ("", "ArrowRight", "ArrowDown"):
                for _ in range(3 if key else 0):
                    hand.key(key, modifiers=8)
                hand.key(" ")
            hand.key("Enter")
            in_force("zone 1")
            zones, lines = (hub.status("yard")["zones_file"][kind] for kind in ("zones", "lines"))
            corners = {zone["name"]: zone["polygon"] for zone in zones}
            assert np.abs(np.array(corners["pad"]) - [(20, 20), (60, 20), (60, 60)]).max() <= 1
            assert np.abs(np.array(corners["zone 1"]) - [(80, 60), (110, 60), (110, 90)]).max() <= 1
            kerb = next(line for line in lines if line["name"] == "kerb")
            assert np.abs(np.array([kerb["from"], kerb["to"]]) - [(20, 100), (140, 100)]).max() <= 1
            hand.key("?", modifiers=8)
            page.wait_for("document.getElementById('keys').open")
            page.value("document.getElementById('keys').close()")
            hand.press("[aria-label='Remove door']")
            page.wait_for("!document.querySelector('#zones').innerText.includes('door')")
            until(lambda: "door" not in [zone["name"] for zone in hub.status("yard")["zones"]["zones"]])

            hand.key("v")
            hand.press(f"[aria-label='Remove object {first['id']}']")
            page.wait_for("document.querySelectorAll('#objects tr').length === 1")
            page.do(
                "Emulation.setDeviceMetricsOverride", width=820, height=1180, deviceScaleFactor=1, mobile=True
            )
            page.do(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
            )
            page.wait_for("document.documentElement.scrollWidth <= 820")
            page.screenshot(tmp_path / "tablet.png")
            assert page.errors == []  # once it is removed, a picture of it may still be asked for
            hand.press("#remove")
            hand.press("#removing button[value=yes]")
            page.wait_for("document.querySelectorAll('#streams li').length === 0")
            assert page.value("document.title") == "xmem live"
    committed = Committed(tmp_path / "out", "yard")
    assert committed.ids == {first["id"], second["id"]}
    drawn = [row for row in committed.rows if row["object_id"] == first["id"]]
    assert drawn[0]["category"] == "square"
    middles = np.array([(row["centroid_x"], row["centroid_y"]) for row in drawn])
    assert np.abs(middles - [left + side / 2, top + side / 2]).max() < 4
    assert first["id"] in [event["object_id"] for event in committed.of("corrected")]
    assert [row["category"] for row in committed.rows if row["object_id"] == second["id"]][-1] == "spot"
    assert [event["object_id"] for event in committed.of("object_removed")] == [first["id"]]
    assert len(committed.of("zones_changed")) == 6
    assert cv2.imread(str(tmp_path / "dashboard.png")) is not None
    if folder := os.environ.get("XMEM_SCREENSHOTS"):
        for shot in ("refused", "dashboard", "tablet"):
            shutil.copy(tmp_path / f"{shot}.png", Path(folder) / f"live-{shot}.png")
